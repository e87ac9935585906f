"""The admin address answers mistakes in JSON, naming what was sent and what it takes."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from proxyd.clock import FakeClock
from proxyd.log import Log
from proxyd.shm.region import Region
from proxyd.shm.revocations import Revocation
from proxyd.store.revocations import RevocationFile
from proxyd.web.admin import AdminContext, make_admin_app


def asked(
    folder: Path, method: str, path: str, body: object = None
) -> tuple[int, dict[str, str], str, list[Revocation]]:
    """Status, headers, the error's message, and what was revoked."""
    revoked: list[Revocation] = []

    def revoke(entry: Revocation) -> int:
        revoked.append(entry)
        return len(revoked)

    context = AdminContext(
        region=Region.create(3, 0.0),
        clock=FakeClock(wall=1000.0),
        log=Log(level="error", format="json", access="off", process="test"),
        percentiles=[0.5],
        revoke=revoke,
        kept=RevocationFile(str(folder)),
        leeway_s=5.0,
        is_node=lambda: True,
    )

    async def ask() -> tuple[int, dict[str, str], str]:
        async with TestClient(TestServer(make_admin_app(context))) as client:
            answer = await client.request(method, path, data=None if body is None else json.dumps(body))
            document = json.loads(await answer.read())
            assert answer.content_type == "application/json"
            return answer.status, dict(answer.headers), document.get("error", {}).get("message", "")

    return (*asyncio.run(ask()), revoked)


@pytest.mark.parametrize(
    "body, says",
    [
        ({"user": "bob"}, 'user is not a user\'s number: "bob"; it is the number of the claim sub'),
        ({"user": -1}, "user is not a user's number: -1;"),
        ({"tenant": 7}, "tenant is not a tenant's name: 7;"),
        ({"jti": "x" * 999}, "jti is not a token's id: \"" + "x" * 63 + "...;"),
        ({"user": 1, "exp": 900}, "seconds since 1970: 900"),
        ({"name": "bob"}, "Give one of user, tenant and jti"),
    ],
)
def test_a_revocation_that_names_nobody_is_told_its_value(tmp_path: Path, body: object, says: str) -> None:
    status, _, message, revoked = asked(tmp_path, "POST", "/sessions/revoke", body)
    assert status == 400
    assert says in message
    assert revoked == []


def test_a_good_revocation_is_published(tmp_path: Path) -> None:
    status, _, _, revoked = asked(tmp_path, "POST", "/sessions/revoke", {"user": 42})
    assert status == 200
    assert [(entry.value, entry.until) for entry in revoked] == [("42", math.inf)]


@pytest.mark.parametrize("path", ["/", "/healthz", "/session/revoke"])
def test_an_unknown_path_is_told_the_three_routes(tmp_path: Path, path: str) -> None:
    status, _, message, _ = asked(tmp_path, "GET", path)
    assert status == 404
    assert f"nothing at {path};" in message
    for route in ("/metrics", "/status", "/sessions/revoke"):
        assert route in message


def test_a_wrong_method_is_told_the_right_one(tmp_path: Path) -> None:
    status, headers, message, _ = asked(tmp_path, "GET", "/sessions/revoke")
    assert (status, headers["Allow"]) == (405, "POST")
    assert "POST /sessions/revoke" in message


def test_a_body_that_is_too_large_is_told_so(tmp_path: Path) -> None:
    status, _, message, _ = asked(tmp_path, "POST", "/sessions/revoke", {"jti": "x" * 20_000})
    assert status == 413
    assert "16384 bytes" in message

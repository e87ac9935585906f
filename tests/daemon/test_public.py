"""What clients of the public address and readers of the admin address rely on: probes, models, CORS, keys, names."""

from __future__ import annotations

import base64
import http.client
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jose import jwt

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    SECRET,
    USAGE,
    Daemon,
    Reply,
    Script,
    Upstream,
    ask,
    chat_chunk,
    model_text,
    node,
    request_bytes,
    wait_for,
)

Make = Callable[[Script], Upstream]

PAGE, STRANGER = "https://app.example.com", "https://evil.example"

# The contract's section 8, with labels; the contract is a document of the founders, so its list is repeated here.
CONTRACT_METRICS = """
proxyd_requests_total{route,status} proxyd_streams_active{tenant} proxyd_events_relayed_total proxyd_bytes_relayed_total
proxyd_time_to_first_event_seconds proxyd_relay_lag_seconds proxyd_task_ack_seconds proxyd_queue_depth{tenant}
proxyd_backpressure_events_total{kind} proxyd_client_aborts_total proxyd_upstream_connections{upstream,state}
proxyd_upstream_connects_total{upstream} proxyd_upstream_reuse_ratio{upstream}
proxyd_upstream_errors_total{upstream,kind} proxyd_breaker_state{upstream} proxyd_tokens_total{kind,model}
proxyd_telemetry_rows_total{state}
proxyd_telemetry_lag_seconds proxyd_telemetry_spool_bytes proxyd_worker_restarts_total proxyd_loop_lag_seconds
proxyd_sockets_time_wait
"""
# What the contract asks for without a name: how a quota was decided.
OUR_METRICS = """
proxyd_quota_decisions_total{basis} proxyd_alert_active{alert} proxyd_last_reload_successful{kind}
proxyd_telemetry_spool_used_ratio proxyd_telemetry_store_failing proxyd_egress_ports_used{upstream}
proxyd_egress_ports_limit{upstream} proxyd_egress_ports_out_total{upstream}
proxyd_upstream_keepalive_refused_total{upstream}
"""


def options(daemon: Daemon, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    try:
        connection.request("OPTIONS", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def post(daemon: Daemon, token: str | None, **headers: str) -> Reply:
    sock = daemon.connect()
    sock.sendall(request_bytes("/v1/chat/completions", CHAT, token, **headers))
    return Reply(sock)


# -- probes and models -------------------------------------------------------------------------------------------------


def test_probes_and_models_are_answered(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    models = model_text("fast", 1, '["openai"]') + model_text("slow", 2, '["openai"]', 'upstream_model = "hidden"')
    with node(tmp_path, up, models=models) as daemon:
        assert daemon.get("/healthz")[0] == 200
        assert daemon.get("/readyz")[0] == 200
        assert daemon.get("/v1/models")[0] == 401
        code, body = daemon.get("/v1/models", Authorization=f"Bearer {daemon.token()}")
        document = json.loads(body)
        assert (code, document["object"]) == (200, "list")
        assert [(entry["id"], entry["object"]) for entry in document["data"]] == [("fast", "model"), ("slow", "model")]
        assert b"hidden" not in body
        assert daemon.get("/")[0] == 404  # the page is off by default
        assert daemon.get("/v1/nothing")[0] == 404


def test_readyz_says_why_it_is_not_ready(upstream: Make, tmp_path: Path) -> None:
    import os
    import signal

    up = upstream(lambda wire: (wire.stream(chat_chunk("a"), end=False), wire.wait_closed()))
    with node(tmp_path, up, server='drain_timeout = "2s"') as daemon:
        live = ask(daemon, "/v1/chat/completions", CHAT)
        next(live.pieces())
        kept = daemon.connect()
        kept.sendall(b"GET /readyz HTTP/1.1\r\n")  # begun: the drain waits for it
        wait_for(lambda: '"streams":1' in json.dumps(json.loads(daemon.admin("/status")[1])).replace(" ", ""))
        os.kill(daemon.process.pid, signal.SIGTERM)  # type: ignore[union-attr]
        wait_for(lambda: '"draining"' in daemon.log())
        time.sleep(0.2)
        kept.sendall(b"Host: t\r\n\r\n")
        reply = Reply(kept)
        assert reply.status == 503
        assert b"draining" in reply.body()


# -- CORS --------------------------------------------------------------------------------------------------------------


def test_an_allowed_page_gets_its_preflight_and_may_use_the_cookie(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, auth=f'allowed_origins = ["{PAGE}"]') as daemon:
        asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type, x-a"}
        code, headers = options(daemon, "/v1/chat/completions", Origin=PAGE, **asked)
        assert code == 204
        assert headers["access-control-allow-origin"] == PAGE
        assert headers["access-control-allow-credentials"] == "true"
        assert "POST" in headers["access-control-allow-methods"]
        assert "content-type" in headers["access-control-allow-headers"]
        assert "Origin" in headers["vary"]
        code, headers = options(daemon, "/v1/chat/completions", Origin=STRANGER, **asked)
        assert code == 403
        assert "access-control-allow-origin" not in headers
        cookie = f"ai_session_jwt={daemon.token()}"
        reply = post(daemon, None, Cookie=cookie, Origin=PAGE)
        assert reply.status == 200
        assert reply.header("access-control-allow-origin") == PAGE
        assert reply.header("access-control-allow-credentials") == "true"
        assert reply.body() == DONE
        # A page may read its refusals, too.
        refused = post(daemon, None, Origin=PAGE)
        assert (refused.status, refused.header("access-control-allow-origin")) == (401, PAGE)
        stranger = post(daemon, None, Cookie=cookie, Origin=STRANGER)
        assert (stranger.status, stranger.header("access-control-allow-origin")) == (403, None)
        own = post(daemon, None, Cookie=cookie, Origin="http://test")
        assert own.status == 200
        bearer = post(daemon, daemon.token(), Origin=STRANGER)
        assert (bearer.status, bearer.header("access-control-allow-origin")) == (200, None)
        daemon.wait_rows(3)


def get(daemon: Daemon, path: str, method: str = "GET", **headers: str) -> Reply:
    """One request without a body on a connection of its own."""
    sock = daemon.connect()
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    return Reply(sock)


def test_an_allowed_page_may_ask_for_the_models_with_cookie_or_token_and_read_every_error(
    upstream: Make, tmp_path: Path
) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, auth=f'allowed_origins = ["{PAGE}"]') as daemon:
        asked = {"Access_Control_Request_Method": "GET", "Access_Control_Request_Headers": "authorization"}
        code, headers = options(daemon, "/v1/models", Origin=PAGE, **asked)
        assert code == 204
        assert headers["access-control-allow-origin"] == PAGE
        assert headers["access-control-allow-credentials"] == "true"
        assert "GET" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"] == "authorization"
        assert len(headers["x-proxyd-request-id"]) == 32
        refused = get(daemon, "/v1/models", "OPTIONS", Origin=STRANGER, **asked)
        assert (refused.status, refused.header("access-control-allow-origin")) == (403, None)
        assert [value for name, value in refused.headers if name == "vary"] == ["Origin"]
        cookie = f"ai_session_jwt={daemon.token()}"
        for extra, path, method, status in (
            ({"Cookie": cookie}, "/v1/models", "GET", 200),
            ({"Authorization": f"Bearer {daemon.token()}"}, "/v1/models", "GET", 200),
            ({}, "/v1/models", "GET", 401),
            ({"Authorization": "Bearer wrong"}, "/v1/models", "GET", 403),
            ({"Cookie": cookie}, "/v1/models", "DELETE", 405),
            ({}, "/nowhere", "GET", 404),
            ({}, "/healthz", "OPTIONS", 405),
        ):
            reply = get(daemon, path, method, Origin=PAGE, **extra)
            assert (reply.status, reply.header("access-control-allow-origin")) == (status, PAGE), (path, method)
            assert reply.header("access-control-allow-credentials") == "true"
            stranger = get(daemon, path, method, Origin=STRANGER, **extra)
            assert stranger.header("access-control-allow-origin") is None
            assert stranger.header("vary") == "Origin"
        assert get(daemon, "/v1/models", Cookie=cookie, Origin=STRANGER).status == 403
        assert get(daemon, "/v1/models", "DELETE").header("allow") == "GET, HEAD, OPTIONS"


# -- keys --------------------------------------------------------------------------------------------------------------


def test_auth_off_on_loopback_serves_anybody_but_no_foreign_page(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, auth='mode = "off"') as daemon:
        assert post(daemon, None).body() == DONE
        assert post(daemon, "whatever").status == 200
        assert post(daemon, None, Origin=STRANGER).status == 403
        assert daemon.get("/v1/models")[0] == 200
        daemon.wait_rows(2)


def _b64(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()


def _pem(key: Any) -> str:
    form = serialization.PrivateFormat.PKCS8
    return str(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode())


def test_rs256_and_es256_tokens_are_checked_with_the_key_set(upstream: Make, tmp_path: Path) -> None:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ec_key, foreign = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    numbers, point = rsa_key.public_key().public_numbers(), ec_key.public_key().public_numbers()
    coordinates = [base64.urlsafe_b64encode(n.to_bytes(32, "big")).rstrip(b"=").decode() for n in (point.x, point.y)]
    keys = [
        {"kty": "RSA", "kid": "r", "alg": "RS256", "use": "sig", "n": _b64(numbers.n), "e": _b64(numbers.e)},
        {
            "kty": "EC",
            "kid": "e",
            "alg": "ES256",
            "use": "sig",
            "crv": "P-256",
            "x": coordinates[0],
            "y": coordinates[1],
        },
    ]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
    up = upstream(lambda wire: wire.stream(DONE))
    auth = f'algorithms = ["RS256", "ES256"]\nsecret_file = ""\njwks_file = "{tmp_path}/jwks.json"'
    claims = {"sub": "9", "exp": int(time.time()) + 600, "iat": int(time.time())}
    with node(tmp_path, up, auth=auth) as daemon:
        for key, algorithm, kid, status in (
            (_pem(rsa_key), "RS256", "r", 200),
            (_pem(ec_key), "ES256", "e", 200),
            (_pem(foreign), "ES256", "e", 403),
            (_pem(rsa_key), "RS256", "e", 403),
            (SECRET, "HS256", "r", 403),
            (json.dumps(keys[0]["n"]), "HS256", "r", 403),
        ):
            token = jwt.encode(claims, key, algorithm, headers={"kid": kid})
            assert post(daemon, token).status == status, (algorithm, kid)
        assert {row["user_id"] for row in daemon.wait_rows(2)} == {9}


# -- the admin address -------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(upstream: Make, tmp_path: Path):
    """A node that has answered each way once: whole, refused, failed, cut."""
    import contextlib

    def script(wire: Any) -> bool | None:
        match wire.seen.json["model"]:
            case "broken":
                wire.stream(chat_chunk("a"), end=False)
                return False
            case "cut":
                wire.stream(chat_chunk("a"), end=False)
                wire.wait_closed()
            case _:
                wire.stream(chat_chunk("a"), FINISH, USAGE, DONE)
        return None

    with node(tmp_path, upstream(script), server="workers = 2") as daemon:
        for model in ("whole", "broken", "whole"):
            ask(daemon, "/v1/chat/completions", {**CHAT, "model": model}).body()
        cut = ask(daemon, "/v1/chat/completions", {**CHAT, "model": "cut"})
        next(cut.pieces())
        cut.sock.close()
        post(daemon, None)
        with contextlib.suppress(OSError):
            daemon.get("/nowhere")
        daemon.wait_rows(4)
        yield daemon


def test_every_metric_is_known_and_every_metric_of_the_contract_is_there(busy: Daemon) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    contract = {}
    for name, _, labels in (entry.partition("{") for entry in (CONTRACT_METRICS + OUR_METRICS).split()):
        contract[name] = set(filter(None, labels.rstrip("}").split(",")))
    found: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for family in text_string_to_metric_families(busy.admin("/metrics")[1].decode()):
        name = family.name + "_total" if family.type == "counter" else family.name
        kinds[name] = family.type
        found[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    assert found.keys() == contract.keys()
    for name, labels in found.items():
        assert labels in (contract[name], set()), name
        assert (kinds[name] == "histogram") == name.endswith("_seconds"), name
        assert (kinds[name] == "counter") == name.endswith("_total"), name
    for name in (
        "requests_total",
        "events_relayed_total",
        "tokens_total",
        "client_aborts_total",
        "loop_lag_seconds_count",
    ):
        assert busy.metric(f"proxyd_{name}") > 0, name
    assert busy.metric("proxyd_tokens_total", kind="prompt") >= 22
    assert busy.metric("proxyd_telemetry_rows_total") == 4
    assert busy.metric("proxyd_streams_active") == 0


def test_the_status_document_tells_the_whole_node(busy: Daemon) -> None:
    code, body = busy.admin("/status")
    assert code == 200
    status = json.loads(body)
    assert busy.process is not None
    assert (status["state"], status["pid"]) == ("ready", busy.process.pid)
    assert status["uptime_s"] > 0
    assert [worker["slot"] for worker in status["workers"]] == [0, 1]
    assert {worker["pid"] for worker in status["workers"]} <= set(busy.children())
    assert status["telemetry"]["pid"] in busy.children()
    assert status["streams"]["active"] == 0
    assert status["requests"]["answered"] >= 5
    assert status["upstreams"]["openai"]["breaker"] in ("closed", "half_open", "open")
    for name, latency in status["latency"].items():
        assert re.fullmatch(r"proxyd_[a-z_]+_seconds", name)
        for window in ("last_minute", "since_start"):
            values = [value for value in latency[window].values() if isinstance(value, int | float)]
            assert all(math.isfinite(value) and value >= 0 for value in values)


def test_everything_has_a_request_id_and_errors_repeat_it(busy: Daemon) -> None:
    reply = post(busy, None)
    body = json.loads(reply.body())
    assert body["error"]["request_id"] == reply.header("x-proxyd-request-id")
    assert {"message", "type", "code", "param", "request_id"} == set(body["error"])
    reply = post(busy, None, X_Request_Id="bad id!")
    assert reply.header("x-proxyd-request-id") != "bad id!"

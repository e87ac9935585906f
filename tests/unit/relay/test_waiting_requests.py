"""A request whose admission waits for the store or for a key: what may happen to it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxyd.access.admission import Admission
from proxyd.access.session import Session, Sessions, UnknownKey
from proxyd.config.schema import Config
from proxyd.dialects.ask import Route
from proxyd.errors import Refusal
from proxyd.front.request import Request
from proxyd.front.wheel import Wheel
from proxyd.relay.service import Relay, Waits
from proxyd.shm.ledger import Ledger
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.upstream.upstreams import Upstreams
from proxyd.wire.head import Headers, parse_request_head
from tests.unit.access import keys
from tests.unit.relay.stage import Book, Log

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'


class Client:
    """The front's side of one request."""

    def __init__(self) -> None:
        self.refused: list[Refusal] = []
        self.on_gone: Any = None

    def refuse(self, refusal: Refusal, extra: Any = None) -> None:
        self.on_gone = None
        self.refused.append(refusal)

    @property
    def codes(self) -> list[str]:
        return [refusal.code for refusal in self.refused]


class Nobody:
    """A plan without an upstream."""

    def next(self) -> None:
        return None


class NoUpstreams(Upstreams):
    def plan(self, *of: Any) -> Any:
        return Nobody()


class LateKeys(Sessions):
    """Does not know the key of the next `unknown` requests."""

    unknown = 0

    def authenticate(self, headers: Headers) -> Session:
        if self.unknown:
            self.unknown -= 1
            raise UnknownKey(is_loaded=True, is_pending=True)
        return super().authenticate(headers)


class World:
    """A relay without upstreams: who is admitted gets 503 `no_upstream`, and has a row."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: dict[str, int] | None = None) -> None:
        upstream = {"name": "u", "url": "http://u.test/v1"}
        config = Config.model_validate(
            {
                "quota": {"tokens": 1000},
                "limits": limits or {},
                "upstream": [upstream],
                "model": [{"name": "*", "id": 1, "upstreams": ["u"]}],
            }
        )
        self.clock = keys.clock_at_now()
        self.region = Region.create(3)
        metrics = Metrics(self.region, 0)
        self.ledger = Ledger.create(1)
        self.sessions = LateKeys(keys.auth_for(), keys.secrets_for(), self.clock)
        self.told: list[Any] = []
        self.log = Log()
        self.book = Book(self.told)
        self.questions: list[asyncio.Future[bool]] = []
        self.fetch: asyncio.Future[None] = loop.create_future()
        self.rechecks = 0
        admission = Admission(config, self.clock, self.ledger.at(0, 1), metrics)
        self.upstreams = NoUpstreams(config, keys.secrets_for(), metrics, self.log, self.clock, loop)  # type: ignore[arg-type]
        self.relay = Relay(
            loop,
            config,
            self.clock,
            self.log,  # type: ignore[arg-type]
            metrics,
            Wheel(self.clock.monotonic()),
            self.sessions,
            admission,
            self.upstreams,
            self.book,
            Waits(self._wait_for_keys, self._read, self._recheck),
        )

    async def _wait_for_keys(self) -> None:
        await asyncio.shield(self.fetch)

    async def _read(self, user_id: int, window_since: float | None, token_iat: int | None) -> bool:
        self.questions.append(asyncio.get_running_loop().create_future())
        return await self.questions[-1]

    def _recheck(self) -> None:
        self.rechecks += 1

    def serve(self) -> Client:
        client = Client()
        lines = [b"POST %b HTTP/1.1" % Route.CHAT.encode(), b"Host: a", b"Authorization: Bearer " + keys.token()]
        head = parse_request_head(b"\r\n".join([*lines, b"", b""]))
        request = Request(head, BODY, "req", "127.0.0.1", False, False, self.clock.monotonic())
        self.relay.serve(client, request)  # type: ignore[arg-type]
        return client

    def answer_with(self, base: int) -> None:
        account = self.ledger.find(42)
        assert account is not None
        account.set_window(base, int(self.clock.monotonic() * 1000), 0)
        self.questions[-1].set_result(True)

    def statuses(self) -> dict[str, int]:
        counted = read(self.region, 0.0).counters.get("proxyd_requests_total", {})
        return {dict(labels)["status"]: value for labels, value in counted.items()}


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    here = World(asyncio.get_running_loop())
    yield here
    await here.upstreams.close()


async def test_what_the_store_says_is_waited_for_and_decides(world: World) -> None:
    client = world.serve()
    await turns()
    assert (client.refused, world.relay.live) == ([], 0)
    world.answer_with(1000)
    await turns()
    assert client.codes == ["quota_exceeded"]
    assert (world.book.finals, world.statuses(), world.rechecks) == ([], {"429": 1}, 1)


async def test_one_who_may_is_admitted_after_the_wait(world: World) -> None:
    client = world.serve()
    await turns()
    world.answer_with(0)
    await turns()
    assert client.codes == ["no_upstream"]
    assert len(world.book.finals) == 1
    assert world.ledger.totals()[2:5] == (0, 0, 0)


async def test_without_an_answer_it_is_decided_on_what_is_known_and_not_waited_again(world: World) -> None:
    client = world.serve()
    await turns()
    world.questions[-1].set_result(False)
    await turns()
    assert client.codes == ["no_upstream"]
    assert len(world.questions) == 1


async def test_a_client_that_leaves_meanwhile_ends_the_wait_and_is_counted(world: World) -> None:
    client = world.serve()
    await turns()
    client.on_gone()
    await turns()
    assert world.questions[-1].cancelled()
    assert (client.refused, world.book.finals, world.relay.live) == ([], [], 0)
    assert world.statuses() == {"499": 1}
    assert [line["cause"] for line in world.log.lines] == ["client_gone"]
    assert world.ledger.totals()[2:5] == (0, 0, 0)


async def test_a_client_that_leaves_before_the_question_is_sent_asks_nothing(world: World) -> None:
    client = world.serve()
    client.on_gone()
    await turns()
    assert (world.questions, client.refused) == ([], [])


async def test_a_session_that_is_revoked_meanwhile_is_refused(world: World) -> None:
    client = world.serve()
    await turns()
    world.sessions.revocations.revoke("user", 42, world.clock.wall())
    world.answer_with(0)
    await turns()
    assert client.codes == ["token_revoked"]
    assert world.book.finals == []


async def test_a_session_that_expires_meanwhile_is_refused(world: World) -> None:
    client = world.serve()
    await turns()
    world.clock.advance(4000)
    world.answer_with(0)
    await turns()
    assert client.codes == ["token_expired"]


async def test_the_end_of_a_drain_answers_those_who_wait(world: World) -> None:
    client = world.serve()
    await turns()
    assert world.relay.interrupt() == 1
    await turns()
    assert client.codes == ["draining"]
    assert world.statuses() == {"503": 1}
    assert world.relay.interrupt() == 0


async def test_a_spool_that_breaks_meanwhile_is_noticed(world: World) -> None:
    client = world.serve()
    await turns()
    world.book.broken_reason = "disk full"  # type: ignore[assignment]
    world.answer_with(0)
    await turns()
    assert client.codes == ["spool_unavailable"]


async def test_a_bug_in_the_wait_answers_500(world: World) -> None:
    lines: list[str] = []
    world.log.error = lambda event, **fields: lines.append(event)  # type: ignore[method-assign]
    client = world.serve()
    await turns()
    world.questions[-1].set_exception(ValueError("bug"))
    await turns()
    assert (client.codes, lines) == (["internal_error"], ["call_failed"])


async def test_a_key_and_then_the_store_are_waited_for(world: World) -> None:
    world.sessions.unknown = 1
    client = world.serve()
    await turns()
    assert (client.refused, world.questions) == ([], [])
    world.fetch.set_result(None)
    await turns()
    world.answer_with(0)
    await turns()
    assert client.codes == ["no_upstream"]
    assert world.rechecks == 2


async def test_a_key_is_waited_for_once(world: World) -> None:
    world.sessions.unknown = 2
    client = world.serve()
    world.fetch.set_result(None)
    await turns()
    assert client.codes == ["invalid_token"]


async def test_a_request_that_cannot_begin_gives_back_what_it_took() -> None:
    here = World(asyncio.get_running_loop(), {"concurrent_streams": 1})

    def broken(*fields: Any) -> None:
        raise ValueError("bug")

    here.book.intent = broken  # type: ignore[method-assign]
    client = here.serve()
    here.log.error = lambda event, **fields: None  # type: ignore[method-assign]
    await turns()
    here.questions[-1].set_result(False)
    await turns()
    assert client.codes == ["internal_error"]
    assert here.ledger.totals()[2:5] == (0, 0, 0)
    await here.upstreams.close()

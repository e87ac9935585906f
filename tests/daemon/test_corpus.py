"""The whole corpus through the running daemon: same bytes out, same accounting, whatever the framing and the cut.

One daemon for all cases; every case is asked for as chunked (chunks cut elsewhere than the writes), with a length and
delimited by the close, each whole, in writes of one byte (bodies up to 6 kB), cut at every CR, LF, BOM and multi-byte
character at once, and in random pieces. Sockets may join writes, so the cuts at *every* position are tests of the
compiled exchange (tests/unit/relay/test_exchange_corpus.py) and of the splitters; here it is a sample of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxyd.wire.sse import Splitter as PureSplitter
from tests.corpus_cases import SEED, TWO_WAY_LIMIT, Case, load_cases
from tests.daemon.harness import Daemon, Reply, config_text, free_port, model_text, request_bytes, upstream_text
from tests.daemon.peer import Line, Peer, trickle

CASES = load_cases()
ROUTES = {
    "openai.chat": "/v1/chat/completions",
    "openai.completions": "/v1/completions",
    "openai.responses": "/v1/responses",
    "anthropic.messages": "/v1/messages",
    "ollama.chat": "/v1/chat/completions",
    "ollama.generate": "/v1/completions",
    "sse": "/v1/chat/completions",
}
STATUS = {"completed": "completed", "truncated": "upstream_error", "error": "upstream_error"}
FRAMINGS = ("chunked", "length", "close")
SITE = [
    case
    for case in CASES
    if case.expected["api"].removesuffix(".json") in ("openai.chat", "anthropic.messages")
    and case.expected["http_status"] == 200
]
MOST_CUTS = 1500
BREAKABLE = [case for case in CASES if case.is_event_stream and case.expected["api"] != "sse"]
SPECIAL = re.compile(rb"\r\n|\r|\n|[\xc2-\xf4][\x80-\xbf]+")


class Stage:
    """The daemon, an upstream that answers what the test put on the programme, and one client connection."""

    def __init__(self, folder: Path) -> None:
        self.pieces: list[bytes] = []
        self.close_after = False
        self.bodies: list[bytes] = []
        self.users = itertools.count(1000)
        self.peer = Peer(self._play)
        port = free_port()
        text = upstream_text(self.peer.url + "/v1") + upstream_text(self.peer.url, name="a", dialect="anthropic")
        text += model_text("claude", 2, '["a"]') + model_text("*", 1, '["openai"]')
        self.daemon = Daemon(folder, config_text(folder, port, text))
        self.daemon.port = port
        self._sock: socket.socket | None = None

    def _play(self, line: Line) -> None:
        while line.read_request():
            self.bodies.append(line.body)
            pieces, close_after = self.pieces, self.close_after  # the test goes on as soon as the last byte is out
            trickle(line.sock, pieces)
            if close_after:
                return

    def ask(self, path: str, body: dict[str, Any], user: int) -> Reply:
        if self._sock is None:
            self._sock = self.daemon.connect()
        self._sock.sendall(request_bytes(path, body, self.daemon.token(user)))
        return Reply(self._sock)

    def hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def rows(self, users: list[int]) -> dict[int, dict[str, Any]]:
        """The one row of each of these users, once they are there."""
        until = time.monotonic() + 15
        while True:
            found = self._select(min(users), max(users))
            if len(found) >= len(users) or time.monotonic() > until:
                break
            time.sleep(0.01)
        assert sorted(row["user_id"] for row in found) == sorted(users)
        return {row["user_id"]: row for row in found}

    def _select(self, first: int, last: int) -> list[dict[str, Any]]:
        path = self.daemon.folder / "telemetry.db"
        query = "SELECT * FROM sys_ai_transactions WHERE user_id BETWEEN ? AND ?"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
                db.row_factory = sqlite3.Row
                return [dict(row) for row in db.execute(query, (first, last))]
        except sqlite3.OperationalError:  # nothing was written yet
            return []


@pytest.fixture(autouse=True)
def a_connection_for_each_test(stage: Stage) -> Iterator[None]:
    yield
    stage.hang_up()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("corpus"))
    try:
        stage.daemon.start()
        yield stage
        stage.daemon.close_clients()
        assert stage.daemon.stop() == 0
        log = stage.daemon.log()
        assert "Traceback" not in log
        assert '"level":"error"' not in log.replace(" ", "")
    finally:
        stage.peer.close()
        stage.daemon.close_clients()
        stage.daemon.kill()


def head_of(case: Case, framing: str, body: bytes) -> bytes:
    expected = case.expected
    lines = [f"HTTP/1.1 {expected['http_status']} Said So", f"Content-Type: {expected['content_type']}"]
    lines += [f"{name}: {value}" for name, value in (expected.get("response_headers") or {}).items()]
    if expected.get("content_encoding"):
        lines.append(f"Content-Encoding: {expected['content_encoding']}")
    if framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    elif framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode()


def framed(body: bytes, framing: str, rng: random.Random) -> bytes:
    if framing != "chunked":
        return body
    out = b""
    at = 0
    while at < len(body):
        piece = body[at : at + rng.choice((1, 3, 20, 80, 700, 20_000))]
        out += b"%x\r\n%b\r\n" % (len(piece), piece)
        at += len(piece)
    return out + b"0\r\n\r\n"


def cut(data: bytes, points: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in itertools.pairwise([0, *sorted(set(points) - {0, len(data)}), len(data)]) if a < b]


def programmes(case: Case) -> Iterator[tuple[str, list[bytes], bool]]:
    """(label, writes, close after) of every way this case is served."""
    rng = random.Random(f"{SEED}{case.path}")
    for framing in FRAMINGS:
        head, body = head_of(case, framing, case.body), framed(case.body, framing, rng)
        close = framing == "close"
        yield f"{framing} whole", [head + body], close
        yield f"{framing} head apart", [head, body], close
        special = [at for found in SPECIAL.finditer(body) for at in range(found.start(), found.end() + 1)]
        special += [1, 2, 3]  # in the BOM
        yield f"{framing} at line ends and in characters", [head, *cut(body, special[:MOST_CUTS])], close
        if len(case.body) <= TWO_WAY_LIMIT:
            yield f"{framing} byte by byte", cut(head + body, list(range(len(head + body)))), close
        for number in range(2):
            points = [rng.randrange(len(head + body)) for _ in range(6)]
            yield f"{framing} random {number}", cut(head + body, points), close


def asked_for(case: Case, *, include_usage: bool) -> tuple[str, dict[str, Any]]:
    api = case.expected["api"]
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}
    if not api.endswith(".json") or case.path.startswith("json/stream-true"):
        body["stream"] = True
        if include_usage:
            body["stream_options"] = {"include_usage": True}
    if "finish_reasons" in case.expected:
        body["n"] = 2
    if api.startswith("anthropic"):
        body["model"] = "claude"
    return ROUTES[api.removesuffix(".json")], body


def without_usage_events(case: Case) -> bytes:
    """The case's bytes without its usage-only events, by the pure splitter and the ordinals alone."""
    if not case.is_event_stream:
        return case.body
    ordinals = itertools.count()
    hidden = set(case.expected["usage_only_events"])

    def verdict(name: bytes, data: bytes, flags: int) -> bytes | None:
        if flags & 4:  # an `error:` field without data is no event
            return None
        return b"" if next(ordinals) in hidden else None

    splitter = PureSplitter(verdict)
    return splitter.feed(case.body) + splitter.finish()


def assert_row(case: Case, row: dict[str, Any]) -> None:
    expected = case.expected
    assert row["upstream"] == ("a" if expected["api"].startswith("anthropic") else "openai")
    assert row["attempts"] == 1
    if expected["api"] == "sse":
        # No provider's answer: nothing to count from, and complete only where there is an end mark or nothing to read.
        assert row["estimated"] == 1
        assert row["status"] in ("completed", "upstream_error")
        return
    assert row["status"] == STATUS[expected["outcome"]]
    usage = expected["usage"]
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    assert row["estimated"] == (prompt is None or completion is None)
    if prompt is not None:
        assert row["prompt_tokens"] == prompt
    if completion is not None:
        assert row["completion_tokens"] == completion
    for name in ("cached_tokens", "reasoning_tokens"):
        if usage[name] is not None and not row["estimated"]:
            assert row[name] == usage[name]


def name_of(case: Case) -> str:
    return case.path


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case_passes_byte_for_byte_and_is_booked_as_expected(case: Case, stage: Stage) -> None:
    users = []
    for label, writes, close in programmes(case):
        path, body = asked_for(case, include_usage=True)
        stage.pieces, stage.close_after = writes, close
        users.append(next(stage.users))
        reply = stage.ask(path, body, users[-1])
        assert reply.status == case.expected["http_status"], label
        assert reply.header("content-type") == case.expected["content_type"], label
        assert reply.header("content-encoding") == case.expected.get("content_encoding"), label
        for name, value in (case.expected.get("response_headers") or {}).items():
            assert reply.header(name) == value, label
        assert reply.body() == case.body, label
        assert reply.ended, label
    for row in stage.rows(users).values():
        assert_row(case, row)


@pytest.mark.parametrize("case", [case for case in CASES if case.expected.get("usage_only_events")], ids=name_of)
def test_injected_usage_is_hidden_and_nothing_else(case: Case, stage: Stage) -> None:
    wanted = without_usage_events(case)
    users = []
    for label, writes, close in programmes(case):
        path, body = asked_for(case, include_usage=False)
        stage.pieces, stage.close_after = writes, close
        users.append(next(stage.users))
        assert stage.ask(path, body, users[-1]).body() == wanted, label
        assert json.loads(stage.bodies[-1])["stream_options"] == {"include_usage": True}
    for row in stage.rows(users).values():
        assert_row(case, row)


# -- the site's own route --------------------------------------------------------------------------------------------


def told_text(case: Case) -> str:
    """The text that a reader of choice 0 sees, read out of the provider's events by hand."""
    body = case.body
    if case.expected.get("content_encoding"):
        body = zlib.decompress(body, 47)
    if not case.expected["content_type"].startswith("text/event-stream"):
        document = json.loads(body)
        if "choices" in document:
            return str(document["choices"][0]["message"]["content"])
        return "".join(block.get("text", "") for block in document["content"])
    told: list[str] = []
    over: list[bool] = []

    def read(name: bytes, data: bytes, flags: int) -> None:
        if over or data.startswith(b"[DONE]") or flags & 4:
            over.append(True)
            return
        try:
            event = json.loads(data)
        except ValueError:
            return
        if event.get("error") or event.get("type") == "error" or event.get("object") == "error":
            over.append(True)
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if choice.get("index", 0) == 0:
                told.extend(delta[key] for key in ("content", "refusal") if isinstance(delta.get(key), str))
        for key in ("content_block", "delta"):
            if isinstance(event.get(key), dict) and event.get("type", "").startswith("content_block"):
                told.append(event[key].get("text") or "")
        if event.get("type") == "message_stop":
            over.append(True)

    PureSplitter(read).feed(body)
    return "".join(told).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def frames_of(body: bytes) -> list[dict[str, str]]:
    frames = []
    for block in body.decode().split("\n\n"):
        frame: dict[str, str] = {}
        for line in block.split("\n"):
            if line and not line.startswith(":"):
                name, _, value = line.partition(":")
                assert name not in frame
                frame[name] = value.removeprefix(" ")
        if frame:
            frames.append(frame)
    return frames


@pytest.mark.parametrize("case", SITE, ids=name_of)
def test_the_sites_route_tells_the_text_and_one_end_whatever_the_cut(case: Case, stage: Stage) -> None:
    tellings = set()
    users, usages = [], []
    for label, writes, close in programmes(case):
        if not any(word in label for word in ("whole", "byte", "line ends")):
            continue
        stage.pieces, stage.close_after = writes, close
        users.append(next(stage.users))
        model = "claude" if case.expected["api"].startswith("anthropic") else "m"
        reply = stage.ask("/api/v1/stream", {"prompt": "Say hello", "model": model}, users[-1])
        assert (reply.status, reply.header("content-type")) == (200, "text/event-stream; charset=utf-8"), label
        frames = frames_of(reply.body())
        assert reply.ended, label
        assert 1000 <= int(frames[0]["retry"]) <= 4000
        assert [frame for frame in frames[1:] if "retry" in frame] == []
        (start,) = [json.loads(frame["data"]) for frame in frames if frame.get("event") == "start"]
        numbered = [frame["id"] for frame in frames if "id" in frame]
        assert numbered == [f"{start['epoch']}-{n}" for n in range(1, len(numbered) + 1)], label
        ends = [frame for frame in frames if frame.get("event") in ("done", "error")]
        assert ends == frames[-1:], label
        texts = [json.loads(frame["data"]) for frame in frames if "event" not in frame and "data" in frame]
        text = "".join(data["delta"] for data in texts if "kind" not in data)
        usages.append([json.loads(frame["data"]) for frame in frames if frame.get("event") == "usage"])
        tellings.add((text, ends[0]["event"]))
    completed = case.expected["outcome"] == "completed"
    assert tellings == {(told_text(case), "done" if completed else "error")}
    rows = stage.rows(users)
    for user, told in zip(users, usages, strict=True):
        row = rows[user]
        assert row["status"] == STATUS[case.expected["outcome"]]
        assert len(told) == completed
        for usage in told:
            assert bool(usage.pop("estimated")) == bool(row["estimated"])
            assert usage == {name: row[name] for name in usage}


# -- broken framing --------------------------------------------------------------------------------------------------

APOLOGY = {
    "openai.chat": b'data: {"error":',
    "openai.completions": b'data: {"error":',
    "openai.responses": b"event: error\ndata: ",
    "anthropic.messages": b"event: error\ndata: ",
}


@pytest.mark.parametrize("case", BREAKABLE, ids=name_of)
def test_a_broken_framing_ends_with_the_dialects_error_event_between_events_and_no_end_mark(
    case: Case, stage: Stage
) -> None:
    rng = random.Random(f"{SEED}{case.path}")
    users = []
    for number in range(6):
        at = rng.randrange(1, len(case.body))
        head = head_of(case, "length" if number % 3 == 2 else "chunked", case.body)
        sent = case.body[:at] if number % 3 == 2 else framed(case.body[:at], "chunked", rng)[:-5]
        # cut by the close, by a chunk size that is none, by the close within a length
        stage.pieces, stage.close_after = [head, sent, *([b"zz\r\n"] if number % 3 == 1 else [])], True
        path, body = asked_for(case, include_usage=True)
        users.append(next(stage.users))
        reply = stage.ask(path, body, users[-1])
        got = reply.body()
        stage.hang_up()
        assert not reply.ended
        # whole blocks of the upstream's, then our event, then nothing
        shown, mark, rest = got.rpartition(APOLOGY[case.expected["api"]])
        assert mark, got[-200:]
        assert case.body.startswith(shown)
        assert rest.endswith(b"\n\n")
        assert "request_id" in rest.decode()
        splitter = PureSplitter(lambda *_: None)
        assert splitter.feed(shown) == shown
        assert splitter.at_boundary
        json.loads(rest.strip() if mark.endswith(b"data: ") else b'{"error":' + rest.strip())
    for row in stage.rows(users).values():
        assert row["status"] == "upstream_error"

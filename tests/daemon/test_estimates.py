"""What is booked where the provider told nothing: the vocabulary's count, from a worker's very first request on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxyd.dialects.tokens import O200K, count_text
from tests.daemon.harness import CHAT, DONE, FINISH, ROOT, Upstream, Wire, ask, chat_chunk, node, wait_for

Make = Callable[[Callable[[Wire], Any]], Upstream]

PARTS = [" It", "'s", " a", " Straße", ": \"", "日本", "語", "\"\n", " ещё", " 🙂"] * 4
PROMPT_TOKENS = 2 + 4 + 3  # "Say hello", three and its role for the message, three for the answer's start


@pytest.fixture
def upstream() -> Iterator[Make]:
    made: list[Upstream] = []

    def make(script: Callable[[Wire], Any]) -> Upstream:
        made.append(Upstream(script))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module", autouse=True)
def oracle() -> None:
    O200K.load()
    assert O200K.is_ready


def blocks(parts: list[str]) -> list[bytes]:
    """The same deltas as Anthropic sends them."""
    return [
        b"event: content_block_delta\ndata: %b\n\n"
        % orjson.dumps(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}}
        )
        for part in parts
    ]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_an_abort_costs_what_was_delivered_even_in_the_first_request_of_a_node(
    upstream: Make, tmp_path: Path, count: int
) -> None:
    def script(wire: Wire) -> None:
        wire.stream(*[chat_chunk(part) for part in PARTS[:count]], end=False)
        wire.wait_closed()

    with node(tmp_path, upstream(script)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        pieces, seen = reply.pieces(), b""
        while seen.count(b"\n\n") < count:
            seen += next(pieces)
        reply.sock.close()
        (row,) = daemon.wait_rows(1)
    assert (row["status"], row["estimated"]) == ("client_aborted", 1)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (PROMPT_TOKENS, count_text("".join(PARTS[:count])))


def test_claude_is_counted_higher_and_a_broken_upstream_like_an_abort(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> bool:
        wire.stream(*blocks(PARTS), end=False)
        return False

    body = {"model": "claude", "max_tokens": 100, "stream": True, "messages": CHAT["messages"]}
    site = {"model": "claude", "prompt": "Say hello"}
    silent = upstream(lambda wire: wire.wait_closed())
    with node(tmp_path, silent, anthropic=upstream(script)) as daemon:
        for path, asked in (("/v1/messages", body), ("/api/v1/stream", site)):
            ask(daemon, path, asked).body()
        rows = daemon.wait_rows(2)
    for row in rows:
        assert (row["status"], row["estimated"]) == ("upstream_error", 1)
        assert row["prompt_tokens"] == round(2 * 1.3) + 7
        assert row["completion_tokens"] == round(count_text("".join(PARTS)) * 1.3)


def test_a_provider_that_never_tells_is_counted_whole_streamed_or_not(upstream: Make, tmp_path: Path) -> None:
    text = "".join(PARTS)
    long = (ROOT / "docs" / "accounting.md").read_text()

    def script(wire: Wire) -> None:
        if not wire.seen.json.get("stream"):
            wire.json({"model": "m", "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]})
            return
        parts = [long[at : at + 9] for at in range(0, len(long), 9)] if "long" in wire.seen.json else PARTS
        wire.stream(*map(chat_chunk, parts), FINISH, DONE)

    with node(tmp_path, upstream(script)) as daemon:
        for asked in ({**CHAT, "stream": False}, CHAT, {**CHAT, "long": True}):
            ask(daemon, "/v1/chat/completions", asked).body()
        rows = daemon.wait_rows(3)
    assert [(row["status"], row["estimated"], row["prompt_tokens"]) for row in rows] == [
        ("completed", 1, PROMPT_TOKENS)
    ] * 3
    assert [row["completion_tokens"] for row in rows[:2]] == [count_text(text)] * 2
    assert abs(rows[2]["completion_tokens"] - count_text(long)) <= 0.15 * count_text(long)


def test_a_damaged_vocabulary_is_told_once_and_bytes_are_counted(
    upstream: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "proxyd", tree / "proxyd", ignore=shutil.ignore_patterns("__pycache__"))
    data = tree / "proxyd" / "data" / "o200k_base.tiktoken"
    data.write_bytes(data.read_bytes()[:-100])
    text = "a secret word " * 40
    folder = tmp_path / "run"
    folder.mkdir()
    up = upstream(lambda wire: wire.stream(chat_chunk(text), FINISH, DONE))
    monkeypatch.setenv("PYTHONPATH", str(tree))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the copy, not the sources in the working directory
    with node(folder, up) as daemon:
        for _ in range(2):
            ask(daemon, "/v1/chat/completions", CHAT).body()
        rows = daemon.wait_rows(2)
        assert {(row["completion_tokens"], row["estimated"]) for row in rows} == {((len(text) + 3) // 4, 1)}
        wait_for(lambda: "vocabulary_unavailable" in daemon.log())
        assert daemon.log().count("vocabulary_unavailable") == 1
        assert "is damaged" in daemon.log()
        assert "secret word" not in daemon.log()

"""A provider that does what the model's name says, and a daemon before it, for the tests of logs.

Owns: the words that must never be in a line (PROMPT, ANSWER), and reading events out of a log.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    KEY,
    USAGE,
    Daemon,
    Script,
    Upstream,
    Wire,
    chat_chunk,
    free_port,
    model_text,
    node,
    upstream_text,
)

Make = Callable[[Script], Upstream]
PROMPT, ANSWER = "zebra-prompt-of-a-client", "quokka-answer-of-a-provider"


def provider(wire: Wire) -> Any:
    """Does what the request's model is called."""
    what = wire.seen.json.get("model", "")
    if wire.seen.path.endswith(("/embeddings", "/completions", "/responses", "/messages")) and what == "whole":
        return wire.json({"id": "x", "object": "list", "usage": {"prompt_tokens": 4, "total_tokens": 4}})
    if what == "good":
        return wire.stream(chat_chunk(ANSWER), FINISH, USAGE, DONE)
    if what == "error":
        return wire.json({"error": {"message": f"no: {PROMPT} {KEY}", "type": "server_error", "code": "x"}}, 500)
    if what == "key":
        return wire.json({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}, 401)
    if what == "cut":
        wire.stream(chat_chunk(ANSWER), end=False)
        return False
    if what == "reset":
        wire.reset()
        return False
    if what == "nonsense":
        wire.send(f"{PROMPT} {KEY} is no HTTP\r\n\r\n".encode())
        return False
    wire.stream(chat_chunk(ANSWER), end=False)  # "endless", "idle": silent from here on
    wire.wait_closed(60)
    return False


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {**CHAT, "model": model, "messages": [{"role": "user", "content": PROMPT}], **more}


MODELS = "".join(
    model_text(name, number, '["openai"]')
    for number, name in enumerate(("good", "error", "key", "cut", "reset", "nonsense", "endless", "whole"), start=10)
)


@pytest.fixture(name="stage")
def make_stage(upstream: Make, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """A daemon before this provider, and one upstream more that nobody listens at ("gone") and a hasty one ("idle")."""
    with contextlib.ExitStack() as stack:

        def start(**changes: str) -> Daemon:
            house = upstream(provider)
            # [[upstream]] tables may follow [[model]] tables: the harness makes the first upstream only.
            models = MODELS + upstream_text(f"http://127.0.0.1:{free_port()}/v1", name="gone")
            models += model_text("gone", 30, '["gone"]')
            models += upstream_text(f"{house.url}/v1", name="hasty", more='idle_timeout = "1s"')
            models += model_text("idle", 31, '["hasty"]')
            return stack.enter_context(node(tmp_path, house, models=models, **changes))

        yield start


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    found = []
    for line in daemon.log().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == name:
                found.append(entry)
    return found

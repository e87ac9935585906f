"""A client that saw the end of its answer, whatever end, may ask again at once: its place among the streams is free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    model_text,
    node,
    upstream_text,
)

Make = Callable[[Script], Upstream]
ENDS = ("whole", "broken", "terminal and reset", "json", "refused", "empty", "unreachable", "site", "site json")


def script(wire: Wire) -> bool | None:
    """Ends as the prompt says."""
    messages = wire.seen.json["messages"]
    end = messages[-1]["content"]
    if end in ("whole", "site"):
        wire.stream(chat_chunk("a"), FINISH, DONE)
    elif end in ("broken", "terminal and reset"):
        wire.stream(*([chat_chunk("a")] if end == "broken" else [chat_chunk("a"), FINISH, DONE]), end=False)
        wire.reset()
        return False
    elif end in ("json", "site json"):
        wire.json({"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]})
    elif end == "refused":
        wire.json({"error": {"message": "no", "type": "invalid_request_error"}}, 400)
    else:
        wire.head(204)
    return None


def test_the_only_place_is_free_when_a_client_has_seen_the_end_whatever_end(upstream: Make, tmp_path: Path) -> None:
    dead = upstream(script)
    dead.close()
    up = upstream(script)
    models = upstream_text(dead.url + "/v1", name="dead") + model_text("gone", 9, '["dead"]')
    models += model_text("*", 1, '["openai"]')
    with node(tmp_path, up, models=models, server="workers = 4", limits="concurrent_streams = 1") as daemon:
        token = daemon.token()
        for end in ENDS * 25:
            model = "gone" if end == "unreachable" else "m"
            if end.startswith("site"):
                reply = ask(daemon, "/api/v1/stream", {"prompt": end, "model": model}, token=token)
            else:
                asked = {**CHAT, "model": model, "messages": [{"role": "user", "content": end}]}
                reply = ask(daemon, "/v1/chat/completions", asked, token=token)
            assert reply.status != 429, end
            if reply.status != 204:
                reply.body()
            reply.sock.close()
        assert len(daemon.wait_rows(25 * len(ENDS), 30)) == 25 * len(ENDS)

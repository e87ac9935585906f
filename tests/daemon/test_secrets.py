"""After a session of every kind nothing that the node shows or keeps holds a key, the secret, a token or the prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.daemon.harness import (
    DONE,
    FINISH,
    KEY,
    SECRET,
    USAGE,
    Reply,
    Script,
    Upstream,
    Wire,
    chat_chunk,
    node,
    request_bytes,
    wait_for,
)
from tests.daemon.test_commands import proxyd

Make = Callable[[Script], Upstream]

PROMPT, ANSWER = "my-blood-type-is-AB-negative", "take-two-of-the-blue-pills"


def script(wire: Wire) -> bool | None:
    """What the upstream does: answers, fails with our key in its mouth, breaks, answers nonsense."""
    model = wire.seen.json.get("model", "")
    echo = {"error": {"message": f"Incorrect API key provided: {KEY[:6]}***", "type": "invalid_request_error"}}
    match model:
        case "refuses":
            wire.json(echo, 401)
        case "breaks":
            wire.stream(chat_chunk(ANSWER), end=False)
            return False
        case "nonsense":
            wire.send(b"SSH-2.0-OpenSSH_9.2\r\n" + PROMPT.encode() + b"\r\n\r\n")
            return False
        case "silent":
            wire.wait_closed()
        case _:
            wire.stream(chat_chunk(ANSWER), FINISH, USAGE, DONE)
    return None


def test_no_key_no_secret_no_token_and_no_prompt_is_shown_or_kept(upstream: Make, tmp_path: Path) -> None:
    up = upstream(script)
    access = tmp_path / "access.log"
    shown: dict[str, bytes] = {}
    with node(
        tmp_path,
        up,
        server="workers = 2",
        more='first_byte_timeout = "300ms"',
        log=f'access = "{access}"\nlevel = "debug"',
    ) as daemon:
        token, expired = daemon.token(user=1234, jti="the-jti"), daemon.token(exp=1)
        forged = token[:-6] + "AAAAAA"

        def send(
            name: str, path: str, body: object, token: str | None, *, answer: bool = False, **headers: str
        ) -> None:
            """`answer`: the body is what was asked for, and may hold the answer's text; headers never may."""
            sock = daemon.connect()
            sock.sendall(request_bytes(path, body, token, **headers))
            reply = Reply(sock)
            content = b"" if answer else reply.body()
            if answer:
                reply.body()
            shown[name] = repr(reply.headers).encode() + content

        chat = {"model": "m", "stream": True, "messages": [{"role": "user", "content": PROMPT}]}
        send("answered", "/v1/chat/completions", chat, token, answer=True)
        send("site", "/api/v1/stream", {"prompt": PROMPT, "model": "m"}, token, answer=True)
        send("cookie", "/v1/chat/completions", chat, None, answer=True, Cookie=f"ai_session_jwt={token}")
        send("sdk key", "/v1/chat/completions", chat, None, answer=True, X_Api_Key=token)
        send("broken", "/v1/chat/completions", {**chat, "model": "breaks"}, token, answer=True)
        send("refused", "/v1/chat/completions", {**chat, "model": "refuses"}, token)
        send("nonsense", "/v1/chat/completions", {**chat, "model": "nonsense"}, token)
        send("silent", "/v1/chat/completions", {**chat, "model": "silent"}, token)
        send("expired", "/v1/chat/completions", chat, expired)
        send("forged", "/v1/chat/completions", chat, forged)
        send("two tokens", "/v1/chat/completions", chat, token, Cookie=f"ai_session_jwt={expired}")
        send("no JSON", "/v1/chat/completions", f'{{"messages": "{PROMPT}'.encode(), token)
        send("wrong type", "/api/v1/stream", {"prompt": [PROMPT], "model": 7}, token)
        send("no route", f"/v1/nothing?token={token}&q={PROMPT}", chat, token)
        send("query", f"/v1/chat/completions?api_key={token}&q={PROMPT}", chat, token, answer=True)
        revoked = daemon.admin("/sessions/revoke", "POST", b'{"jti": "the-jti"}')
        assert revoked[0] == 200
        send("revoked", "/v1/chat/completions", chat, token)
        wait_for(lambda: access.read_text().count("\n") >= len(shown))
        for path in ("/metrics", "/status"):
            shown[path] = daemon.admin(path)[1]
        for name in ([], ["--json"]):
            found = proxyd(daemon.environ, "-c", str(daemon.config), "status", *name)
            shown[f"status {name}"] = (found.stdout + found.stderr).encode()
        checked = proxyd(daemon.environ, "--check-config", "-c", str(daemon.config))
        shown["check-config"] = (checked.stdout + checked.stderr).encode()
        assert daemon.process is not None
        for pid in (daemon.process.pid, *daemon.children()):
            shown[f"title of {pid}"] = Path(f"/proc/{pid}/cmdline").read_bytes()
        # The key goes to the upstream and nothing of the client's credentials does.
        for seen in up.requests:
            assert seen.header("authorization") == f"Bearer {KEY}"
            for value in (token, expired, forged, SECRET):
                assert value.encode() not in seen.head + seen.body
        daemon.stop()
    shown["log"] = (tmp_path / "log.txt").read_bytes()
    for file in sorted(tmp_path.rglob("*")):
        if file.is_file() and file.name not in ("jwt.secret", "proxyd.toml"):
            shown[str(file.relative_to(tmp_path))] = file.read_bytes()
    assert {"access.log", "telemetry.db"} <= shown.keys()
    hidden = {"key": KEY, "secret": SECRET, "token": token, "signature": token.rpartition(".")[2], "expired": expired}
    hidden |= {"forged": forged, "prompt": PROMPT, "answer": ANSWER}
    leaks = [
        f"{what} in {where}" for where, data in shown.items() for what, text in hidden.items() if text.encode() in data
    ]
    assert not leaks, "\n".join(leaks)
    # A hostile line break or control byte in what is logged would forge lines.
    for line in (tmp_path / "access.log").read_text().splitlines():
        json.loads(line)
    assert os.stat(access).st_mode & 0o007 == 0

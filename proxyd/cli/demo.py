"""`proxyd --demo`: the whole daemon without a file, a key or a server.

Owns: the demo's configuration, its directory, what it prints. Must not know: how anything of it works; it writes a
configuration text and runs the same daemon as everybody, plus one child: the demo upstream.

What exists only while it runs: one directory (state, sockets, telemetry) under the system's temporary one, removed at
the end; a secret and a key in memory. A demo killed with -9 leaves the directory, and nothing else.
Exit codes: the daemon's; 1 when no port is free.
"""

from __future__ import annotations

import argparse
import os
import secrets as random
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from functools import partial

from proxyd.access.mint import mint
from proxyd.cli import serve
from proxyd.config.load import parse
from proxyd.config.secrets import resolve
from proxyd.host.child import ChildSpec
from proxyd.log import Log
from proxyd.web import demo_upstream

__all__ = ["Provider", "config_text", "greeting", "pick_port", "run"]

DEFAULT_PORT = 3000
# How many ports after 3000 are tried; who has twenty servers there wants to choose.
PORTS_TRIED = 20
HOST = "127.0.0.1"
TTL_S = 24 * 3600.0
SECRET_ENV = "PROXYD_DEMO_SECRET"  # noqa: S105 - the name of a variable that exists in no process's environment
KEY_ENV = "PROXYD_DEMO_KEY"


@dataclass(frozen=True, slots=True)
class Provider:
    """An upstream of the demo and the model to show it with."""

    name: str
    dialect: str
    url: str
    key_env: str
    model: str


REAL = (
    Provider("openai", "openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "gpt-4o-mini"),
    Provider("anthropic", "anthropic", "https://api.anthropic.com", "ANTHROPIC_API_KEY", "claude-haiku-4-5"),
)


def run(args: argparse.Namespace) -> int:
    """Runs until Ctrl-C; leaves nothing behind."""
    port = pick_port(args.port)
    if port is None:
        wanted = f"port {args.port} is" if args.port else f"ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED} are"
        print(f"proxyd: {wanted} taken; choose another: --port N", file=sys.stderr)
        return 1
    owner = os.getpid()
    directory = tempfile.mkdtemp(prefix="proxyd-demo-")
    try:
        return _run_in(directory, port, args.port)
    finally:
        # A forked child that ever came here must not take the directory from the others.
        if os.getpid() == owner:
            _remove(directory)


def _remove(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    done = "could not remove all of" if os.path.exists(directory) else "removed"
    try:
        print(f"stopped; {done} {directory}", flush=True)
    except OSError:
        pass  # who read it was ended by the same Ctrl-C


def _run_in(directory: str, port: int, asked_port: int | None) -> int:
    environ = dict(os.environ) | {SECRET_ENV: random.token_hex(32), KEY_ENV: random.token_hex(16)}
    providers = [provider for provider in REAL if environ.get(provider.key_env)]
    children: tuple[ChildSpec, ...] = ()
    if not providers:
        listener = demo_upstream.listen()
        base = f"http://{HOST}:{listener.getsockname()[1]}"
        providers = [
            Provider("demo-openai", "openai", f"{base}/v1", KEY_ENV, "demo"),
            Provider("demo-anthropic", "anthropic", base, KEY_ENV, "demo"),
        ]
        body = partial(demo_upstream.run_child, listener=listener, key=environ[KEY_ENV])
        children = (ChildSpec("demo upstream", body),)
    for name in ("state", "run"):
        os.mkdir(os.path.join(directory, name), 0o700)
    config, findings = parse(config_text(directory, port, providers), "the demo's configuration", environ)
    secrets = None
    if config is not None:
        secrets, more = resolve(config, environ)
        findings = [*findings, *more]
    if config is None or secrets is None:
        for finding in findings:
            print(finding.text(), file=sys.stderr)
        return 1
    token = mint(config.auth, secrets, 1, "default", None, TTL_S)
    cookie = f"{config.auth.cookie}={token}; Path=/; HttpOnly; SameSite=Strict"
    text = greeting(port, asked_port, token, providers)
    log = Log(level=config.log.level, format=config.log.format, access=config.log.access, process="master")
    return serve.run(
        config,
        secrets,
        log,
        extra_children=children,
        on_ready=lambda: print(text, flush=True),
        page_cookie=cookie,
    )


def pick_port(asked: int | None) -> int | None:
    """The port to listen on: the asked one, or the first free one from 3000 on; None when that is taken."""
    candidates = [asked] if asked is not None else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED + 1)
    for port in candidates:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the daemon will bind: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return None


def config_text(directory: str, port: int, providers: list[Provider]) -> str:
    """The demo's configuration file, as one could write it."""
    parts = [
        f"""\
[server]
listen = ["{HOST}:{port}"]
admin = "unix:{directory}/run/admin.sock"
workers = 1
drain_timeout = "100ms"
state_dir = "{directory}/state"
runtime_dir = "{directory}/run"

[auth]
secret_env = "{SECRET_ENV}"
# Browsers keep cookies for a host, not for a port: two demos would overwrite each other's.
cookie = "proxyd_demo_{port}"

[telemetry]
sink = "sqlite:///{directory}/state/telemetry.db"
durability = "os"

[log]
access = "stdout"
format = "text"
level = "warning"

[demo]
page = true
"""
    ]
    for provider in providers:
        parts.append(
            f"""
[[upstream]]
name = "{provider.name}"
dialect = "{provider.dialect}"
url = "{provider.url}"
api_key_env = "{provider.key_env}"
"""
        )
    by_model: dict[str, list[str]] = {}
    for provider in providers:
        by_model.setdefault(provider.model, []).append(provider.name)
    # Any other name too, so that a program that was written for a provider runs unchanged.
    by_model["*"] = [provider.name for provider in providers]
    for number, (model, names) in enumerate(by_model.items(), start=1):
        listed = ", ".join(f'"{name}"' for name in names)
        parts.append(f'\n[[model]]\nname = "{model}"\nid = {number}\nupstreams = [{listed}]\n')
    return "".join(parts)


def greeting(port: int, asked_port: int | None, token: str, providers: list[Provider]) -> str:
    """What a person sees: where to look, what to paste, how to stop."""
    base = f"http://{HOST}:{port}"
    is_real = providers[0].key_env != KEY_ENV
    names = " and ".join(provider.name for provider in providers)
    answers = f"{names}, with your key: answers cost money" if is_real else "a built-in demo model, not an AI"
    moved = f" (port {DEFAULT_PORT} is taken)" if asked_port is None and port != DEFAULT_PORT else ""
    model = providers[0].model
    is_openai = any(provider.dialect == "openai" for provider in providers)
    lines = [
        f"proxyd demo on {base}{moved}",
        f"  answers come from: {answers}",
        "",
        f"Chat page:  {base}/",
        "",
        "An answer, word by word:",
        "",
        f"  curl -N {base}/api/v1/stream \\",
        f"    -H 'Authorization: Bearer {token}' \\",
        "    -H 'Content-Type: application/json' \\",
        """    -d '{"prompt": "Say hello in seven words."}'""",
        "",
        "For a shell whose programs use the token as $TOKEN:",
        "",
        f"  export TOKEN={token}",
        "",
    ]
    if is_openai:
        lines += [
            "The same from Python (pip install openai), in the shell of the export:",
            "",
            "  import os",
            "  from openai import OpenAI",
            f'  client = OpenAI(base_url="{base}/v1", api_key=os.environ["TOKEN"])',
            f'  stream = client.chat.completions.create(model="{model}", stream=True,',
            '      messages=[{"role": "user", "content": "Say hello in seven words."}])',
            "  for chunk in stream:",
            '      print(chunk.choices[0].delta.content or "", end="", flush=True)',
            "",
        ]
    lines.append("Ctrl-C stops it and removes everything it made. Requests appear below.")
    return "\n".join(lines)

"""proxyd installed in a machine of its own (nspawn.py) as the README tells an operator to: wheel, venv, link, `make
install`, secrets, one edit of the shipped file.

Owns: the wheel, what is copied in, the scripted upstream and the client that run inside, both of the standard library
alone. Must not know what is tested. There is no network inside, so what the wheel asks for is put into the venv
beforehand; pip then finds it there, and fails if anything is missing.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.daemon.harness import ROOT, wait_for
from tests.daemon.nspawn import Machine, python_for_the_machine

TREE = ("Makefile", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py", "requirements-test.lock",
        "conf", "ext", "proxyd", "systemd")  # fmt: skip
PACKAGE = "/opt/proxyd/lib/python{}.{}/site-packages/proxyd".format(*sys.version_info[:2])
CONFIG = "/etc/proxyd/proxyd.toml"
UNIT = "proxyd.service"
PATIENCE_S = 60.0

# Answers any POST with as many events as the question says, this far apart: "EVENTS GAP_S".
UPSTREAM = '''
import http.server, json, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        events, gap = body["messages"][-1]["content"].split()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for n in range(int(events)):
            self.send({"choices": [{"index": 0, "delta": {"content": f"w{n} "}, "finish_reason": None}]})
            time.sleep(float(gap))
        self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.send({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": int(events), "total_tokens": 9}})
        self.chunk(b"data: [DONE]\\n\\n")
        self.chunk(b"")

    def send(self, event):
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **event}
        self.chunk(b"data: " + json.dumps(event).encode() + b"\\n\\n")

    def chunk(self, data):
        self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(data), data))

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 9000), Handler)
server.daemon_threads = True
server.serve_forever()
'''

# A new connection and a GET every few milliseconds until TERM; then it prints how each ended.
KNOCKER = '''
import collections, json, signal, socket, time

ends = collections.Counter()
going = True

def stop(*_):
    global going
    going = False

signal.signal(signal.SIGTERM, stop)
print("knocking", flush=True)
while going:
    try:
        with socket.create_connection(("127.0.0.1", 3000), 30) as sock:
            try:
                sock.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: h\\r\\nConnection: close\\r\\n\\r\\n")
                answer = sock.recv(12)
                ends[answer[9:12].decode() if answer else "closed"] += 1
            except OSError as error:
                ends["after: " + str(error)] += 1
    except OSError as error:
        ends["connect: " + str(error)] += 1
    time.sleep(0.005)
print(json.dumps(ends), flush=True)
'''

# One request with a body of so many megabytes, to one worker.
FILLER = '''
import socket, sys

size, token, block = int(sys.argv[1]) << 20, sys.argv[2], b" " * 1048576
sock = socket.create_connection(("127.0.0.1", 3000), 30)
head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: h\\r\\nAuthorization: Bearer %s\\r\\n" % token
sock.sendall((head + "Content-Length: %d\\r\\n\\r\\n" % size).encode())
try:
    for _ in range(size >> 20):
        sock.sendall(block)
    print(sock.recv(100))
except OSError as error:
    print(error)
'''


class SystemdNode:
    """The machine and the daemon in it. `install` first."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self._token = ""

    # --- as an operator does ---------------------------------------------------------------------------------------

    def install(self) -> None:
        """Everything but the secrets and the start."""
        machine = self.machine
        tree = self._copy_of_the_tree()
        build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
        built = subprocess.run(build, cwd=tree, capture_output=True, text=True, timeout=600, check=False)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
        for name in ("build", "ext"):
            shutil.rmtree(tree / name)  # what a server without a compiler gets
        machine.put(tree, "/root/proxyd")
        (wheel,) = [f"/root/proxyd/dist/{path.name}" for path in (tree / "dist").glob("*.whl")]
        shutil.rmtree(tree)
        python = python_for_the_machine(sys.version_info, sys.base_prefix)
        machine.run(python, "-m", "venv", "--without-pip", "/opt/proxyd")
        self._put_dependencies()
        pip = ["/opt/proxyd/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--quiet"]
        machine.run(*pip, wheel)
        machine.run("ln", "-sfn", "/opt/proxyd/bin/proxyd", "/usr/bin/proxyd")
        machine.run("make", "-C", "/root/proxyd", "install")
        machine.write("/root/upstream.py", UPSTREAM)
        machine.write("/root/knocker.py", KNOCKER)
        machine.write("/root/filler.py", FILLER)
        machine.run("systemd-run", "--unit=upstream", "/usr/bin/python3", "/root/upstream.py")
        # What an operator edits: where the provider is. The rest is as shipped, but for a shorter drain.
        self.configure(lambda text: text)

    def _copy_of_the_tree(self) -> Path:
        """With what is compiled already, or this takes another minute."""
        tree = self.folder / "proxyd"
        tree.mkdir(parents=True)
        for name in TREE:
            if (ROOT / name).is_dir():
                leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / name, tree / name, ignore=leave)
            else:
                shutil.copy2(ROOT / name, tree / name)
        shutil.copytree(ROOT / "build", tree / "build", ignore=shutil.ignore_patterns("lib*", "bdist*", "temp*"))
        # Where bdist_wheel looks for a module that is newer than its sources; `make build` put it into the package.
        made = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "proxyd"
        made.mkdir(parents=True)
        for module in (tree / "proxyd").glob("*.so"):
            module.rename(made / module.name)
        return tree

    def _put_dependencies(self) -> None:
        paths = sorted({path for name in _needed("proxyd", ROOT / "pyproject.toml") for path in _files(name)})
        home = str(distribution("pip").locate_file(""))
        archive = self.folder / "deps.tar"
        pack = ["tar", "-C", home, "-cf", str(archive), "--no-recursion", "--null", "--files-from=-"]
        subprocess.run(pack, input="\0".join(paths), text=True, check=True, timeout=120)
        self.machine.put(archive, "/root/deps.tar")
        archive.unlink()
        self.machine.run("tar", "--no-same-owner", "-C", str(Path(PACKAGE).parent), "-xf", "/root/deps.tar")

    def make_secrets(self) -> None:
        for name in ("jwt.secret", "openai.key"):
            self.machine.run("install", "-m", "0600", "/dev/null", f"/etc/proxyd/{name}")
        self.machine.run("sh", "-c", "openssl rand -base64 48 > /etc/proxyd/jwt.secret")
        self.machine.run("sh", "-c", "echo sk-of-the-machine > /etc/proxyd/openai.key")

    def configure(self, change: Callable[[str], str]) -> None:
        """The shipped file with the upstream of the machine and `change`."""
        text = (ROOT / "conf/proxyd.toml").read_text()
        for was, now in (
            ('url = "https://api.openai.com/v1"', 'url = "http://127.0.0.1:9000/v1"'),
            ('workers = "auto"', "workers = 2"),
            ('drain_timeout = "120s"', 'drain_timeout = "20s"'),
            ('max_body = "8MiB"', 'max_body = "1GiB"'),
        ):
            assert text.count(was) == 1, was
            text = text.replace(was, now)
        self.machine.write(CONFIG, change(text))

    def drop_in(self, text: str) -> None:
        """As `systemctl edit proxyd`; "" removes it."""
        path = f"/etc/systemd/system/{UNIT}.d/test.conf"
        if text:
            self.machine.write(path, text)
        else:
            self.machine.run("rm", "-f", path)
        self.machine.run("systemctl", "daemon-reload")

    def set_version(self, version: str) -> None:
        """As if pip had installed another one."""
        text = self.machine.run("cat", f"{PACKAGE}/__init__.py").stdout
        changed, count = re.subn(r'__version__ = "[^"]*"', f'__version__ = "{version}"', text)
        assert count == 1
        self.machine.write(f"{PACKAGE}/__init__.py", changed)

    # --- what it is like -------------------------------------------------------------------------------------------

    @property
    def main_pid(self) -> int:
        """As the machine counts."""
        return int(self.machine.show(UNIT, "MainPID"))

    @property
    def is_active(self) -> bool:
        return self.machine.show(UNIT, "ActiveState") == "active"

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.machine.run("proxyd", "status", "--json").stdout)
        return found

    def wait_serving(self) -> dict[str, Any]:
        """Active, and its workers ready; the status then."""

        def look() -> dict[str, Any] | None:
            done = self.machine.run("proxyd", "status", "--json", check=False)
            if done.returncode or not self.is_active:
                return None
            status: dict[str, Any] = json.loads(done.stdout)
            return status if status["state"] == "ready" and len(self.workers()) == 2 else None

        status: dict[str, Any] = wait_for(look, PATIENCE_S, 0.2)
        return status

    def workers(self) -> list[int]:
        """Pids of the workers, as the machine counts."""
        found = self.machine.run("pgrep", "-P", str(self.main_pid), "-f", "^proxyd: worker", check=False).stdout
        return [int(word) for word in found.split()]

    def token(self) -> str:
        if not self._token:
            self._token = self.machine.run("proxyd", "token", "--user", "7", "--ttl", "1h").stdout.strip()
        return self._token

    def curl(self, events: int, gap_s: float = 0.0) -> list[str]:
        """What curl is to be called with for a stream of so many events."""
        messages = [{"role": "user", "content": f"{events} {gap_s}"}]
        question = {"model": "gpt-4o-mini", "stream": True, "messages": messages}
        return ["curl", "-sSN", "--max-time", "50", "http://127.0.0.1:3000/v1/chat/completions",
                "-H", f"Authorization: Bearer {self.token()}", "-H", "Content-Type: application/json",
                "-d", json.dumps(question)]  # fmt: skip

    def messages(self, cursor: str = "") -> list[str]:
        """What the journal has of the unit."""
        return [str(entry.get("MESSAGE", "")) for entry in self.machine.journal(UNIT, cursor)]

    def events(self, cursor: str = "") -> list[dict[str, Any]]:
        """The daemon's own events among them."""
        found = []
        for message in self.messages(cursor):
            with contextlib.suppress(ValueError):
                entry = json.loads(message)
                if isinstance(entry, dict) and "event" in entry:
                    found.append(entry)
        return found


def _needed(project: str, pyproject: Path) -> set[str]:
    """The names of all distributions that it stands on, and pip's."""
    import tomllib

    queue = [Requirement(text) for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]]
    queue.append(Requirement("pip"))
    seen: set[tuple[str, tuple[str, ...]]] = set()
    names: set[str] = set()
    while queue:
        wanted = queue.pop()
        key = (wanted.name.lower(), tuple(sorted(wanted.extras)))
        if key in seen:
            continue
        seen.add(key)
        names.add(wanted.name)
        for text in distribution(wanted.name).requires or ():
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                queue.append(more)
    return names


def _files(name: str) -> list[str]:
    """A distribution's files below site-packages."""
    found = distribution(name)
    home = Path(str(found.locate_file("")))
    names = [str(path) for path in found.files or () if ".." not in path.parts and "__pycache__" not in path.parts]
    return [name for name in names if (home / name).is_file()]

"""nginx in front of a proxyd of the test, with conf/nginx/proxyd.conf as the package installs it.

Owns: rendering that file for free ports and a temporary folder (only what names a port, a certificate or a socket is
changed), starting and ending nginx. Must not know: what goes through it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.daemon.harness import ROOT, free_port, wait_for

CONF = ROOT / "conf/nginx/proxyd.conf"
MAIN = """
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
{user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {servers}
}}
"""


def once(pattern: str, by: str, text: str) -> str:
    """`text` with exactly one match replaced; a file that changed so that there is none is a failure."""
    changed, count = re.subn(pattern, by.replace("\\", "\\\\"), text, flags=re.MULTILINE)
    assert count == 1, f"{CONF.name}: {count} matches of {pattern!r}"
    return changed


def render(name: str, listen: int, *, unix: str | None, tcp: int) -> str:
    """The shipped file for one listener: with its Unix socket block, or with its TCP block uncommented."""
    text = CONF.read_text()
    if unix is not None:
        text = once(r"server unix:/run/proxyd/proxyd\.sock ", f"server unix:{unix} ", text)
    else:
        text = once(r"^upstream proxyd \{\n(?:.*\n)*?\}\n", "", text)
        block = re.search(r"^# upstream proxyd \{\n(?:#.*\n)*?# \}\n", text, re.MULTILINE)
        assert block is not None
        text = text.replace(block.group(), re.sub(r"^# ?", "", block.group(), flags=re.MULTILINE))
        text = once(r"server 127\.0\.0\.1:3000 ", f"server 127.0.0.1:{tcp} ", text)
    text = once(r"^    listen 443 ssl http2;$", f"    listen 127.0.0.1:{listen};", text)
    text = once(r"^    listen \[::\]:443 ssl http2;$", "", text)
    text = once(r"^    ssl_certificate +\S+;$", "", text)
    text = once(r"^    ssl_certificate_key +\S+;$", "", text)
    # two renderings stand in one http block: names of theirs must differ
    text = once(r"^upstream proxyd \{", f"upstream {name} {{", text)
    return text.replace("http://proxyd;", f"http://{name};").replace("$proxyd_connection", f"${name}_connection")


class Nginx:
    """A running nginx: `tcp` and `unix` are its ports, by how it reaches proxyd."""

    def __init__(self, folder: Path, port: int, sock: str) -> None:
        self.folder = folder
        self.tcp, self.unix = free_port(), free_port()
        servers = render("by_tcp", self.tcp, unix=None, tcp=port) + render("by_unix", self.unix, unix=sock, tcp=port)
        # workers of a root's nginx would be of another user, who may not open the socket
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        self.conf = folder / "nginx.conf"
        self.conf.write_text(MAIN.format(folder=folder, servers=servers, user=user))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        assert program is not None, "nginx is missing: run tests/install-deps"
        where = ["-p", str(self.folder), "-c", str(self.conf), "-e", str(self.folder / "error.log")]
        self.process = subprocess.Popen([program, *where, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
        wait_for(self._is_up, 20)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.errors()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.unix), 1):
            return True
        return False

    def errors(self) -> str:
        path = self.folder / "error.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        """For tests that failed. TERM first: a master killed at once would leave its worker behind."""
        if self.process is None or self.process.poll() is not None:
            return
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def nginx_before(folder: Path, port: int, sock: str) -> Iterator[Nginx]:
    nginx = Nginx(folder, port, sock)
    try:
        nginx.start()
        yield nginx
        assert nginx.stop() == 0
    finally:
        nginx.kill()

"""A node of real processes with a service that fits on a page: the process tests run it as a program.

Each connection is greeted with "worker SLOT PID\\n"; then a word: `hold` keeps it busy until the client closes,
`stuck` blocks the loop for ever, `state` answers the worker's state. argv: one JSON object, see `main`.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxyd.host.child import EXIT_CANNOT_BOOT, Birth, ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.host.systemd import Notifier
from proxyd.log import Log
from proxyd.master.main import Master
from proxyd.master.spec import GenerationSpec, MasterSpec, Program, Refused
from proxyd.shm.region import Region
from proxyd.worker.adopt import Adoption
from proxyd.worker.main import Context, run_telemetry, run_worker


@dataclass(frozen=True)
class At:
    kind: str
    host: str | None = None
    port: int | None = None
    path: str | None = None


class Accepting:
    def __init__(self, service: Trivial, listeners: list[socket.socket]) -> None:
        self._service = service
        self._listeners = listeners

    def resume(self) -> None:
        for listener in self._listeners:
            self._service.loop.add_reader(listener.fileno(), self._service.on_ready, listener)

    def pause(self) -> None:
        for listener in self._listeners:
            self._service.loop.remove_reader(listener.fileno())

    def close(self) -> None:
        for listener in self._listeners:
            self._service.on_ready(listener)
        self.pause()


class Trivial:
    def __init__(self, context: Context, listeners: Listeners) -> None:
        self._context = context
        self.loop = context.loop
        self._listeners = listeners
        slot = context.birth.slot
        self._own = Accepting(self, listeners.of_slot(slot))
        self._adoption = Adoption(
            context.region, context.birth, lambda other: Accepting(self, listeners.tcp_of_slot(other))
        )
        self._clients: set[socket.socket] = set()
        self._is_closed = False
        self.busy = 0
        self.finished = 0
        self.handed_over = 0
        self.ended = 0
        self.named: list[dict[str, object]] = []

    @property
    def streams(self) -> int:
        return self.busy

    held = running = streams

    async def start(self) -> None:
        self._own.resume()

    def on_ready(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
        client.send(f"worker {self._context.birth.slot} {os.getpid()}\n".encode())
        self._clients.add(client)
        self._context.loop.add_reader(client.fileno(), self._on_word, client)

    def _on_word(self, client: socket.socket) -> None:
        try:
            word = client.recv(100).strip()
        except ConnectionError:
            word = b""
        if word == b"stuck":
            while True:
                time.sleep(1)
        if word == b"hold":
            self.busy += 1
            client.send(b"held\n")
        elif word == b"state":
            client.send(self._context.standing.state.name.encode() + b"\n")
        elif not word:
            self._context.loop.remove_reader(client.fileno())
            self._clients.discard(client)
            client.close()
            self.busy = max(0, self.busy - 1)

    def retire(self) -> None:
        self.stop_accepting()

    awaited = 0
    is_orphan = False

    def refuse(self) -> None:
        self.stop_accepting()

    def stop_accepting(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._own.close()
        self._adoption.close()
        self._listeners.close_public()

    def interrupt(self, keep: int) -> int:
        if keep >= self.busy:
            return 0
        for client in self._clients:
            client.send(b"aborted\n")
        self.ended += self.busy
        self.busy = 0
        return self.ended

    def pulse(self) -> None:
        self._adoption.pulse()

    def tick(self) -> None: ...
    async def close(self) -> None: ...


class Next:
    """The generations after the first, as options["renewals"] has them, one for each check: `examine` (what it does:
    bad, crash, hang, flood), `refuse` (a plan that cannot be), `bug` (one that raises), `workers`, `fail` (as for the
    first generation). Behind the last one all goes well."""

    def __init__(self, make: Callable[..., GenerationSpec], options: dict[str, Any], log: Log) -> None:
        self._make, self._log = make, log
        self._wishes = list(options.get("renewals", []))
        self._looked = mmap.mmap(-1, 8)  # by all children
        self._workers = options.get("workers", 2)
        self.program = Program(sys.executable, (sys.executable, "-c", "raise SystemExit(3)"), dict(os.environ))

    def examine(self) -> tuple[bool, list[str]]:
        number = self._looked[0]
        self._looked[0] = number + 1
        how = self._wishes[number].get("examine") if number < len(self._wishes) else None
        if how == "flood":
            while True:
                os.write(2, b"x" * 65536)
        if how == "crash":
            os._exit(9)
        if how == "hang":
            time.sleep(1000)
        return how != "bad", ["line 3: nonsense"] if how == "bad" else []

    def plan(self, listeners: Listeners, log: Log) -> GenerationSpec:
        number = self._looked[0] - 1
        wish = self._wishes[number] if number < len(self._wishes) else {}
        if "bug" in wish:
            raise KeyError(wish["bug"])
        if "refuse" in wish:
            raise Refused(wish["refuse"], ["refused here"])
        count = wish.get("workers", self._workers)
        return self._make(listeners.renewed(_addresses(), count, 64), count, wish)

    def hand_over(self, log: Log) -> dict[str, Any]:
        return {"fds": [], "memory": []}


def _addresses() -> list[At]:
    options = json.loads(sys.argv[1])
    addresses = [At("tcp", "127.0.0.1", options["port"])]
    if "path" in options:
        addresses.append(At("unix", path=options["path"]))
    return addresses


def main() -> int:
    options = json.loads(sys.argv[1])
    workers = options.get("workers", 2)
    region = Region.create(options.get("seats", 16) + 2)
    listeners = Listeners(_addresses(), [], workers, 64)
    log = Log(access="off", process="master", level="debug")

    def telemetry(birth: Birth) -> int:
        async def serve(context: Context, stop: asyncio.Event) -> None:
            await stop.wait()
            context.log.info("telemetry_stopped")

        return run_telemetry(birth, region, log, serve)

    def extra(birth: Birth) -> int:
        signal.pause()
        return 0

    def generation(listeners: Listeners, workers: int, wish: dict[str, Any]) -> GenerationSpec:
        def run(birth: Birth) -> int:
            how = wish.get("fail", {}).get(str(birth.slot))
            if how == "crash":
                os._exit(1)
            if how == "cannot boot":
                return EXIT_CANNOT_BOOT
            if how == "hang":
                time.sleep(1000)

            async def build(context: Context) -> Trivial:
                return Trivial(context, listeners)

            return run_worker(birth, region, log, options.get("drain_timeout", 5.0), build)

        return GenerationSpec(
            listeners=listeners,
            workers=workers,
            run_worker=run,
            telemetry=ChildSpec("telemetry", telemetry),
            drain_timeout_s=options.get("drain_timeout", 5.0),
            log=log,
        )

    spec = MasterSpec(
        region=region,
        first=generation(listeners, workers, options),
        extra_children=(ChildSpec("extra", extra),) if options.get("extra") else (),
        beat_timeout_s=options.get("beat_timeout", 10.0),
        check_timeout_s=options.get("check_timeout", 30.0),
        boot_timeout_s=options.get("boot_timeout", 30.0),
        notifier=Notifier(os.environ),
        renewal=Next(generation, options, log) if "renewals" in options else None,
        version="1.0",
    )
    return Master(spec, log).run()


if __name__ == "__main__":
    sys.exit(main())

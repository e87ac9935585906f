"""Starts the daemon: binds, makes the shared memory, and gives the master its children.

Owns the order of a start; what a generation of workers is made of is in cli/node.py. Must not know argv, files or
secrets' places: `cli.main` and `cli.demo` bring a checked configuration. Exit codes: the master's own; 1 when an
address, the state directory, the file of revocations, the file limit or shared memory refuses. Importing this imports
every room: the workers share what the master loaded.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Mapping

from proxyd import __version__
from proxyd.cli.fixed import fixed_options
from proxyd.cli.listen_remedy import listen_remedy
from proxyd.cli.node import Node
from proxyd.cli.output import fail
from proxyd.cli.renewal import FileRenewal
from proxyd.clock import SYSTEM
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.host import limits
from proxyd.host.child import ChildSpec
from proxyd.host.sockets import ListenError, Listeners
from proxyd.host.systemd import Notifier, take_listen_fds
from proxyd.log import Log
from proxyd.master.main import Master
from proxyd.master.spec import MasterSpec, Program
from proxyd.shm.region import Region, count_seats
from proxyd.shm.revocations import RevocationRing
from proxyd.store.revocations import RevocationFile, RevocationFileError
from proxyd.telemetry.segment import SpoolError, ensure_spool_dir

# The workers of a master that was killed a moment ago close their listeners as soon as they notice; nginx waits too.
BIND_PATIENCE_S = 1.0
BIND_RETRY_MS = 50


def run(
    config: Config,
    secrets: Secrets,
    log: Log,
    *,
    find_program: Callable[[Mapping[str, str]], Program] | None = None,
    extra_children: tuple[ChildSpec, ...] = (),
    page_cookie: str = "",
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serves until a signal ends it; returns the exit code. `find_program` tells, for an environment, what
    an upgrade starts; without it there is neither reload nor upgrade. `on_ready` is called in the master, once."""
    server = config.server
    notifier = Notifier(os.environ)
    given = take_listen_fds(os.environ)
    environ = dict(os.environ)
    allowed = limits.raise_open_files()
    connections = sum(upstream.max_connections for upstream in config.upstream)
    files = limits.decide(connections, allowed, count_seats(server.workers))
    if files.problem:
        fail("proxyd", 0, f"{files.problem}; {files.remedy}")
    if not files.is_enough:
        return 1
    try:
        _make_directories(config, log)
        ensure_spool_dir(server.state_dir)  # here it is one line; in the children one each, again and again
        listeners = _bind(config, [fd for fds in given.values() for fd in fds])
    except SpoolError as error:
        return fail("proxyd", 1, str(error))
    except ListenError as error:
        return fail("proxyd", 1, f"{error.strerror}; {listen_remedy(error, config)}")
    except OSError as error:
        return fail("proxyd", 1, error.strerror or str(error))
    try:
        node = Node.create(config)
        _restore_revocations(config, node.region, log)
    except (RevocationFileError, OSError) as error:
        listeners.unlink()
        listeners.close()
        return fail("proxyd", 1, str(error) if isinstance(error, RevocationFileError) else _no_room(error, config))
    renewal = None
    if find_program is not None:
        program = find_program(environ)
        renewal = FileRenewal(node, config.file, environ, program, fixed_options(config), log, config.log)
    spec = MasterSpec(
        region=node.region,
        first=node.generation(config, secrets, listeners, log, page_cookie),
        extra_children=extra_children,
        notifier=notifier,
        stored=tuple(given),
        on_ready=lambda: _tell_ready(config, listeners, log, on_ready),
        on_worker_gone=lambda seat: node.reclaim(seat, log),
        renewal=renewal,
        no_renewal="a demo has no file that could be read again; stop it and start it anew",
        version=__version__,
    )
    return Master(spec, log).run()


def _tell_ready(config: Config, listeners: Listeners, log: Log, on_ready: Callable[[], None]) -> None:
    """Which daemon this is, and where it can be reached."""
    log.info(
        "listening",
        addresses=listeners.addresses(),
        admin=config.server.admin.text,
        file=config.file,
        version=__version__,
    )
    on_ready()


def _restore_revocations(config: Config, region: Region, log: Log) -> None:
    """Puts what earlier lives refused into the ring, from which each worker learns it before it serves."""
    loaded = RevocationFile(config.server.state_dir).load(SYSTEM.wall())
    ring = RevocationRing(region)
    for entry in loaded.entries:
        ring.publish(entry)
    if loaded.not_compacted:
        log.warning("revocations_not_compacted", detail=loaded.not_compacted)


def _no_room(error: OSError, config: Config) -> str:
    """The kernel gave no memory or no sockets to share: why, and what to do."""
    remedy = "raise LimitNOFILE, or lower server.workers"
    if error.errno == errno.ENOMEM:
        remedy = "it is mostly address space: set vm.overcommit_memory to 0 or 1, or raise RLIMIT_AS"
    elif error.errno == errno.EFBIG:
        remedy = "shared memory counts as a file there: raise RLIMIT_FSIZE (LimitFSIZE=, ulimit -f)"
    return f"nothing to share among {config.server.workers} workers: {error.strerror}; {remedy}"


def _make_directories(config: Config, log: Log) -> None:
    """Makes what is missing of the daemon's own directories. One that cannot be made is refused where it is used, with
    its remedy."""
    sink = config.telemetry.sink
    store = os.path.dirname(sink.removeprefix("sqlite:///")) if sink.startswith("sqlite:///") else ""
    for path, mode in ((config.server.state_dir, 0o700), (config.server.runtime_dir, 0o750), (store, 0o700)):
        if path and not os.path.lexists(path):
            try:
                os.makedirs(path, mode)
            except OSError:
                continue
            log.info("directory_made", path=path, mode=f"{mode:04o}")


def _bind(config: Config, given: list[int]) -> Listeners:
    """`given`: descriptors that the service manager handed over; all are closed, but for duplicates of those that are
    in use. Raises ListenError."""
    server = config.server
    deadline = SYSTEM.monotonic() + BIND_PATIENCE_S
    offered = [sock for fd in given if (sock := _socket(fd)) is not None]
    try:
        while True:
            try:
                copies = [sock.dup() for sock in offered]
                return Listeners(server.listen, [server.admin], server.workers, server.backlog, copies)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or SYSTEM.monotonic() > deadline:
                    raise
            # Not a loop of the master's: nothing runs yet that could be held up, and a signal ends the process.
            select.poll().poll(BIND_RETRY_MS)
    finally:
        for sock in offered:
            sock.close()


def _socket(fd: int) -> socket.socket | None:
    try:
        return socket.socket(fileno=fd)
    except OSError:  # no socket: of another version's store
        os.close(fd)
        return None

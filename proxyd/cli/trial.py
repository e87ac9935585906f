"""A worker's whole life in a folder of its own: whether this program's workers can boot with this configuration.

Owns: what of the configuration is exchanged for the trial: the state directory, the addresses. Must not know who asks.
Part of the check before an upgrade: behind it the old program is gone, and a worker that cannot boot is better found
here. The worker begins with a TERM that waits for its loop, so it boots, is READY, drains nothing, and ends.
Bound: worker.main.BOOT_S. Touches nothing of the node that serves: no spool, no shared memory, no listener of it.
"""

from __future__ import annotations

import os
import signal
import tempfile

from proxyd.cli.node import Node
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.config.values import Listen
from proxyd.host.child import Birth
from proxyd.host.sockets import Listeners
from proxyd.ids import new_epoch
from proxyd.log import Log, Sink


def boot_a_worker(config: Config, secrets: Secrets) -> int:
    """Its exit code; what it says goes to stdout. For a process that does nothing else afterwards. Raises OSError for
    what the machine refuses."""
    with tempfile.TemporaryDirectory(prefix="proxyd-trial-", dir=_place(config)) as folder:
        server = config.server.model_copy(update={"state_dir": folder, "runtime_dir": folder, "workers": 1})
        alone = config.model_copy(update={"server": server})
        log = Log(level="error", format="text", access="off", process="trial", events=Sink(1))
        public, admin = (Listen("unix", path=os.path.join(folder, name)) for name in ("public", "admin"))
        listeners = Listeners([public], [admin], 1, 1)
        node = Node.create(alone)
        lifeline, held = os.pipe2(os.O_CLOEXEC)
        birth = Birth(0, 0, 0, new_epoch(), lifeline, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)  # waits for the loop's handler: worker/main.py
        try:
            return node.generation(alone, secrets, listeners, log).run_worker(birth)
        finally:
            os.close(held)
            listeners.unlink()
            listeners.close()


def _place(config: Config) -> str:
    """Where a folder may be made: not everywhere is there a /tmp."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return config.server.state_dir

"""The real daemon, one of whose workers can be made to hang in a callback of its loop, as a bug would.

`python tests/daemon/stuck_node.py BEAT_S -c FILE`: the daemon of FILE; its master gives a silent worker BEAT_S
seconds. A worker that finds `stick-PID` with its own pid in the current folder writes `stuck-PID` and never returns.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from proxyd.master import slots

slots.BEAT_TIMEOUT_S = float(sys.argv[1])  # before the master is imported: it takes its default from here

from proxyd.cli.main import main  # noqa: E402
from proxyd.worker.services import WorkerServices  # noqa: E402

FOLDER = Path.cwd()
_pulse = WorkerServices.pulse


def spin_for_ever() -> None:
    (FOLDER / f"stuck-{os.getpid()}").touch()
    while True:
        pass


def pulse(self: WorkerServices) -> None:
    if (FOLDER / f"stick-{os.getpid()}").exists():
        spin_for_ever()
    _pulse(self)


WorkerServices.pulse = pulse  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))

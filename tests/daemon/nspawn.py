"""A machine with a real systemd: systemd-nspawn on an overlay of this one's `/`, thrown away afterwards.

Owns: booting it, running commands in it, its journal, ending it. Must not know proxyd. Needs root and the package
systemd-container; where they are missing it fails, and says so.

    pytest -- unshare -- sh (pid 1 of a pid and a mount namespace) -- systemd-nspawn -- systemd of the machine

Nothing of it outlives the test, however that ends: `unshare` dies with its parent (PR_SET_PDEATHSIG) and takes the pid
namespace along, which takes the machine, and the mounts go with the mount namespace. Only the empty control groups must
be removed by name (`close`); those of a test that was killed are removed by the next machine.
What the machine writes is in a tmpfs of TMPFS at most. It boots to multi-user.target with no unit of ours enabled, and
its /tmp and network are its own, so it reads nothing of the source tree: files come in by `put`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.daemon.harness import wait_for

BOOT_S = 60.0  # 3 s on an idle machine
COMMAND_S = 120.0
TMPFS = "1500m"  # a virtual environment and a journal are 150 MB
PREFIX = "proxyd-test-"
_PR_SET_PDEATHSIG = 1
_ENVIRON = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
# $1 the folder for the mounts, $2 the machine's name, $3 the size of what it may write.
_BOOT = """
set -e
mount -t tmpfs -o "size=$3,mode=0755" tmpfs "$1"
cd "$1"
mkdir up work root
mount -t overlay overlay -o lowerdir=/,upperdir="$1/up",workdir="$1/work" root
mkdir -p root/etc/systemd/system
rm -f root/etc/machine-id root/etc/systemd/system/default.target
: > root/etc/machine-id
rm -rf root/etc/systemd/system/*.wants root/etc/systemd/system/*.requires root/var/log/journal
mkdir -p root/var/log/journal
systemd-nspawn --directory=root --machine="$2" --boot --register=no --keep-unit --private-network --console=pipe \\
  systemd.unit=multi-user.target
"""


class Machine:
    """Booted by `boot`, ended by `close`; `with Machine(folder) as machine` does both."""

    def __init__(self, folder: Path) -> None:
        for program in ("systemd-nspawn", "unshare", "nsenter"):
            assert shutil.which(program), f"{program} is missing: apt install systemd-container util-linux"
        assert os.geteuid() == 0, "booting a machine needs root"
        self.folder = folder / "machine"
        self.name = f"{PREFIX}{os.getpid()}-{time.monotonic_ns() % 1_000_000_000}"
        self.log = folder / "machine.log"
        self.leader = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[Path] = []

    def __enter__(self) -> Machine:
        try:
            return self.boot()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- its life ------------------------------------------------------------------------------------------------

    def boot(self) -> Machine:
        self.folder.mkdir(parents=True)
        _remove_groups_of_the_dead()
        self._groups = _make_groups(self.name)
        parent, groups = os.getpid(), [group / "cgroup.procs" for group in self._groups]
        libc = ctypes.CDLL(None)

        def prepare() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            for path in groups:
                path.write_text("0")

        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "sh", "-c", _BOOT, "sh", str(self.folder), self.name, TMPFS],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_ENVIRON,
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.leader = wait_for(self._find_leader, BOOT_S)
        wait_for(self._is_up, BOOT_S, 0.1)
        self._take_memory_group()
        return self

    def _find_leader(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, f"systemd-nspawn ended: {self.log.read_text(errors='replace')[-2000:]}"
        pids = [self._process.pid]
        for _ in range(3):  # unshare, sh, systemd-nspawn, systemd
            pids = [child for pid in pids for child in _children(pid)]
        for pid in pids:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return pid
        return 0

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _take_memory_group(self) -> None:
        """With control groups of version 1 systemd-nspawn mounts the memory controller read-only, and the machine's
        systemd leaves MemoryMax= without effect. It is the machine's own subtree (`_make_groups`): let it have it."""
        memory = "/sys/fs/cgroup/memory"
        if self.run("mountpoint", "-q", memory, check=False).returncode == 0:
            self.run("mount", "-o", "remount,bind,rw", memory)
            self.run("systemctl", "daemon-reexec")

    def close(self) -> None:
        """Ends it, at once and for certain. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        for group in self._groups:
            _remove_group(group)
        self._groups = []

    # --- what is done in it --------------------------------------------------------------------------------------

    def command(self, *words: str | Path) -> list[str]:
        """What runs `words` in the machine, as root, from outside."""
        enter = ["nsenter", "--target", str(self.leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        return [*enter, "--", "sh", "-c", 'cd /; exec "$@"', "sh", *map(str, words)]

    def run(
        self,
        *words: str | Path,
        check: bool = True,
        stdin: str = "",
        timeout: float = COMMAND_S,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**_ENVIRON, **(environ or {})},
        )
        assert not check or done.returncode == 0, f"{words} exited with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """The same without waiting; the machine's end ends it, too. Whoever starts it reads its pipes and waits."""
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_ENVIRON,
        )

    def path(self, inside: str) -> Path:
        """A path of the machine, to be read from outside."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def put(self, source: Path, inside: str) -> None:
        """Copies a file or a folder into the machine."""
        pack = ["tar", "-C", str(source.parent), "-cf", "-", source.name]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
            self.run("mkdir", "-p", os.path.dirname(inside))
            unpack = ["tar", "--no-same-owner", "-C", os.path.dirname(inside), "-xf", "-"]
            subprocess.run(self.command(*unpack), stdin=tar.stdout, check=True, timeout=COMMAND_S, env=_ENVIRON)
        assert tar.returncode == 0
        if os.path.basename(inside) != source.name:
            self.run("mv", f"{os.path.dirname(inside)}/{source.name}", inside)

    def write(self, inside: str, text: str, mode: str = "0644") -> None:
        """Makes a file; written beside it and moved, as an editor does."""
        self.run("install", "-D", "-m", mode, "/dev/stdin", f"{inside}.new", stdin=text)
        self.run("mv", f"{inside}.new", inside)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def journal(self, unit: str, cursor: str = "") -> list[dict[str, Any]]:
        """The unit's lines, those of systemd about it as well; after `cursor`, if one is given."""
        after = [f"--after-cursor={cursor}"] if cursor else []
        said = self.run("journalctl", "--no-pager", "-o", "json", "--all", "-u", unit, *after).stdout
        return [json.loads(line) for line in said.splitlines()]

    def cursor(self, unit: str) -> str:
        """Where the unit's journal is now; "" at its beginning. Of the unit's own lines: after the cursor of another
        one journalctl leaves the unit's first line out, because it takes that for the cursor's."""
        said = self.run("journalctl", "--no-pager", "-n", "1", "-o", "json", "-u", unit).stdout
        return str(json.loads(said)["__CURSOR"]) if said else ""


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# --- control groups -------------------------------------------------------------------------------------------------


def _make_groups(name: str) -> list[Path]:
    """A group of the machine's own in each hierarchy that systemd uses: two machines in one would end each other's
    services. Of version 1: its own hierarchy and memory; of version 2: the one there is."""
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        names = {"0": ("unified", "")} if number == "0" else {}
        names.update({"name=systemd": ("systemd",), "memory": ("memory",)})
        for folder in names.get("0" if number == "0" else controllers, ()):
            base = Path("/sys/fs/cgroup", folder)
            if (base / "cgroup.procs").exists():
                group = Path(f"{base}{path.rstrip('/')}/{name}")
                group.mkdir()
                made.append(group)
                break
    assert made, "no control groups below /sys/fs/cgroup: systemd cannot boot without"
    return made


def _remove_group(group: Path) -> None:
    """Depth first; the kernel refuses while a process is still on its way out."""
    until = time.monotonic() + 10
    while group.exists() and time.monotonic() < until:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if group.exists():
            time.sleep(0.05)


def _remove_groups_of_the_dead() -> None:
    """What test runs that were killed left: empty folders named after a process that is gone."""
    for group in Path("/sys/fs/cgroup").glob(f"**/{PREFIX}*"):
        pid = group.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove_group(group)


def python_for_the_machine(version: Sequence[int], base: str) -> str:
    """An interpreter of this version that a daemon may use: one in a home directory is out of its reach."""
    wanted = f"{version[0]}.{version[1]}"
    for path in (f"/usr/bin/python{wanted}", f"/usr/local/bin/python{wanted}", f"{base}/bin/python{wanted}"):
        if os.path.exists(path) and not os.path.realpath(path).startswith(("/root/", "/home/")):
            return path
    raise AssertionError(f"no Python {wanted} outside of home directories: apt install python{wanted}")

"""Workers die or hang under load: what waited in their backlog is served, what they held comes back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.daemon import worker_loss
from tests.daemon.harness import ROOT, Daemon, config_text, free_port, model_text, upstream_text, wait_for
from tests.daemon.load import Newcomers, Scripted, build, loads
from tests.daemon.worker_loss import Plan, connections_at, sockets_of

BEAT_S = 2.0


def test_a_killed_workers_backlog_is_served_by_its_successor_and_what_it_held_comes_back(tmp_path: Path) -> None:
    # The bound on the respawn is what a shared machine keeps; the figure itself is printed by the module's main().
    outcome = worker_loss.run(tmp_path, Plan(seconds=6, every_s=2, stopped_s=0.4, rate=300, respawn_s=5.0))
    assert outcome.faults == []
    assert len(outcome.kills) == 3
    assert outcome.report["requests"]["failed"]["connect"] == 0
    assert outcome.report["requests"]["whole"] > 1000


class StuckNode(Daemon):
    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/daemon/stuck_node.py"), str(BEAT_S), "-c", str(self.config)],
                stdout=log, stderr=log, cwd=self.folder, env={**self.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        wait_for(self._is_ready, 30)


def test_a_worker_that_hangs_in_a_callback_is_found_by_its_beats_leaves_its_stack_and_is_replaced(
    tmp_path: Path,
) -> None:
    build(tmp_path)
    provider = Scripted(tmp_path)
    port = free_port()
    upstream = upstream_text(provider.url + "/v1") + model_text("*", 1, '["openai"]')
    daemon = StuckNode(tmp_path, config_text(tmp_path, port, upstream, server="workers = 2"))
    daemon.port = port
    try:
        daemon.start()
        assert daemon.process is not None
        victim, other = daemon.child("worker 0"), daemon.child("worker 1")
        streams = {"streams": 20, "stream_rate": 10, "min": 20, "max": 30}
        with loads(Newcomers(tmp_path, port, daemon.token(), "tcp", rate=200, kept=0.2, **streams)) as (load,):
            load.wait("ready")
            load.go()
            (tmp_path / f"stick-{victim}").touch()
            wait_for((tmp_path / f"stuck-{victim}").exists, 10)
            there, owned = connections_at(port), sockets_of(victim)
            accepted = frozenset(client for client, inode in there.items() if inode in owned)
            wait_for(lambda: '"event":"child_died"' in daemon.log(), 30)
            wait_for(lambda: daemon.child("worker 0") != victim, 20)
            time.sleep(1)
            load.stop()
            load.wait("stopped", 60)
            requests = load.report()["requests"]
            failures = [one for one in load.failures if one.port not in accepted]
            assert failures == [], (failures[:5], len(load.failures))
            assert {one.kind for one in load.failures} <= {"reset", "empty", "cut"}
        assert re.search(r'"event":"child_silent"[^\n]*"child":"worker 0"', daemon.log())
        assert "spin_for_ever" in daemon.log()
        assert "killed by SIGABRT" in daemon.log()
        assert daemon.child("worker 1") == other
        assert os.path.exists(f"/proc/{other}")
        assert requests["whole"] > 300
        assert daemon.stop() == 0
    finally:
        daemon.kill()
        provider.close()

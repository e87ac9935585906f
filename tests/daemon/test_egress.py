"""Local ports: few connections carry many requests, a range that runs out is told before, and nobody gets a 502 of it.

The scenarios are those of tests/daemon/egress_ports.py, in a network namespace of their own, with 200 ports.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.daemon.harness import ROOT


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.daemon.egress_ports", "--ports", "200", "--clients", "40", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize(
    ("scenario", "requests"),
    [
        pytest.param("keep", 2000, id="kept connections carry ten times as many requests as there are ports"),
        pytest.param("refuse", 600, id="an upstream that closes each connection leaves no port taken"),
        pytest.param("await", 800, id="an upstream that waits for our close is reset before the ports are gone"),
        pytest.param("out", 100, id="without a port requests wait, get 503, and all is well when ports come back"),
        pytest.param("sources", 60, id="source addresses take turns and a bad one is passed over"),
    ],
)
def test_local_ports_last(scenario: str, requests: int) -> None:
    assert f"{scenario:8} ok" in run("--requests", str(requests), scenario)

"""The compiled modules under the address and undefined-behaviour sanitizers: spans, buffers and epoll pointers.

Built in a folder of its own, so that nobody's build is disturbed; the tests that it runs are those that drive the
compiled code directly. A missing libasan fails: it comes with gcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RUNS = (
    "tests/unit/relay/test_compiled_exchange.py",
    "tests/unit/relay/test_exchange_limit.py",
    "tests/unit/relay/test_quota_within_a_stream.py",
    "tests/unit/wire/test_splitter.py",
    "tests/unit/wire/test_scan.py",
    "tests/unit/shm/test_ledger.py",
    "tests/unit/shm/test_ledger_machine.py",
    "tests/unit/shm/test_ledger_seats.py",
    "tests/unit/shm/test_ledger_windows.py",
    "tests/unit/shm/test_metrics.py",
    "tests/unit/dialects/test_vocabulary.py",
)


def test_the_compiled_code_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "node_modules")
    for name in ("proxyd", "ext", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environ = {**os.environ, "PROXYD_SANITIZE": "1"}
    done = subprocess.run(build, cwd=tree, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so")]
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python itself frees nothing at its end; leaks of ours are found by the memory benchmark and the soak.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *RUNS]
    done = subprocess.run(run, cwd=tree, env=environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def _library(name: str) -> str:
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert os.path.isabs(path), f"gcc has no {name}: install gcc with its sanitizer libraries"
    return path

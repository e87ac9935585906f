"""Every module can be the first one imported: no hidden order, no cycle that only another import hides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# One interpreter imports what the modules lean on, then forks once a module: each child imports that one alone.
_PROGRAM = """
import importlib, os, sys, traceback
for name in ("aiohttp.web", "asyncio", "httptools", "jose.jwt", "orjson", "prometheus_client", "pydantic", "uvloop"):
    importlib.import_module(name)
failed = 0
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
            ours = sorted(one for one in sys.modules if one.startswith("proxyd"))
            if "proxyd" not in ours:
                raise AssertionError("imported from elsewhere")
        except BaseException:
            sys.stderr.write(f"--- {name}\\n")
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(pid, 0)[1] != 0
sys.exit(1 if failed else 0)
"""


def _names() -> list[str]:
    found = []
    for path in sorted((ROOT / "proxyd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_each_module_imports_alone():
    names = _names()
    assert "proxyd.config.load" in names
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", _PROGRAM, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_version_needs_none_of_the_daemon():
    """`proxyd --version` answers where a dependency is broken, and at once."""
    program = (
        "import sys\nfrom proxyd.cli.main import main\nassert main(['--version']) == 0\n"
        "heavy = {'uvloop', 'aiohttp', 'pydantic', 'jose'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("proxyd 0.")

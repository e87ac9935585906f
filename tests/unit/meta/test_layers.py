"""Imports point down, and files stay one idea long."""

from __future__ import annotations

import re

import pytest

from tests.unit.meta import rooms


def test_imports_point_down_only():
    found = [line for path in rooms.modules() for line in rooms.complaints(rooms.name_of(path), path.read_text())]
    assert not found, "\n".join(found)


def test_a_module_outgrows_400_lines_only_with_a_reason_at_its_head():
    sources = [*rooms.modules(), *(rooms.ROOT / "ext").rglob("*.pyx"), *(rooms.ROOT / "tests").rglob("*.py")]
    grown = []
    for path in sources:
        if "node_modules" in path.parts:
            continue
        lines = path.read_text().splitlines()
        has_reason = any(re.search(r"\blong because\b|\bLength:", line) for line in lines[:40])
        if len(lines) > 400 and not has_reason:
            grown.append(f"{path.relative_to(rooms.ROOT)}: {len(lines)} lines")
    assert not grown, "split them, or say 'long because ...' within the first 40 lines:\n" + "\n".join(grown)


def test_every_module_begins_with_a_docstring():
    silent = [
        rooms.name_of(path) for path in rooms.modules() if not path.read_text().lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent


@pytest.mark.parametrize(
    "name, source, word",
    [
        ("proxyd.config.x", "from proxyd.relay import y", "up"),
        ("proxyd.front.x", "from proxyd.upstream.pool import y", "sideways"),
        ("proxyd.front.x", "def f():\n    from proxyd.wire import head", "inside a function"),
        ("proxyd.front.x", "import aiohttp.web", "aiohttp"),
        ("proxyd.wire.x", "import time", "no I/O"),
        ("proxyd.wire.x", "from asyncio import sleep", "no I/O"),
        ("proxyd.front.x", "from proxyd import _relay", "only relay"),
        ("proxyd.front.x", "from proxyd._relay import Exchange", "only relay"),
        ("proxyd.errors", "from proxyd.config import schema", "up"),
        ("proxyd.front.x", "import proxyd.nowhere", "no such room"),
        ("proxyd.front.x", "if TYPE_CHECKING:\n    from proxyd.relay import y", "up"),
    ],
)
def test_the_walk_notices(name, source, word):
    assert any(word in line for line in rooms.complaints(name, source))


@pytest.mark.parametrize(
    "name, source",
    [
        (
            "proxyd.relay.x",
            "from proxyd import _relay\nfrom proxyd.wire import head\nfrom proxyd.front.states import y",
        ),
        ("proxyd.cli.main", "def f():\n    from proxyd.master import main"),
        ("proxyd.web.x", "import aiohttp"),
        ("proxyd.log", "from proxyd.clock import SYSTEM"),
        ("proxyd.config.x", "from proxyd.config import y\nimport os"),
    ],
)
def test_the_walk_lets_pass(name, source):
    assert rooms.complaints(name, source) == []


def test_the_pure_and_the_compiled_modules_have_the_same_rooms():
    """ext/ mirrors the package: a .pyx nobody has listed here would escape the rules above."""
    built = {path.stem for path in (rooms.ROOT / "ext" / "proxyd").glob("*.pyx")}
    assert built <= set(rooms.COMPILED)

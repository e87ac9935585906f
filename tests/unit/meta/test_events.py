"""The table of events in docs/running.md is that of the code: each event once, and none that nothing logs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LEVELS = ("debug", "info", "warning", "error")


def logged() -> Iterator[tuple[str, str]]:
    """(where, event) of each call of a log's level, of `log(...)` where a level was chosen before, and log.py's own."""
    for path in sorted((ROOT / "proxyd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Dict) and path.name == "log.py":
                for key, value in zip(node.keys, node.values, strict=True):
                    if getattr(key, "value", "") == "event" and isinstance(value, ast.Constant):
                        yield where, value.value
            if not isinstance(node, ast.Call) or not node.args:
                continue
            function, event = node.func, node.args[0]
            if isinstance(function, ast.Attribute) and function.attr == "_event":
                event = node.args[1]
                if isinstance(event, ast.Constant):
                    yield where, event.value
                continue
            is_level = isinstance(function, ast.Attribute) and function.attr in LEVELS
            owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            is_log = is_level and owner.rpartition(".")[2] in ("log", "_log")
            if path.name == "log.py" and owner == "self" and is_level:
                is_log = True
            if isinstance(function, ast.Name) and function.id == "log":
                is_log = True
            if is_log:
                yield from ((where, name) for name in names(event, where))


def names(event: ast.expr, where: str) -> list[str]:
    if isinstance(event, ast.Constant) and isinstance(event.value, str):
        return [event.value]
    if isinstance(event, ast.JoinedStr) and ast.unparse(event) == "f'{verb}_unavailable'":
        return ["reload_unavailable", "upgrade_unavailable"]
    raise AssertionError(f"{where}: an event that nobody can look up: {ast.unparse(event)}")


def table() -> list[str]:
    text = (ROOT / "docs" / "running.md").read_text()
    part = text[text.index("\n## Events\n") :]
    part = part[: part.index("\n## ", 5)]
    return [
        name
        for line in part.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split(" | ")[0])
    ]


def test_every_event_of_the_code_is_in_the_table_and_no_other() -> None:
    told, found = table(), {event for _, event in logged()}
    assert found - set(told) == set(), "add it to docs/running.md, Events: meaning and what to do"
    assert set(told) - found == set(), "nothing logs it"
    assert len(told) == len(set(told))


def test_an_event_s_name_is_one_word_in_lower_case() -> None:
    for where, event in logged():
        assert re.fullmatch(r"[a-z][a-z_]{3,39}", event), (where, event)

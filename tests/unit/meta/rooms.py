"""The rooms and their order, read from the sources with `ast`: what the meta tests share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "proxyd"

LAYERS: dict[str, int] = {
    "cli": 8,
    "master": 7,
    "worker": 7,
    "web": 6,
    "relay": 5,
    "tasks": 5,
    "gateway": 5,
    "telemetry": 5,
    "front": 4,
    "upstream": 4,
    "bus": 4,
    "store": 4,
    "dialects": 3,
    "access": 3,
    "wire": 2,
    "config": 1,
    "host": 1,
    "shm": 1,
    "errors": 0,
    "clock": 0,
    "ids": 0,
    "log": 0,
}
# Compiled modules know no policy, so whoever stands above may use them: (layer, the only rooms that may, or all).
COMPILED: dict[str, tuple[int, frozenset[str] | None]] = {
    "_scan": (0, None),
    "_sse": (0, None),
    "_shm": (0, None),
    "_frame": (0, None),
    "_ledger": (0, frozenset({"shm", "access", "telemetry", "worker"})),
    "_limits": (0, frozenset({"shm", "access", "telemetry", "worker"})),
    "_bpe": (0, None),
    "_relay": (4, frozenset({"relay"})),
}


@dataclass(frozen=True)
class Import:
    """One import statement of a module of ours."""

    module: str
    line: int
    target: str
    in_function: bool
    for_types_only: bool


def modules() -> list[Path]:
    """Every source file of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """proxyd/config/load.py as proxyd.config.load."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """The room of a dotted name: its second part; "" for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(name: str, source: str) -> Iterator[Import]:
    """Every import in a source, resolved to absolute names."""
    yield from _walk(name, ast.parse(source), in_function=False, for_types_only=False)


def _walk(name: str, node: ast.AST, *, in_function: bool, for_types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name, child.lineno, alias.name, in_function, for_types_only)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            assert child.level == 0, f"{name}:{child.lineno}: relative imports hide where an arrow points"
            for alias in child.names:
                yield Import(name, child.lineno, f"{base}.{alias.name}", in_function, for_types_only)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = for_types_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            yield from _walk(name, child, in_function=inside, for_types_only=types)


def complaints(name: str, source: str) -> list[str]:
    """What a module's imports do that its room may not."""
    found = []
    for one in imports_of(name, source):
        where = f"{one.module}:{one.line} imports {one.target}"
        own, target = room_of(name), room_of(one.target)
        top = one.target.split(".")[0]
        if top == "aiohttp" and own != "web":
            found.append(f"{where}: aiohttp belongs to web alone")
        if own == "wire" and top in ("asyncio", "socket", "time", "os", "logging", "ssl", "select", "threading"):
            found.append(f"{where}: wire does no I/O")
        if top != "proxyd":
            continue
        if one.in_function and own != "cli":
            found.append(f"{where}: inside a function")
        if own in ("", "__main__") or target in ("", "__version__", own):
            continue
        if target in COMPILED:
            layer, only = COMPILED[target]
            if only is not None and own not in only:
                found.append(f"{where}: only {', '.join(sorted(only))} may")
        elif target in LAYERS:
            layer = LAYERS[target]
        else:
            found.append(f"{where}: no such room")
            continue
        if own not in LAYERS:
            found.append(f"{one.module} is in no room")
        elif layer > LAYERS[own]:
            found.append(f"{where}: up")
        elif layer == LAYERS[own] and target not in COMPILED and layer != 0:
            found.append(f"{where}: sideways")
    return found

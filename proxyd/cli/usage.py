"""`proxyd usage`: a user's token totals out of the telemetry store, whether the daemon runs or not.

Owns: the arguments, the table and the exit codes of this command. Must not know: SQL (store/queries does).
Exit codes: 0 printed, a user without rows included; 1 there is no store yet, or it or the configuration cannot be used;
2 the file cannot be read or the arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import orjson

from proxyd.clock import SYSTEM, Clock
from proxyd.config.load import load
from proxyd.config.units import UnitError, parse_duration
from proxyd.errors import ConfigError
from proxyd.store.queries import Totals, usage, usage_by
from proxyd.store.schema import StoreError, StoreMissing
from proxyd.store.sink import open_reader

DEFAULT_CONFIG = "/etc/proxyd/proxyd.toml"
DEFAULT_WINDOW = "24h"
_SPLITS = (("status", "status"), ("model", "model_id"), ("tenant", "tenant"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `run` reads. `-c` may also stand before the command: then the parser's owner has set it."""
    parser.add_argument("-c", "--config", default=argparse.SUPPRESS, metavar="FILE", help="the configuration")
    parser.add_argument("--user", required=True, type=int, metavar="ID", help="the user's number: the claim sub")
    parser.add_argument("--window", type=_window, default=DEFAULT_WINDOW, metavar="D", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ, clock: Clock = SYSTEM) -> int:
    """Prints the totals; returns the exit code. Messages go to stderr."""
    path = getattr(args, "config", None) or DEFAULT_CONFIG
    try:
        sink = load(path, environ).telemetry.sink
    except OSError as error:
        return _fail(2, f"cannot read {path}: {error.strerror}")
    except ConfigError as error:
        return _fail(1, str(error))
    since = clock.wall() - args.window
    try:
        reader = open_reader(sink)
        try:
            total = usage(reader, args.user, since)
            splits = {name: usage_by(reader, column, args.user, since) for name, column in _SPLITS}
        finally:
            reader.close()
    except StoreMissing as error:
        return _fail(1, f"{error}; proxyd makes it when it starts")
    except StoreError as error:
        return _fail(1, str(error))
    print(_json(args, total, splits) if args.json else _table(args, total, splits))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command alone, as `proxyd usage` runs it."""
    parser = argparse.ArgumentParser(prog="proxyd usage", description="Prints a user's token totals.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _figures(totals: Totals) -> dict[str, int | float]:
    return {
        "transactions": totals.transactions,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.total_tokens,
        "estimated_share": round(totals.estimated_share, 4),
    }


def _json(args: argparse.Namespace, total: Totals, splits: Mapping[str, Mapping[str, Totals]]) -> str:
    document: dict[str, object] = {"user_id": args.user, "window_s": args.window, **_figures(total)}
    for name, parts in splits.items():
        document[f"by_{name}"] = {key: _figures(part) for key, part in parts.items()}
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()


def _table(args: argparse.Namespace, total: Totals, splits: Mapping[str, Mapping[str, Totals]]) -> str:
    """One line for all, then one for each status, model id and tenant."""
    lines = [("", "transactions", "prompt", "completion", "total", "estimated"), _line(f"user {args.user}", total)]
    for name, parts in splits.items():
        lines += [_line(f"{name} {key}", part) for key, part in parts.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _line(label: str, totals: Totals) -> tuple[str, str, str, str, str, str]:
    figures = (totals.transactions, totals.prompt_tokens, totals.completion_tokens, totals.total_tokens)
    transactions, prompt, completion, tokens = (str(figure) for figure in figures)
    return (label, transactions, prompt, completion, tokens, f"{totals.estimated_share:.1%}")


def _window(text: str) -> float:
    try:
        return parse_duration(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(f"{error.message}; {error.remedy}") from None


def _fail(code: int, message: str) -> int:
    print(f"proxyd usage: {message}", file=sys.stderr)
    return code

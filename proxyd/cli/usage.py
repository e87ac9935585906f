"""`proxyd usage`: a user's token totals out of the telemetry store, whether the daemon runs or not.

Owns: the arguments, the table and the exit codes of this command. Must not know: SQL (store/queries does).
Of the file it needs `telemetry.sink`, and the names of models as far as they can be read.
Exit codes: 0 printed, a user without rows included; 1 there is no store yet, or it or the configuration cannot be used;
2 the file cannot be read or the arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

import orjson

from proxyd.cli.output import fail, put
from proxyd.cli.part import read_part
from proxyd.clock import SYSTEM, Clock
from proxyd.config.units import UnitError, format_duration, parse_duration
from proxyd.store.queries import Totals, usage, usage_by
from proxyd.store.schema import StoreError, StoreMissing
from proxyd.store.sink import open_reader, sqlite_path

WHO = "proxyd usage"
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
    part = read_part(WHO, path, {"telemetry": ("sink",)}, environ)
    if isinstance(part, int):
        return part
    sink = part.config.telemetry.sink
    since = clock.wall() - args.window
    try:
        _refuse_unreadable(sink)
        reader = open_reader(sink)
        try:
            total = usage(reader, args.user, since)
            splits = {name: usage_by(reader, column, args.user, since) for name, column in _SPLITS}
        finally:
            reader.close()
    except StoreMissing as error:
        return fail(WHO, 1, f"{error}; proxyd makes it when it starts")
    except (StoreError, OSError) as error:
        return fail(WHO, 1, str(error))
    if getattr(args, "json", False):
        return put(WHO, _json(args, total, splits, part.model_names))
    if not total.transactions:
        return put(WHO, f"no rows for user {args.user} in {format_duration(args.window)}")
    return put(WHO, _table(args, total, splits, part.model_names))


def _refuse_unreadable(sink: str) -> None:
    """Raises StoreError, in words that help, for a store that is another user's: SQLite would say "unable to open"."""
    path = sqlite_path(sink)
    try:
        path.stat()
        if os.access(path, os.R_OK):
            return
    except PermissionError:
        pass
    except OSError:
        return
    raise StoreError(
        f"{path}: may not be read by this user (uid {os.geteuid()}): ask as root or as the daemon's user:"
        " sudo -u proxyd proxyd usage ..."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command alone, as `proxyd usage` runs it."""
    parser = argparse.ArgumentParser(prog="proxyd usage", description="Prints a user's token totals.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _figures(totals: Totals) -> dict[str, int | float | str | None]:
    return {
        "transactions": totals.transactions,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.total_tokens,
        "estimated_share": round(totals.estimated_share, 4),
    }


_Splits = Mapping[str, Mapping[str, Totals]]


def _json(args: argparse.Namespace, total: Totals, splits: _Splits, names: Mapping[int, str]) -> str:
    document: dict[str, object] = {"user_id": args.user, "window_s": args.window, **_figures(total)}
    for name, parts in splits.items():
        document[f"by_{name}"] = {
            key: _figures(part) | ({"name": names.get(int(key))} if name == "model" else {})
            for key, part in parts.items()
        }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()


def _table(args: argparse.Namespace, total: Totals, splits: _Splits, names: Mapping[int, str]) -> str:
    """One line for all, then one for each status, model and tenant; a model has the name of its id in the file."""
    lines = [("", "transactions", "prompt", "completion", "total", "estimated"), _line(f"user {args.user}", total)]
    for name, parts in splits.items():
        for key, part in parts.items():
            known = names.get(int(key)) if name == "model" else None
            lines.append(_line(f"{name} {key}" if known is None else f"model {known} (id {key})", part))
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

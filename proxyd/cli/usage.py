"""`proxyd usage`: the tokens of a user, a tenant or a model out of the telemetry store, whether the daemon runs or not.

Owns: the table, the JSON and the exit codes of this command. Must not know: SQL (store/queries does).
Of the file it needs `telemetry.sink` and its password, and the names of models as far as they can be read.
The counts of a user alone come from the index alone, as the quota's do; the splits below them, and any other question,
read the rows of the window.
Exit codes: 0 printed, a user without rows included; 1 there is no store yet, or it or the configuration cannot be used;
2 the file cannot be read or the arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace

import orjson

from proxyd.cli.output import fail, printable, put
from proxyd.cli.part import SINK, read_part, read_password, refuse_unreadable
from proxyd.clock import SYSTEM, Clock
from proxyd.config.sink import is_mysql
from proxyd.config.units import format_duration
from proxyd.store.queries import SPLITS, Asked, Group, Totals, split, total, usage, user_totals
from proxyd.store.schema import StoreError, StoreMissing, utc_text
from proxyd.store.sink import open_reader

WHO = "proxyd usage"


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ, clock: Clock = SYSTEM) -> int:
    """Prints the totals; returns the exit code. Messages go to stderr."""
    part = read_part(WHO, args.config, SINK, environ)
    if isinstance(part, int):
        return part
    password = read_password(WHO, part, environ)
    if isinstance(password, int):
        return password
    try:
        model_id = None if args.model is None else _model_id(args.model, part.model_names)
    except ValueError as error:
        return fail(WHO, 2, str(error))
    since = max(0.0, clock.wall() - args.window) if args.since is None else args.since
    asked = Asked(since, args.user, args.tenant, model_id)
    sink = part.config.telemetry.sink
    try:
        refuse_unreadable(WHO, sink)
        reader = open_reader(sink, password)
        try:
            # The index is asked first, so that the splits hold at least what the total does.
            in_all = user_totals(reader, args.user, since) if _is_user_alone(asked) else None
            groups = usage(reader, asked)
        finally:
            reader.close()
    except StoreMissing as error:
        # Of MySQL the message itself tells what to run: the daemon makes nothing there.
        remedy = "" if is_mysql(sink) else "; proxyd makes it when it starts, `proxyd schema --apply` at once"
        return fail(WHO, 1, f"{error}{remedy}")
    except (StoreError, OSError) as error:
        return fail(WHO, 1, str(error))
    summed = total(groups)
    in_all = summed if in_all is None else replace(in_all, estimated_tokens=summed.estimated_tokens)
    if args.json:
        return put(WHO, _json(args, asked, in_all, groups, part.model_names))
    label = _label(asked, part.model_names)
    if not in_all.transactions:
        when = f"in {format_duration(args.window)}" if args.since is None else f"since {utc_text(since)} UTC"
        return put(WHO, f"no rows for {label} {when}")
    return put(WHO, _table(label, in_all, groups, part.model_names))


def _is_user_alone(asked: Asked) -> bool:
    return asked.user_id is not None and asked.tenant is None and asked.model_id is None


def _model_id(text: str, names: Mapping[int, str]) -> int:
    """A model's id by its name in the file, else by the number itself. Raises ValueError for neither."""
    for number, name in names.items():
        if name == text:
            return number
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise ValueError(f"the file has no model {text!r}; name one of it, or the number of its rows")


def _label(asked: Asked, names: Mapping[int, str]) -> str:
    parts = []
    if asked.user_id is not None:
        parts.append(f"user {asked.user_id}")
    if asked.tenant is not None:
        parts.append(f"tenant {printable(asked.tenant)}")
    if asked.model_id is not None:
        parts.append(_model(asked.model_id, names))
    return ", ".join(parts)


def _model(number: int, names: Mapping[int, str]) -> str:
    return f"model {printable(names[number])} (id {number})" if number in names else f"model {number}"


def _figures(totals: Totals) -> dict[str, int | float | str | None]:
    return {
        "transactions": totals.transactions,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.total_tokens,
        "estimated_share": round(min(1.0, totals.estimated_share), 4),
    }


def _json(
    args: argparse.Namespace, asked: Asked, in_all: Totals, groups: list[Group], names: Mapping[int, str]
) -> str:
    document: dict[str, object] = {
        "user_id": asked.user_id,
        # An argument may hold bytes that are no UTF-8, and JSON may not.
        "tenant": None if asked.tenant is None else asked.tenant.encode(errors="backslashreplace").decode(),
        "model_id": asked.model_id,
        "since": utc_text(asked.since).replace(" ", "T") + "Z",
        "window_s": args.window if args.since is None else None,
        **_figures(in_all),
    }
    for column in SPLITS:
        document[f"by_{column.removesuffix('_id')}"] = {
            key: _figures(part) | ({"name": names.get(int(key))} if column == "model_id" else {})
            for key, part in split(groups, column).items()
        }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()


def _table(label: str, in_all: Totals, groups: list[Group], names: Mapping[int, str]) -> str:
    """One line for all, then one for each status, model and tenant; a model has the name of its id in the file."""
    lines = [("", "transactions", "prompt", "completion", "total", "estimated"), _line(label, in_all)]
    for column in SPLITS:
        for key, part in split(groups, column).items():
            lines.append(_line(_model(int(key), names) if column == "model_id" else f"{column} {printable(key)}", part))
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
    return (label, transactions, prompt, completion, tokens, f"{min(1.0, totals.estimated_share):.1%}")

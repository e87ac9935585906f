"""README.md and docs/ say what the code has, and nothing that it has not: routes, metrics, options, exit codes,
signals, error codes, columns, log events; links resolve, TOML is valid, commands name what exists."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import signal
import sqlite3
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.cli import check
from proxyd.cli.main import _parser
from proxyd.config.load import parse
from proxyd.config.rules import NOT_YET
from proxyd.dialects.ask import Route
from proxyd.errors import UpstreamErrorKind
from proxyd.host.child import EXIT_CANNOT_BOOT
from proxyd.master.children import EXIT_CRASHED
from proxyd.master.signals import HANDLED
from proxyd.relay.answer import _REFUSALS
from proxyd.relay.states import _ROW_STATUS, Cause, Phase
from proxyd.store.schema import COLUMNS, SQLITE_DDL
from proxyd.telemetry.record import STATUSES
from proxyd.web.exposition import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README, HTTP, RUNNING = PAGES["README.md"], PAGES["docs/http.md"], PAGES["docs/running.md"]
ACCOUNTING, ARCHITECTURE = PAGES["docs/accounting.md"], PAGES["docs/architecture.md"]
EVERYTHING = "\n".join(PAGES.values())
MAKEFILE = (ROOT / "Makefile").read_text()
SOURCES = {path: path.read_text() for path in sorted((ROOT / "proxyd").rglob("*.py"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next of its rank or higher."""
    mark = re.search(rf"^(#+) {re.escape(heading)}$", page, re.MULTILINE)
    assert mark is not None, heading
    rest = page[mark.end() :]
    following = re.search(rf"^#{{1,{len(mark[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def first_cells(text: str) -> list[str]:
    """The words in backticks of each table row's first cell."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("| `"):
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


def fenced(language: str) -> Iterator[tuple[str, str]]:
    for page, text in PAGES.items():
        for found, body in FENCE.findall(text):
            if found == language:
                yield page, body


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command of the pages' shell blocks, as words."""
    for page, body in fenced("sh"):
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip():
                yield page, shlex.split(line, comments=True)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The main parser under "" and each command's own."""
    main = _parser()
    found = {"": main}
    for action in main._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those that people give; a hidden one is the program's own."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return {option for action in shown for option in action.option_strings}


# --- routes ----------------------------------------------------------------------------------------------------------


def routes_in_code() -> set[tuple[str, str]]:
    """Path and method of every route: the relay's table, and what the two aiohttp applications add."""
    found = {(str(route.value), "POST") for route in Route}
    for name in ("app.py", "admin.py"):
        for method, path in re.findall(r'router\.add_(\w+)\("([^"]+)"', SOURCES[ROOT / "proxyd" / "web" / name]):
            found.add((path, method.upper()))
    return found


def test_the_route_tables_are_those_of_the_code():
    told = {
        (path, method) for path, method in re.findall(r"^\| `(/[^`]*)` \| ([A-Z]+) \|", section(HTTP, "Routes"), re.M)
    }
    assert told == routes_in_code()


# --- metrics ---------------------------------------------------------------------------------------------------------


def metric_rows() -> dict[str, tuple[str, set[str]]]:
    rows = re.findall(r"^\| `(proxyd_\w+)` \| (\w+) \| ([^|]*)\|", section(HTTP, "Metrics"), re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_metrics_table_is_that_of_the_code():
    assert metric_rows() == {name: (family.kind, set(family.labels)) for name, family in FAMILIES.items()}


def test_no_page_names_a_metric_that_is_not_there():
    assert set(re.findall(r"`(proxyd_[a-z_]+)", EVERYTHING)) <= set(FAMILIES)


def test_the_kinds_of_upstream_errors_are_told():
    row = next(line for line in HTTP.splitlines() if line.startswith("| `proxyd_upstream_errors_total`"))
    told = set(re.findall(r"`(\w+)`", row)) - {"proxyd_upstream_errors_total", "upstream", "kind", "status_429"}
    assert told == {kind.value for kind in UpstreamErrorKind} - {"no_upstream"}


# --- commands, exit codes, signals -----------------------------------------------------------------------------------


def test_every_command_and_option_of_the_program_is_in_the_readme():
    for name, parser in parsers().items():
        if name:
            assert f"`proxyd {name} " in README, name
        for option in options_of(parser) - {"-h"}:
            assert re.search(rf"`[^`\n]*(?<![\w-]){re.escape(option)}(?![\w-])[^`\n]*`", README), (name, option)


def proxyd_calls() -> Iterator[tuple[str, list[str]]]:
    """Every call of the program in a shell block or in backticks."""
    for page, words in commands():
        if words[0] == "proxyd":
            yield page, words[1:]
    for page, text in PAGES.items():
        for call in re.findall(r"`proxyd ((?:--?[a-z]|[a-z]+ ?)[^`\n]*)`", FENCE.sub("", text)):
            yield page, call.replace("[", " ").replace("]", " ").split()


def test_no_page_calls_the_program_with_words_that_it_does_not_know():
    known = parsers()
    for page, words in proxyd_calls():
        assert words[0].startswith("-") or words[0] in known, (page, words)
        allowed = options_of(known[words[0] if words[0] in known else ""])
        assert {word for word in words if word.startswith("-")} <= allowed, (page, words)


def test_the_make_targets_of_the_pages_exist_and_all_are_told():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    used = {words[words.index("make") + 1] for _, words in commands() if "make" in words}
    used |= set(re.findall(r"`make ([a-z]+)", EVERYTHING))
    assert used <= targets
    listed = re.search(r"`make` lists the targets: (.*?)\.\n", PAGES["docs/development.md"], re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == targets - {"types", "help"}


def test_every_exit_code_is_told_and_no_other():
    ours = {check.OK, check.ERRORS, check.UNREADABLE, EXIT_CANNOT_BOOT, EXIT_CRASHED}
    for page in (README, RUNNING):
        paragraph = next(part for part in page.split("\n\n") if part.startswith("Exit codes:"))
        assert {int(code) for code in re.findall(r"(?<![\w.-])\d+(?![\w.-])", paragraph)} == ours


def test_every_signal_is_told_and_no_other():
    handled = {number.name.removeprefix("SIG") for number in HANDLED}
    rows = "\n".join(line for line in section(README, "Day to day").splitlines() if line.startswith("| `"))
    names = "|".join(number.name.removeprefix("SIG") for number in signal.Signals)
    assert set(re.findall(rf"`({names})`", rows)) == handled
    rows = "\n".join(line for line in section(RUNNING, "Signals").splitlines() if line.startswith("| "))
    assert set(re.findall(rf"\b({names})\b", rows)) == handled


# --- what answers and rows say ---------------------------------------------------------------------------------------


def raised() -> set[tuple[int, str]]:
    """Status and code of each `Refusal(status, "code", ...)` and of the functions that fix one of them."""
    found: set[tuple[int, str]] = {(status, code) for status, code, _, _ in _REFUSALS.values()}
    for text in SOURCES.values():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            words = [one.value for one in node.args if isinstance(one, ast.Constant)]
            if name in ("Refusal", "__init__") and len(words) > 1 and type(words[0]) is int and words[1]:
                found.add((words[0], str(words[1])))
            elif name == "invalid" and words:
                found.add((403, str(words[1]) if len(words) > 1 else "invalid_token"))
            elif name == "_refuse" and len(node.args) >= 2 and isinstance(node.args[1], ast.Constant | ast.JoinedStr):
                code = node.args[2] if len(node.args) > 2 else None
                found.add((400, str(code.value) if isinstance(code, ast.Constant) else "invalid_value"))
    request = ast.parse(SOURCES[ROOT / "proxyd" / "front" / "request.py"])
    for node in request.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_CODES":
            found |= set(ast.literal_eval(node.value).items())
    return found


def test_the_table_of_statuses_is_that_of_the_code():
    told: set[tuple[int, str]] = set()
    for line in section(HTTP, "Statuses").splitlines():
        cells = line.strip("| ").split(" | ")
        if not re.match(r"\d{3}", cells[0]):
            continue
        statuses, codes = [int(one) for one in cells[0].split(", ")], re.findall(r"`(\w+)`", cells[1])
        pairs = zip(statuses, codes, strict=True) if len(statuses) > 1 else ((statuses[0], code) for code in codes)
        told |= set(pairs)
    assert told == raised()


def test_the_columns_of_a_row_are_told():
    assert first_cells(section(ACCOUNTING, "The row")) == ["transaction_id", *COLUMNS]


def test_the_statuses_of_a_row_and_the_causes_are_told():
    text = section(ACCOUNTING, "Statuses")
    assert set(first_cells(text)) == set(STATUSES) == set(_ROW_STATUS.values())
    causes = text[text.index("as `cause`:") :]
    assert set(re.findall(r"`(\w+)`", causes)) - {"cause"} == {cause.value for cause in Cause}


def test_the_phases_are_told():
    assert first_cells(section(ARCHITECTURE, "Phases")) == [phase.name for phase in Phase]


def test_every_event_that_the_pages_name_can_be_logged():
    logged = set()
    for text in SOURCES.values():
        logged |= set(re.findall(r'(?:log|_log)\.\w+\(\s*"([a-z_]+)"', text))
        logged |= set(re.findall(r'_event\("\w+", "([a-z_]+)"', text)) | set(re.findall(r'"event": "([a-z_]+)"', text))
    logged |= {"reload_unavailable", "upgrade_unavailable"}
    worth = re.search(r"^Events worth an alarm: (.*?)\n\n", RUNNING, re.M | re.DOTALL)
    assert worth is not None
    assert set(re.findall(r"`(\w+)`", worth[1])) <= logged


def test_the_access_line_s_fields_are_told():
    told = set(first_cells(section(RUNNING, "Logs")))
    fields = {"time"}
    for path in ("relay/outcome.py", "relay/service.py", "worker/services.py"):
        text = SOURCES[ROOT / "proxyd" / path]
        for found in re.findall(r"(?:fields: dict\[str, Any\] = |log\.access\(\s*)\{(.*?)\n\s+\}", text, re.DOTALL):
            fields |= set(re.findall(r'^\s+"(\w+)":', found, re.M))
        fields |= set(re.findall(r'fields\["(\w+)"\]', text))
    assert told == fields


# --- links, examples -------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_resolve():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
            assert path.exists(), (page, target)
            if anchor:
                assert anchor in anchors(path.read_text()), (page, target)


def test_every_page_can_be_reached_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page}" in README, page


@pytest.mark.parametrize(("page", "text"), list(fenced("toml")))
def test_toml_on_a_page_is_a_valid_configuration(page, text):
    tomllib.loads(text)
    config, findings = parse(text, page, {})
    assert [finding.text() for finding in findings] == []
    assert config is not None


def test_sql_on_a_page_runs_against_the_store_s_tables_and_the_rolling_sum_from_the_index_alone():
    database = sqlite3.connect(":memory:")
    for statement in SQLITE_DDL:
        database.execute(statement)
    blocks = [text for _, text in fenced("sql")]
    assert blocks
    for text in blocks:
        database.execute(text)
    plan = database.execute("EXPLAIN QUERY PLAN " + next(text for text in blocks if "AS total" in text)).fetchall()
    assert "COVERING INDEX idx_sys_ai_user_window" in plan[0][3]


def test_files_that_the_readme_installs_are_there():
    for _, words in commands():
        if words[0] == "install" and not words[-2].startswith("/"):
            assert (ROOT / words[-2]).exists(), words


def test_options_that_do_nothing_yet_are_told_in_the_readme():
    text = section(README, "What it does, and what it does not do yet")
    for table in {str(key[0]) for key in NOT_YET} - {"telemetry"}:
        assert f"`[{table}]`" in text or f"`{table}." in text, table


def test_no_page_names_a_machine_s_own_path():
    assert not re.search(r"/work/|/root/|/home/\w|/tmp/|pypi\.|\.example\.internal", EVERYTHING)

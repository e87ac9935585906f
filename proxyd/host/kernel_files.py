"""The files made from the table in `kernel`: `python -m proxyd.host.kernel_files FOLDER`, in the source tree `.`.

    conf/sysctl.d/60-proxyd.conf      the settings, each with its reason and its danger
    conf/modules-load.d/proxyd.conf   the modules that must be there before them
    docs/kernel.md                    the table between the two marks; the words around it are written by hand

Owns: their text. Must not know: the live kernel. A test compares the files with what is made here.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from proxyd.host.kernel import LEFT_ALONE, MODULES, ON_OUR_SOCKETS, SETTINGS, Judged, Rule, Setting

SYSCTL, MODULES_LOAD, PAGE = "conf/sysctl.d/60-proxyd.conf", "conf/modules-load.d/proxyd.conf", "docs/kernel.md"
BEGIN, END = "<!-- made by proxyd.host.kernel_files -->", "<!-- until here -->"
_WIDTH = 118


def sysctl_text() -> str:
    """conf/sysctl.d/60-proxyd.conf."""
    lines = [
        *_comment("Kernel settings for a node that runs proxyd. Made from proxyd/host/kernel.py: change it there."),
        *_comment(
            "It belongs into /usr/lib/sysctl.d. Files of all sysctl.d folders are read in the order of their names, and"
            " the last line about a setting wins: /etc/sysctl.d/99-yours.conf beats this one. Apply with"
            " `sysctl --system`. `proxyd --check-config` compares what is live, whatever stands in files."
        ),
    ]
    for setting in SETTINGS:
        lines += ["", *_comment(_sentence(setting.why)), *_comment(f"Mind: {setting.danger}.")]
        if setting.since:
            lines += _comment(f"There is none before {setting.since}.")
        if not setting.in_namespace:
            lines += _comment("Once a machine: a container has none.")
        lines.append(f"{setting.name} = {setting.wanted}")
    lines += ["", *_comment("Not set here, on purpose:")]
    for one in LEFT_ALONE:
        value = f" ({one.founding})" if one.founding[:1].isdigit() else ""
        lines += _comment(f"- {one.name}{value}: {one.verdict}. Instead: {one.instead}.", indent="  ")
    return "\n".join([*lines, ""])


def modules_text() -> str:
    """conf/modules-load.d/proxyd.conf."""
    lines = _comment(
        "Modules that must be loaded before /usr/lib/sysctl.d/60-proxyd.conf is applied, or its lines fail. Made from"
        " proxyd/host/kernel.py. A kernel that has them built in needs no line and minds none."
    )
    for name, why in MODULES:
        lines += [*_comment(_sentence(why)), name]
    return "\n".join([*lines, ""])


def table_text() -> str:
    """The tables of docs/kernel.md, between the marks."""
    return "\n".join(
        [
            "### What our file sets",
            "",
            "| setting | ours | founding value | why | mind | source |",
            "|---|---|---|---|---|---|",
            *(_row(setting) for setting in SETTINGS),
            "",
            "### What it leaves alone",
            "",
            *_judged(LEFT_ALONE),
            "",
            "### What is set on our own sockets and in the unit",
            "",
            *_judged(ON_OUR_SOCKETS),
        ]
    )


def page_with_table(page: str) -> str:
    """The page with the tables made anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table_text()}\n\n{END}{after}"


def _row(setting: Setting) -> str:
    how = {Rule.AT_LEAST: ", or more", Rule.AT_MOST: ", or less", Rule.MAXIMUM: "; the last, or less"}
    ours = f"`{setting.wanted}`{how.get(setting.rule, '')}"
    where = "" if setting.in_namespace else "; once a machine"
    since = f"; {setting.since}" if setting.since else ""
    cells = (setting.founding or "not named", setting.why, setting.danger, f"{setting.source}{where}{since}")
    return f"| `{setting.name}` | {ours} | {' | '.join(cells)} |"


def _judged(ones: Sequence[Judged]) -> Iterator[str]:
    yield "| name | founding value | judged | instead | source |"
    yield "|---|---|---|---|---|"
    for one in ones:
        yield f"| `{one.name}` | {one.founding} | {one.verdict} | {one.instead} | {one.source} |"


def _sentence(text: str) -> str:
    first = text.split()[0]
    is_name = "." in first or "(" in first
    return f"{text if is_name else text[0].upper() + text[1:]}."


def _comment(text: str, indent: str = "") -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - len(indent), break_on_hyphens=False, break_long_words=False)
    return [f"# {indent if number else ''}{line}" for number, line in enumerate(lines)]


def main(argv: Sequence[str]) -> int:
    """Writes the files below the folder."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m proxyd.host.kernel_files FOLDER\n")
        return 2
    root = Path(argv[0])
    for name, text in ((SYSCTL, sysctl_text()), (MODULES_LOAD, modules_text())):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    page = root / PAGE
    if page.exists():
        page.write_text(page_with_table(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

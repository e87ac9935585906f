"""The schema, conf/proxyd.toml and docs/configuration.md tell the same options, defaults and reload classes."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from proxyd.config import rules, schema
from proxyd.config.load import parse, toml

ROOT = Path(__file__).resolve().parents[3]
CONF = (ROOT / "conf" / "proxyd.toml").read_text()
DOCS = (ROOT / "docs" / "configuration.md").read_text()

SECTIONS: dict[str, type[BaseModel]] = {
    "server": schema.Server,
    "http": schema.Http,
    "auth": schema.Auth,
    "quota": schema.Quota,
    "limits": schema.Limits,
    "upstream": schema.UpstreamConfig,
    "model": schema.ModelConfig,
    "stream": schema.Stream,
    "telemetry": schema.Telemetry,
    "monitoring": schema.Monitoring,
    "log": schema.LogOptions,
    "demo": schema.Demo,
}
# Options that have no default, or whose default would show nothing; conf/ marks each of them as an example.
EXAMPLES = {"upstream.name", "upstream.url", "upstream.api_key_file", "model.name", "model.id", "model.upstreams"}
# [limits.tenants.NAME] stands in conf/ as a comment, since any name would be one of somebody's tenants.
IN_A_COMMENT = {"limits.tenants"}

OPTIONS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def field(option: str) -> Any:
    section, name = option.split(".")
    return SECTIONS[section].model_fields[name]


def in_conf(option: str) -> Any:
    section, name = option.split(".")
    table = tomllib.loads(CONF)[section]
    return (table[0] if isinstance(table, list) else table)[name]


def test_every_section_of_the_schema_is_known_here():
    assert set(SECTIONS) == set(schema.Config.model_fields)


def test_the_shipped_file_is_accepted_without_any_finding():
    config, findings = parse(CONF, "conf/proxyd.toml", {})
    assert findings == []
    assert config is not None


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - EXAMPLES - IN_A_COMMENT))
def test_the_shipped_file_has_each_option_with_its_default(option):
    assert in_conf(option) == field(option).default


@pytest.mark.parametrize("option", sorted(EXAMPLES))
def test_the_shipped_file_marks_examples(option):
    name = option.split(".")[1]
    lines = CONF.splitlines()
    table = lines.index(f"[[{option.split('.')[0]}]]")
    place = next(index for index in range(table, len(lines)) if lines[index].startswith(f"{name} = "))
    assert "(example" in lines[place - 1] or "(example" in lines[place - 2]


def test_the_shipped_file_has_no_option_that_the_schema_lacks():
    document = tomllib.loads(CONF)
    named = {
        f"{section}.{name}"
        for section, table in document.items()
        for name in (table[0] if isinstance(table, list) else table)
    }
    assert named == set(OPTIONS) - IN_A_COMMENT
    assert "#   [limits.tenants.acme]" in CONF


def test_the_shipped_file_comments_every_table_and_names_what_is_left_out():
    assert "[tasks], [gateway] and [bus]" in CONF
    for match in re.finditer(r"^([a-z_]+) = ", CONF, re.MULTILINE):
        before = CONF[: match.start()].splitlines()[-3:]
        assert any(line.startswith(("#", "[")) for line in before), match[1]


def test_every_option_says_what_it_means_and_when_it_is_read_again():
    for option in OPTIONS:
        info = field(option)
        assert info.description, option
        assert info.json_schema_extra["reload"] in ("reload", "restart"), option


def test_every_option_is_read_by_somebody_or_warned_about():
    """An option that no room reads promises what nobody does: it works, or rules.NOT_YET says that it does not."""
    readers = [
        path for path in (ROOT / "proxyd").rglob("*.py") if path.name not in ("schema.py", "values.py", "load.py")
    ]
    text = "\n".join(path.read_text() for path in readers if path.name != "rules.py" or path.parent.name != "config")
    if re.search(r"\.for_tenant\(", text):
        text += " .concurrent_streams .requests_per_minute .tokens_per_minute .tenants"
    unread = {option for option in OPTIONS if not re.search(rf"\.{option.split('.')[1]}\b", text)}
    assert unread <= {".".join(map(str, key)) for key in rules.NOT_YET}


def rows() -> dict[str, list[str]]:
    """The table rows of the page: option -> its cells."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in DOCS.splitlines():
        heading = re.fullmatch(r"## `\[+([a-z]+)\]+`.*", line)
        if heading:
            section = heading[1]
        row = re.fullmatch(r"\| `([a-z_]+)` \| (.*) \|", line)
        if row and section:
            found[f"{section}.{row[1]}"] = row[2].split(" | ")
    return found


def test_the_page_has_a_row_for_each_option_and_no_other():
    assert set(rows()) == set(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_page_tells_the_default_and_the_reload_class(option):
    info = field(option)
    default, _unit, reload_class, meaning = rows()[option]
    expected = "required" if info.is_required() else "none" if info.default == {} else f"`{toml(info.default)}`"
    assert default == expected
    assert reload_class == info.json_schema_extra["reload"]
    assert meaning

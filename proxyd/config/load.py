"""From a TOML text to a `Config`, with every finding at once and the line of each.

Owns: the order of checks and the wording of schema findings. Must not know: secrets, the host.
Invariant: `parse` touches no file and never raises for any text; `None` is returned exactly when a finding is an error.

    text -> tomllib -> schema (pydantic) -> rules -> Config
                          | errors
                          +-> the same document with the bad options taken out, so that the rules still see the rest

A bad option must not hide the other faults: an operator who fixes a file wants one list, not one finding a run.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proxyd.config import rules
from proxyd.config.locate import KeyPath, Lines, locate
from proxyd.config.schema import Config
from proxyd.config.secrets import key_text
from proxyd.config.syntax import diagnose
from proxyd.errors import ConfigError, Finding

# A configuration is some pages of text. Half: nobody would notice; twice: a wrong path (a log) is parsed for seconds.
MAX_FILE_BYTES = 1024 * 1024

# What may be repeated of a key: no option has a longer name, nor other characters; a tenant's is shown with its slip.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_NAME_OF_ANY_LENGTH = re.compile(r"[A-Za-z0-9_-]+")
_TENANT = re.compile(r"[\w. -]{1,64}")

_KINDS = {"str": "a string", "bool": "true or false", "int": "an integer", "float": "a number",
          "list": "a list", "tuple": "a list", "dict": "a table", "NoneType": "nothing"}  # fmt: skip
_WANTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "tuple_type": "a list in brackets",
    "list_type": "a list in brackets",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
}


def load(path: str, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in a file. Raises ConfigError with all findings, or OSError when the file cannot be read."""
    config, findings = parse(read_text(path), path, environ)
    if config is None:
        raise ConfigError(findings)
    return config


@dataclass(frozen=True, slots=True)
class Part:
    """Some options of a file whose other options may be wrong.

    `config` holds what was asked for, and defaults elsewhere. `model_names`: id to name, as far as the file tells.
    """

    config: Config
    model_names: dict[int, str]
    errors_elsewhere: int


def load_part(path: str, wanted: Mapping[str, tuple[str, ...]], environ: Mapping[str, str] = os.environ) -> Part:
    """Some sections of a file, each with the options that are wanted of it (none named: all of them).

    Raises ConfigError with the findings about these, OSError when the file cannot be read.
    """
    text = read_text(path)
    document, broken = _document(text, path)
    if document is None:
        raise ConfigError(broken)
    lines = locate(text)
    some: dict[str, Any] = {}
    for section, options in wanted.items():
        table = document.get(section, {})
        if options and isinstance(table, dict):
            table = {name: value for name, value in table.items() if name in options}
        some[section] = table
    finder = _Finder(path, lines, document)
    config = finder.validate(some)
    if config is not None:
        config.remember_origin(path, lines)
        finder.add_all(problem for problem in rules.check_part(config) if problem.key[0] in wanted)
    failed = [finding for finding in finder.findings if finding.severity == "error"]
    if config is None or failed:
        raise ConfigError(failed)
    elsewhere = sum(finding.severity == "error" for finding in parse(text, path, environ)[1])
    return Part(config, _model_names(document), elsewhere)


def _model_names(document: dict[str, Any]) -> dict[int, str]:
    models = document.get("model")
    entries = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
    return {
        one["id"]: one["name"]
        for one in entries
        if type(one.get("id")) is int and isinstance(one.get("name"), str) and one["name"].isprintable()
    }


def read_text(path: str) -> str:
    """The file's text; bytes that are no UTF-8 stay visible as lone surrogates for `parse` to report."""
    with Path(path).open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1).decode("utf-8", "surrogateescape")


def parse(text: str, path: str, environ: Mapping[str, str] = os.environ) -> tuple[Config | None, list[Finding]]:
    """The configuration in a text, which `path` names in findings. Findings are in the order of their lines."""
    document, broken = _document(text, path)
    if document is None:
        return None, broken
    lines = locate(text)
    finder = _Finder(path, lines, document)
    config = finder.validate(document)
    if config is not None:
        config.remember_origin(path, lines)
        finder.add_all(rules.check(config, environ))
    findings = sorted(finder.findings, key=lambda finding: (finding.line, finding.key))
    failed = any(finding.severity == "error" for finding in findings)
    return (None if failed else config), findings


def _document(text: str, path: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The TOML document, or the one finding that says why it is none."""

    def broken(line: int, message: str, remedy: str) -> tuple[None, list[Finding]]:
        return None, [Finding("error", path, line, "", message, remedy)]

    if len(text) > MAX_FILE_BYTES:
        return broken(1, f"larger than {MAX_FILE_BYTES} bytes", "is this the right file?")
    stray = re.search(r"[\ud800-\udfff]", text)
    if stray is not None:
        return broken(text.count("\n", 0, stray.start()) + 1, "not UTF-8", "save the file as UTF-8")
    try:
        return tomllib.loads(text), []
    except tomllib.TOMLDecodeError as error:
        # tomllib quotes the key that it met twice, never a value.
        slip = diagnose(text, str(error))
        return broken(slip.line, slip.message, slip.remedy)
    except RecursionError:
        return broken(1, "nested too deeply", "no option needs it")


class _Finder:
    """Findings of one document."""

    def __init__(self, path: str, lines: Lines, document: dict[str, Any]) -> None:
        self.path = path
        self.lines = lines
        self.document = document
        self.findings: list[Finding] = []
        self.bad: set[KeyPath] = set()

    def add(self, severity: rules.Severity, key: KeyPath, message: str, remedy: str) -> None:
        name = self.name(key)
        shown = key_text(shown_key(key))
        self.findings.append(Finding(severity, self.path, self.line(key), shown, message, remedy, name))

    def add_all(self, problems: Iterable[rules.Problem]) -> None:
        for one in problems:
            if not any(map(self.is_known_bad, (one.key, *one.rests_on))):
                self.add(one.severity, one.key, one.message, one.remedy)

    def name(self, key: KeyPath) -> str:
        """The name of the upstream or model that holds the key, if the file gives it a usable one."""
        if len(key) < 2 or key[0] not in ("upstream", "model"):
            return ""
        try:
            name = self.document[key[0]][key[1]]["name"]
        except (KeyError, IndexError, TypeError):
            return ""
        return name if isinstance(name, str) and re.fullmatch(r"[!-~]{1,64}", name) else ""

    def line(self, key: KeyPath) -> int:
        """The line of a key or of what encloses it; 1 when the file mentions neither."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return 1

    def is_known_bad(self, key: KeyPath) -> bool:
        """True when a finding about this option, or about one around or inside it, exists already."""
        return any(key[: len(bad)] == bad or bad[: len(key)] == key for bad in self.bad)

    def validate(self, document: dict[str, Any]) -> Config | None:
        """The validated document; with errors, what validates once the bad options are taken out."""
        try:
            return Config.model_validate(document)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        for one in errors:
            self.report(one, document)
        try:
            return Config.model_validate(_without(document, errors))
        except ValidationError:
            return None

    def report(self, error: ErrorDetails, document: dict[str, Any]) -> None:
        """One schema error in our words; the value is repeated only for words out of a fixed choice."""
        key: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
        if key in self.bad:
            return
        self.bad.add(key)
        context = error.get("ctx", {})
        kind = error["type"]
        if kind == "refused":
            self.add("error", key, context["message"], context["remedy"])
        elif kind == "extra_forbidden":
            is_later = len(key) == 1 and key[0] in _LATER
            message = "unknown key: not part of this version" if is_later else "unknown key"
            self.add("error", key, message, "remove the table" if is_later else _nearest(key))
        elif kind == "missing":
            self.add("error", key, "is missing", f"add it: {_example(key)}")
        elif kind == "literal_error":
            got = error["input"] if isinstance(error["input"], str) and len(error["input"]) <= 40 else None
            message = f'"{got}" is not one of the choices' if got is not None else "is not one of the choices"
            self.add("error", key, message, f"write {context['expected']}".replace("'", '"'))
        elif kind in _WANTED:
            got = _KINDS.get(type(error["input"]).__name__, "something else")
            self.add("error", key, f"must be {_WANTED[kind]}, not {got}", f"for example: {_example(key)}")
        else:
            self.add("error", key, error["msg"][:1].lower() + error["msg"][1:], f"for example: {_example(key)}")


def shown_key(key: KeyPath) -> KeyPath:
    """The key as it may be repeated: somebody will have pasted an address with its password before the `=`."""
    return tuple(
        part if isinstance(part, int) or _is_tellable(key[:at], part) else _masked(part) for at, part in enumerate(key)
    )


def _is_tellable(around: KeyPath, part: str) -> bool:
    return (_TENANT if around == ("limits", "tenants") else _NAME).fullmatch(part) is not None


def _masked(part: str) -> str:
    """Of a long name its beginning, of anything else its length."""
    return f"{part[:8]}..." if _NAME_OF_ANY_LENGTH.fullmatch(part) else f"<{len(part)} characters>"


def _without(document: dict[str, Any], errors: Iterable[ErrorDetails]) -> dict[str, Any]:
    """A copy in which every bad option is gone, and every missing or bad required one has a harmless value."""
    repaired = copy.deepcopy(document)
    for place, error in enumerate(errors):
        loc = [part for part in error["loc"] if part != "[key]"]
        if loc[:2] == ["server", "listen"] and len(loc) == 3:
            # Port 0 is in nobody's way: the other addresses are still compared with each other.
            repaired["server"]["listen"][loc[2]] = "127.0.0.1:0"
            continue
        # The option itself, not the element of its list.
        while len(loc) > 1 and isinstance(loc[-1], int) and loc[0] not in ("upstream", "model"):
            loc.pop()
        if loc[0] in ("upstream", "model") and len(loc) > 3:
            loc = loc[:3]
        holder: Any = repaired
        for part in loc[:-1]:
            try:
                holder = holder[part]
            except (KeyError, IndexError, TypeError):
                holder = None
                break
        last = loc[-1]
        if isinstance(holder, list) and isinstance(last, int):
            holder[last] = {}
            loc.append("")
        elif isinstance(holder, dict):
            holder.pop(last, None)
        if loc[0] in ("upstream", "model") and len(loc) == 3:
            _fill(repaired, str(loc[0]), loc[1], place)
    return repaired


def _fill(document: dict[str, Any], kind: str, index: Any, place: int) -> None:
    """Gives one [[upstream]] or [[model]] the required options that it lacks."""
    entry = document[kind][index]
    if not isinstance(entry, dict):
        return
    entry.setdefault("name", f"{rules.UNNAMED}{place}")
    if kind == "upstream":
        entry.setdefault("url", "https://unnamed.invalid")
    else:
        entry.setdefault("id", 65535 - place)
        entry.setdefault("upstreams", ["unnamed"])


def _model_at(key: KeyPath) -> type[BaseModel] | None:
    """The schema of the table that holds `key`."""
    model: type[BaseModel] = Config
    for part in key[:-1]:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        if info is None:
            # A tenant's name: the table below [limits.tenants].
            continue
        inner = _inner_model(info.annotation)
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as tuple[UpstreamConfig, ...] or dict[str, TenantLimits]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument)
        if inner is not None:
            return inner
    return None


# Tables of the contract that belong to later versions.
_LATER = ("tasks", "gateway", "bus")
# Keys that people expect, and where what they want is.
_HINTS = {
    "api_key": "put the key into a file and name it with api_key_file",
    "key": "put the key into a file and name it with api_key_file",
    "secret": "put the secret into a file and name it with secret_file",
    "password": "put the password into a file and name it with password_file",
}


def _nearest(key: KeyPath) -> str:
    """What an unknown key was probably meant to be."""
    model = _model_at(key)
    name = str(key[-1])
    if model is None:
        return "remove it"
    here = list(model.model_fields)
    if name in _HINTS:
        return _HINTS[name]
    close = difflib.get_close_matches(name.lower(), here, n=1, cutoff=0.6)
    if close:
        return f"did you mean {_as_written(close[0], model)}?"
    for section, info in Config.model_fields.items():
        inner = _inner_model(info.annotation)
        if inner is not None and inner is not model and name in inner.model_fields:
            return f"did you mean {name} in {_as_written(section, Config)}?"
    near = difflib.get_close_matches(name.lower(), here, n=1, cutoff=0.5)
    if near:
        return f"remove it; the nearest known key is {_as_written(near[0], model)}"
    return f"remove it; known here: {', '.join(_as_written(one, model) for one in here)}"


def _as_written(name: str, model: type[BaseModel]) -> str:
    """A key, or a table in its brackets."""
    if model is not Config:
        return name
    return f"[[{name}]]" if name in ("upstream", "model") else f"[{name}]"


_EXAMPLES = {
    "name": 'name = "openai"',
    "url": 'url = "https://api.openai.com/v1"',
    "id": "id = 1",
    "upstreams": 'upstreams = ["openai"]',
}


def _example(key: KeyPath) -> str:
    """The option as the file could write it."""
    names = [part for part in shown_key(key) if isinstance(part, str)]
    name = names[-1]
    if key[0] == "model" and name == "name":
        return 'name = "gpt-4o-mini"'
    if name in _EXAMPLES and key[0] in ("upstream", "model"):
        return _EXAMPLES[name]
    if len(key) <= 2 and name in Config.model_fields:
        return f"[[{name}]]" if name in ("upstream", "model") else f"[{name}]"
    model = _model_at(tuple(names))
    info = model.model_fields.get(name) if model is not None else None
    return f"{name} = {toml(info.default)}" if info is not None else name


def toml(value: Any) -> str:
    """A default of the schema as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(one) for one in value) + "]"
    return str(value)

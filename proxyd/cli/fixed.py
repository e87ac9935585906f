"""The options that only a restart changes: what they were when the node started, and which of them differ now.

Owns the comparison and its words. Must not know reloads, files or processes. The values go from one image of the
program to the next as text and digest, so that nothing secret is in what is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from proxyd.config.schema import Config, Section
from proxyd.config.sink import has_password
from proxyd.config.values import Listen

RESTART = "restart"


def fixed_options(config: Config) -> dict[str, list[str]]:
    """Option to (what may be shown, a digest of the value), for each option of the reload class "restart"."""
    return {key: [_shown(value), _digest(value)] for key, value in _values(config)}


def differences(before: Mapping[str, Any], config: Config) -> list[str]:
    """One line for each option that differs, with its line in the file. Options that `before` does not know were not
    there when the node started: they hold nothing yet, and are passed over."""
    told = []
    for key, (shown, digest) in fixed_options(config).items():
        old = before.get(key)
        if old is None or old[1] == digest:
            continue
        section, _, option = key.partition(".")
        line = config.line_of(section, option)
        was, now = (old[0], shown) if old[0] != shown else (f"{old[0]} (another password)", shown)
        change = f"was {was} at the start, is {now} now; only a restart changes that"
        told.append(f"error {config.file}:{line} {key}: {change}")
    return told


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    for section in type(config).model_fields:
        table = getattr(config, section)
        if not isinstance(table, Section):
            continue
        for option, field in type(table).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("reload") == RESTART:
                yield f"{section}.{option}", getattr(table, option)


def _text(value: Any) -> str:
    return value.text if isinstance(value, Listen) else str(value)


def _shown(value: Any) -> str:
    text = _text(value)
    if has_password(text):
        parts = urlsplit(text)
        return text.replace(parts.netloc, f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}", 1)
    return text or '""'


def _digest(value: Any) -> str:
    return hashlib.blake2b(_text(value).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

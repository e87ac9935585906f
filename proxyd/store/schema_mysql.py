"""The store's tables in MySQL and MariaDB: their DDL, and how a live schema differs from them.

Owns: columns, types, indexes, and what is told and created when one of them is missing. Must not know: connections;
whoever asks runs `INSPECT` and hands the answers to `compare`.
Invariants: one description gives both the DDL and the comparison; the syntax is MariaDB 10.11's and MySQL 8's alike;
nothing that exists is ever altered: a column of another type is named, a missing one is added.

  sys_ai_transactions    the rows, exactly the contract's columns
  sys_ai_spool_offsets   per node and spool stream: how far its records are in the table
  sys_ai_spool_open      transactions begun in a segment that is gone and not yet ended
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Tenants and upstreams may hold any character; the server's own default is latin1 in MariaDB.
CHARSET, COLLATION = "utf8mb4", "utf8mb4_unicode_ci"


class Column(NamedTuple):
    """`fill`: what rows get that were there before the column was added; "" for a column that is never added."""

    name: str
    type: str
    more: str = "NOT NULL"
    fill: str = ""

    @property
    def ddl(self) -> str:
        return f"{self.name} {self.type} {self.more}"

    @property
    def kind(self) -> str:
        """The type without its character set, in the words of information_schema."""
        return self.type.partition(" CHARACTER")[0].lower()

    @property
    def added_ddl(self) -> str:
        """For a table that is there already: its own character set may be any, ours is said at each text column."""
        is_ours = self.type.startswith("VARCHAR") and "CHARACTER SET" not in self.type
        text = f" CHARACTER SET {CHARSET} COLLATE {COLLATION}" if is_ours else ""
        return f"{self.name} {self.type}{text} {self.more} DEFAULT {self.fill}"


class Table(NamedTuple):
    """`indexes`: name to columns; the primary key is the index PRIMARY."""

    name: str
    columns: tuple[Column, ...]
    indexes: dict[str, tuple[str, ...]]

    @property
    def ddl(self) -> str:
        lines = [column.ddl for column in self.columns]
        for name, columns in self.indexes.items():
            lines.append(f"{'PRIMARY KEY' if name == 'PRIMARY' else f'KEY {name}'} ({', '.join(columns)})")
        body = ",\n  ".join(lines)
        options = f"ENGINE=InnoDB DEFAULT CHARSET={CHARSET} COLLATE={COLLATION}"
        return f"CREATE TABLE {self.name} (\n  {body}\n) {options}"


TRANSACTIONS = Table(
    "sys_ai_transactions",
    (
        Column("transaction_id", "BIGINT UNSIGNED", "NOT NULL AUTO_INCREMENT"),
        Column("user_id", "BIGINT UNSIGNED"),
        Column("model_id", "SMALLINT UNSIGNED"),
        Column("prompt_tokens", "INT UNSIGNED"),
        Column("completion_tokens", "INT UNSIGNED"),
        Column("created_at", "TIMESTAMP", "NOT NULL DEFAULT CURRENT_TIMESTAMP"),
        # The founding table ended here; the others are added to it, and its rows get what they were.
        Column("tenant", "VARCHAR(64)", fill="'default'"),
        Column("request_id", "VARCHAR(64) CHARACTER SET ascii", fill="''"),
        Column("status", "VARCHAR(16)", fill="'completed'"),
        Column("estimated", "TINYINT", fill="0"),
        Column("cached_tokens", "INT UNSIGNED", fill="0"),
        Column("reasoning_tokens", "INT UNSIGNED", fill="0"),
        Column("upstream", "VARCHAR(64)", fill="''"),
        Column("attempts", "TINYINT", fill="1"),
        Column("ttft_ms", "INT UNSIGNED", fill="0"),
        Column("duration_ms", "INT UNSIGNED", fill="0"),
    ),
    {
        "PRIMARY": ("transaction_id",),
        # Holds all that the rolling sum reads, so that it never touches the table.
        "idx_sys_ai_user_window": ("user_id", "created_at", "prompt_tokens", "completion_tokens"),
        # Retention finds the oldest rows by it; without it each hourly pass would read the whole table.
        "idx_sys_ai_created": ("created_at",),
    },
)
OFFSETS = Table(
    "sys_ai_spool_offsets",
    (
        Column("node", "CHAR(16) CHARACTER SET ascii"),
        Column("stream", "VARCHAR(64) CHARACTER SET ascii"),
        Column("segment", "BIGINT UNSIGNED"),
        Column("position", "BIGINT UNSIGNED"),
        Column("finished", "TINYINT"),
    ),
    {"PRIMARY": ("node", "stream")},
)
OPEN = Table(
    "sys_ai_spool_open",
    (
        Column("node", "CHAR(16) CHARACTER SET ascii"),
        Column("stream", "VARCHAR(64) CHARACTER SET ascii"),
        Column("txn", "BIGINT UNSIGNED"),
        Column("intent", "BLOB"),
        Column("checkpoint", "BLOB"),
    ),
    {"PRIMARY": ("node", "stream", "txn")},
)
TABLES = (TRANSACTIONS, OFFSETS, OPEN)
MYSQL_DDL: tuple[str, ...] = tuple(table.ddl for table in TABLES)

_OURS = ", ".join(f"'{table.name}'" for table in TABLES)
_COLUMNS = "table_name, column_name, column_type, is_nullable, column_default, character_set_name, extra"
_WHERE = f"WHERE table_schema = DATABASE() AND table_name IN ({_OURS})"
# S608: the names are constants of this module.
INSPECT: tuple[str, str, str] = (
    f"SELECT table_name, table_type, engine FROM information_schema.tables {_WHERE}",  # noqa: S608
    f"SELECT {_COLUMNS} FROM information_schema.columns {_WHERE} ORDER BY ordinal_position",  # noqa: S608
    f"SELECT table_name, index_name, column_name FROM information_schema.statistics {_WHERE} ORDER BY seq_in_index",  # noqa: S608
)


class Finding(NamedTuple):
    """One difference. `statement` creates what is missing, None where nothing may be done without a person.

    `stops`: rows could not be stored, or not exactly once; the others only make queries slow.
    """

    subject: str
    complaint: str
    statement: str | None
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.subject} {self.complaint}"


class _Live(NamedTuple):
    """One column as it is."""

    type: str
    is_nullable: bool
    default: str | None
    charset: str | None
    extra: str


def compare(tables: Sequence[Any], columns: Sequence[Any], indexes: Sequence[Any]) -> list[Finding]:
    """All differences between the wanted schema and the answers to `INSPECT`; empty when there is none."""
    live = {name: (kind, engine) for name, kind, engine in tables}
    findings: list[Finding] = []
    for table in TABLES:
        if table.name not in live:
            findings.append(Finding(f"table {table.name}", "is missing", table.ddl))
            continue
        kind, engine = live[table.name]
        if kind != "BASE TABLE" or str(engine).lower() != "innodb":
            found = f"a {engine} table" if kind == "BASE TABLE" else f"a {str(kind).lower()}"
            findings.append(Finding(f"table {table.name}", f"is {found} and must be an InnoDB table", None))
            continue
        there = {
            str(name): _Live(_text(kind).lower(), nullable == "YES", default, charset, _text(extra).lower())
            for of, name, kind, nullable, default, charset, extra in columns
            if of == table.name
        }
        keys: dict[str, list[str]] = {}
        for of, name, column in indexes:
            if of == table.name:
                keys.setdefault(str(name), []).append(str(column))
        findings.extend(_columns(table, there))
        findings.extend(_indexes(table, there, keys))
    return findings


def _columns(table: Table, there: dict[str, _Live]) -> Iterator[Finding]:
    missing = [column for column in table.columns if column.name not in there]
    added = [column for column in missing if column.fill]
    if added and len(added) == len(missing):
        parts = ", ".join(f"ADD COLUMN {column.added_ddl}" for column in added)
        names = ", ".join(column.name for column in added)
        words = "is missing" if len(added) == 1 else "are missing"
        yield Finding(
            f"column{'s' if len(added) > 1 else ''} {names} of {table.name}", words, f"ALTER TABLE {table.name} {parts}"
        )
    else:
        for column in missing:
            yield Finding(f"column {column.name} of {table.name}", "is missing: somebody else's table?", None)
    for column in table.columns:
        live = there.get(column.name)
        if live is None:
            continue
        subject = f"column {column.name} of {table.name}"
        if not _fits(live.type, column.kind):
            yield Finding(subject, f"is {live.type} and must be {column.kind}", None)
        elif column.name in ("tenant", "upstream") and live.charset not in (None, "utf8mb4"):
            yield Finding(subject, f"has the character set {live.charset} and must have utf8mb4", None)
        elif "AUTO_INCREMENT" in column.more and "auto_increment" not in live.extra:
            yield Finding(subject, "is not AUTO_INCREMENT", None)
    for name in there.keys() - {column.name for column in table.columns}:
        live = there[name]
        if not live.is_nullable and live.default is None and not re.search("generated|auto_increment", live.extra):
            yield Finding(f"column {name} of {table.name}", "is not proxyd's, NOT NULL and without a default", None)


def _indexes(table: Table, there: dict[str, _Live], keys: dict[str, list[str]]) -> Iterator[Finding]:
    for name, columns in table.indexes.items():
        found = keys.get(name)
        words = ", ".join(columns)
        if name == "PRIMARY":
            if found != list(columns) and there.keys() >= set(columns):
                yield Finding(f"the primary key of {table.name}", f"is ({', '.join(found or ())}), not ({words})", None)
        elif found is None:
            statement = f"CREATE INDEX {name} ON {table.name} ({words})"
            yield Finding(f"index {name}", "is missing", statement, stops=False)
        elif tuple(found[: len(columns)]) != columns:
            yield Finding(f"index {name}", f"is on ({', '.join(found)}), not on ({words})", None, stops=False)


_INTEGERS = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "integer": 32, "bigint": 64}


def _fits(live: str, wanted: str) -> bool:
    """True when every value of the wanted type that we write (none is negative) has room in the live one."""
    wanted_bits, live_bits = _bits(wanted), _bits(live)
    if wanted_bits:
        return live_bits >= wanted_bits
    wanted_text, live_text = (re.match(r"(?:var)?char\((\d+)\)", kind) for kind in (wanted, live))
    if wanted_text:
        return live_text is not None and int(live_text[1]) >= int(wanted_text[1])
    if wanted == "blob":
        return live in ("blob", "mediumblob", "longblob")
    return live.partition("(")[0] == wanted


def _bits(kind: str) -> int:
    """Bits of the largest number of an integer type; 0 for other types. MariaDB says bigint(20), MySQL 8 bigint."""
    found = re.match(r"([a-z]+)(?:\(\d+\))?( unsigned)?", kind)
    bits = _INTEGERS.get(found[1], 0) if found else 0
    return bits if not bits or (found and found[2]) else bits - 1


def _text(value: Any) -> str:
    """MySQL 8 gives some of these columns as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value or "")

"""The reading side of a MySQL sink: blocking, for commands, whether the daemon runs or not.

Owns: a PyMySQL connection, `?` parameters in MySQL's dialect, errors in words. Must not know: what is asked.
Bounds: CONNECT_S to connect, READ_S for an answer.
Invariant: the session's times are UTC, whatever the server's zone is, and answers have all their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pymysql
from pymysql.constants import CR, ER, FIELD_TYPE
from pymysql.converters import conversions

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.schema import StoreError, StoreMissing, utc_text

CONNECT_S = 5
# A bill over a year of rows may take this long; ten times more is a server that does not answer.
READ_S = 120
# Of sql_select_limit, which a server may have at 1 for everybody. DEFAULT would be the server's value again.
ALL_ROWS = 2**64 - 1
_REMEDY = {
    ER.ACCESS_DENIED_ERROR: "correct the user in telemetry.sink, telemetry.password_file or the user's rights",
    ER.DBACCESS_DENIED_ERROR: "give the user its rights on the database (conf/mysql)",
    ER.BAD_DB_ERROR: "create it (conf/mysql), then run `proxyd schema --apply`",
    ER.NO_SUCH_TABLE: "run `proxyd schema --apply`",
    CR.CR_CONN_HOST_ERROR: "is the server running, is the address right?",
    CR.CR_CONNECTION_ERROR: "is the server running, is the address right?",
}
# A server's message may be as long as it likes.
_MAX_TEXT = 300


def explained(address: MysqlAddress, error: BaseException) -> str:
    """The error in one line: where, what the server said, its number, what to do. Never a password: the server and
    the drivers do not have it in their messages."""
    number, text = number_and_text(error)
    remedy = _REMEDY.get(number)
    return f"{address}: {text}{f' (error {number})' if number else ''}{f'; {remedy}' if remedy else ''}"


def number_and_text(error: BaseException) -> tuple[int, str]:
    """MySQL's error number, 0 for what has none, and its message, printable and bounded."""
    arguments = error.args
    number = arguments[0] if arguments and isinstance(arguments[0], int) else 0
    if len(arguments) > 1:
        text = str(arguments[1])
    else:
        text = str(error) or type(error).__name__
    plain = "".join(char if char.isprintable() else "?" for char in text)
    return number, plain if len(plain) <= _MAX_TEXT else f"{plain[:_MAX_TEXT]}..."


def connect(address: MysqlAddress, *, read_timeout: float | None = READ_S) -> pymysql.Connection:
    """A session in UTC. Raises StoreMissing for a database that is not there, StoreError otherwise."""
    try:
        connection = pymysql.connect(
            **address.arguments(), database=address.database, autocommit=True, conv=_CONVERSIONS,
            connect_timeout=CONNECT_S, read_timeout=CONNECT_S, write_timeout=READ_S,
            init_command=f"SET time_zone = '+00:00', sql_select_limit = {ALL_ROWS}",
        )  # fmt: skip
    except (pymysql.Error, OSError, RuntimeError) as error:
        missing = number_and_text(error)[0] == ER.BAD_DB_ERROR
        raise (StoreMissing if missing else StoreError)(explained(address, error)) from error
    # The greeting of a server that hangs is waited for as long as a connection, not as long as an answer.
    connection._read_timeout = read_timeout
    return connection


class MysqlReader:
    """Implements `schema.Reader`."""

    __slots__ = ("_address", "_connection")

    def __init__(self, address: MysqlAddress) -> None:
        """Raises StoreMissing when there is no database or no table, StoreError otherwise."""
        self._address = address
        self._connection = connect(address)
        try:
            self.fetch("SELECT 1 FROM sys_ai_transactions LIMIT 1")
        except StoreError:
            self._connection.close()
            raise

    def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._connection.cursor() as cursor:
                # Always with parameters, so that %% becomes % again.
                cursor.execute(sql.replace("%", "%%").replace("?", "%s"), tuple(params))
                return list(cursor.fetchall())
        except (pymysql.Error, OSError, RuntimeError) as error:
            missing = number_and_text(error)[0] == ER.NO_SUCH_TABLE
            raise (StoreMissing if missing else StoreError)(explained(self._address, error)) from error

    def timestamp(self, seconds: float) -> str:
        return utc_text(seconds)

    def close(self) -> None:
        self._connection.close()


def _number(text: str) -> int | float:
    """SUM() of integers is a DECIMAL here and an integer in SQLite."""
    return float(text) if "." in text else int(text)


_CONVERSIONS: dict[Any, Callable[..., Any]] = {
    **conversions, FIELD_TYPE.DECIMAL: _number, FIELD_TYPE.NEWDECIMAL: _number,
}  # fmt: skip

"""Whose fault a MySQL error is: the row's, the server's, or nobody knows.

Owns: the error numbers of MariaDB 10.11 and MySQL 8 that a commit can meet. Must not know: connections, retries.
Why it matters: a row's fault sets that row aside for good; a server's fault is waited out. So a number stands among
the rows' only if a row's values bring it about and another row would pass: what the schema, a right, a lock or the disk
cause must never empty a group into the dead letters.
Source: mariadb.com/kb error codes, dev.mysql.com/doc/mysql-errors/8.0/en/server-error-reference.html
"""

from __future__ import annotations

from enum import Enum, auto

from proxyd.store.schema import StoreError


class Blame(Enum):
    """ROWS: some row of the group, whatever state the server is in. SERVER: every row would fare the same."""

    ROWS = auto()
    SERVER = auto()
    UNKNOWN = auto()


class SqlFault(StoreError):
    """The server answered with an error, or the connection is lost (`is_lost`)."""

    def __init__(self, message: str, number: int, text: str) -> None:
        super().__init__(message)
        self.number, self.text = number, text

    @property
    def is_lost(self) -> bool:
        """True when the session is gone, with its transaction."""
        return self.number in _LOST

    @property
    def blame(self) -> Blame:
        return blame(self.number, self.text)


_ROWS = frozenset({
    1048,  # column cannot be null: a trigger made it so
    1062, 1586,  # duplicate entry in somebody's own unique index
    1264, 1690,  # out of range
    1265, 1366, 1292, 1411, 1525,  # truncated, incorrect value
    1300, 3854,  # invalid character string
    1406,  # too long
    1441,  # date and time overflow
    1216, 1217, 1451, 1452, 1761, 1762,  # foreign keys that somebody added
    1644,  # SIGNAL in a trigger
    1643,  # SIGNAL NOT FOUND in a trigger
    4025, 3819,  # CHECK constraints
})  # fmt: skip
_LOST = frozenset({
    0,  # the driver's own: not connected
    1053, 1152, 1153, 1158, 1159, 1160, 1161, 1184,  # shutdown, network
    1927, 3169, 4031,  # killed, timed out by the server
    2000, 2002, 2003, 2006, 2013, 2014, 2055,
})  # fmt: skip
_SERVER = _LOST | {
    1016, 1017, 1020, 1021, 1026, 1030, 1034, 1035, 1036, 1037, 1038, 1041, 1105, 1114, 1194, 1195,  # files, memory
    1040, 1042, 1043, 1044, 1045, 1046, 1049, 1129, 1130, 1142, 1143, 1203, 1226, 1227, 1370, 1449,  # rights
    1054, 1109, 1146, 1147, 1364, 1526, 1932, 1933,  # the schema: missing columns, partitions; a column without default
    1099, 1100, 1180, 1181, 1182, 1205, 1206, 1207, 1213, 1223, 1290, 1467, 1568, 1613, 1614, 1637,  # locks, read-only
    1317, 1665, 1689, 1785, 1792, 1836, 1969, 3024, 3098, 3100, 3101, 3572, 4047,  # limits, replication
    1064, 1149,  # a statement that is no SQL: ours, or a proxy's between us
}  # fmt: skip


def blame(number: int, text: str) -> Blame:
    """`text`: the server's message; two numbers mean one thing or the other by it."""
    if number in (1062, 1586) and "PRIMARY" in text:
        return Blame.SERVER  # the server gave that number itself: its counter is at its end, or damaged
    if number in _ROWS:
        return Blame.ROWS
    if number in _SERVER or 2000 <= number < 3000:
        return Blame.SERVER
    return Blame.UNKNOWN

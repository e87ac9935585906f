"""What else would make a group's row cheaper for MariaDB: other schemas, statements and settings, beside today's.

Owns: the list of them. Must not know: proxyd's processes. Each is measured with prepared texts by PyMySQL, in rounds in
turns, on tables that already hold rows, so it is the server's cost alone that differs. Used by group_commit --levers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from proxyd.store.mysql_text import inserts, row_texts
from proxyd.store.schema import Row
from tests.bench.databases import database, make_rows, mariadb
from tests.bench.measure import Cpu, table
from tests.daemon.mariadb import Database

TABLE = "sys_ai_transactions"
HELD = 200_000
ROUNDS = 3


@dataclass(frozen=True)
class Lever:
    name: str
    group: int = 1000
    ddl: str = ""
    session: str = ""
    order: Callable[[Row], object] | None = None


LEVERS = (
    Lever("as it is"),
    Lever("groups of 4,000", group=4000),
    Lever("groups of 10,000", group=10_000),
    Lever("without idx_sys_ai_created", ddl=f"DROP INDEX idx_sys_ai_created ON {TABLE}"),
    Lever(
        "without any index but the key",
        ddl=f"ALTER TABLE {TABLE} DROP INDEX idx_sys_ai_created, DROP INDEX idx_sys_ai_user_window",
    ),
    Lever("rows of a group by user", order=lambda row: row.user_id),
    Lever("unique_checks, foreign_key_checks off", session="SET unique_checks = 0, foreign_key_checks = 0"),
    Lever("session in binary (no conversion)", session="SET NAMES binary"),
    Lever(
        "without idx_sys_ai_created, by user, 4,000",
        group=4000,
        ddl=f"DROP INDEX idx_sys_ai_created ON {TABLE}",
        order=lambda row: row.user_id,
    ),
)


def texts(lever: Lever) -> list[bytes]:
    rows = make_rows(20_000, 7)
    made = []
    for first in range(0, len(rows), lever.group):
        group = rows[first : first + lever.group]
        if lever.order is not None:
            group = sorted(group, key=lever.order)  # type: ignore[arg-type]
        written, _ = row_texts(group, lambda text: text)
        made += list(inserts((text for _, text in written), 1 << 25))
    return made


def one_round(made: Database, lever: Lever, statements: list[bytes], seconds: float, pid: int) -> tuple[float, float]:
    """Rows a second and the server's microseconds a row."""
    with contextlib.closing(made.connect(autocommit=False)) as connection:
        if lever.session:
            connection.query(lever.session)
        stored = 0
        used, began = Cpu.of(pid).total, time.perf_counter()
        while time.perf_counter() - began < seconds and stored < 1_000_000:
            for statement in statements:
                connection.query(statement)
                connection.commit()
            stored += 20_000
        return stored / (time.perf_counter() - began), (Cpu.of(pid).total - used) / stored


def print_levers(seconds: float) -> None:
    with mariadb() as server:
        houses: list[tuple[Lever, Database, list[bytes]]] = []
        for lever in LEVERS:
            made = database(server)
            if lever.ddl:
                made.query(lever.ddl)
            statements = texts(lever)
            one_round(made, lever, statements, HELD / 60_000, server.pid)
            houses.append((lever, made, statements))
        seen: dict[str, list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for lever, made, statements in houses:
                seen.setdefault(lever.name, []).append(one_round(made, lever, statements, seconds / 2, server.pid))
        rows = []
        base = median(rate for rate, _ in seen[LEVERS[0].name])
        for lever, made, _ in houses:
            rate, cost = median(rate for rate, _ in seen[lever.name]), median(cost for _, cost in seen[lever.name])
            size = made.query(
                "SELECT SUM(data_length + index_length) / SUM(table_rows) FROM information_schema.tables"
                " WHERE table_schema = DATABASE() AND table_name = %s",
                TABLE,
            )
            rows.append([lever.name, f"{rate:,.0f}", f"{rate / base:.2f}", f"{cost:.1f}", f"{float(size[0][0]):.0f}"])
    print("\nlevers: one statement and one COMMIT a group, texts made before")
    print(table(["", "rows/s", "of today's", "server us/row", "bytes/row"], rows))

"""From the configuration to the store object, however long that takes.

Owns: which parts of the configuration a store is made of. Must not know: what is stored. Nothing is connected here.
Bounds: tries back off as a failing store's do (trouble.py), and end at a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from proxyd.config.sink import is_mysql
from proxyd.store.node import Owner, node_id
from proxyd.store.schema import Store, StoreError
from proxyd.store.sink import make_store
from proxyd.telemetry.segment import directory_bytes
from proxyd.telemetry.spoolio import SpoolLog
from proxyd.telemetry.trouble import StoreTrouble

__all__ = ["make_patiently"]


async def make_patiently(
    config: Any, secrets: Any, spool: Path, trouble: StoreTrouble, stop: asyncio.Event, log: SpoolLog
) -> Store | None:
    """The store of `telemetry.sink`, not yet open; None when told to stop while it cannot be made."""
    while True:
        try:
            store = _make(config, secrets, log)
        except (StoreError, OSError) as error:
            pause_s = trouble.on_failure(error, None, 0, directory_bytes(spool))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)
            if stop.is_set():
                return None
        else:
            trouble.on_success()
            return store


def _make(config: Any, secrets: Any, log: SpoolLog) -> Store:
    sink = config.telemetry.sink
    password = None if secrets is None else secrets.telemetry_password
    # A file of ours alone needs no name for its only node.
    if not is_mysql(sink):
        return make_store(sink, config.telemetry.durability, log=log)
    node, owner = node_id(config.server.state_dir), Owner(config.server.state_dir)
    return make_store(sink, config.telemetry.durability, password=password, node=node, log=log, owner=owner)

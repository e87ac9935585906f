"""Where transactions are written down, as the relay sees it.

Owns: the three entries of a transaction and their fields. Must not know: files, formats, who reads them. The worker
gives the relay a Book that is the telemetry room's spool.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Book"]


class Book(Protocol):
    """A spool of transactions. Entries are durable across kill -9 when the loop turn that made them is over."""

    @property
    def broken_reason(self) -> str | None:
        """Why nothing can be written at the moment (a full disk, say), or None."""
        ...

    def new_txn(self) -> int:
        """The next transaction's number."""
        ...

    def intent(
        self,
        txn: int,
        request_id: str,
        user_id: int,
        tenant: str,
        model_id: int,
        created_at: float,
        prompt_estimate: int,
    ) -> None:
        """A transaction begins; `created_at` is wall seconds."""
        ...

    def checkpoint(
        self,
        txn: int,
        prompt_tokens: int,
        completion_tokens: int,
        *,
        attempts: int,
        ttft_ms: int,
        duration_ms: int,
        upstream: str,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
        ending: tuple[str, bool] | None = None,
    ) -> None:
        """Its counts so far. `ending`: (status, estimated) that it has ended with, should no final follow."""
        ...

    def flush(self) -> None:
        """Makes what was entered so far safe from kill -9 now, not at the end of the loop turn. One write(2)."""
        ...

    def final(
        self,
        txn: int,
        user_id: int,
        model_id: int,
        prompt_tokens: int,
        completion_tokens: int,
        created_at: float,
        *,
        tenant: str,
        request_id: str,
        status: str,
        estimated: bool,
        cached_tokens: int,
        reasoning_tokens: int,
        upstream: str,
        attempts: int,
        ttft_ms: int,
        duration_ms: int,
    ) -> None:
        """Its end, once."""
        ...

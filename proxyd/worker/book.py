"""The relay's book is the telemetry room's spool: the two rooms do not know each other, the worker joins them.

Owns nothing but the change of words. Cost: one call and one tuple an entry.
"""

from __future__ import annotations

from proxyd.telemetry.record import Checkpoint, Final, Intent, ending_of
from proxyd.telemetry.spool import SpoolWriter

__all__ = ["SpoolBook"]


class SpoolBook:
    """relay.book.Book over a SpoolWriter."""

    __slots__ = ("_spool", "new_txn")

    def __init__(self, spool: SpoolWriter) -> None:
        self._spool = spool
        self.new_txn = spool.new_txn

    @property
    def broken_reason(self) -> str | None:
        return self._spool.broken_reason

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
        self._spool.intent(Intent(txn, request_id, user_id, tenant, model_id, "", created_at, prompt_estimate))

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
        self._spool.checkpoint(
            Checkpoint(
                txn,
                prompt_tokens,
                completion_tokens,
                cached_tokens,
                reasoning_tokens,
                attempts,
                ttft_ms,
                duration_ms,
                upstream,
                ending_of(*ending) if ending is not None else 0,
            )
        )

    def flush(self) -> None:
        self._spool.flush()

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
        self._spool.final(
            Final(
                txn,
                user_id,
                model_id,
                prompt_tokens,
                completion_tokens,
                created_at,
                tenant,
                request_id,
                status,
                int(estimated),
                cached_tokens,
                reasoning_tokens,
                upstream,
                attempts,
                ttft_ms,
                duration_ms,
            )
        )

"""Fetches `auth.jwks_url` for one worker, off the loop.

Owns: the one fetch under way and who waits for its end. Must not know keys or tokens: access.jwks decides when to fetch
and what a document means.

Bounds: one fetch at a time, TIMEOUT_S each, MAX_DOCUMENT_BYTES of answer; no redirect is followed, so the keys come
from the configured host or not at all. A proxy from the environment is not used.
"""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from proxyd.access.jwks import MAX_DOCUMENT_BYTES, RemoteKeys
from proxyd.log import Log

__all__ = ["TIMEOUT_S", "KeyFetcher"]

# An issuer answers within a second. Half fails on a slow TLS handshake across an ocean; twice keeps the first request
# after a key rotation waiting that much longer.
TIMEOUT_S = 5.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class KeyFetcher:
    """`request()` is what RemoteKeys calls; `wait()` is for a request whose token names a key that may be coming."""

    __slots__ = ("_done", "_log", "_loop", "_opener", "_task", "_url", "remote")

    def __init__(self, loop: asyncio.AbstractEventLoop, url: str, log: Log) -> None:
        self._loop = loop
        self._url = url
        self._log = log
        self._done = asyncio.Event()
        self._done.set()
        self._task: asyncio.Task[None] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
        self.remote: RemoteKeys | None = None

    def request(self) -> None:
        """Begins a fetch; returns at once."""
        self._done.clear()
        self._task = self._loop.create_task(self._run())

    async def wait(self) -> None:
        """Until the fetch under way has ended, TIMEOUT_S at most."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._done.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        remote = self.remote
        assert remote is not None, "set before the first fetch"
        try:
            document = await self._loop.run_in_executor(None, _fetch, self._opener.open, self._url)
        except (OSError, ValueError) as error:
            remote.on_failure(str(error))
            self._log.warning("jwks_fetch_failed", url=self._url, reason=str(error))
        else:
            for problem in remote.on_document(document):
                self._log.warning("jwks_problem", url=self._url, reason=problem)
        finally:
            self._done.set()


def _fetch(open_url: Callable[..., Any], url: str) -> bytes:
    """The document. Raises OSError (urllib's errors are) or ValueError."""
    with open_url(url, timeout=TIMEOUT_S) as answer:
        document: bytes = answer.read(MAX_DOCUMENT_BYTES + 1)
    if len(document) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"the answer is larger than {MAX_DOCUMENT_BYTES} bytes")
    return document

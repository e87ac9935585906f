"""TLS towards one origin: the context, the last session, and what a failure is called.

Owns: one SSLContext per origin (verification on, TLS 1.2 or newer, ALPN http/1.1) and the session to resume.
Must not know: loops, pools; the handshake itself is `connection`'s, since it has to wait.
Invariants: certificates and host names are always verified, there is no switch for it; no detail holds a key or a
request.
"""

from __future__ import annotations

import socket
import ssl


class OriginTls:
    """The TLS side of one origin, shared by all its connections in this worker."""

    __slots__ = ("_context", "_host", "_session")

    def __init__(self, host: str, ca_file: str = "") -> None:
        """Loads the trust store (tens of ms: at start, not in a request). Raises OSError or ssl.SSLError for a bad
        ca_file."""
        self._context = build_context(ca_file)
        self._host = host.rstrip(".")  # RFC 6066, 3: the name in SNI has no trailing dot
        self._session: ssl.SSLSession | None = None

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """`sock`'s descriptor in a TLS socket that has not shaken hands; `sock` is empty afterwards. Offers the
        session."""
        return self._context.wrap_socket(
            sock, server_hostname=self._host, do_handshake_on_connect=False, session=self._session
        )

    def remember(self, sock: ssl.SSLSocket) -> None:
        """Keeps this connection's session if it can be resumed. With TLS 1.3 that is so once a ticket has come in,
        which needs a read after the handshake (RFC 8446, 4.6.1)."""
        session = sock.session
        if session is not None and session.has_ticket:
            self._session = session

    def forget(self) -> None:
        """After a failed handshake: the session may be what it failed on."""
        self._session = None


def build_context(ca_file: str = "") -> ssl.SSLContext:
    """A verifying client context; `ca_file` replaces the system's store."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def describe(error: ssl.SSLError, host: str) -> str:
    """The failure in an operator's words: which host, and why its certificate or its TLS was not accepted."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message} (host {host})"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return f"closed during TLS (host {host})"
    reason = (error.reason or "TLS error").replace("_", " ").lower()
    return f"{reason} (host {host})"

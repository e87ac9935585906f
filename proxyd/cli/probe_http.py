"""What `--probe` does on the network: names, connections, certificates, one GET; each step bounded.

Owns: the steps and how a failure is called. Must not know: the configuration's findings, which keys there are.
Bounds: STEP_S for each step; `gather` gives up on what has not ended by then, in a thread that nothing waits for,
because getaddrinfo has no deadline of its own. MAX_BODY_BYTES of an answer are read.
Invariant: no text made here holds a header that was sent.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509

from proxyd import __version__
from proxyd.upstream.dial import IP_BIND_ADDRESS_NO_PORT
from proxyd.upstream.resolve import Address
from proxyd.upstream.tls import describe

# A provider across an ocean answers each step within a second. Half: slow resolvers fail; twice: the bound of the whole
# command is reached by one address that swallows packets.
STEP_S = 5.0
MAX_BODY_BYTES = 256 * 1024
# At once, of one upstream: addresses and source addresses.
_THREADS = 32
_DAY_S = 86_400.0

T = TypeVar("T")


class ProbeError(Exception):
    """A step that failed, in words; `remedy` where there is one."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


def gather(calls: Sequence[Callable[[], T]], seconds: float) -> list[T | Exception]:
    """What each returned or raised, in their order; TimeoutError for those that had not ended. Never waits longer."""
    results: list[T | Exception] = [TimeoutError(f"no answer within {seconds:.0f} s") for _ in calls]
    waiting: queue.SimpleQueue[tuple[int, Callable[[], T]]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    for entry in enumerate(calls):
        waiting.put(entry)

    def work() -> None:
        while True:
            try:
                index, call = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, call()))
            except Exception as error:  # noqa: BLE001 handed to whoever asked
                done.put((index, error))

    for _ in range(min(_THREADS, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    deadline = time.monotonic() + seconds
    for _ in calls:
        try:
            index, result = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        results[index] = result
    return results


def resolve(host: str, port: int) -> list[Address]:
    """Blocks for as long as the resolver likes. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(Address(socket.AddressFamily(item[0]), tuple(item[4])) for item in found))


def connect(address: Address, source: str = "") -> socket.socket:
    """A connection, with STEP_S for whatever is done on it. Raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(STEP_S)
        if source:
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        sock.connect(address.sockaddr)
        if sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(111, os.strerror(111))  # TCP's simultaneous open: nobody listens there
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of a verified chain: the protocol, and when the first of its certificates ends. `days` may be negative."""

    protocol: str
    ends: datetime
    subject: str

    def days(self, now: float) -> int:
        return int((self.ends.timestamp() - now) // _DAY_S)


def handshake(sock: socket.socket, context: ssl.SSLContext, host: str) -> tuple[ssl.SSLSocket, Certificate]:
    """Raises ProbeError, in the words of the daemon's log; the socket is closed then."""
    try:
        tls = context.wrap_socket(sock, server_hostname=host.rstrip("."))
    except ssl.SSLError as error:
        sock.close()
        raise ProbeError(describe(error, host), _REMEDIES.get(getattr(error, "verify_code", 0), "")) from error
    except OSError as error:
        sock.close()
        raise ProbeError(f"no TLS handshake: {words(error)}") from error
    return tls, _certificate(tls)


# Of X509_verify_cert_error_string(3).
_REMEDIES = {
    10: "the server's certificate must be renewed; or this machine's clock is wrong",
    18: "name its authority in upstream.ca_file",
    19: "name its authority in upstream.ca_file",
    20: "name its authority in upstream.ca_file; or the server leaves an intermediate certificate out",
    62: "the url must name the host that the certificate is for",
    64: "the url must name the host that the certificate is for",
}


def _certificate(tls: ssl.SSLSocket) -> Certificate:
    chain = [x509.load_der_x509_certificate(der) for der in _chain(tls)]
    first = min(chain, key=lambda one: one.not_valid_after_utc)
    return Certificate(tls.version() or "TLS", first.not_valid_after_utc, first.subject.rfc4514_string())


def _chain(tls: ssl.SSLSocket) -> list[bytes]:
    """DER of each certificate that was verified, the server's first; Python tells it officially from 3.13 on."""
    whole = getattr(tls, "get_verified_chain", None)
    if whole is not None:
        return list(whole())
    inner = getattr(getattr(tls, "_sslobj", None), "get_verified_chain", None)
    if inner is not None:
        return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in inner()]
    return [tls.getpeercert(binary_form=True) or b""]


def ended(address: Address, host: str, now: float) -> str:
    """That a certificate which was refused is over, if it is; else "". Nothing is sent over that connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with connect(address) as sock, context.wrap_socket(sock, server_hostname=host.rstrip(".")) as tls:
            found = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return ""
    ends = found.not_valid_after_utc
    return f"; it ended {ends:%Y-%m-%d}" if ends.timestamp() < now else ""


def get(sock: socket.socket, target: str, headers: Sequence[tuple[str, str]]) -> tuple[int, bytes]:
    """Status and the beginning of the body; closes the socket. Raises ProbeError."""
    client = http.client.HTTPConnection("unused", timeout=STEP_S)
    client.sock = sock
    try:
        client.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in (*headers, ("User-Agent", f"proxyd/{__version__}"), ("Connection", "close")):
            client.putheader(name, value)
        client.endheaders()
        answer = client.getresponse()
        return answer.status, answer.read(MAX_BODY_BYTES)
    except (http.client.HTTPException, ValueError) as error:
        raise ProbeError(f"answers no HTTP ({type(error).__name__})") from error
    except OSError as error:
        raise ProbeError(f"no answer to a GET: {words(error)}") from error
    finally:
        client.close()
        with contextlib.suppress(OSError):
            sock.close()


def words(error: Exception) -> str:
    """An error of a socket in words."""
    if isinstance(error, TimeoutError) and not error.strerror:
        return f"no answer within {STEP_S:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

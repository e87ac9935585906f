"""One upstream of `--probe`: its name, its addresses, its certificate, its keys.

Owns: the order of the steps, what is an error and what is in order. Must not know: how a step is done (probe_http),
other targets.

    name -> all addresses over TCP -> TLS with the first that answered -> the same from each source address
         -> one GET of the models' list for each key, or one without

Invariant: a key is named by where it comes from, never shown.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from proxyd.cli import probe_http as net
from proxyd.cli.check_found import Found
from proxyd.cli.probe_http import STEP_S, Certificate, ProbeError
from proxyd.config.locate import KeyPath
from proxyd.config.schema import UpstreamConfig
from proxyd.config.secrets import Secret
from proxyd.upstream.dial import interleave
from proxyd.upstream.origin import Origin
from proxyd.upstream.resolve import Address
from proxyd.upstream.tls import build_context

# A certificate is renewed a month before its end (Let's Encrypt: 30 of 90 days): with less somebody forgot it.
FEW_DAYS = 21
_VERSION = ("anthropic-version", "2023-06-01")


class Note(NamedTuple):
    """What is in order: about which option, in words."""

    key: KeyPath
    text: str


class Outcome:
    """What one target gave so far; `step` is what it is at, for one that does not end. Written by its thread."""

    __slots__ = ("found", "is_done", "key", "notes", "step")

    def __init__(self, key: KeyPath) -> None:
        self.key = key
        self.step = "resolving its name"
        self.found: list[Found] = []
        self.notes: list[Note] = []
        self.is_done = threading.Event()

    def error(self, key: KeyPath, message: str, remedy: str) -> None:
        self.found.append(Found(True, key, message, remedy))

    def warn(self, key: KeyPath, message: str, remedy: str, live: str = "", wanted: str = "") -> None:
        self.found.append(Found(False, key, message, remedy, live, wanted))


class UpstreamProbe:
    """One [[upstream]]."""

    def __init__(self, index: int, config: UpstreamConfig, keys: Sequence[Secret], is_keyed: bool, now: float) -> None:
        self.index = index
        self.config = config
        self.keys = keys
        self.is_keyed = is_keyed
        self.now = now
        self.origin = Origin(config)
        self.place: KeyPath = ("upstream", index, "url")
        self.context: ssl.SSLContext | None = None

    def run(self, outcome: Outcome) -> None:
        addresses = self._resolve(outcome)
        reached = self._connect(outcome, addresses) if addresses else []
        if not reached:
            return
        if self.origin.tls:
            self.context = build_context(self.config.ca_file)
            outcome.step = "shaking hands over TLS"
            if not self._tls(outcome, reached[0]):
                return
        self._sources(outcome, reached)
        if self.is_keyed:
            outcome.step = "asking for the models' list"
            self._ask(outcome, reached[0])

    def _resolve(self, outcome: Outcome) -> list[Address]:
        began = time.monotonic()
        host, port = self.origin.host, self.origin.port
        (found,) = net.gather([lambda: net.resolve(host, port)], STEP_S)
        took_ms = (time.monotonic() - began) * 1000
        if isinstance(found, Exception):
            message = f"the name {host} cannot be resolved: {net.words(found)}"
            outcome.error(self.place, message, "check the name, and DNS")
            return []
        addresses = interleave(found)
        if len(addresses) > 1 or addresses[0].sockaddr[0] != host:
            count = f"{len(addresses)} address{'es' if len(addresses) > 1 else ''}"
            outcome.notes.append(Note(self.place, f"{host} has {count}, told in {took_ms:.0f} ms"))
        return addresses

    def _connect(self, outcome: Outcome, addresses: list[Address]) -> list[Address]:
        """Those that take a connection, from the first source address of their family, if any."""
        outcome.step = "connecting"

        def try_one(address: Address) -> float:
            began = time.monotonic()
            net.connect(address, self._source_for(address)).close()
            return (time.monotonic() - began) * 1000

        results = net.gather([partial(try_one, address) for address in addresses], STEP_S)
        reached = [one for one, took in zip(addresses, results, strict=True) if not isinstance(took, Exception)]
        failed = [
            f"{one.text()}: {net.words(error)}"
            for one, error in zip(addresses, results, strict=True)
            if isinstance(error, Exception)
        ]
        if not reached:
            message = f"cannot be connected to: {'; '.join(failed[:3])}"
            outcome.error(self.place, message, "check the address and the firewall")
            return []
        took = next(one for one in results if not isinstance(one, Exception))
        others = f"; not over {'; '.join(failed[:3])}" if failed else ""
        outcome.notes.append(Note(self.place, f"{reached[0].text()} connected in {took:.0f} ms{others}"))
        return reached

    def _sources(self, outcome: Outcome, reached: list[Address]) -> None:
        """The way from each source address; the way back may be missing for some only."""
        sources = list(map(str, self.config.source_addresses))
        if not sources:
            return
        outcome.step = "connecting from each source address"
        targets = [next((one for one in reached if _fits(source, one)), None) for source in sources]

        def try_one(source: str, address: Address | None) -> str:
            if address is None:
                raise ProbeError("no reachable address of its family")
            with net.connect(address, source):
                return source

        pairs = zip(sources, targets, strict=True)
        results = net.gather([partial(try_one, source, address) for source, address in pairs], STEP_S)
        for number, (source, result) in enumerate(zip(sources, results, strict=True)):
            if isinstance(result, Exception):
                key: KeyPath = ("upstream", self.index, "source_addresses", number)
                message = f"{self.origin.host} cannot be connected to from {source}: {net.words(result)}"
                outcome.error(key, message, "is the address on an interface, and routed? `ip route get ... from ...`")
        good = sum(not isinstance(result, Exception) for result in results)
        text = f"connected from {good} of {len(sources)} source addresses"
        outcome.notes.append(Note(("upstream", self.index, "source_addresses"), text))

    def _tls(self, outcome: Outcome, address: Address) -> bool:
        try:
            sock, certificate = self._handshake(address)
        except ProbeError as error:
            is_refused = isinstance(error.__cause__, ssl.SSLCertVerificationError)
            more = net.ended(address, self.origin.host, self.now) if is_refused else ""
            remedy = error.remedy or "is this the right port, and does it speak TLS 1.2?"
            outcome.error(self.place, f"{error}{more}", remedy)
            return False
        sock.close()
        self._judge(outcome, certificate)
        return True

    def _handshake(self, address: Address) -> tuple[ssl.SSLSocket, Certificate]:
        assert self.context is not None
        try:
            sock = net.connect(address, self._source_for(address))
        except OSError as error:
            raise ProbeError(f"cannot be connected to: {net.words(error)}") from error
        return net.handshake(sock, self.context, self.origin.host)

    def _judge(self, outcome: Outcome, certificate: Certificate) -> None:
        days = certificate.days(self.now)
        ends = f"{certificate.ends:%Y-%m-%d}"
        if days < FEW_DAYS:
            message = f"the certificate of {self.origin.host} ends in {days} days, on {ends} ({certificate.subject})"
            outcome.warn(self.place, message, "see that it is renewed", str(days), str(FEW_DAYS))
        else:
            text = f"{certificate.protocol}, certificates valid for {days} days, to {ends}"
            outcome.notes.append(Note(self.place, text))

    def _ask(self, outcome: Outcome, address: Address) -> None:
        """One GET for each key, or one without."""
        targets: list[tuple[KeyPath, str, Origin]] = [
            (key, source, Origin(self.config, (secret,)))
            for (key, source), secret in zip(self._key_places(), self.keys, strict=True)
        ] or [(("upstream", self.index, "api_key_file"), "", self.origin)]
        path = "/v1/models" if self.origin.dialect == "anthropic" else "/models"
        answers = net.gather([partial(self._get, address, origin, path) for _, _, origin in targets], STEP_S)
        for (key, source, origin), answer in zip(targets, answers, strict=True):
            if isinstance(answer, ProbeError | OSError):
                text = str(answer) if isinstance(answer, ProbeError) else net.words(answer)
                outcome.error(self.place, f"{origin.host}: {text}", "is this the API's address?")
                return
            if isinstance(answer, Exception):
                raise answer
            self._judge_answer(outcome, key, source, answer, origin.target(path).decode())

    def _source_for(self, address: Address) -> str:
        """The first source address of the same family, "" for none."""
        return next((str(one) for one in self.config.source_addresses if _fits(str(one), address)), "")

    def _key_places(self) -> Iterator[tuple[KeyPath, str]]:
        """Where each key comes from, in the order in which they are used."""
        for number, path in enumerate(self.config.api_key_file):
            yield ("upstream", self.index, "api_key_file", number), path
        for number, name in enumerate(self.config.api_key_env):
            yield ("upstream", self.index, "api_key_env", number), f"the variable {name}"

    def _get(self, address: Address, origin: Origin, path: str) -> int:
        sock: socket.socket
        if self.context is not None:
            sock = self._handshake(address)[0]
        else:
            sock = net.connect(address, self._source_for(address))
        headers = [(name.decode(), value.decode()) for name, value in origin.auth_headers()]
        headers += [("Host", origin.host_header.decode()), ("Accept", "application/json")]
        if origin.dialect == "anthropic":
            headers.append(_VERSION)
        return net.get(sock, origin.target(path).decode(), headers)[0]

    def _judge_answer(self, outcome: Outcome, key: KeyPath, source: str, status: int, target: str) -> None:
        asked = f"GET {target} is answered {status}"
        if status in (401, 403) and source:
            remedy = "put a key of this provider there that may list models; --probe shows no key"
            outcome.error(key, f"{asked}: the key of {source} is refused", remedy)
        elif status in (401, 403):
            message = f"{asked}: it asks for a key, and none is configured"
            outcome.error(key, message, "set api_key_file or api_key_env")
        elif 300 <= status < 400:
            message = f"{asked}, a redirect, which proxyd passes on and never follows"
            outcome.warn(self.place, message, "is it the API's base?")
        elif status >= 500:
            message = f"{asked}: it can be reached and does not serve now"
            outcome.warn(self.place, message, "the provider's status page")
        elif status < 300:
            outcome.notes.append(Note(key, f"{asked}: the key of {source} is accepted" if source else asked))
        else:
            outcome.notes.append(Note(self.place, f"{asked}: it can be reached; whether the key is good was not told"))


def _fits(source: str, address: Address) -> bool:
    return (":" in source) == (":" in str(address.sockaddr[0]))

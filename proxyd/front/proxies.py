"""Who is really asking, when a proxy stands between: trusted peers and what they forwarded.

Owns: the rule by which a peer is trusted and the forwarded headers are read. Pure: no socket, no clock. Must not know
requests, connections or replies.

Invariants
- A header of a peer that is not in `http.trusted_proxies` changes nothing: anybody can send `X-Forwarded-For`.
- `X-Forwarded-For` is read from the right: the first address that is not itself a trusted proxy is the client. What
  stands left of it was written by the client.
- Nothing here raises for what a peer sent; an unreadable entry ends the walk and the last good address stands.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["UNIX_PEER", "Identity", "Proxies", "identify", "parse_address", "trusted_from"]

UNIX_PEER = "unix"

# A chain longer than this is somebody padding the header; at half of it a CDN, a load balancer and nginx still fit.
MAX_HOPS = 32

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxies:
    """`http.trusted_proxies`, parsed: the networks, and whether peers on our Unix listeners are trusted."""

    networks: tuple[Network, ...]
    unix: bool

    def trusts(self, peer: str) -> bool:
        """Whether `peer` (an address, or UNIX_PEER) may speak for others."""
        if peer == UNIX_PEER:
            return self.unix
        address = parse_address(peer)
        return address is not None and self._holds(address)

    def _holds(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Identity:
    """peer: the client's address as text, UNIX_PEER if unknown behind a Unix socket; secure: it came over TLS."""

    peer: str
    trusted: bool
    secure: bool


def trusted_from(entries: Iterable[str]) -> Proxies:
    """Proxies from the configuration's texts ("unix", an address, a network). Raises ValueError on anything else."""
    networks: list[Network] = []
    unix = False
    for entry in entries:
        if entry == UNIX_PEER:
            unix = True
        else:
            networks.append(ipaddress.ip_network(entry, strict=False))
    return Proxies(tuple(networks), unix)


def parse_address(text: str) -> Address | None:
    """An address as proxies write it: plain, `1.2.3.4:567`, `[::1]`, `[::1]:567`, v4-mapped v6. None if it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    text = text.partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def identify(peer: str, is_trusted: bool, headers: Iterable[tuple[bytes, bytes]], proxies: Proxies) -> Identity:
    """The client behind `peer`. `is_trusted` is `proxies.trusts(peer)`, computed once per connection."""
    if not is_trusted:
        return Identity(peer, False, False)
    forwarded: list[bytes] = []
    proto = b""
    for name, value in headers:
        if name == b"x-forwarded-for":
            forwarded.extend(value.split(b","))
        elif name == b"x-forwarded-proto":
            proto = value
    client = peer
    for entry in reversed(forwarded[-MAX_HOPS:]):
        address = parse_address(entry.decode("latin-1"))
        if address is None:
            break
        client = str(address)
        if not proxies._holds(address):
            break
    return Identity(client, True, proto.rpartition(b",")[2].strip().lower() == b"https")

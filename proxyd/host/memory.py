"""Memory: what all streams could hold at once, against what the machine and the kernel's TCP give.

Owns: the arithmetic. Must not know: the configuration, files. Everything here is pure; sizes are bytes.

    a stalled stream:   the relay's own buffer (stream.buffer) in the worker
                        + a send buffer to the client  (tcp_wmem, last number)     } kernel memory of TCP, which
                        + a receive buffer of the upstream  (tcp_rmem, last number) } net.ipv4.tcp_mem bounds for all
"""

from __future__ import annotations

# An idle socket's kernel memory (measured: 4.8 KiB) and what a busy one has under way (TCP_NOTSENT_LOWAT). Half: a node
# full of ordinary streams is found to be short too late; twice: small machines are warned for nothing.
ORDINARY_SOCKET_BYTES = 20 * 1024
# Above this part of the memory the buffers of stalled clients compete with all else. Twice would be all of it.
BUFFERS_SHARE = 0.5


def last_number(triple: str) -> int:
    """The maximum of tcp_rmem or tcp_wmem, the limit of tcp_mem; 0 for what is no triple of numbers."""
    words = triple.split()
    return int(words[2]) if len(words) == 3 and all(word.isdigit() for word in words) else 0


def buffers(streams: int, buffer: int) -> int:
    """What the workers hold when every client stops reading."""
    return streams * buffer


def are_too_large(held: int, ram: int) -> bool:
    """Whether `held` leaves too little; False where the memory is not known."""
    return ram > 0 and held > ram * BUFFERS_SHARE


def ordinary_tcp(streams: int) -> int:
    """Kernel memory of so many streams that flow: two sockets each."""
    return 2 * streams * ORDINARY_SOCKET_BYTES


def stalled_until_full(tcp_limit: int, rmem_max: int, wmem_max: int) -> int:
    """How many stalled streams fill TCP's memory when their buffers have grown to the maximum."""
    return tcp_limit // max(1, rmem_max + wmem_max)


def in_words(size: int) -> str:
    """For messages: 2.2 GiB, 512 MiB, 20 KiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}".replace(".0 ", " ")
    return f"{size} B"

"""Listeners that were there before: given by the service manager, kept by a reload, handed over by an execve."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxyd.host.sockets import ListenError, Listeners


@dataclass(frozen=True)
class At:
    kind: str
    host: str | None = None
    port: int | None = None
    path: str | None = None


def tcp(port: int, host: str = "127.0.0.1") -> At:
    return At("tcp", host, port)


def unix(path: Path | str) -> At:
    return At("unix", path=str(path))


def unit_socket(host: str = "127.0.0.1", port: int = 0, *, shared: bool = False) -> socket.socket:
    """As a socket unit binds it: blocking, its own backlog, none of our options."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    made.listen(8)
    return made


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def is_answered(where: tuple[str, int] | str) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET) as client:
        try:
            client.connect(where)
        except OSError:
            return False
        return True


@pytest.fixture
def ending():
    held: list[Listeners] = []
    yield held
    for one in held:
        one.unlink()
        one.close()


# --- given -------------------------------------------------------------------------------------------------------


def test_one_given_socket_is_shared_by_all_slots(ending) -> None:
    given, stray = unit_socket(), unit_socket()
    listeners = Listeners([tcp(port_of(given))], [], 3, 16, [stray, given])
    ending.append(listeners)
    assert listeners.public == [[given], [given], [given]]
    assert stray.fileno() == -1
    assert not given.getblocking()
    assert given.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert listeners.addresses() == [f"127.0.0.1:{port_of(given)}"]


@pytest.mark.parametrize(
    ("count", "slots", "spread"),
    [(4, 2, [[0, 2], [1, 3]]), (3, 2, [[0, 2], [1]]), (2, 3, [[0], [1], [0]]), (2, 2, [[0], [1]])],
)
def test_given_sockets_are_dealt_to_slots_in_turn(ending, count: int, slots: int, spread: list[list[int]]) -> None:
    given = [unit_socket(shared=True)]
    given += [unit_socket(port=port_of(given[0]), shared=True) for _ in range(count - 1)]
    listeners = Listeners([tcp(port_of(given[0]))], [], slots, 16, given)
    ending.append(listeners)
    assert listeners.public == [[given[n] for n in own] for own in spread]


def test_a_given_socket_for_both_families_serves_the_ipv4_address(ending) -> None:
    given = unit_socket("::")
    at = port_of(given)
    listeners = Listeners([tcp(at, "0.0.0.0"), tcp(at, "::")], [], 1, 16, [given])
    ending.append(listeners)
    assert listeners.public == [[given]]
    assert listeners.addresses() == [f"0.0.0.0:{at}", f"[::]:{at}"]
    assert listeners.fds() == [given.fileno()]


def test_a_given_path_stays_the_managers(tmp_path: Path) -> None:
    path = tmp_path / "s"
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(path))
    given.listen(1)
    listeners = Listeners([], [unix(path)], 1, 16, [given])
    assert listeners.admin == [given]
    listeners.unlink()
    listeners.close()
    assert path.exists()


def test_a_stored_path_of_an_earlier_life_is_ours_again_and_one_nobody_finds_is_not(ending, tmp_path: Path) -> None:
    path, gone = tmp_path / "s", tmp_path / "gone"
    earlier = Listeners([unix(path), unix(gone)], [], 2, 16)
    kept = [socket.socket(fileno=os.dup(fd)) for fd in earlier.fds()]
    earlier.keep_stored()
    earlier.unlink()
    earlier.close()
    assert path.exists()
    gone.unlink()
    later = Listeners([unix(path), unix(gone)], [], 2, 16, kept)
    ending.append(later)
    assert is_answered(str(path))
    assert is_answered(str(gone))
    later.unlink()
    assert not path.exists()


def test_a_given_socket_that_cannot_be_listened_on_is_refused_and_closed() -> None:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    with pytest.raises(ListenError, match="does not listen"):
        Listeners([tcp(port_of(bound))], [], 1, 16, [bound])
    assert bound.fileno() == -1


# --- renewed -----------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_sockets_that_stay(ending, tmp_path: Path) -> None:
    old = Listeners([tcp(0), unix(tmp_path / "s")], [unix(tmp_path / "a")], 2, 16)
    ending.append(old)
    before = [list(own) for own in old.public]
    new = old.renewed([unix(tmp_path / "s"), tcp(0)], 2, 32)
    assert new.public == [[before[0][1], before[0][0]], [before[1][1], before[1][0]]]
    assert new.admin == old.admin
    assert old.public == before
    new.release(old)
    assert all(sock.fileno() >= 0 for own in before for sock in own)
    assert (tmp_path / "s").exists()


def test_more_slots_get_sockets_of_their_own_and_fewer_accept_on_all(ending) -> None:
    old = Listeners([tcp(0)], [], 2, 16)
    ending.append(old)
    (first,), (second,) = old.public
    more = old.renewed([tcp(0)], 4, 16)
    ending.append(more)
    assert more.public[:2] == [[first], [second]]
    third, fourth = more.public[2][0], more.public[3][0]
    assert {sock.getsockname() for sock in (third, fourth)} == {first.getsockname()}
    old.release(more)
    fewer = more.renewed([tcp(0)], 1, 16)
    assert fewer.public == [[first, second, third, fourth]]
    more.release(fewer)
    assert all(sock.fileno() >= 0 for sock in (first, second, third, fourth))
    again = fewer.renewed([tcp(0)], 2, 16)
    assert again.public == [[first, third], [second, fourth]]


def test_after_a_switch_what_is_gone_is_closed_and_its_path_removed(tmp_path: Path) -> None:
    old = Listeners([tcp(0), unix(tmp_path / "old")], [], 2, 16)
    gone = old.public[0][0].getsockname()
    new = old.renewed([unix(tmp_path / "new")], 2, 16)
    assert is_answered(gone)
    old.release(new)
    assert not is_answered(gone)
    assert not (tmp_path / "old").exists()
    assert is_answered(str(tmp_path / "new"))
    new.release(None)
    assert not (tmp_path / "new").exists()


def test_after_a_failed_reload_only_the_new_is_closed(ending, tmp_path: Path) -> None:
    old = Listeners([tcp(0), unix(tmp_path / "old")], [], 1, 16)
    ending.append(old)
    new = old.renewed([unix(tmp_path / "old"), unix(tmp_path / "new"), tcp(0)], 3, 64)
    new.release(old)
    assert is_answered(str(tmp_path / "old"))
    assert is_answered(old.public[0][0].getsockname())
    assert not (tmp_path / "new").exists()
    assert len(old.fds()) == 2


def test_an_address_that_cannot_be_had_leaves_nothing_of_the_reload(ending, tmp_path: Path) -> None:
    old = Listeners([tcp(0)], [], 1, 16)
    ending.append(old)
    held = len(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="cannot listen"):
        old.renewed([tcp(0), unix(tmp_path / "new"), tcp(port_of(taken))], 3, 64)
    assert len(os.listdir("/proc/self/fd")) == held
    assert os.listdir(tmp_path) == []
    assert is_answered(old.public[0][0].getsockname())


def test_other_words_for_the_same_address_keep_its_sockets(ending) -> None:
    first = Listeners([tcp(0)], [], 1, 16)
    at = port_of(first.public[0][0])
    ending.append(first)
    again = first.renewed([tcp(at, "localhost"), tcp(at)], 1, 16)
    assert again.public == [[first.public[0][0]]]


def test_one_interface_and_all_of_them_have_room_for_each_other_in_a_reload(ending) -> None:
    old = Listeners([tcp(0)], [], 1, 16)
    at = port_of(old.public[0][0])
    ending.append(old)
    everywhere = old.renewed([tcp(at, "0.0.0.0")], 1, 16)
    ending.append(everywhere)
    old.release(everywhere)
    assert is_answered(("127.0.0.1", at))
    back = everywhere.renewed([tcp(at)], 1, 16)
    everywhere.release(back)
    ending.append(back)
    assert is_answered(("127.0.0.1", at))


# --- across execve -------------------------------------------------------------------------------------------------


def test_the_next_image_has_the_same_listeners(tmp_path: Path) -> None:
    first = Listeners([tcp(0), unix(tmp_path / "s")], [unix(tmp_path / "a")], 3, 16)
    told, own = first.addresses(), [[sock.fileno() for sock in own] for own in first.public]
    for fd in first.fds():
        os.set_inheritable(fd, True)
    state = json.loads(json.dumps(first.to_state()))
    for sock in {*first.admin, *(sock for own in first.public for sock in own)}:
        sock.detach()
    second = Listeners.from_state(state)
    assert second.addresses() == told
    assert [[sock.fileno() for sock in own] for own in second.public] == own
    assert not any(os.get_inheritable(fd) for fd in second.fds())
    assert second.renewed([tcp(0), unix(tmp_path / "s")], 3, 16).public == second.public
    second.unlink()
    second.close()
    assert os.listdir(tmp_path) == []


def test_a_state_with_another_descriptor_is_refused_and_closes_nothing() -> None:
    first = Listeners([tcp(0)], [], 1, 16)
    state = first.to_state()
    with socket.socket() as other:
        state["public"][0]["fds"].append(other.fileno())
        with pytest.raises(ValueError, match="does not listen"):
            Listeners.from_state(state)
        assert os.fstat(other.fileno())
    assert is_answered(first.public[0][0].getsockname())
    for wrong in ({}, {**state, "slots": 0}, {**state, "public": [{}]}):
        with pytest.raises(ValueError, match="cannot be taken over"):
            Listeners.from_state(wrong)
    first.close()


def test_names_for_the_store_are_such_as_it_takes_and_last(ending, tmp_path: Path) -> None:
    first = Listeners([tcp(0), tcp(0, "::1"), unix(tmp_path / "s")], [unix(tmp_path / "a")], 2, 16)
    ending.append(first)
    names = first.named()
    assert sorted(fd for fds in names.values() for fd in fds) == sorted(
        {sock.fileno() for own in first.public for sock in own}
    )
    assert all(":" not in name and len(name) < 255 and name.isascii() for name in names)
    assert [len(fds) for fds in names.values()] == [2, 2, 1]

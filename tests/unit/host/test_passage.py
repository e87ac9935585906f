"""The passage: connections change hands whole, once, and never get lost between two processes."""

from __future__ import annotations

import os
import resource
import select
import socket

import pytest

from proxyd.host.passage import Passage


@pytest.fixture
def passage():
    made = Passage.create()
    yield made
    made.close()


@pytest.fixture
def pair():
    client, served = socket.socketpair()
    client.settimeout(10)
    yield client, served
    client.close()
    served.close()


def test_a_connection_goes_through_with_what_its_client_has_sent(passage: Passage, pair) -> None:
    client, served = pair
    assert passage.take() is None
    client.send(b"GET")
    assert passage.give(served)
    served.close()
    taken = passage.take()
    assert taken is not None
    assert (taken.recv(10), taken.getblocking(), taken.get_inheritable()) == (b"GET", False, False)
    taken.send(b"200")
    assert client.recv(10) == b"200"
    taken.close()
    assert client.recv(10) == b""
    assert passage.take() is None


def test_a_full_passage_says_so_and_loses_nothing(passage: Passage) -> None:
    passage._give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    clients = []
    while True:
        client, served = socket.socketpair()
        given = passage.give(served)
        if not given:
            break
        clients.append(client)
        served.close()
    assert clients
    served.send(b"still mine")
    assert client.recv(20) == b"still mine"
    for one in clients:
        one.settimeout(10)
        taken = passage.take()
        assert taken is not None
        taken.send(b"x")
        taken.close()
        assert one.recv(1) == b"x"
        one.close()
    assert passage.give(served)
    client.close()
    served.close()


def test_each_connection_goes_to_exactly_one_of_many_takers(passage: Passage) -> None:
    takers = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            while True:
                select.select([passage.take_fd], [], [])
                taken = passage.take()
                if taken is not None:
                    taken.send(str(os.getpid()).encode())
                    taken.close()
        takers.append(pid)
    answers, clients = [], []
    for _ in range(200):
        client, served = socket.socketpair()
        client.settimeout(30)
        while not passage.give(served):
            select.select([], [passage._give], [], 1)
        served.close()
        clients.append(client)
    for client in clients:
        answers.append(client.recv(100))
        assert client.recv(100) == b""
        client.close()
    assert {int(answer) for answer in answers} <= set(takers)
    for pid in takers:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_taker_without_a_free_descriptor_leaves_it_to_others(passage: Passage, pair) -> None:
    client, served = pair
    assert passage.give(served)
    assert passage.give(served)
    served.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert passage.take_fd >= 0
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        assert passage.take() is None
        assert passage.take() is None
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
        first = passage.take()  # with the last free descriptor
        assert first is not None
        assert passage.take() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    second = passage.take()
    assert second is not None
    second.send(b"alive")
    assert client.recv(10) == b"alive"
    first.close()
    second.close()


def test_what_is_no_message_of_ours_is_dropped_with_its_descriptors(passage: Passage, pair) -> None:
    client, served = pair
    reading, writing = os.pipe()
    socket.send_fds(passage._give, [b"\x02"], [served.fileno()])
    socket.send_fds(passage._give, [b"\x01"], [writing, writing])
    socket.send_fds(passage._give, [b"\x01"], [writing])
    passage._give.send(b"\x01")
    passage._give.send(b"long and of nobody's")
    passage.give(served)
    os.close(writing)
    served.close()
    taken = passage.take()
    assert taken is not None
    assert os.read(reading, 1) == b""  # nobody has the pipe's other end
    taken.close()
    assert client.recv(1) == b""
    os.close(reading)


def test_a_dead_taker_leaves_what_it_did_not_take(passage: Passage, pair) -> None:
    _, served = pair
    passage.give(served)
    served.close()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    taken = passage.take()
    assert taken is not None
    taken.close()


def test_the_next_image_finds_what_lies_in_it(pair) -> None:
    _, served = pair
    first = Passage.create()
    first.give(served)
    served.close()
    fds = [os.dup(fd) for fd in first.fds()]
    first.close()
    second = Passage.adopt(fds)
    assert second.fds() == fds
    assert not any(os.get_inheritable(fd) for fd in fds)
    taken = second.take()
    assert taken is not None
    taken.close()
    second.close()


def test_other_descriptors_are_refused_and_stay_open(pair) -> None:
    client, served = pair
    with pytest.raises(ValueError, match="no end of a passage"):
        Passage.adopt([client.fileno(), served.fileno()])
    with pytest.raises(ValueError, match="two ends"):
        Passage.adopt([])
    client.send(b"x")
    assert served.recv(1) == b"x"

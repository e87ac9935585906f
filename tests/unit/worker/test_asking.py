"""A worker's questions: one deadline, equal ones shared, and no wait for who does not answer."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proxyd.log import Log, Sink
from proxyd.telemetry.questions import Channel, Question, pack_answer, pack_question, unpack_question
from proxyd.worker import asking
from proxyd.worker.asking import Asker


class Telemetry:
    """The other process: answers when the test says so, if at all."""

    def __init__(self, slots: int = 1) -> None:
        self.channel = Channel.create(slots)
        self.is_ready = True
        self._log = Log(access="off", events=Sink(-1))
        self.askers = [self.asker(slot) for slot in range(slots)]

    def asker(self, slot: int) -> Asker:
        end = self.channel._asking[slot]
        return Asker(end, asyncio.get_running_loop(), self._log, is_ready=lambda: self.is_ready)

    def asked(self, slot: int = 0) -> list[Question]:
        found = []
        while True:
            try:
                question = unpack_question(self.channel._answering[slot].recv(64))
            except BlockingIOError:
                return found
            assert question is not None
            found.append(question)

    def answer(self, number: int, ok: bool = True, slot: int = 0) -> None:
        self.channel._answering[slot].send(pack_answer(number, ok))

    def say(self, data: bytes) -> None:
        self.channel._answering[0].send(data)


@pytest.fixture
async def telemetry() -> AsyncIterator[Telemetry]:
    house = Telemetry(2)
    yield house
    for asker in house.askers:
        asker.close()
    house.channel.close()


def begin(asker: Asker, user: int = 7, since: float | None = 1.5, iat: int | None = None) -> asyncio.Task[bool]:
    return asyncio.get_running_loop().create_task(asker.read(user, since, iat))


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No deadline ends within the test."""
    monkeypatch.setattr(asking, "DEADLINE_S", 3600.0)


@pytest.mark.parametrize("ok", [True, False])
async def test_the_answer_is_what_telemetry_said(telemetry: Telemetry, patient: None, ok: bool) -> None:
    task = begin(telemetry.askers[0], iat=1000)
    await turn()
    (question,) = telemetry.asked()
    assert question[1:] == (7, 1.5, 1000)
    telemetry.answer(question.number, ok)
    assert await task is ok
    assert telemetry.askers[0].under_way == 0


async def test_no_answer_within_the_deadline_is_no(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "DEADLINE_S", 0.01)
    assert await begin(telemetry.askers[0]) is False
    assert telemetry.askers[0].under_way == 0


async def test_a_telemetry_process_that_is_not_ready_is_not_asked(telemetry: Telemetry, patient: None) -> None:
    telemetry.is_ready = False
    assert await begin(telemetry.askers[0]) is False
    assert telemetry.asked() == []


async def test_equal_questions_under_way_are_one(telemetry: Telemetry, patient: None) -> None:
    asker = telemetry.askers[0]
    equal = [begin(asker, since=since) for since in (1.5, 1.6, 1.7)]
    others = [begin(asker, user=8), begin(asker, since=None, iat=3), begin(asker, iat=3)]
    asker.ask(7, 1.8, None)
    await turn()
    asked = telemetry.asked()
    assert len(asked) == 4
    telemetry.answer(asked[0].number)
    assert await asyncio.gather(*equal) == [True] * 3
    assert not any(task.done() for task in others)
    for question in asked[1:]:
        telemetry.answer(question.number)
    await asyncio.gather(*others)


async def test_one_who_leaves_does_not_take_the_answer_from_the_others(telemetry: Telemetry, patient: None) -> None:
    first, second = begin(telemetry.askers[0]), begin(telemetry.askers[0])
    await turn()
    first.cancel()
    (question,) = telemetry.asked()
    telemetry.answer(question.number)
    assert await second is True


async def test_the_same_is_asked_anew_after_its_answer(telemetry: Telemetry, patient: None) -> None:
    for _ in range(2):
        task = begin(telemetry.askers[0])
        await turn()
        (question,) = telemetry.asked()
        telemetry.answer(question.number)
        assert await task is True


async def test_questions_under_way_are_bounded(telemetry: Telemetry, patient: None, monkeypatch) -> None:
    monkeypatch.setattr(asking, "MAX_UNDER_WAY", 3)
    tasks = [begin(telemetry.askers[0], user=user) for user in range(5)]
    await turn()
    assert [task.done() for task in tasks] == [False] * 3 + [True] * 2
    assert (tasks[3].result(), len(telemetry.asked())) == (False, 3)


async def test_a_full_socket_is_no_at_once(telemetry: Telemetry, patient: None, monkeypatch) -> None:
    monkeypatch.setattr(asking, "MAX_UNDER_WAY", 100_000)
    asker = telemetry.askers[0]
    users = 0
    while asker.under_way == users:
        asker.ask(users, None, 1)
        users += 1
    assert asker.under_way == users - 1 > 100
    assert await begin(asker, user=users) is False


async def test_answers_to_a_predecessor_and_garbage_are_dropped(telemetry: Telemetry, patient: None) -> None:
    dead = begin(telemetry.askers[0])
    await turn()
    (old,) = telemetry.asked()
    asyncio.get_running_loop().remove_reader(telemetry.channel._asking[0])
    successor = telemetry.asker(0)
    task = begin(successor)
    await turn()
    (question,) = telemetry.asked()
    telemetry.answer(old.number)
    for garbage in (b"", b"x", b"x" * 9, b"x" * 10, pack_answer(question.number, True) + b"\0"):
        if garbage:
            telemetry.say(garbage)
    await turn()
    assert not task.done()
    telemetry.answer(question.number, True)
    assert await task is True
    successor.close()
    dead.cancel()


async def test_an_answer_that_comes_twice_is_taken_once(telemetry: Telemetry, patient: None) -> None:
    task = begin(telemetry.askers[0])
    await turn()
    (question,) = telemetry.asked()
    telemetry.answer(question.number, False)
    telemetry.answer(question.number, True)
    assert await task is False


async def test_who_does_not_answer_is_asked_on_but_not_waited_for_until_it_answers(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = telemetry.askers[0]
    monkeypatch.setattr(asking, "DEADLINE_S", 0.001)
    for _ in range(asking.SILENT_AFTER):
        assert await begin(asker) is False
    monkeypatch.setattr(asking, "DEADLINE_S", 3600.0)
    telemetry.asked()
    task = begin(asker)
    await turn()
    assert task.done()
    assert task.result() is False
    (question,) = telemetry.asked()
    telemetry.answer(question.number)
    await soon(lambda: asker.under_way == 0)
    patient_again = begin(asker)
    await turn()
    assert not patient_again.done()
    telemetry.answer(telemetry.asked()[0].number)
    assert await patient_again is True


async def test_a_late_answer_is_no_answer_but_a_sign_of_life(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = telemetry.askers[0]
    monkeypatch.setattr(asking, "DEADLINE_S", 0.001)
    for _ in range(asking.SILENT_AFTER):
        assert await begin(asker) is False
    monkeypatch.setattr(asking, "DEADLINE_S", 3600.0)
    telemetry.answer(telemetry.asked()[0].number)
    await soon(lambda: asker._unanswered == 0)
    task = begin(asker)
    await turn()
    assert not task.done()
    telemetry.answer(telemetry.asked()[0].number)
    assert await task is True


async def test_each_slot_has_answers_of_its_own(telemetry: Telemetry, patient: None) -> None:
    tasks = [begin(asker) for asker in telemetry.askers]
    await turn()
    numbers = [telemetry.asked(slot)[0].number for slot in (0, 1)]
    telemetry.answer(numbers[0], True, slot=1)  # of the other slot: not a number of ours
    telemetry.answer(numbers[1], False, slot=1)
    assert await tasks[1] is False
    assert not tasks[0].done()
    telemetry.answer(numbers[0], True)
    assert await tasks[0] is True


async def test_the_end_of_the_other_side_ends_the_reading_and_every_question(telemetry: Telemetry, patient) -> None:
    asker = telemetry.askers[0]
    task = begin(asker)
    await turn()
    telemetry.channel._answering[0].close()
    await turn()
    assert await begin(asker, user=9) is False
    asker.close()
    assert await task is False


async def test_a_number_that_no_store_holds_is_not_asked(telemetry: Telemetry, patient: None) -> None:
    assert await begin(telemetry.askers[0], user=2**64) is False
    assert await begin(telemetry.askers[0], iat=2**63) is False


async def test_a_worker_keeps_its_own_end_alone_and_telemetry_all_of_its_own() -> None:
    worker, other = Channel.create(3), Channel.create(3)
    kept = worker.keep_asking(1)
    assert [end.fileno() >= 0 for end in worker._asking] == [False, True, False]
    assert {end.fileno() for end in worker._answering} == {-1}
    kept.close()
    ends = other.keep_answering()
    assert all(end.fileno() >= 0 and end.type == socket.SOCK_SEQPACKET for end in ends)
    assert {end.fileno() for end in other._asking} == {-1}
    other.close()


async def test_the_next_image_takes_the_channel_over_with_what_lies_in_it() -> None:
    first = Channel.create(3)
    fds = [os.dup(fd) for fd in first.fds()]
    first._asking[2].send(pack_question(Question(1, 42, 0.0, None)))
    first.close()
    second = Channel.adopt(fds)
    assert second.fds() == fds
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert unpack_question(second._answering[2].recv(64)) == Question(1, 42, 0.0, None)
    second.close()
    assert {end.fileno() for end in (*second._asking, *second._answering)} == {-1}


async def test_descriptors_of_no_channel_are_refused_and_left_open() -> None:
    pair = socket.socketpair()
    channel = Channel.create(1)
    for wrong in ([], channel.fds()[:1], [end.fileno() for end in pair]):
        with pytest.raises(ValueError, match="cannot be taken over"):
            Channel.adopt(wrong)
    assert all(os.fstat(fd) for fd in channel.fds())
    channel.close()
    for end in pair:
        end.close()

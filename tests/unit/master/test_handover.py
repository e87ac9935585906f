"""The document that one image leaves to the next: it is whole, or it is refused and says why."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest

from proxyd.master import handover
from proxyd.master.handover import GenerationState, Handed, HandoverError, SlotState
from proxyd.master.succession import verify


def slot(number: int, pid: int = 100) -> SlotState:
    return SlotState(number, number, "running", pid, 12.5, None, 0, None, True, True)


def handed(**changes: Any) -> Handed:
    values: dict[str, Any] = {
        "pid": 42,
        "version": "1.0",
        "lifelines": (3, 4, 5, 6),
        "news": 7,
        "last_number": 3,
        "generations": (
            GenerationState(2, "draining", "0.9", 10.0, 130.0, 120.0, (slot(0),)),
            GenerationState(3, "serving", "1.0", 20.0, None, 60.5, (slot(1), slot(2, 0))),
        ),
        "telemetry": slot(-1),
        "telemetry_succeeds": False,
        "renewals": 9,
        "began_at": 99.25,
        "wanted": ("reload", "upgrade"),
        "last": {"ok": True},
        "keeps_listeners": True,
        "signals": (15, 1),
        "listeners": {"public": []},
        "node": {"region": 8, "memory": [8, 9], "fds": [8, 9]},
        "fds": (3, 4, 5, 6, 7, 8, 9),
    }
    return Handed(**(values | changes))


def through_json(state: Handed) -> Any:
    return json.loads(json.dumps(state.document()))


@pytest.mark.parametrize("changes", [{}, {"telemetry": None}, {"last": None}, {"generations": ()}, {"signals": ()}])
def test_what_is_handed_over_comes_back(changes: dict[str, Any]) -> None:
    state = handed(**changes)
    assert handover.parse(through_json(state)) == state


def test_it_goes_through_a_descriptor_and_closes_it() -> None:
    fd = handover.write(handed().document())
    assert not os.get_inheritable(fd)
    assert handover.read(fd) == handed()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_a_state_of_another_format_is_refused_with_what_to_do() -> None:
    document = through_json(handed()) | {"format": handover.FORMAT + 1}
    with pytest.raises(HandoverError, match="restart"):
        handover.parse(document)


def test_keys_of_a_later_version_are_passed_over() -> None:
    document = through_json(handed()) | {"colour": "blue"}
    document["generations"][0]["colour"] = "blue"
    assert handover.parse(document) == handed()


MAYBE = {"telemetry", "last"}


@pytest.mark.parametrize("key", sorted(set(through_json(handed())) - MAYBE))
@pytest.mark.parametrize("value", [None, "text", [["list"]], -0.5j])
def test_a_key_that_is_missing_or_of_another_kind_is_named(key: str, value: Any) -> None:
    document = copy.deepcopy(through_json(handed()))
    if value is None:
        del document[key]
    elif type(document[key]) is type(value) and not isinstance(value, list):
        return
    else:
        document[key] = value
    with pytest.raises(HandoverError):
        handover.parse(document)


@pytest.mark.parametrize("key", sorted(through_json(handed())["generations"][1]["slots"][0]))
def test_so_is_one_of_a_slot(key: str) -> None:
    document = through_json(handed())
    document["generations"][1]["slots"][0][key] = {"not": "this"}
    with pytest.raises(HandoverError, match=key):
        handover.parse(document)


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[]", b"null", b'{"format":', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    fd = os.memfd_create("test")
    os.write(fd, text)
    with pytest.raises(HandoverError):
        handover.read(fd)


@pytest.mark.parametrize("text", ["", "x", "-1", "3 4", "³", "9" * 20])
def test_a_variable_that_names_no_descriptor_is_refused_and_gone(text: str) -> None:
    environ = {handover.ENV: text}
    with pytest.raises(HandoverError):
        handover.take(environ)
    assert environ == {}


def test_without_the_variable_there_is_nothing_to_take() -> None:
    assert handover.take({}) is None
    assert handover.take({handover.ENV: "12"}) == 12


def test_a_word_that_this_program_does_not_know_is_refused_by_the_check() -> None:
    verify(handed())
    unknown = SlotState(0, 0, "dreaming", 0, 0.0, None, 0, None, False, False)
    for changes in ({"telemetry": unknown}, {"wanted": ("downgrade",)}, {"generations": ()}):
        with pytest.raises(ValueError, match=r"dreaming|downgrade|0 generations"):
            verify(handed(**changes))


def test_a_closed_descriptor_is_refused() -> None:
    with pytest.raises(HandoverError, match="cannot be read"):
        handover.read(999_999)

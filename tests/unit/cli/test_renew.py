"""`proxyd reload` and `proxyd upgrade`: whom they signal, which result is theirs, what they exit with."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.cli import renew

FILE = '[server]\nadmin = "unix:/nowhere/admin.sock"\n'


class Node:
    """A daemon that answers /status from a list, the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.signalled: list[tuple[int, int]] = []
        self.now = 0.0

    def ask(self, admin: Any) -> dict[str, Any]:
        self.asked.append(admin.text)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        found: dict[str, Any] = answer
        return found

    def kill(self, pid: int, number: int) -> None:
        self.signalled.append((pid, number))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def status(number: int = 0, *, begun: int = 0, **last: Any) -> dict[str, Any]:
    told = {"number": number, "kind": "reload", "ok": True, "took_s": 0.1, "findings": []}
    told["detail"] = "generation 2 serves"
    renewal: dict[str, Any] = {"begun": begun, "under_way": None, "waits": [], "unavailable": None}
    renewal["results"] = {(told | last)["kind"]: told | last} if number else {}
    return {"pid": 77, "workers": [], "renewal": renewal, "last_reload": told | last if number else None}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    def run(node: Node, kind: str = "reload", text: str = FILE) -> int:
        (tmp_path / "f.toml").write_text(text)
        args = argparse.Namespace(command=kind, config=str(tmp_path / "f.toml"))
        return renew.run(args, {}, node.ask, node.kill, lambda: node.now, node.sleep)

    return run


def test_a_reload_signals_hup_waits_and_prints_the_result(run: Any, capsys: Any) -> None:
    node = Node(status(3, begun=3), status(3, begun=4), status(4, begun=4))
    assert run(node) == 0
    assert node.signalled == [(77, signal.SIGHUP)]
    assert "generation 2 serves" in capsys.readouterr().out


def test_an_upgrade_signals_usr2(run: Any) -> None:
    node = Node(status(), status(1, kind="upgrade"))
    assert run(node, "upgrade") == 0
    assert node.signalled == [(77, signal.SIGUSR2)]


def test_findings_of_a_refusal_are_printed_and_the_exit_code_is_1(run: Any, capsys: Any) -> None:
    node = Node(status(), status(1, ok=False, detail="has errors", findings=["error f.toml:3 wrong"]))
    assert run(node) == 1
    printed = capsys.readouterr().err
    assert "error f.toml:3 wrong" in printed
    assert "has errors" in printed


def test_the_result_of_one_that_was_under_way_is_not_ours(run: Any) -> None:
    before = status(4, begun=5)
    before["renewal"]["under_way"] = {"kind": "reload", "step": "starting"}
    node = Node(before, status(5, begun=6, ok=False), status(6, begun=6))
    assert run(node) == 0


def test_a_daemon_that_does_not_answer_for_a_moment_is_asked_again(run: Any) -> None:
    node = Node(status(), ConnectionRefusedError(), TimeoutError(), ValueError("no JSON"), status(1))
    assert run(node) == 0


def test_no_result_in_time_is_told_and_bounded(run: Any, capsys: Any) -> None:
    node = Node(status())
    assert run(node) == 1
    assert renew.WAIT_S <= node.now < renew.WAIT_S + 1
    assert "no result" in capsys.readouterr().err


def test_a_daemon_that_goes_away_meanwhile_is_unreachable(run: Any) -> None:
    assert run(Node(status(), ConnectionRefusedError())) == renew.UNREACHABLE


def test_a_daemon_that_was_started_anew_meanwhile_is_told_at_once(run: Any, capsys: Any) -> None:
    node = Node(status(), status() | {"pid": 78})
    assert run(node) == 1
    assert node.now < 1
    assert "process 77, ended meanwhile, and process 78 serves" in capsys.readouterr().err


def test_a_daemon_that_ended_meanwhile_is_not_waited_for(run: Any, capsys: Any) -> None:
    node = Node(status(), ConnectionRefusedError())

    def kill(pid: int, number: int) -> None:
        if number == 0:
            raise ProcessLookupError

    node.kill = kill  # type: ignore[method-assign]
    assert run(node) == renew.UNREACHABLE
    assert node.now < 1
    assert "journalctl" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [FileNotFoundError(), ConnectionRefusedError(), PermissionError(), ValueError("x")])
def test_nobody_is_signalled_where_nobody_answers(run: Any, answer: Exception) -> None:
    node = Node(answer)
    assert run(node) == renew.UNREACHABLE
    assert node.signalled == []


@pytest.mark.parametrize("pid", [None, 0, 1, -1, "77"])
def test_no_process_is_signalled_that_cannot_be_the_master(run: Any, pid: Any) -> None:
    node = Node(status() | {"pid": pid})
    assert run(node) == renew.UNREACHABLE
    assert node.signalled == []


def test_a_daemon_that_is_stopping_is_not_signalled_and_not_waited_for(run: Any, capsys: Any) -> None:
    node = Node(status() | {"state": "draining"})
    assert run(node) == 1
    assert node.signalled == []
    assert "is stopping" in capsys.readouterr().err


@pytest.mark.parametrize("without", [("renewal",), ("renewal", "results")])
def test_a_daemon_of_an_older_version_is_told_of(run: Any, capsys: Any, without: tuple[str, ...]) -> None:
    answer = status()
    within: Any = answer
    for name in without[:-1]:
        within = within[name]
    del within[without[-1]]
    node = Node(answer)
    assert run(node) == renew.UNREACHABLE
    assert node.signalled == []
    assert "restart it once" in capsys.readouterr().err


def test_a_demo_says_why_it_cannot(run: Any, capsys: Any) -> None:
    answer = status()
    answer["renewal"]["unavailable"] = "a demo has no file"
    node = Node(answer)
    assert run(node) == 1
    assert node.signalled == []
    assert "a demo has no file" in capsys.readouterr().err


def test_a_reload_that_came_between_is_not_taken_for_the_upgrade(run: Any) -> None:
    node = Node(status(), status(1, kind="reload", ok=False), status(2, kind="upgrade"))
    assert run(node, "upgrade") == 0


def test_an_upgrade_that_worked_has_read_the_file_and_one_that_failed_has_not(run: Any) -> None:
    assert run(Node(status(), status(1, kind="upgrade"))) == 0
    node = Node(status(), status(1, kind="upgrade", ok=False), status(2))
    assert run(node) == 0


def test_a_result_with_another_behind_it_is_found(run: Any) -> None:
    both = status(2, kind="reload")
    both["renewal"]["results"]["upgrade"] = both["last_reload"] | {"kind": "upgrade", "number": 1, "ok": False}
    assert run(Node(status(), both), "upgrade") == 1


@pytest.mark.parametrize("error", [ProcessLookupError(), PermissionError()])
def test_a_process_that_cannot_be_signalled_is_unreachable(run: Any, error: Exception) -> None:
    node = Node(status())

    def refuse(pid: int, number: int) -> None:
        raise error

    node.kill = refuse  # type: ignore[method-assign]
    assert run(node) == renew.UNREACHABLE


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (FILE + "workers = -5\n[nonsense]\n", "unix:/nowhere/admin.sock"),
        (FILE + "[[[", "unix:/nowhere/admin.sock"),
        ("[[[", "unix:/run/proxyd/admin.sock"),
        ('[server]\nadmin = "0.0.0.0"\n', "unix:/run/proxyd/admin.sock"),
    ],
)
def test_the_daemon_is_found_by_a_file_that_is_broken(run: Any, text: str, asked: str) -> None:
    node = Node(status(), status(1, ok=False))
    assert run(node, text=text) == 1
    assert set(node.asked) == {asked}


def test_a_file_that_cannot_be_read_is_an_exit_code_of_2(tmp_path: Path) -> None:
    assert renew.run(argparse.Namespace(command="reload", config=str(tmp_path / "none"))) == 2


def test_what_a_finding_holds_cannot_write_to_the_terminal(run: Any, capsys: Any) -> None:
    run(Node(status(), status(1, ok=False, findings=["\x1b[2Jgone"])))
    assert "\x1b" not in capsys.readouterr().err

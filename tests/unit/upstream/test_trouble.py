"""The lines about one upstream that fails."""

from __future__ import annotations

from typing import Any

from proxyd.errors import UpstreamErrorKind
from proxyd.upstream.trouble import FLAPPING_S, KEY_REPEAT_S, REPEAT_S, Trouble

Kind = UpstreamErrorKind


class Book:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, /, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = error = info

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.lines]


def make() -> tuple[Trouble, Book]:
    book = Book()
    return Trouble("openai", "127.0.0.1:9", book), book  # type: ignore[arg-type]


def test_sixty_refused_connections_are_one_line_that_names_the_address() -> None:
    trouble, book = make()
    for n in range(60):
        trouble.on_failure(Kind.REFUSED, "127.0.0.1:9: Connection refused", 100 + n * 0.1)
    ((event, fields),) = book.lines
    assert event == "upstream_unreachable"
    assert (fields["upstream"], fields["kind"], fields["address"]) == ("openai", "refused", "127.0.0.1:9")


def test_a_long_trouble_is_told_again_with_its_count_and_its_end_is_told_once() -> None:
    trouble, book = make()
    for second in range(int(REPEAT_S) + 1):
        trouble.on_failure(Kind.RESOLVE, "no such name", 100.0 + second)
    assert book.names == ["upstream_unreachable"] * 2
    assert book.lines[-1][1]["failures"] == REPEAT_S + 1
    assert trouble.on_answer(140.0)
    assert not trouble.on_answer(141.0)
    assert book.names[2:] == ["upstream_recovered"]
    assert book.lines[-1][1]["failed_s"] == 40.0


def test_an_upstream_that_fails_every_other_request_is_not_a_line_each() -> None:
    trouble, book = make()
    for n in range(100):
        trouble.on_failure(Kind.TLS, "", 100 + n * FLAPPING_S / 100)
        trouble.on_answer(100 + n * FLAPPING_S / 100)
    assert book.names == ["upstream_unreachable", "upstream_recovered"]


def test_an_upstream_that_answers_badly_is_failing_and_a_cut_body_is_neither() -> None:
    trouble, book = make()
    trouble.on_failure(Kind.BROKEN_BODY, "", 90.0)
    trouble.on_failure(503, "", 100.0)
    assert [(event, fields["kind"]) for event, fields in book.lines] == [("upstream_failing", "status_503")]


def test_a_refused_key_is_told_by_its_number_and_seldom() -> None:
    trouble, book = make()
    for second in range(int(KEY_REPEAT_S) + 1):
        trouble.on_key_refused(401, "2 of 3", 100.0 + second)
    assert [fields["refusals"] for _, fields in book.lines] == [1, KEY_REPEAT_S]
    assert book.lines[0] == (
        "upstream_refuses_key", {"upstream": "openai", "status": 401, "key": "2 of 3", "refusals": 1}
    )  # fmt: skip

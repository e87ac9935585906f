"""A stream whose user runs out of tokens ends at the event that crossed the line, in its dialect, booked once."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxyd.dialects.ask import Route
from proxyd.dialects.tokens import O200K
from proxyd.relay.states import Phase
from proxyd.wire.framing import encode_chunk
from tests.unit.relay.stage import Account, Stage

# One token of the vocabulary, in five bytes, wherever it stands.
WORD = " four"
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}}\n\n'


def event(name: str, document: dict[str, Any]) -> bytes:
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + json.dumps(document).encode() + b"\n\n"


def chat(text: str) -> bytes:
    return event("", {"choices": [{"index": 0, "delta": {"content": text}}]})


def legacy(text: str) -> bytes:
    return event("", {"choices": [{"index": 0, "text": text}]})


def response(text: str) -> bytes:
    return event("response.output_text.delta", {"type": "response.output_text.delta", "delta": text})


def claude(text: str) -> bytes:
    document = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    return event("content_block_delta", document)


STARTED = event("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 9}}})
NATIVE = [
    (Route.CHAT, "openai", chat),
    (Route.COMPLETIONS, "openai", legacy),
    (Route.RESPONSES, "openai", response),
    (Route.MESSAGES, "anthropic", claude),
]


@pytest.fixture(autouse=True, scope="module")
def vocabulary() -> None:
    if not O200K.is_ready:
        O200K.load()


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(account: Account | None = None) -> Stage:
        made.append(Stage(account))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., Stage]


def what_happened(stage: Stage) -> list[Any]:
    """All but the looks on the way."""
    return [one for one in stage.told if one[0] not in ("progress", "checkpoint")]


@pytest.mark.parametrize("route, dialect, block", NATIVE)
def test_a_native_stream_ends_with_its_dialects_error_event_at_the_event_that_crossed_the_line(
    stage: Make, route: Route, dialect: str, block: Callable[[str], bytes]
) -> None:
    s = stage().begin(route, dialect, room=3)
    words = 4 if dialect == "openai" else 3  # Claude's vocabulary is taken to make 1.3 tokens of each
    s.turn(encode_chunk(block(WORD) * 50 + DONE) + b"0\r\n\r\n")
    payload, ended = s.answered()
    assert not ended
    assert payload.startswith(block(WORD) * words)
    last_word = payload[len(block(WORD)) * words :]
    assert last_word.count(b"\n\n") == 1
    error = json.loads(last_word[last_word.index(b"data: ") + 6 :])["error"]
    assert error["type"] == "rate_limit_error"
    assert error.get("code", "quota_exceeded") == "quota_exceeded"
    assert last_word.startswith(b"event: error\n") == (route in (Route.MESSAGES, Route.RESPONSES))
    assert s.book.finals[0]["estimated"]
    assert what_happened(s) == [
        "upstream fine",
        ("upstream", "closed"),
        "release",
        ("settle", s.prompt + 4),
        ("final", s.prompt, 4, "interrupted"),
        "finished",
    ]
    assert s.log.lines[0]["cause"] == "quota_exceeded"
    for callback in s.later_calls:
        callback()
    assert s.told[-1] == ("client ended", False)


@pytest.mark.parametrize("dialect, block", [("openai", chat), ("anthropic", claude)])
def test_the_sites_stream_ends_with_an_error_that_is_not_worth_a_retry(
    stage: Make, dialect: str, block: Callable[[str], bytes]
) -> None:
    s = stage().begin(Route.STREAM, dialect, body=b'{"model":"m","prompt":"p"}', room=3)
    s.turn(encode_chunk(block(WORD) * 50 + DONE) + b"0\r\n\r\n")
    payload, ended = s.answered()
    assert not ended
    blocks = payload.split(b"\n\n")
    assert sum(b'data: {"delta":" four"}' in one for one in blocks) == (4 if dialect == "openai" else 3)
    name, data = blocks[-2].split(b"\n")
    assert name == b"event: error"
    told = json.loads(data[6:])
    assert (told["error"]["code"], told["retryable"]) == ("quota_exceeded", False)
    assert b"event: usage" not in payload
    assert b"event: done" not in payload
    assert s.told[-3:] == [("settle", s.prompt + 4), ("final", s.prompt, 4, "interrupted"), "finished"]


def test_a_stream_that_uses_its_last_token_and_no_more_is_complete(stage: Make) -> None:
    s = stage().begin(room=3)
    s.turn(encode_chunk(chat(WORD) * 3 + DONE) + b"0\r\n\r\n")
    assert s.answered() == (chat(WORD) * 3 + DONE, True)
    assert s.told[-3:] == [("settle", s.prompt + 3), ("final", s.prompt, 3, "completed"), "finished"]
    assert s.log.lines[0]["cause"] == "complete"


def test_a_terminal_event_that_was_relayed_makes_it_complete_whatever_its_usage_says(stage: Make) -> None:
    s = stage().begin(room=14)
    s.turn(encode_chunk(chat(WORD) + USAGE + DONE))
    s.pass_time(2.0)
    assert "finished" not in s.told
    s.turn(b"0\r\n\r\n")
    assert s.answered()[0].replace(b": proxyd\n", b"") == chat(WORD) + DONE
    assert s.told[-3:] == [("settle", 16), ("final", 11, 5, "completed"), "finished"]


def test_what_the_provider_told_before_is_booked_and_not_our_estimate(stage: Make) -> None:
    s = stage().begin(Route.MESSAGES, "anthropic", room=12)
    s.turn(encode_chunk(STARTED + claude(WORD) * 50))
    payload, ended = s.answered()
    assert not ended
    words = payload.count(b'" four"')
    completion = round(1.3 * words)
    assert s.told[-3:] == [("settle", 9 + completion), ("final", 9, completion, "interrupted"), "finished"]
    # the first mark was set when the prompt was thought to have s.prompt tokens; the second knew better
    assert 9 + completion > s.prompt + 12 >= 9 + round(1.3 * (words - 1))


def test_counts_that_come_with_each_event_end_it_when_they_cross_the_line(stage: Make) -> None:
    def counted(n: int) -> bytes:
        usage = {"prompt_tokens": 11, "completion_tokens": n, "total_tokens": 11 + n}
        return event("", {"choices": [{"index": 0, "delta": {"content": WORD}}], "usage": usage})

    s = stage(Account(1010)).begin()
    for n in range(1, 100):
        s.turn(encode_chunk(counted(100 * n)))
        s.pass_time(1.2)
        if "finished" in s.told:
            break
    assert n == 10
    assert s.told[-3:] == [("settle", 1011), ("final", 11, 1000, "interrupted"), "finished"]
    assert not s.book.finals[0]["estimated"]


def test_an_encoded_stream_is_cut_behind_the_piece_that_crossed_the_line_without_an_end(stage: Make) -> None:
    head = b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    s = stage().begin(head=head, room=3)
    pieces = [gzip.compress(chat(WORD)) for _ in range(8)]
    for piece in pieces:
        if "finished" not in s.told:
            s.turn(encode_chunk(piece))
    assert s.answered() == (b"".join(pieces[:4]), False)
    assert s.told[-3:] == [("settle", s.prompt + 4), ("final", s.prompt, 4, "interrupted"), "finished"]
    assert ("client ended", False) in s.told


def test_a_json_answer_is_whole_or_nothing_so_it_goes_on_and_is_settled_whole(stage: Make) -> None:
    usage = b'"usage":{"prompt_tokens":11,"completion_tokens":500,"total_tokens":511}'
    answer = b'{"choices":[{"message":{"content":"' + b"x" * 3000 + b'"},"finish_reason":"stop"}],' + usage + b"}"
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(answer)
    s = stage().begin(head=head, body=b'{"model":"m","messages":[]}', room=-1)
    s.turn(answer[:1000])
    s.pass_time(3.0)
    s.turn(answer[1000:])
    assert s.taken().endswith(answer)
    assert s.told[-3:] == [("settle", 511), ("final", 11, 500, "completed"), "finished"]


def test_a_stream_that_waits_ends_when_another_of_its_user_has_crossed_the_line(stage: Make) -> None:
    account = Account(100)
    quiet, loud = stage(account).begin(), stage(account).begin()
    quiet.turn(encode_chunk(chat(WORD)))
    quiet.pass_time(1.2)
    loud.turn(encode_chunk(chat(WORD * 120)))
    assert loud.told[-2:] == [("final", loud.prompt, 120, "interrupted"), "finished"]
    assert "finished" not in quiet.told
    quiet.pass_time(1.2)
    assert quiet.told[-2:] == [("final", quiet.prompt, 1, "interrupted"), "finished"]
    assert b'"code":"quota_exceeded"' in quiet.answered()[0]


def test_two_streams_of_one_pace_pass_the_line_by_two_events_each_at_most(stage: Make) -> None:
    account = Account(1000)
    pair = [stage(account).begin() for _ in range(2)]
    for _ in range(600):
        for s in pair:
            if "finished" not in s.told:
                s.turn(encode_chunk(chat(WORD * 3)))
    assert [s.book.finals[0]["status"] for s in pair] == ["interrupted"] * 2
    assert 1000 < account.spent <= 1000 + 2 * (3 + 3)
    assert account.spent == sum(s.book.finals[0]["prompt"] + s.book.finals[0]["completion"] for s in pair)


def test_a_stream_alone_is_looked_at_each_kilobyte_and_then_at_its_line(stage: Make) -> None:
    s = stage().begin(room=1000)
    while "finished" not in s.told:
        s.turn(encode_chunk(chat(WORD)))
    looks = [one[1] - s.prompt for one in s.told if one[0] == "progress"]
    assert looks == [0, 13, 218, 423, 629, 834, 1001]
    assert s.told[-2] == ("final", s.prompt, 1001, "interrupted")


def test_the_first_kilobyte_is_looked_at_at_half_of_the_way_each_time(stage: Make) -> None:
    s = stage().begin(room=200)
    while "finished" not in s.told:
        s.turn(encode_chunk(chat(WORD)))
    looks = [one[1] - s.prompt for one in s.told if one[0] == "progress"]
    assert looks == [0, 13, 107, 154, 178, 190, 201]
    assert s.told[-2] == ("final", s.prompt, 201, "interrupted")


@pytest.mark.parametrize("text", ["\u4e16\u754c\u4f60\u597d\u55ce", "8f3a-", "{}[]()", "aaaa", "\n\t", "\U0001f600"])
def test_the_count_that_ends_it_is_the_count_that_is_booked_whatever_the_script(stage: Make, text: str) -> None:
    for room in (40, 900):
        s = stage().begin(room=room)
        while "finished" not in s.told:
            s.turn(encode_chunk(chat(text)))
        _, completion = s.told[-2][1:3]
        last = [one[1] for one in s.told if one[0] == "progress"][-1]
        assert s.prompt + completion == last
        assert room < completion <= room + 16, (text, completion)


@pytest.mark.parametrize("room", [2**62, 2**63 - 1])
def test_a_quota_as_large_as_a_site_can_write_is_no_less_than_none(stage: Make, room: int) -> None:
    s = stage(Account(room)).begin()
    for _ in range(300):
        s.turn(encode_chunk(chat(WORD)))
    counted = stage(Account(room)).begin(Route.MESSAGES, "anthropic")
    usage = event("message_delta", {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}})
    for _ in range(3):
        counted.turn(encode_chunk(STARTED + usage + claude(WORD) * 20))
        counted.pass_time(1.2)
    s.turn(encode_chunk(DONE) + b"0\r\n\r\n")
    assert s.answered() == (chat(WORD) * 300 + DONE, True)
    assert s.told[-2] == ("final", s.prompt, 300, "completed")
    assert "finished" not in counted.told


def test_without_a_quota_nothing_is_asked_but_at_the_marks(stage: Make) -> None:
    s = stage().begin()
    for _ in range(300):
        s.turn(encode_chunk(chat(WORD)))
    assert [one[1] - s.prompt for one in s.told if one[0] == "progress"] == [257]
    s.pass_time(3.0)
    assert [one[1] - s.prompt for one in s.told if one[0] == "progress"] == [257, 375]


def test_a_prompt_that_is_more_than_what_was_left_is_an_answer_of_one_event(stage: Make) -> None:
    s = stage().begin(room=-45)
    s.turn(encode_chunk(event("", {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}) + chat(WORD) * 3))
    payload = s.answered()[0]
    assert payload.count(b'" four"') == 1
    assert b'"code":"quota_exceeded"' in payload
    assert s.told[-2] == ("final", s.prompt, 1, "interrupted")


def test_a_client_that_left_before_the_line_is_a_client_that_left(stage: Make) -> None:
    s = stage().begin(Route.COMPLETIONS, body=b'{"model":"m","stream":true,"prompt":"p"}', room=3)
    s.client.close()
    s.reads = False
    s.turn()
    assert s.told[-3:] == [("settle", s.prompt), ("final", s.prompt, 0, "client_aborted"), "finished"]


def test_an_end_that_waits_for_a_slow_client_is_not_another_end(stage: Make) -> None:
    s = stage().begin(room=100_000)
    s.reads = False
    while s.stream.transaction.phase is not Phase.ENDING:
        s.turn(encode_chunk(chat("x" * 8000)))
    assert "finished" not in s.told
    s.pass_time(2.0)
    got = b""
    while "finished" not in s.told:
        got += s.taken()
        s.turn()
    got += s.taken()
    ends = [one for one in s.told if one[0] in ("settle", "final")]
    completion = ends[1][2]
    assert ends == [("settle", s.prompt + completion), ("final", s.prompt, completion, "interrupted")]
    assert 100_000 < completion <= 100_000 + 8000
    assert b'"code":"quota_exceeded"' in got


def test_a_heartbeat_and_the_last_word_stand_between_events(stage: Make) -> None:
    s = stage().begin(room=100)
    s.turn(encode_chunk(chat(WORD)))
    s.pass_time(0.8)
    s.turn(encode_chunk(chat(WORD) + b'data: {"choices":[{"delta":{"content":"ha'))
    s.pass_time(0.8)
    s.account.spent = 200
    s.pass_time(1.2)
    payload, ended = s.answered()
    assert not ended
    assert payload.count(b": proxyd\n") >= 2
    rest = payload.replace(b": proxyd\n", b"")
    assert rest.startswith(chat(WORD) * 2 + b'data: {"error":')
    assert b'"ha' not in payload


@pytest.mark.parametrize("end", ["whole", "broken", "terminal"])
def test_the_permit_is_given_back_when_the_upstream_is_and_before_the_last_bytes_leave(stage: Make, end: str) -> None:
    s = stage().begin()
    s.turn(encode_chunk(chat(WORD)))
    if end == "terminal":
        s.turn(encode_chunk(DONE))
    s.taken()
    sent: list[bytes] = []
    release = s.ticket.release

    def look() -> None:
        sent.append(s.taken())
        release()

    s.ticket.release = look  # type: ignore[method-assign]
    if end == "whole":
        s.turn(encode_chunk(chat("more") + DONE) + b"0\r\n\r\n")
    else:
        s.upstream.close()
        s.turn()
    assert sent == [b""]
    assert s.taken()
    order = what_happened(s)
    upstream = order.index(("upstream", "kept" if end == "whole" else "closed"))
    assert order[upstream + 1] == "release"
    assert upstream + 1 < order.index("finished")


def test_the_ticket_is_settled_once_before_the_final_record(stage: Make) -> None:
    s = stage().begin(Route.COMPLETIONS, body=b'{"model":"m","stream":true,"prompt":"p"}')
    s.turn(encode_chunk(legacy(WORD) + DONE) + b"0\r\n\r\n")
    s.pass_time(2.0)
    s.stream.drop()
    assert what_happened(s)[2:] == [
        "release",
        ("ending", 1, 1),
        "flush",
        ("client ended", True),
        ("settle", 2),
        ("final", 1, 1, "completed"),
        "finished",
    ]


def test_what_costs_nothing_is_refunded(stage: Make) -> None:
    s = stage().begin(Route.COMPLETIONS)
    s.upstream.close()
    s.turn()
    assert s.told[-3:] == ["refund", ("final", 0, 0, "upstream_error"), "finished"]

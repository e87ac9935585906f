"""The real SDKs get through proxyd, and through nginx before it, what they get from the provider directly."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import KEY, ROOT, wait_for
from tests.daemon.sdk.documented import BROKEN, CLOSED, CUT, REFUSES, RESET, TABLE, Row, decide
from tests.daemon.sdk.runs import DIRECT, NGINX_TCP, NGINX_UNIX, VIA, Run, install_javascript, node_of
from tests.daemon.sdk.steps import RETRIED, SDKS, STEPS, steps_of

PAGE = ROOT / "docs/compatibility.md"

# What fails even without proxyd; everything else must not, or the comparison would compare nothing.
FAILS = re.compile(
    r"(openai|anthropic) (?!503 once|client leaves).*"
    r"|(openai/chat-error-mid-stream|openai/responses-failed|compat/vllm-error-mid|openai/chat-malformed-json-event"
    r"|anthropic/error-overloaded-mid|anthropic/error-first-event)\.sse .*"
)
FAILS_IN_PYTHON = re.compile(r"openai/chat-id-then-comment-keepalive\.sse .*")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The whole session, run once. The folder is short: a Unix socket's path has 107 bytes."""
    install_javascript()
    with tempfile.TemporaryDirectory(prefix="proxyd-sdk-") as folder, node_of(Path(folder)) as made:
        made.run()
        yield made


@pytest.mark.parametrize("sdk", SDKS)
def test_every_step_was_taken_and_fails_directly_only_where_it_should(run: Run, sdk: str) -> None:
    for step in steps_of(sdk):
        for way in (DIRECT, *VIA):
            assert (sdk, way, step.name) in run.seen
        seen = run.outcome(sdk, DIRECT, step.name)
        fails = FAILS.fullmatch(step.name) or (sdk.startswith("openai-py") and FAILS_IN_PYTHON.fullmatch(step.name))
        assert ("raised" in seen) == bool(fails), (step.name, seen)
        assert seen["attempts"], step.name
    for status in RETRIED:
        dialect = sdk.partition("-")[0]
        for way in (DIRECT, *VIA):
            attempts = run.outcome(sdk, way, f"{dialect} {status} retried")["attempts"]
            assert [one["headers"]["x-stainless-retry-count"] for one in attempts] == ["0", "1", "2"], (way, status)
    assert run.provider.strays == []


@pytest.mark.parametrize("way", VIA)
@pytest.mark.parametrize("sdk", SDKS)
def test_an_sdk_sees_no_difference_but_the_documented_ones(run: Run, sdk: str, way: str) -> None:
    unknown = []
    for step in steps_of(sdk):
        direct, via = run.outcome(sdk, DIRECT, step.name), run.outcome(sdk, way, step.name)
        unknown += decide(step.name, way, direct, via)[0]
    assert not unknown, "\n".join(unknown[:40])


def test_every_documented_difference_is_seen_and_has_its_place_on_the_page(run: Run) -> None:
    needed: set[Row] = set()
    for sdk in SDKS:
        for step in steps_of(sdk):
            for way in VIA:
                outcomes = run.outcome(sdk, DIRECT, step.name), run.outcome(sdk, way, step.name)
                needed |= decide(step.name, way, *outcomes)[1]
    assert [row for row in TABLE if row not in needed] == []
    page = PAGE.read_text()
    shown = set(re.findall(r"^### (.+)$", page, re.MULTILINE))
    assert shown == {row.anchor for row in TABLE}


@pytest.mark.parametrize("sdk", SDKS)
def test_a_broken_stream_raises_what_the_page_says_after_the_same_events(run: Run, sdk: str) -> None:
    steps = [step.name for step in steps_of(sdk) if re.fullmatch(CUT, step.name)]
    assert len(steps) == 5
    for step in steps:
        directly, through = (RESET if step.endswith("reset") else BROKEN)[sdk]
        direct = run.outcome(sdk, DIRECT, step)
        assert direct["raised"]["class"] == directly, step
        for way in VIA:
            via = run.outcome(sdk, way, step)
            assert via["raised"]["class"] == through, (step, way)
            assert via["events"] == direct["events"]
            assert len(via["attempts"]) == 1
            if sdk.startswith("openai"):
                assert via["raised"]["code"] == "upstream_broken"
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {sdk} "))
    for name in {*BROKEN[sdk], *RESET[sdk]}:
        assert f"`{name}`" in row


@pytest.mark.parametrize("sdk", SDKS)
def test_a_provider_that_closes_without_an_answer_is_a_retried_502(run: Run, sdk: str) -> None:
    step = f"{sdk.partition('-')[0]} closed without an answer"
    assert run.outcome(sdk, DIRECT, step)["raised"]["class"].endswith(CLOSED[0])
    for way in VIA:
        via = run.outcome(sdk, way, step)
        assert via["raised"]["class"].endswith(CLOSED[1])
        assert via["raised"].get("status_code", via["raised"].get("status")) == 502
        assert {one["headers"]["x-stainless-retry-count"] for one in via["attempts"]} == {"0", "1"}


@pytest.mark.parametrize("sdk", SDKS)
def test_a_refusal_of_proxyds_own_reads_as_the_providers_would(run: Run, sdk: str) -> None:
    refused = [step for step in steps_of(sdk) if step.own is not None]
    assert len(refused) == 4
    for step in refused:
        assert re.fullmatch(REFUSES, step.name)
        assert step.own is not None
        status, code = step.own
        direct = run.outcome(sdk, DIRECT, step.name)["raised"]
        for way in VIA:
            via = run.outcome(sdk, way, step.name)
            raised = via["raised"]
            assert via["attempts"] == [], "it cost the provider nothing"
            assert raised.get("status_code", raised.get("status")) == status
            assert status == 403 or raised["class"] == direct["class"]
            assert raised.get("request_id", raised.get("requestID")) == raised["headers"]["x-proxyd-request-id"]
            if sdk.startswith("openai"):
                assert raised["code"] == code


def test_a_client_that_leaves_stops_the_provider(run: Run) -> None:
    for sdk in SDKS:
        for way in (DIRECT, *VIA):
            (seen,) = run.provider.attempts[sdk, way, f"{sdk.partition('-')[0]} client leaves"]
            wait_for(lambda seen=seen: seen.closed_at, 25)
            assert seen.closed_at is not None
            assert seen.closed_at - seen.at < 10, (sdk, way)


def test_every_request_that_reached_the_provider_has_one_row(run: Run) -> None:
    asked = {
        seen.header("x-request-id")
        for (_, way, _), attempts in run.provider.attempts.items()
        if way != DIRECT
        for seen in attempts
    }
    wait_for(lambda: asked <= {row["request_id"] for row in run.daemon.rows()}, 30)
    rows = run.daemon.rows()
    assert len({row["request_id"] for row in rows}) == len(rows)
    # a client that lost its patience before the provider was asked has a row, too
    assert {row["status"] for row in rows if row["request_id"] not in asked} <= {"client_aborted"}


def test_no_key_travels_to_the_wrong_side(run: Run) -> None:
    token = run.daemon.token().partition(".")[0]  # the head of every token of ours
    for (_, way, step), attempts in run.provider.attempts.items():
        if way != DIRECT:
            assert all(token not in seen.head.decode() for seen in attempts), step
    for (_, way, step), seen in run.seen.items():
        assert way == DIRECT or KEY not in str(seen), step


def test_nginx_complains_only_of_the_streams_that_were_broken(run: Run) -> None:
    lines = [line for line in run.nginx.errors().splitlines() if "[info]" not in line and "[notice]" not in line]
    # a body above client_body_buffer_size; the file says so
    large = [line for line in lines if "is buffered to a temporary file" in line]
    # "while sending to client" where part of a large event still waits for the client
    cut_off = re.compile("upstream prematurely closed connection while (reading upstream|sending to client)")
    broken = [line for line in lines if cut_off.search(line)]
    assert [line for line in lines if line not in large and line not in broken] == []
    cuts = [step.name for step in STEPS if " cut" in step.name]
    breaks = sum(
        len(attempts)
        for (_, way, step), attempts in run.provider.attempts.items()
        if way in (NGINX_TCP, NGINX_UNIX) and step in cuts
    )
    assert len(broken) <= breaks

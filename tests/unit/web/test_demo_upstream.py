"""What the demo model says and which faults it plays, without sockets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxyd.cli.demo import REAL, Provider, config_text, greeting
from proxyd.config.load import parse
from proxyd.web import demo_answers as answers
from proxyd.web.demo_upstream import ALONE, NUMBERED, Pace, Scenario, decide_scenario, explain

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "one two three"}]}
TOOLS: dict[str, Any] = {
    "tools": [{"name": "weather", "function": {"name": "weather"}}],
    "messages": [{"role": "user", "content": "Tool!"}],
}


def data_of(events: list[bytes]) -> list[dict[str, Any]]:
    lines = [line for event in events for line in event.split(b"\n") if line.startswith(b"data: {")]
    return [orjson.loads(line[6:]) for line in lines]


def test_every_dialect_says_the_same_words() -> None:
    question = answers.read_question(ASKED)
    chat = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data_of(answers.chat(question, True)))
    completion = "".join(chunk["choices"][0]["text"] for chunk in data_of(answers.completion(question, True)))
    response = "".join(
        event["delta"] for event in data_of(answers.response(question, True)) if event["type"].endswith("text.delta")
    )
    message = "".join(
        event["delta"]["text"]
        for event in data_of(answers.message(question, True))
        if event["type"] == "content_block_delta"
    )
    assert chat == completion == response == message == question.text
    assert "not an AI" in question.text
    assert "one two three" in question.text


def test_an_answer_is_the_same_each_time_and_whole_as_streamed() -> None:
    question = answers.read_question(ASKED)
    assert answers.chat(question, True) == answers.chat(answers.read_question(ASKED), True)
    whole = answers.chat(question, False)
    assert isinstance(whole, dict)
    assert whole["choices"][0]["message"]["content"] == question.text


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_comes_at_the_end_if_it_was_asked_for(wanted: bool) -> None:
    question = answers.read_question({**ASKED, "stream_options": {"include_usage": wanted}})
    events = answers.chat(question, True)
    assert events[-1] == b"data: [DONE]\n\n"
    chunks = data_of(events)
    assert [bool(chunk.get("usage")) for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert bool(chunks[-1].get("usage")) is wanted
    if wanted:
        assert chunks[-1]["usage"]["completion_tokens"] == len(question.words)
        assert chunks[-1]["choices"] == []


def test_a_tool_is_called_when_there_is_one_and_the_prompt_names_tools() -> None:
    question = answers.read_question(TOOLS)
    parts = [
        event["delta"]["partial_json"]
        for event in data_of(answers.message(question, True))
        if event["type"] == "content_block_delta"
    ]
    calls = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in data_of(answers.chat(question, True))]
    spoken = "".join(call[0]["function"]["arguments"] for call in calls if call)
    assert orjson.loads("".join(parts)) == orjson.loads(spoken)
    assert answers.read_question({**TOOLS, "tools": []}).tool == ""


def test_a_limit_cuts_the_answer_and_says_so() -> None:
    question = answers.read_question({**ASKED, "max_tokens": 3})
    assert question.text == "This is proxyd's"
    assert data_of(answers.chat(question, True))[-1]["choices"][0]["finish_reason"] == "length"
    assert data_of(answers.message(question, True))[-2]["delta"]["stop_reason"] == "max_tokens"
    assert data_of(answers.response(question, True))[-1]["type"] == "response.incomplete"


def test_responses_events_are_numbered_without_gaps() -> None:
    events = data_of(answers.response(answers.read_question({"model": "m", "input": "hi"}), True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    "document",
    [{}, {"messages": "x"}, {"messages": [1, None]}, {"input": {"a": 1}}, {"messages": [{"content": [{"text": 1}]}]}],
)
def test_an_odd_question_is_answered_too(document: dict[str, Any]) -> None:
    assert answers.read_question(document).text


@pytest.mark.parametrize(
    ("model", "prompt", "header", "expected"),
    [
        ("m", "hello", "", Scenario(delay=1, pace=2)),
        ("demo-error-429", "", "", Scenario(error=429, delay=1, pace=2)),
        ("demo-cut-3", "", "", Scenario(cut=3, delay=1, pace=2)),
        ("m", "[demo: pace=0 words=9]", "", Scenario(words=9, delay=1, pace=0)),
        ("m", "pace=0 burst", "", Scenario(delay=1, pace=2)),
        ("demo-burst", "[demo:delay=7,burst]", "", Scenario(burst=True, delay=7, pace=2)),
        ("demo-mini-4", "[demo model]", "", Scenario(delay=1, pace=2)),
        ("demo-error-429", "[demo: error=500]", "error=503,burst", Scenario(error=503, burst=True, delay=1, pace=2)),
        ("m", "", "no_usage, stall=1", Scenario(no_usage=True, stall=1, delay=1, pace=2)),
        ("m", "[demo: colour=4 cut]", "", Scenario(unknown="colour=4", delay=1, pace=2)),
        ("m", "[demo: cut=x]", "", Scenario(unknown="cut=x", delay=1, pace=2)),
        ("m", "[demo: burst=1]", "", Scenario(unknown="burst=1", delay=1, pace=2)),
        ("m", "[demo: error=200]", "", Scenario(unknown="error=200", delay=1, pace=2)),
    ],
)
def test_faults_are_asked_for_by_name_prompt_and_header(
    model: str, prompt: str, header: str, expected: Scenario
) -> None:
    assert decide_scenario(Pace(1, 2), model, prompt, header) == expected


@pytest.mark.parametrize("name", [*NUMBERED, *ALONE])
def test_each_directive_means_the_same_in_a_name_a_prompt_and_a_header(name: str) -> None:
    in_name, written = (f"demo-{name}", name) if name in ALONE else (f"demo-{name}-500", f"{name}=500")
    asked = [(in_name, "", ""), ("m", f"[demo: {written}] Hello", ""), ("m", "", written)]
    scenarios = {decide_scenario(Pace(1, 2), *one) for one in asked}
    assert len(scenarios) == 1
    assert scenarios != {decide_scenario(Pace(1, 2), "m", "", "")}


def test_an_unknown_directive_is_answered_by_a_sentence_with_the_known_ones() -> None:
    said = answers.say(answers.read_question(ASKED), explain("colour=4")).text
    assert "colour=4" in said
    for name in (*NUMBERED, *ALONE):
        assert name in said


def test_the_directives_are_listed_for_developers() -> None:
    text = (Path(__file__).parents[3] / "docs/development.md").read_text()
    table = text[text.index("| directive |") :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)(?:=N)?` \| ", table, re.MULTILINE) == [*NUMBERED, *ALONE]


@pytest.mark.parametrize(("asked", "told"), [("one", "1 word:"), ("one two", "2 words:"), ("", "0 words:")])
def test_words_are_counted_in_english(asked: str, told: str) -> None:
    assert f"You wrote {told}" in answers.read_question({"prompt": asked}).text


DEMO = [
    Provider("demo-openai", "openai", "http://127.0.0.1:5/v1", "PROXYD_DEMO_KEY", "demo"),
    Provider("demo-anthropic", "anthropic", "http://127.0.0.1:5", "PROXYD_DEMO_KEY", "demo"),
]


@pytest.mark.parametrize("providers", [DEMO, list(REAL), [REAL[0]], [REAL[1]]])
def test_the_demos_configuration_has_nothing_to_find(providers: list[Provider]) -> None:
    names = ("PROXYD_DEMO_SECRET", "PROXYD_DEMO_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
    config, findings = parse(config_text("/tmp/demo", 3000, providers), "demo", dict.fromkeys(names, "k" * 40))
    assert findings == []
    assert config is not None
    assert config.demo.page
    assert config.find_model("any-name") is not None
    assert all(listen.is_local for listen in config.server.listen)
    assert config.auth.cookie == "proxyd_demo_3000"  # browsers keep cookies for a host, whatever the port


def test_the_greeting_says_where_how_and_who_answers() -> None:
    text = greeting(3001, None, "TOKEN", DEMO)
    for part in ("http://127.0.0.1:3001/", "curl -N", "Bearer TOKEN", "from openai import", "Ctrl-C", "not an AI"):
        assert part in text
    assert "\n  export TOKEN=TOKEN\n" in text
    assert text.count("TOKEN=TOKEN") == 1
    assert 'api_key=os.environ["TOKEN"]' in text
    assert "in this process" not in text  # it is a child
    assert "port 3000 is taken" in text
    assert "taken" not in greeting(3001, 3001, "TOKEN", DEMO)
    assert "cost money" in greeting(3000, None, "TOKEN", list(REAL))
    assert "openai import" not in greeting(3000, None, "TOKEN", [REAL[1]])

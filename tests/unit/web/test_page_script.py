"""What the chat page shows when an answer fails, is stopped or is left: its script in node, on a stage of our own."""

from __future__ import annotations

import json
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

PAGE = str(files("proxyd.web.page").joinpath("index.html"))
STAGE = str(Path(__file__).with_name("page_stage.mjs"))


def play(scene: str) -> Any:
    """First. is sent and meets the scene; then Second. is sent and answered by Good."""
    done = subprocess.run(["node", STAGE, PAGE, scene], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_error_event_is_shown_though_the_body_breaks_behind_it() -> None:
    seen = play("error_then_break")
    assert seen["after"]["log"] == ["First.", "Half|The upstream broke off."]
    assert seen["asked"][1] == ["First.", "Half", "Second."]


def test_a_break_without_an_error_event_is_a_lost_connection() -> None:
    assert play("break_alone")["after"]["log"] == ["First.", "Half|The connection was lost."]


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ("error_alone_then_break", "The upstream broke off."),
        ("offline", "The server cannot be reached."),
        ("other_403", "Not this model."),
        ("too_large", "Body too large."),
        ("old_session", "This page's session has ended; reload the page.Reload"),
        ("no_session", "This page's session has ended; reload the page.Reload"),
    ],
)
def test_what_was_typed_comes_back_when_nothing_was_answered(scene: str, message: str) -> None:
    seen = play(scene)
    assert seen["after"] == {"log": ["First.", f"|{message}"], "waits": False, "input": "First.", "canSend": True}
    # What was not answered is neither asked again nor left standing.
    assert seen["asked"] == [["First."], ["Second."]]
    assert seen["end"]["log"] == ["Second.", "Good."]


def test_the_reload_button_reloads_and_keeps_what_was_typed() -> None:
    seen = play("old_session")
    assert (seen["reloads"], seen["kept"]) == (1, "First.")


def test_a_new_chat_ends_the_answer_that_runs_and_takes_nothing_of_it_along() -> None:
    seen = play("new_chat")
    assert seen["during"]["log"] == ["First.", "Old text"]
    assert seen["aborted"]
    assert seen["after"] == {"log": [], "waits": False, "input": "", "canSend": True}
    assert seen["asked"][1] == ["Second."]
    assert seen["end"]["log"] == ["Second.", "Good."]


def test_while_nothing_comes_a_sign_shows_and_stop_gives_the_text_back() -> None:
    seen = play("stopped")
    assert (seen["during"]["waits"], seen["during"]["canSend"]) == (True, False)
    assert (seen["after"]["waits"], seen["after"]["input"]) == (False, "First.")

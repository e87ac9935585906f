"""What of a provider's error reaches the access line."""

from __future__ import annotations

from typing import Any

import pytest

from proxyd.relay.outcome import error_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"type": "invalid_request_error", "code": "bad_key"}, "type=invalid_request_error code=bad_key"),
        ({"type": "authentication_error", "message": "the prompt was: secret"}, "type=authentication_error"),
        ({"type": "tell me a story", "code": "a" * 65}, ""),
        ({"type": None, "code": 401}, "code=401"),
        ({"type": "x\ny", "code": True}, ""),
        (None, ""),
    ],
)
def test_only_single_words_of_type_and_code_are_taken(error: dict[str, Any] | None, words: str) -> None:
    assert error_words(error) == words

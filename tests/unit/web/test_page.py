"""The chat page as a file."""

from __future__ import annotations

import re

from proxyd.web.page import PAGE_HEADERS, page_bytes


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = page_bytes().decode()
    assert re.findall(r"https?://|//[a-z]+\.|@import|url\(", page) == []
    assert re.findall(r"\bsrc=", page) == []


def test_the_page_never_turns_text_into_markup() -> None:
    page = page_bytes().decode()
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", " on"):
        assert not re.search(rf"{re.escape(dangerous)}\w*\s*=" if dangerous == " on" else re.escape(dangerous), page)


def test_the_policy_allows_this_script_and_style_and_nothing_inline_else() -> None:
    policy = PAGE_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2
    assert "unsafe-inline" not in policy
    page = page_bytes()
    assert (page.count(b"<script>"), page.count(b"<style>")) == (1, 1)
    assert b"style=" not in page

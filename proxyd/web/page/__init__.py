"""The chat page: one HTML file with its style and script inside, and the headers it is served with.

Owns: reading the file once, and a Content-Security-Policy that names its one script and one style by their hashes, so
that the page needs no exception for inline code. Must not know: routes, sessions.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

__all__ = ["PAGE_HEADERS", "page_bytes"]


@cache
def page_bytes() -> bytes:
    """The page."""
    return files(__package__).joinpath("index.html").read_bytes()


def _hash_of(tag: bytes) -> str:
    """The CSP source of the page's one inline element `tag` (CSP level 3, section 8.2)."""
    match = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page_bytes(), re.DOTALL)
    assert match is not None, "the page has one of each"
    return f"'sha256-{base64.b64encode(hashlib.sha256(match[1]).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of(b'script')}; style-src {_hash_of(b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

"""What a tenant may be called.

Owns: the alphabet of tenant names and the name of the tenant of a token that names none. Must not know: tokens, limits.
Invariant: a tenant that passed here is safe as a metric label, a TOML key, a Redis key part, a file name and a
VARCHAR(64).
"""

from __future__ import annotations

import re
from typing import TypeGuard

DEFAULT_TENANT = "default"

# 64: the column `tenant VARCHAR(64)`; longer would be cut by the store and two tenants could become one.
# The first character is a letter or digit, so that no name is `.`, `..` or looks like an option.
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_tenant(value: object) -> TypeGuard[str]:
    """True for a string of 1..64 letters, digits, `.`, `_`, `-` that begins with a letter or digit."""
    return isinstance(value, str) and _TENANT.fullmatch(value) is not None

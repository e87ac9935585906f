"""Configurations that the tests start from, and how they look at findings."""

from __future__ import annotations

from proxyd.config.load import parse
from proxyd.config.schema import Config
from proxyd.errors import Finding

SECRET = "0123456789abcdef0123456789abcdef"
ENVIRON = {"JWT": SECRET, "KEY": "sk-test"}

AUTH = """[auth]
secret_env = "JWT"
"""
UPSTREAM = """[[upstream]]
name = "a"
url = "https://api.example.com/v1"
"""
MODEL = """[[model]]
name = "m"
id = 1
upstreams = ["a"]
"""
MINIMAL = AUTH + UPSTREAM + MODEL


def valid(text: str) -> Config:
    """The configuration of a text that must be accepted."""
    config, findings = parse(text, "F", ENVIRON)
    assert config is not None, "\n".join(finding.text() for finding in findings)
    return config


def findings(text: str, severity: str = "error") -> list[Finding]:
    """The findings of one severity."""
    return [finding for finding in parse(text, "F", ENVIRON)[1] if finding.severity == severity]


def keys(text: str, severity: str = "error") -> list[str]:
    """The keys that findings name, in order."""
    return [finding.key for finding in findings(text, severity)]


def only(text: str, severity: str = "error") -> Finding:
    """The one finding of a text."""
    found = findings(text, severity)
    assert len(found) == 1, [finding.text() for finding in found]
    return found[0]

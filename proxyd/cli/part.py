"""The part of the configuration that a command needs, out of a file that may have errors elsewhere.

Owns: what the commands say about the file. Must not know: what they do with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxyd.cli.output import fail, fail_all
from proxyd.config.load import Part, load_part
from proxyd.errors import ConfigError


def read_part(who: str, path: str, wanted: Mapping[str, tuple[str, ...]], environ: Mapping[str, str]) -> Part | int:
    """The wanted options of the file, or the exit code after saying on stderr why there are none."""
    try:
        part = load_part(path, wanted, environ)
    except OSError as error:
        return fail(who, 2, f"cannot read {path}: {error.strerror}; name the daemon's file: -c FILE")
    except ConfigError as error:
        return fail_all(who, 1, error.findings)
    if part.errors_elsewhere:
        count = f"{part.errors_elsewhere} error{'s' if part.errors_elsewhere > 1 else ''}"
        fail(who, 0, f"warning: {path} has {count} elsewhere; proxyd --check-config tells")
    return part

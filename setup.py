"""Builds the compiled half of proxyd: every ext/proxyd/NAME.pyx becomes the module proxyd.NAME.

What is not here is in pyproject.toml. Switches, all from the environment:
  PROXYD_DEBUG_BUILD=1  bounds checks on, no optimisation: what a debugging run wants
  PROXYD_SANITIZE=1     address and undefined-behaviour sanitizers; run with
                        LD_PRELOAD="$(gcc -print-file-name=libasan.so)"
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("PROXYD_DEBUG_BUILD") == "1"
SANITIZE = os.environ.get("PROXYD_SANITIZE") == "1"
KIND = ("debug" if DEBUG else "release") + ("-sanitize" if SANITIZE else "")
STAMP = ROOT / "build" / "kind"

# -Wextra minus what Cython's own generated code trips over; our own lines see every other warning.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]


def give_up(reason: str, remedy: str) -> None:
    """Ends the build with one line instead of a page of compiler driver traceback."""
    sys.exit(f"proxyd: {reason}; {remedy}")


class BuildExt(build_ext):
    """build_ext that looks for its tools first and says what to install."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A module built in another kind looks up to date by its dates, and is not.
        self.force = self.force or not STAMP.exists() or STAMP.read_text() != KIND

    def run(self) -> None:
        if self.extensions:
            driver = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
            if shutil.which(driver) is None:
                give_up(f"no C compiler ({driver}) on PATH", "install one: apt install gcc python3-dev")
            headers = Path(sysconfig.get_path("include"), "Python.h")
            if not headers.exists():
                give_up(f"no Python headers ({headers})", "install them: apt install gcc python3-dev")
        STAMP.unlink(missing_ok=True)  # a build that fails half way has mixed kinds: the next one starts over
        super().run()
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(KIND)


def compile_args() -> list[str]:
    """What the C compiler is told; warnings are errors in the work tree, not in a released sdist (see below)."""
    args = ["-O0", "-g"] if DEBUG else ["-O2", "-g"]
    args += ["-std=gnu11", "-fno-strict-aliasing", *WARNINGS]
    # A compiler that is newer than the release may warn about something new: that must not keep a user from installing.
    if not (ROOT / "PKG-INFO").exists():
        args.append("-Werror")
    if SANITIZE:
        args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    return args


def extensions() -> list[Extension]:
    """Every .pyx that exists, translated to C under build/."""
    sources = sorted((ROOT / "ext" / "proxyd").glob("*.pyx"))
    if not sources or not BUILDS:
        return []
    try:
        from Cython.Build import cythonize
        from Cython.Compiler import Options
        from Cython.Compiler.Errors import CompileError
    except ImportError:
        give_up("Cython is not installed", 'install it: pip install "Cython>=3.3,<3.4"')
    Options.warning_errors = True  # a warning of Cython's is an error, as one of the C compiler's is
    link = ["-fsanitize=address,undefined"] if SANITIZE else []
    found = [
        Extension(
            f"proxyd.{path.stem}",
            [path.relative_to(ROOT).as_posix()],
            extra_compile_args=compile_args(),
            extra_link_args=link,
        )
        for path in sources
    ]
    directives = {
        "language_level": 3,
        "boundscheck": DEBUG,
        "cdivision": not DEBUG,
        "initializedcheck": DEBUG,
    }
    try:
        return cythonize(
            found,
            include_path=["ext"],
            build_dir=f"build/cython-{KIND}",
            compiler_directives=directives,
            quiet="--quiet" in sys.argv,
        )
    except CompileError as error:
        give_up(f"Cython refused {error}", "its reasons are above")
        raise


# `setup.py --version`, egg_info and sdist need no Cython and no compiler.
BUILDS = any(word.startswith(("build", "bdist", "install", "develop", "editable")) for word in sys.argv[1:])

if __name__ == "__main__":
    os.chdir(ROOT)
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})

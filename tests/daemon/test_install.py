"""proxyd as an operator installs it: sdist, wheel out of the sdist, a fresh venv, a run far from the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    USAGE,
    Daemon,
    Upstream,
    ask,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    upstream_text,
    wait_for,
)

# What must not travel: what was built here would hide that something is missing.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis", "node_modules"
)


def run(*command: str | Path, cwd: Path, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ or clean_environ(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def clean_environ() -> dict[str, str]:
    """Without anything that leads back into the source tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    built = run(sys.executable, "-m", "build", "--no-isolation", "--sdist", ".", cwd=folder / "tree")
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (archive,) = (folder / "tree" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the sdist alone."""
    built = run(sys.executable, "-m", "build", "--no-isolation", "--wheel", ".", cwd=sdist)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (found,) = (sdist / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh venv with nothing but the wheel and what it asks for, in the versions of the lock."""
    folder = tmp_path_factory.mktemp("installed")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    pip = [folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = run(*pip, "-c", ROOT / "requirements-test.lock", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "venv/bin"


def test_make_dist_installs_what_building_needs_and_not_the_tests(tmp_path: Path) -> None:
    planned = run("make", "-n", "dist", f"VENV={tmp_path}/venv", cwd=ROOT)
    assert planned.returncode == 0, planned.stderr
    assert "-c requirements-test.lock build Cython setuptools wheel" in planned.stdout
    assert "-r requirements-test.lock" not in planned.stdout


def test_the_sdist_holds_what_a_build_and_an_operator_need(sdist: Path) -> None:
    inside = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    compiled = {str(path.relative_to(ROOT)) for path in (ROOT / "ext").rglob("*") if path.suffix in (".pyx", ".pxd")}
    assert len(compiled) > 4
    assert compiled <= inside
    assert {"conf/proxyd.toml", "LICENSE", "requirements-test.lock", "setup.py", "systemd/proxyd.service"} <= inside
    assert {f"conf/mysql/{name}" for name in ("schema.sql", "grants.sql", "60-proxyd.cnf")} <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc")) or name.startswith("build/")]


def test_the_wheel_holds_every_module_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for path in (ROOT / "proxyd").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in inside
    for path in (ROOT / "ext/proxyd").glob("*.pyx"):
        assert any(name.startswith(f"proxyd/{path.stem}.") and name.endswith(".so") for name in inside), path.stem
    assert {"proxyd/data/o200k_base.tiktoken", "proxyd/data/NOTICE", "proxyd/py.typed"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "ext/", "bench/"))]


def test_an_installed_proxyd_runs_far_from_its_sources(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "proxyd", "--version", cwd=tmp_path)
    assert version.returncode == 0, version.stderr
    assert version.stdout.startswith("proxyd ")
    where = run(installed / "python", "-c", "import proxyd._relay as r; print(r.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where.stdout
    count = "from proxyd.dialects.tokens import O200K; O200K.load(); print(O200K.count('hello world'))"
    assert run(installed / "python", "-c", count, cwd=tmp_path).stdout == "2\n"
    upstream = Upstream(lambda wire: wire.stream(chat_chunk("far"), FINISH, USAGE, DONE))
    port = free_port()
    text = upstream_text(upstream.url + "/v1") + model_text("*", 1, '["openai"]')
    daemon = Installed(tmp_path, config_text(tmp_path, port, text), installed)
    daemon.port = port
    try:
        checked = run(installed / "proxyd", "--check-config", "-c", daemon.config, cwd=tmp_path, environ=daemon.environ)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        daemon.start()
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == chat_chunk("far") + FINISH + DONE
        (row,) = daemon.wait_rows(1)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (11, 5)
        daemon.close_clients()
        assert daemon.stop() == 0
    finally:
        daemon.close_clients()
        daemon.kill()
        upstream.close()


IN_PLACE = (
    "usr/lib/systemd/system/proxyd.service",
    "usr/lib/systemd/system/proxyd.socket",
    "usr/lib/sysusers.d/proxyd.conf",
    "usr/lib/tmpfiles.d/proxyd.conf",
    "usr/lib/sysctl.d/60-proxyd.conf",
    "usr/lib/modules-load.d/proxyd.conf",
    "usr/share/proxyd/proxyd.toml",
    "usr/share/proxyd/nginx/proxyd.conf",
    "usr/share/proxyd/mysql/schema.sql",
    "usr/share/proxyd/mysql/grants.sql",
    "usr/share/proxyd/mysql/60-proxyd.cnf",
    "etc/proxyd/proxyd.toml",
    "etc/logrotate.d/proxyd",
)


def make_install(folder: Path, *settings: str, source: Path = ROOT) -> str:
    done = run("make", "install", f"DESTDIR={folder}", *settings, cwd=source)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_make_install_puts_everything_in_place_readable_by_all_and_nothing_elsewhere(tmp_path: Path) -> None:
    make_install(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    inside = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in files}
    assert set(IN_PLACE) <= set(inside)
    assert set(inside.values()) == {0o644}
    assert not [name for name in inside if name not in IN_PLACE and not name.startswith("usr/share/proxyd/")]
    assert (tmp_path / IN_PLACE[0]).read_text() == (ROOT / "systemd/proxyd.service").read_text()


def test_make_install_never_overwrites_what_an_operator_edited_and_renews_the_rest(tmp_path: Path) -> None:
    make_install(tmp_path)
    for name in ("etc/proxyd/proxyd.toml", "etc/logrotate.d/proxyd", "usr/lib/systemd/system/proxyd.service"):
        (tmp_path / name).write_text("mine")
    said = make_install(tmp_path)
    assert (tmp_path / "etc/proxyd/proxyd.toml").read_text() == "mine"
    assert (tmp_path / "etc/logrotate.d/proxyd").read_text() == "mine"
    assert said.count("kept ") == 2
    assert f"{tmp_path}/usr/share/proxyd/proxyd.toml" in said
    assert "ExecStart=" in (tmp_path / "usr/lib/systemd/system/proxyd.service").read_text()
    assert make_install(tmp_path / "again").count("kept ") == 0


def test_make_install_elsewhere_has_a_unit_that_runs_from_there(tmp_path: Path) -> None:
    make_install(tmp_path, "PREFIX=/usr/local", "SYSCONFDIR=/usr/local/etc")
    unit = (tmp_path / "usr/local/lib/systemd/system/proxyd.service").read_text()
    assert "ExecStart=/usr/local/bin/proxyd -c /usr/local/etc/proxyd/proxyd.toml\n" in unit
    assert "/usr/bin/proxyd" not in unit
    assert (tmp_path / "usr/local/etc/proxyd/proxyd.toml").exists()


def test_make_install_works_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    make_install(tmp_path, source=sdist)
    assert all((tmp_path / name).is_file() for name in IN_PLACE)


class Installed(Daemon):
    """The daemon of the installed command, started in the test's own folder."""

    def __init__(self, folder: Path, config: str, programs: Path) -> None:
        super().__init__(folder, config)
        self._programs = programs
        for name in [name for name in self.environ if name.startswith("PYTHON")]:
            del self.environ[name]

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self._programs / "proxyd", "-c", self.config],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environ,
            )
        wait_for(self._is_ready, 30)


@pytest.fixture
def bare_path(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has no compiler."""
    (tmp_path / "bin").mkdir()
    environ = clean_environ()
    environ.pop("CC", None)
    return {**environ, "PATH": str(tmp_path / "bin")}


def test_without_a_compiler_the_build_says_so_in_one_line(sdist: Path, bare_path: dict[str, str]) -> None:
    built = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=sdist, environ=bare_path)
    assert built.returncode != 0
    said = [line for line in built.stderr.splitlines() if line.strip()]
    assert len(said) == 1, built.stderr
    assert said[0].startswith("proxyd: no C compiler")
    assert "apt install" in said[0]


def test_pip_without_a_compiler_shows_that_line(sdist: Path, bare_path: dict[str, str], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    built = run(*pip, "--wheel-dir", tmp_path, sdist, cwd=tmp_path, environ=bare_path)
    assert built.returncode != 0
    said = built.stdout + built.stderr
    assert "proxyd: no C compiler" in said
    assert said.count("Traceback") == 0, said

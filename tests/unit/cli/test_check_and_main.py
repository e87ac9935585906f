"""--check-config and the argument list, called in this process; what they print and how they exit."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from proxyd import __version__
from proxyd.cli import check
from proxyd.cli.listen_remedy import listen_remedy
from proxyd.cli.main import main
from proxyd.config.load import parse
from proxyd.host.sockets import ListenError
from tests.unit.cli.hosts import GOOD
from tests.unit.config.texts import ENVIRON, MINIMAL

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def node(tmp_path):
    """A configuration whose every path exists, and a way to change it."""
    for name in ("state", "run"):
        (tmp_path / name).mkdir(0o700)
    secret, key = tmp_path / "jwt.secret", tmp_path / "key"
    for path, value in ((secret, SECRET), (key, "sk-very-secret")):
        path.write_text(value)
        path.chmod(0o600)

    class Node:
        path = tmp_path / "proxyd.toml"
        root = tmp_path
        text = f"""[server]
listen = ["127.0.0.1:0"]
admin = "unix:{tmp_path}/run/admin.sock"
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
[auth]
secret_file = "{secret}"
[telemetry]
sink = "sqlite:///{tmp_path}/state/t.db"
[[upstream]]
name = "a"
url = "https://api.example.com/v1"
api_key_file = "{key}"
[[model]]
name = "m"
id = 1
upstreams = ["a"]
"""

        def check(self, *changes, extra="", json=False):
            text = self.text
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            self.path.write_text(text + extra)
            return check.run(str(self.path), as_json=json, see=lambda environ: GOOD)

    return Node()


def test_a_good_configuration_has_no_findings_and_exits_0(node, capsys):
    assert node.check() == 0
    assert capsys.readouterr().out == f"{node.path}: no findings\n"


def test_warnings_do_not_fail(node, capsys):
    short = ("[telemetry]\n", '[telemetry]\nretention = "1d"\n')
    assert node.check(short, extra='[quota]\ntokens = 5\nwindow = "2d"\n') == 0
    line = f"warning {node.path}:21 quota.window: is longer than telemetry.retention (24h)"
    assert capsys.readouterr().out.startswith(line)


def test_errors_exit_1_and_are_all_printed(node, capsys):
    assert (
        node.check(("id = 1", "id = 70000"), (node.root.name + "/key", node.root.name + "/none"), extra="[tasks]\n")
        == 1
    )
    out = capsys.readouterr().out
    assert "model[0].id" in out
    assert "tasks: unknown key" in out


def test_secrets_are_checked_without_being_printed(node, capsys):
    (node.root / "key").chmod(0o644)
    (node.root / "jwt.secret").write_text("short")
    assert node.check() == 1
    out = capsys.readouterr().out
    assert "upstream[0].api_key_file" in out
    assert "mode 0644" in out
    assert "auth.secret_file: the secret has 5 bytes" in out
    assert "sk-very-secret" not in out


def test_revocations_that_a_start_would_refuse_are_an_error_with_the_line(node, capsys):
    file = node.root / "state" / "revocations.jsonl"
    file.write_text("junk\n")
    assert node.check() == 1
    line, _, remedy = capsys.readouterr().out.partition("; a start is refused; ")
    assert line == f"error {node.path}:4 server.state_dir: {file}:1 is no revocation"
    assert remedy.startswith("correct the line, or take it out")
    assert file.read_text() == "junk\n"
    file.unlink()
    assert node.check() == 0


def test_an_unreadable_file_exits_2(node, capsys):
    assert main(["--check-config", "-c", str(node.root / "none.toml")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().out
    assert main(["--check-config", "-c", str(node.root)]) == 2


def test_json_holds_the_same_findings(node, capsys):
    assert node.check(("id = 1", 'id = "1"'), json=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["errors"], document["warnings"], document["file"]) == (1, 0, str(node.path))
    finding = document["findings"][0]
    assert (finding["severity"], finding["key"], finding["line"]) == ("error", "model[0].id", 16)
    assert finding["name"] == "m"
    assert finding["message"]
    assert finding["remedy"]


def test_json_of_an_unreadable_file_is_json_too(tmp_path, capsys):
    assert main(["--check-config", "--json", "-c", str(tmp_path / "none")]) == 2
    assert json.loads(capsys.readouterr().out)["errors"] == 1


@pytest.mark.parametrize(
    ("limit", "severity", "says"),
    [
        (1000, "error", "open files: the limit of 1000 is below the 2726 that each worker needs for 1024 upstream"),
        (3000, "warning", "open files: the limit of 3000 leaves little beside the 2726 that streams may take"),
        (3750, "", ""),
    ],
)
def test_a_limit_of_open_files_that_refuses_a_start_is_an_error_and_a_tight_one_a_warning(node, limit, severity, says):
    node.path.write_text(node.text)
    program = [sys.executable, "-m", "proxyd", "--check-config", "-c", str(node.path)]
    done = subprocess.run(
        ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", *program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1 if severity == "error" else 0, "")
    lines = [line for line in done.stdout.splitlines() if "open files" in line]
    assert len(lines) == bool(severity)
    for line in lines:
        assert line.startswith(f"{severity} {node.path}:")
        assert "upstream[0].max_connections" in line
        assert says in line


@pytest.mark.parametrize("name, mode", [("state", "0700"), ("run", "0750")])
def test_a_missing_directory_is_a_warning_where_a_start_makes_it_and_else_an_error(
    node, capsys, monkeypatch, name, mode
):
    (node.root / name).rmdir()
    assert node.check() == 0
    assert f"{node.root}/{name} does not exist; a start makes it" in capsys.readouterr().out
    monkeypatch.setattr(check, "_may_make", lambda path: False)
    assert node.check() == 1
    assert f"{node.root}/{name} does not exist; install -d -m {mode} {node.root}/{name}" in capsys.readouterr().out


def test_a_runtime_directory_without_sockets_is_a_warning(node, capsys):
    (node.root / "run").rmdir()
    assert node.check((f"unix:{node.root}/run/admin.sock", "127.0.0.1:0")) == 0
    assert "warning" in capsys.readouterr().out


def test_directories_that_systemd_makes_are_a_warning_that_says_so(node, capsys, monkeypatch):
    monkeypatch.setattr(check, "_MADE_BY_SYSTEMD", (f"{node.root}/state", f"{node.root}/run"))
    for name in ("state", "run"):
        (node.root / name).rmdir()
    assert node.check() == 0
    out = capsys.readouterr().out
    assert out.count("does not exist; systemd makes it when the unit starts") == 2


def test_a_directory_that_is_a_file_is_an_error(node, capsys):
    (node.root / "state").rmdir()
    (node.root / "state").write_text("")
    assert node.check() == 1
    assert "is not a directory" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_spool_is_an_error(node, capsys):
    (node.root / "state" / "spool").write_text("")
    assert node.check() == 1
    assert f"server.state_dir: {node.root}/state/spool is not a directory" in capsys.readouterr().out


def test_a_state_directory_that_is_open_to_all_is_a_warning(node, capsys):
    (node.root / "state").chmod(0o777)
    assert node.check() == 0
    assert f"is open to every user (mode 0777); chmod 0700 {node.root}/state" in capsys.readouterr().out


@pytest.mark.parametrize("content, code", [(b"a shopping list", 1), (b"", 0), (b"SQLite format 3\0...", 0)])
def test_a_store_that_is_no_database_is_an_error_of_the_check(node, capsys, content, code):
    (node.root / "state" / "t.db").write_bytes(content)
    assert node.check() == code
    assert ("telemetry.sink" in capsys.readouterr().out) == bool(code)
    # A start serves beside it, and its rows wait.
    assert check.examine(str(node.path), {}).errors == 0


def test_a_file_in_a_sockets_place_is_an_error(node, capsys):
    (node.root / "run" / "admin.sock").write_text("")
    assert node.check() == 1
    assert "is not a socket" in capsys.readouterr().out


def test_the_places_of_logs_sockets_and_databases_are_looked_at(node, capsys):
    changes = [("/state/t.db", "/nodb/t.db"), ('"127.0.0.1:0"', f'"unix:{node.root}/nosock/s"')]
    assert node.check(*changes, extra=f'[log]\naccess = "{node.root}/nolog/a.log"\n') == 1
    lines = capsys.readouterr().out.splitlines()
    told = {name: line.split()[0] for line in lines for name in ("nodb", "nosock", "nolog") if f"/{name} does" in line}
    assert told == {"nodb": "warning", "nosock": "error", "nolog": "error"}


def test_certificates_must_be_readable_and_certificates(node, capsys):
    (node.root / "ca.pem").write_text("no certificate")
    assert node.check(('api.example.com/v1"', f'api.example.com/v1"\nca_file = "{node.root}/ca.pem"')) == 1
    assert "holds no certificate" in capsys.readouterr().out
    assert node.check(('api.example.com/v1"', f'api.example.com/v1"\nca_file = "{node.root}/none.pem"')) == 1
    assert "cannot read" in capsys.readouterr().out


def test_a_directory_in_a_sockets_place_is_an_error(node, capsys):
    (node.root / "run" / "admin.sock").mkdir()
    assert node.check() == 1
    assert "server.admin" in capsys.readouterr().out


def test_the_environment_may_hold_the_secrets(node, capsys, monkeypatch):
    monkeypatch.setenv("PROXYD_TEST_JWT", SECRET)
    secret_line = f'secret_file = "{node.root}/jwt.secret"'
    assert node.check((secret_line, 'secret_env = "PROXYD_TEST_JWT"')) == 0
    monkeypatch.delenv("PROXYD_TEST_JWT")
    assert node.check((secret_line, 'secret_env = "PROXYD_TEST_JWT"')) == 1


def test_a_start_with_a_bad_file_prints_the_findings_to_stderr_and_exits_1(node, capsys):
    node.path.write_text(node.text + "[tasks]\n")
    assert main(["-c", str(node.path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tasks: unknown key" in captured.err
    assert "not started" in captured.err


def test_a_start_without_a_file_exits_2(tmp_path, capsys):
    assert main(["-c", str(tmp_path / "none.toml")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_examining_starts_nothing_and_creates_nothing(node):
    node.path.write_text(node.text)
    before = sorted(os.walk(node.root))
    report = check.examine(str(node.path), {})
    assert report.config is not None
    assert report.secrets is not None
    assert sorted(os.walk(node.root)) == before


def test_the_version_names_what_it_stands_on(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"proxyd {__version__} (uvloop ")
    assert all(word in out for word in ("aiohttp ", "OpenSSL ", "Python 3."))


@pytest.mark.parametrize(
    "argv",
    [
        ["tasks"],
        ["schema", "now"],
        ["usage"],
        ["--nonsense"],
        ["--port", "80"],
        ["--demo", "--port", "99999"],
        ["--demo", "--port", "-1"],
        ["--demo", "--check-config"],
        ["--demo", "-c", "FILE"],
        ["--demo", "status"],
        ["--check-config", "token", "--user", "1"],
        ["--probe"],
        ["--json"],
        ["token"],
        ["token", "--user", "-1"],
        ["token", "--user", "x"],
        ["token", "--user", "1", "--ttl", "60"],
        ["usage", "--user", "1", "--window", "1w"],
        ["usage", "--user", str(2**64)],
        ["--json", "token", "--user", "1"],
        ["top", "--interval", "50ms"],
        ["top", "--interval", "2"],
        ["top", "--count", "0"],
    ],
)
def test_arguments_that_mean_nothing_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: proxyd" in capsys.readouterr().err


def test_the_file_may_be_named_before_and_after_a_command(node, capsys):
    node.path.write_text(node.text)
    tokens = []
    for argv in (["-c", str(node.path), "token", "--user", "7"], ["token", "--user", "7", "-c", str(node.path)]):
        assert main(argv) == 0
        tokens.append(capsys.readouterr().out)
    assert all(token.count(".") == 2 for token in tokens)


def test_a_password_in_a_file_that_every_user_may_read_is_a_warning(node, capsys):
    sink = (f"sqlite:///{node.root}/state/t.db", "mysql://u:hush-hush@db.example.com/d")
    node.path.write_text("")
    for mode, words in ((0o600, []), (0o640, []), (0o644, ["password_file", "mode 0644", "telemetry.sink"])):
        node.path.chmod(mode)
        assert node.check(sink) == 0
        out = capsys.readouterr().out
        assert out.startswith("warning" if words else f"{node.path}: no findings")
        assert [word for word in words if word not in out] == []
        assert "hush-hush" not in out


def test_certificates_of_a_database_are_looked_at(node, capsys):
    for path, words in ((f"{node.root}/none.pem", "No such file"), (str(node.root / "key"), "no certificate in PEM")):
        assert node.check((f"sqlite:///{node.root}/state/t.db", f"mysql://u@h/d?ssl_ca={path}")) == 1
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EADDRNOTAVAIL, "no interface of this machine has the address of server.listen"),
        (errno.EADDRINUSE, "`ss -ltnp` names it"),
        (errno.EACCES, "a port above 1023"),
        (errno.ENOENT, "RuntimeDirectory="),
        (errno.EIO, "change server.listen"),
    ],
)
def test_an_address_that_cannot_be_had_has_a_remedy(code, words):
    config, _ = parse(MINIMAL, "F", ENVIRON)
    assert words in listen_remedy(ListenError(code, "10.9.9.9:3000", "why"), config)


def test_a_directory_that_is_mounted_read_only_names_the_units_line(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    folder.mkdir()
    told = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=told.f_flag | os.ST_RDONLY))
    (found,) = check._directory(("server", "state_dir"), str(folder), 0o700, is_needed=True)
    assert found[3].endswith(f"[Service] ReadWritePaths={folder}")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "must be let in: chmod 0644 /etc/proxyd/x.toml"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "-c FILE"),
    ],
)
def test_a_start_without_its_file_says_what_to_do(monkeypatch, capsys, error, remedy):
    def examine(*_):
        raise error

    monkeypatch.setattr(check, "examine", examine)
    assert main(["-c", "/etc/proxyd/x.toml"]) == 2
    assert remedy in capsys.readouterr().err

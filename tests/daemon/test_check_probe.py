"""`proxyd --check-config --probe` against real servers: names, TCP, TLS, keys, source addresses, databases, key sets.

Each upstream of one file is another kind of server, so that one call of the program tells all of them; what a database
says is asked of the functions, which is what the program prints. It is long because all of it stands on one set of
servers and certificates, which takes seconds to make.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from proxyd.config.secrets import Secret
from proxyd.store import probe as store
from proxyd.store.apply import apply
from tests.daemon.harness import ROOT, Daemon, config_text, free_port, model_text
from tests.daemon.mariadb import PASSWORD, Database, MariaDb
from tests.daemon.peer import Line, Peer
from tests.unit.upstream.conftest import Authority

GOOD_KEY, BAD_KEY = "sk-good-key-of-the-probe", "sk-bad-key-of-the-probe"
SINK_PASSWORD = "hush-hush-of-the-probe"
COMMITS = "of which proxyd makes at most 50 a second"


def answer(status: int, more: str = "", body: bytes = b"{}") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def provider(line: Line) -> None:
    """A provider of either dialect: lists models for the good key."""
    while line.read_request():
        target = line.head.split(b" ")[1]
        keys = {f"authorization: bearer {GOOD_KEY}", f"x-api-key: {GOOD_KEY}"}
        is_known = any(one.decode("latin-1").lower() in keys for one in line.head.split(b"\r\n"))
        assert target == b"/v1/models", target
        line.send(answer(200 if is_known else 401))


def answers(data: bytes) -> Any:
    def script(line: Line) -> None:
        line.read_request()
        line.send(data)

    return script


class Stage:
    """One file with an upstream for each case, and what the program said about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        (folder / "good.key").write_text(GOOD_KEY)
        (folder / "bad.key").write_text(BAD_KEY)
        for name in ("good.key", "bad.key"):
            (folder / name).chmod(0o600)
        self.peers: dict[str, Peer] = {}
        self.text = ""
        self.names: list[str] = []
        closed = free_port()
        self.silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
        good, bad = f'api_key_file = "{folder}/good.key"', f'api_key_file = ["{folder}/good.key", "{folder}/bad.key"]'
        trusted = f'ca_file = "{ours.ca_file}"'
        server = ours.server("localhost")
        self.add("plain", provider, more=good)
        self.add("anthropic", provider, more=good, dialect="anthropic", path="")
        self.add("spread", provider, more=f'{good}\nsource_addresses = ["127.0.0.2", "127.0.0.3"]')
        self.add("badkey", provider, more=bad)
        self.add("nokey", provider)
        self.add("missing", answers(answer(404)), more=good)
        self.add("moved", answers(answer(301, "Location: http://127.0.0.1/\r\n")), more=good)
        self.add("ill", answers(answer(503)), more=good)
        self.add("nohttp", answers(b"SSH-2.0-OpenSSH_9\r\n"), more=good)
        self.add("tls", provider, more=f"{good}\n{trusted}", tls=server)
        self.add("stranger", provider, more=f'{good}\nca_file = "{theirs.ca_file}"', tls=server)
        self.add("expired", provider, more=f"{good}\n{trusted}", tls=ours.server("localhost", expired=True))
        self.add("othername", provider, more=f"{good}\n{trusted}", tls=ours.server("other.example"))
        self.url("refused", f"http://127.0.0.1:{closed}/v1", good)
        self.url("unnamed", "http://no-such-name.invalid/v1", good)
        self.url("silent", f"http://127.0.0.1:{self.silent.getsockname()[1]}/v1", good)
        self.url("silenttls", f"https://localhost:{self.silent.getsockname()[1]}/v1", f"{good}\n{trusted}")
        text = self.text + model_text("m", 1, json.dumps(self.names))
        sink = f'sink = "mysql://proxyd:{SINK_PASSWORD}@127.0.0.1:{self.silent.getsockname()[1]}/d"'
        self.daemon = Daemon(folder, config_text(folder, free_port(), text, telemetry=sink))

    def add(
        self, name: str, script: Any, *, more: str = "", dialect: str = "openai", path: str = "/v1", tls: Any = None
    ) -> None:
        peer = Peer(script, tls=tls)
        self.peers[name] = peer
        place = f"https://localhost:{peer.port}" if tls else f"http://127.0.0.1:{peer.port}"
        self.url(name, f"{place}{path}", f'{more}\ndialect = "{dialect}"')

    def url(self, name: str, url: str, more: str = "") -> None:
        self.names.append(name)
        self.text += f'\n[[upstream]]\nname = "{name}"\nurl = "{url}"\nmax_connections = 8\nmax_idle = 4\n{more}\n'

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "proxyd", "--check-config", "--probe", "-c", str(self.daemon.config), *more],
            capture_output=True, text=True, cwd=ROOT, env=self.daemon.environ, timeout=60, check=False,
        )  # fmt: skip

    def close(self) -> None:
        self.silent.close()
        for peer in self.peers.values():
            peer.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    stage = Stage(tmp_path_factory.mktemp("probe"))
    before = tree(stage.folder)
    began = time.monotonic()
    done = stage.run("--json")
    took = time.monotonic() - began
    after = tree(stage.folder)
    stage.close()
    return {
        "code": done.returncode, "document": json.loads(done.stdout), "took": took, "err": done.stderr,
        "before": before, "after": after, "peers": stage.peers,
    }  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def of(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What was found about one upstream; not what its configuration alone says."""
    found = [one for one in told["document"]["findings"] if one["name"] == name]
    return [one for one in found if "unencrypted" not in one["message"]]


def in_order(told: dict[str, Any], name: str) -> str:
    return "\n".join(one["message"] for one in told["document"]["in_order"] if one["name"] == name)


def test_a_good_upstream_of_either_dialect_has_its_key_accepted(told: dict[str, Any]) -> None:
    for name in ("plain", "anthropic"):
        assert of(told, name) == []
        assert "the key of " in in_order(told, name)
        assert "is accepted" in in_order(told, name)


def test_each_source_address_is_tried(told: dict[str, Any]) -> None:
    assert of(told, "spread") == []
    assert "connected from 2 of 2 source addresses" in in_order(told, "spread")


def test_a_refused_key_is_an_error_that_names_its_source(told: dict[str, Any]) -> None:
    (one,) = of(told, "badkey")
    assert (one["severity"], one["key"].startswith("upstream[3].api_key_file")) == ("error", True)
    assert "answered 401" in one["message"]
    assert "bad.key is refused" in one["message"]
    assert "good.key is accepted" in in_order(told, "badkey")


def test_an_upstream_that_asks_for_a_key_without_one_is_an_error(told: dict[str, Any]) -> None:
    (one,) = of(told, "nokey")
    assert one["severity"] == "error"
    assert "asks for a key, and none is configured" in one["message"]


@pytest.mark.parametrize(("name", "words"), [("moved", "a redirect"), ("ill", "answered 503")])
def test_an_answer_that_serves_nobody_is_a_warning(told: dict[str, Any], name: str, words: str) -> None:
    (one,) = of(told, name)
    assert one["severity"] == "warning"
    assert words in one["message"]


def test_any_other_answer_in_http_means_that_it_can_be_reached(told: dict[str, Any]) -> None:
    assert of(told, "missing") == []
    assert "answered 404: it can be reached" in in_order(told, "missing")


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("nohttp", "answers no HTTP", "API's address"),
        ("stranger", "certificate verify failed", "upstream.ca_file"),
        ("expired", "certificate has expired", "renewed"),
        ("othername", "certificate verify failed: Hostname mismatch", "the url must name the host"),
        ("refused", "Connection refused", "firewall"),
        ("unnamed", "cannot be resolved", "DNS"),
        ("silent", "no answer", ""),
        ("silenttls", "no TLS handshake: no answer within 5 s", ""),
    ],
)
def test_what_no_request_would_get_past_is_an_error(told: dict[str, Any], name: str, words: str, remedy: str) -> None:
    (one,) = of(told, name)
    assert one["severity"] == "error"
    assert words in one["message"]
    assert remedy in one["remedy"]


def test_a_database_that_accepts_and_says_nothing_is_an_error(told: dict[str, Any]) -> None:
    about = [one for one in told["document"]["findings"] if one["key"] == "telemetry.sink"]
    (one,) = [one for one in about if one["severity"] == "error"]
    assert "mysql proxyd@127.0.0.1" in one["message"]


def test_an_expired_certificate_says_since_when(told: dict[str, Any]) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    assert f"it ended {yesterday:%Y-%m}" in of(told, "expired")[0]["message"]


def test_a_certificate_that_ends_soon_is_a_warning_with_the_days(told: dict[str, Any]) -> None:
    (one,) = of(told, "tls")
    assert (one["severity"], one["live"], one["wanted"]) == ("warning", "0", "21")
    assert "ends in 0 days" in one["message"]
    assert "is accepted" in in_order(told, "tls")


def test_everything_is_asked_at_once_and_ends(told: dict[str, Any]) -> None:
    # Five seconds for each silent step, fifteen in all; the rest is the machine's.
    assert told["took"] < 40


def test_errors_give_the_exit_code_of_errors_and_nothing_is_written_or_shown(told: dict[str, Any]) -> None:
    assert (told["code"], told["err"]) == (1, "")
    assert told["before"] == told["after"]
    text = json.dumps(told["document"])
    assert GOOD_KEY not in text
    assert BAD_KEY not in text
    assert SINK_PASSWORD not in text


def test_keys_go_over_verified_connections_only_and_to_upstreams_that_have_them(told: dict[str, Any]) -> None:
    seen = {name: b"".join(line.head for line in peer.lines) for name, peer in told["peers"].items()}
    for name in ("stranger", "expired", "othername"):
        assert seen[name] == b""
    assert b"sk-" not in seen["nokey"]
    assert f"x-api-key: {GOOD_KEY}".encode() in seen["anthropic"]
    assert b"Bearer" not in seen["anthropic"]
    assert f"Authorization: Bearer {GOOD_KEY}".lower().encode() in seen["plain"].lower()


# -- the store ---------------------------------------------------------------------------------------------------------


def look(database: Database) -> store.Look:
    return store.look(database.url(with_password=False), Secret(PASSWORD.encode()), 5.0, COMMITS)


def test_an_empty_database_lacks_its_tables_and_a_complete_one_nothing(mariadb: Database) -> None:
    empty = look(mariadb)
    assert [one.is_error for one in empty.troubles] == [True, True, True]
    assert "table sys_ai_transactions is missing" in empty.troubles[0].message
    assert "proxyd schema --apply" in empty.troubles[0].remedy
    apply(mariadb.url())
    complete = look(mariadb)
    assert complete.troubles == []
    assert complete.words.endswith("the schema is complete")
    assert "MariaDB" in complete.words
    mariadb.query("DROP INDEX idx_sys_ai_created ON sys_ai_transactions")
    (slow,) = look(mariadb).troubles
    assert not slow.is_error
    assert "index idx_sys_ai_created is missing" in slow.message


def test_settings_that_may_lose_rows_are_warnings_with_what_they_cost() -> None:
    careless = {"innodb_flush_log_at_trx_commit": 2, "sync_binlog": 0, "log_bin": "bin", "server_id": 1}
    with MariaDb(**careless, binlog_format="STATEMENT") as server:
        database = server.create()
        apply(database.url())
        troubles = {one.message.split(": ")[1].split()[0]: one for one in look(database).troubles}
        names = ("innodb_flush_log_at_trx_commit", "sync_binlog", "binlog_format")
        flush, sync, form = (troubles[name] for name in names)
        assert (flush.is_error, flush.live, flush.wanted) == (False, "2", "1")
        assert "it may lose up to a second of stored rows when the server's machine dies" in flush.message
        assert f"1 costs a flush of the disk for each commit, {COMMITS}" in flush.message
        assert (sync.is_error, sync.live) == (False, "0")
        assert (form.is_error, form.live) == (True, "STATEMENT")
        server.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        server.query("SET GLOBAL sync_binlog = 1")
        server.query("SET GLOBAL binlog_format = 'ROW'")
        assert look(database).troubles == []


def test_a_database_that_is_not_there_or_refuses_is_an_error_without_its_password(mariadb: Database) -> None:
    refused = store.look(mariadb.url(with_password=False), Secret(b"wrong-password-xyz"), 5.0, COMMITS)
    gone = store.look(mariadb.url(with_password=False, port=free_port()), Secret(PASSWORD.encode()), 5.0, COMMITS)
    for seen, words in ((refused, "Access denied"), (gone, "Can't connect")):
        (one,) = seen.troubles
        assert one.is_error
        assert words in one.message
        assert "wrong-password-xyz" not in one.message
        assert PASSWORD not in one.message


# -- SQLite ------------------------------------------------------------------------------------------------------------


def sqlite(path: Path) -> store.Look:
    return store.look(f"sqlite:///{path}", None, 5.0, COMMITS)


def test_a_file_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    assert "not there yet" in sqlite(path).words
    apply(f"sqlite:///{path}")
    for name in ("t.db-wal", "t.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    before = {one.name: (one.stat().st_mtime_ns, one.read_bytes()) for one in tmp_path.iterdir()}
    seen = sqlite(path)
    assert seen.troubles == []
    assert seen.words.endswith("the schema is complete")
    assert {one.name: (one.stat().st_mtime_ns, one.read_bytes()) for one in tmp_path.iterdir()} == before


def test_a_file_in_use_is_read_beside_its_daemon(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    apply(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO sys_ai_spool_offsets VALUES ('s', 1, 1, 0)")
        writer.commit()
        assert (tmp_path / "t.db-wal").exists()
        assert sqlite(path).troubles == []


def test_a_wal_without_its_daemon_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    apply(f"sqlite:///{path}")
    (tmp_path / "t.db-shm").unlink(missing_ok=True)
    (tmp_path / "t.db-wal").write_bytes(b"")
    assert "the next start reads it" in sqlite(path).words
    assert not (tmp_path / "t.db-shm").exists()


def test_a_file_of_somebody_else_or_with_less_is_an_error(tmp_path: Path) -> None:
    foreign = tmp_path / "f.db"
    with contextlib.closing(sqlite3.connect(foreign)) as other:
        other.execute("CREATE TABLE sys_ai_transactions (x)")
        other.commit()
    (one,) = sqlite(foreign).troubles
    assert one.is_error
    assert "that proxyd did not make" in one.message
    less = tmp_path / "l.db"
    apply(f"sqlite:///{less}")
    with contextlib.closing(sqlite3.connect(less)) as other:
        other.execute("DROP TABLE sys_ai_spool_open")
        other.commit()
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert "table sys_ai_spool_open is missing" in sqlite(less).troubles[0].message


# -- key sets ----------------------------------------------------------------------------------------------------------


def jwks_case(folder: Path, script: Any, *more: str) -> dict[str, Any]:
    peer, upstream = Peer(script), Peer(provider)
    (folder / "good.key").write_text(GOOD_KEY)
    (folder / "good.key").chmod(0o600)
    place = f'url = "http://127.0.0.1:{upstream.port}/v1"\napi_key_file = "{folder}/good.key"\n'
    text = f'[[upstream]]\nname = "a"\n{place}'
    auth = f'algorithms = ["ES256"]\njwks_url = "http://127.0.0.1:{peer.port}/keys"'
    daemon = Daemon(folder, config_text(folder, free_port(), text + model_text("m", 1, '["a"]'), auth=auth))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "proxyd", "--check-config", "--probe", "-c", str(daemon.config), *more],
            capture_output=True, text=True, cwd=ROOT, env=daemon.environ, timeout=60, check=False,
        )  # fmt: skip
    finally:
        peer.close()
        upstream.close()
    if not more:
        return {"code": done.returncode, "lines": done.stdout.splitlines(), "file": str(daemon.config)}
    document: dict[str, Any] = json.loads(done.stdout)
    return {
        "code": done.returncode,
        "found": [one for one in document["findings"] if one["key"] == "auth.jwks_url"],
        "in_order": [one["message"] for one in document["in_order"] if one["key"] == "auth.jwks_url"],
    }


def test_a_key_set_is_fetched_and_understood(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from jose import jwk

    public = jwk.construct(ec.generate_private_key(ec.SECP256R1()).public_key(), "ES256").to_dict()
    public = {name: value.decode() if isinstance(value, bytes) else value for name, value in public.items()}
    body = json.dumps({"keys": [{**public, "kid": "k1"}]}).encode()
    told = jwks_case(tmp_path, answers(answer(200, body=body)), "--json")
    assert (told["code"], told["found"], told["in_order"]) == (0, [], ["1 usable key"])


def test_what_is_in_order_is_a_line_of_its_own_before_the_findings(tmp_path: Path) -> None:
    told = jwks_case(tmp_path, answers(answer(503)))
    assert told["code"] == 1
    kinds = [line.split()[0] for line in told["lines"]]
    assert set(kinds) <= {"ok", "warning", "error"}
    assert kinds == sorted(kinds, key=lambda kind: kind != "ok")
    (line,) = [line for line in told["lines"] if "is accepted" in line]
    assert line.startswith(f"ok {told['file']}:")
    assert " upstream[0].api_key_file[0] (a): GET /v1/models is answered 200: the key of " in line


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (answer(200, body=b'{"keys": []}'), "gives no usable keys"),
        (answer(302, "Location: /x\r\n"), "a redirect is not followed"),
        (b"no http\r\n", "answers no HTTP"),
    ],
)
def test_a_key_set_without_keys_is_an_error(tmp_path: Path, data: bytes, words: str) -> None:
    told = jwks_case(tmp_path, answers(data), "--json")
    assert told["code"] == 1
    assert [one["severity"] for one in told["found"]] == ["error"]
    assert words in told["found"][0]["message"]


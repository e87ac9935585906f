"""mysql:// URLs: every part comes out as it was meant, and no complaint repeats a password."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from proxyd.config.secrets import Secret
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.schema import StoreError

ODD = "p@ss:w/rd?#%20'\"\\x&=é日"


def parts(address: MysqlAddress) -> tuple[str, int, str, str, str]:
    return address.host, address.port, address.user, address.password, address.database


@pytest.mark.parametrize(
    ("sink", "expected"),
    [
        ("mysql://u:p@db.example.com:3307/proxyd", ("db.example.com", 3307, "u", "p", "proxyd")),
        ("mysql://u@db/proxyd", ("db", 3306, "u", "", "proxyd")),
        ("mysql://u:p@[2001:db8::1]:3307/d", ("2001:db8::1", 3307, "u", "p", "d")),
        (f"mysql://{quote(ODD, safe='')}:{quote(ODD, safe='')}@h/a%20b%26", ("h", 3306, ODD, ODD, "a b&")),
        ("mysql://u:p%2520@h/d", ("h", 3306, "u", "p%20", "d")),
        ("mysql://u:a:b@h/d", ("h", 3306, "u", "a:b", "d")),
    ],
)
def test_each_part_is_read(sink: str, expected: tuple[object, ...]) -> None:
    assert parts(MysqlAddress.parse(sink)) == expected


def test_a_socket_needs_neither_host_nor_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "daemon-user")
    address = MysqlAddress.parse("mysql:///proxyd?unix_socket=/run/mysqld/my%20sock")
    assert (address.unix_socket, address.user, address.host) == ("/run/mysqld/my sock", "daemon-user", "")
    assert str(address) == "mysql daemon-user@/run/mysqld/my sock/proxyd"
    named = MysqlAddress.parse("mysql://someone@/proxyd?unix_socket=/s")
    assert named.user == "someone"
    assert "host" not in named.arguments()


def test_a_certificate_authority_is_kept_and_must_be_readable() -> None:
    address = MysqlAddress.parse("mysql://u@h/d?ssl_ca=/nowhere/ca.pem")
    assert address.ssl_ca == "/nowhere/ca.pem"
    with pytest.raises(StoreError, match=r"ssl_ca=/nowhere/ca.pem: No such file"):
        address.arguments()


def test_a_password_of_its_own_is_used_and_two_are_refused() -> None:
    secret = Secret("pässword".encode())
    assert MysqlAddress.parse("mysql://u@h/d", secret).password == "pässword"
    with pytest.raises(StoreError, match=r"password_file gives one too"):
        MysqlAddress.parse("mysql://u:hunter2@h/d", secret)
    with pytest.raises(StoreError, match="not UTF-8"):
        MysqlAddress.parse("mysql://u@h/d", Secret(b"\xff"))


@pytest.mark.parametrize(
    ("sink", "words"),
    [
        ("postgres://u:hunter2@h/d", "not a mysql"),
        ("mysql:u:hunter2@h/d", "not a mysql"),
        ("mysql://u:hunter2@h", "names no database"),
        ("mysql://u:hunter2@h/", "names no database"),
        ("mysql://u:hunter2@h/a/b", "more than one"),
        (f"mysql://u:hunter2@h/{'x' * 65}", "64 characters"),
        ("mysql://u:hunter2@h:0/d", "port 0"),
        ("mysql://u:hunter2@h:70000/d", "port cannot be read"),
        ("mysql://u:hunter2@h:x/d", "port cannot be read"),
        ("mysql://u:hunter2@[::1/d", "port cannot be read"),
        ("mysql://u:hunter2@@h/d", "holds @"),
        ("mysql://u:hunter2#@h/d", "cannot be read|holds @|names no database|user"),
        ("mysql://u:hunter2/x@h/d", "cannot be read"),
        ("mysql://u:hun ter2@h/d", "holds a space"),
        ("mysql://u:hünter2@h/d", "non-ASCII"),
        ("mysql://u:%ff@h/d", "password holds"),
        ("mysql://u:%00@h/d", "password holds"),
        ("mysql:///d", "neither a host nor"),
        ("mysql://u:hunter2@h/d?unix_socket=/s", "both a host and"),
        ("mysql://:3306/d?unix_socket=/s", "both a port and"),
        ("mysql:///d?unix_socket=s", "not an absolute path"),
        ("mysql:///d?unix_socket=/a&unix_socket=/b", "given twice"),
        ("mysql:///d?unix_socket=/a&ssl_ca=/b", "needs no TLS"),
        ("mysql://u:hunter2@h/d?local_infile=1", "an option other than"),
        ("mysql://:hunter2@h/d", "names no user"),
        ("mysql://h/d", "names no user"),
    ],
)
def test_what_is_wrong_is_named_and_never_the_password(sink: str, words: str) -> None:
    with pytest.raises(StoreError, match=rf"telemetry\.sink: .*(?:{words})") as caught:
        MysqlAddress.parse(sink)
    assert "hunter2" not in str(caught.value)
    assert "hünter2" not in str(caught.value)


def test_no_form_of_an_address_shows_the_password() -> None:
    address = MysqlAddress.parse("mysql://u:hunter2@[::1]/d")
    assert str(address) == "mysql u@[::1]:3306/d"
    assert "hunter2" not in f"{address} {address!r}"

"""The shape of telemetry.sink: what is taken, what is refused, and that no refusal repeats a part of it."""

import pytest

from proxyd.config.sink import ca_file, has_password
from tests.unit.config.texts import MINIMAL, only, valid


def config(sink: str) -> str:
    return MINIMAL + f'[telemetry]\nsink = "{sink}"\n'


@pytest.mark.parametrize(
    "sink",
    [
        "sqlite:////var/lib/x.db",
        "sqlite:///x.db",
        "mysql://u@h/d",
        "mysql://u:p%40ss%2F%3A@db.example.com:3307/proxyd",
        "mysql://u:@h/d",
        "mysql://u@[::1]:3306/d",
        "mysql:///d?unix_socket=/run/mysqld/mysqld.sock",
        "mysql://u:p@/d?unix_socket=/run/m.sock",
        "mysql:///d?unix_socket=%2Frun%2Fm.sock",
        "mysql://u@h/d?ssl_ca=/etc/ssl/certs/ca.pem",
    ],
)
def test_these_are_sinks(sink):
    assert valid(config(sink)).telemetry.sink == sink


@pytest.mark.parametrize(
    "sink, words",
    [
        ("", "not a sink"),
        ("postgres://u:hush@h/d", "not a sink"),
        ("sqlite://x.db", "not a sink"),
        ("mysql:u:hush@h/d", "not a mysql:// URL"),
        ("mysql:/hush/d", "not a mysql:// URL"),
        ("mysql://", "names no database"),
        ("mysql://u:hush@h", "names no database"),
        ("mysql://u:hush@h/", "names no database"),
        ("mysql://u:hush@h/a/b", "names no database"),
        ("mysql://u:hu/sh@h/d", "host or port cannot be read"),
        ("mysql://hu/sh@h", "names no database"),
        ("mysql://u:hu@sh@h/d", "mean something else"),
        ("mysql://u:hu#sh@h/d", "host or port cannot be read"),
        ("mysql://u:12#sh@h/d", "mean something else"),
        ("mysql://u:12/sh@h", "names no database"),
        ("mysql://u:12?sh@h/d", "names no database"),
        ("mysql://u:hu%sh@h/d", "mean something else"),
        ("mysql://u:hu?sh@h/d", "host or port cannot be read"),
        ("mysql://u:hush@h:0/d", "port 0"),
        ("mysql://u:hush@h:99999/d", "host or port cannot be read"),
        ("mysql://u:hush@h:x/d", "host or port cannot be read"),
        ("mysql://u:hush@[::1/d", "host or port cannot be read"),
        ("mysql://u:hush @h/d", "holds a space"),
        ("mysql://u:h\u00fcsh@h/d", "holds a space"),
        ("mysql://h/d", "names no user"),
        ("mysql:///d", "neither a host nor a unix_socket"),
        ("mysql://u:hush@/d", "neither a host nor a unix_socket"),
        ("mysql://u:hush@h/d?unix_socket=/s", "a host and a unix_socket"),
        ("mysql:///d?unix_socket=s", "is not absolute"),
        ("mysql:///d?socket=/s", "another option"),
        ("mysql://u:hush@h/d?charset=utf8", "another option"),
        ("mysql:///d?unix_socket=/a&unix_socket=/b", "another option"),
        ("mysql:///d?unix_socket=/a&ssl_ca=/b", "another option"),
        ("mysql:///d?ssl_ca=/b", "neither a host nor a unix_socket"),
        ("mysql://u@h/d?ssl_ca=b", "is not absolute"),
        ("mysql://u:hush%00@h/d", "holds %00"),
        ("mysql://u:hush%ff@h/d", "holds %00"),
        ("mysql://u:hush@h/" + "d" * 65, "more than 64"),
    ],
)
def test_these_are_none_and_nothing_of_them_is_repeated(sink, words):
    found = only(config(sink))
    assert found.key == "telemetry.sink"
    assert words in found.message
    assert found.remedy
    assert not {"hush", "hu/sh", "hu@sh", "hu#sh", "hu?sh", "hu%sh", "h\u00fcsh"} & set(found.text().split())
    assert "hush" not in found.text()


def test_a_sink_that_is_no_text_is_refused():
    assert only(MINIMAL + "[telemetry]\nsink = 3\n").key == "telemetry.sink"


def test_who_holds_a_password():
    assert has_password("mysql://u:p@h/d")
    assert not any(map(has_password, ["mysql://u@h/d", "mysql://u:@h/d", "mysql:///d?unix_socket=/s", "sqlite:///a:b@c"]))


def test_who_names_certificates():
    assert ca_file("mysql://u@h/d?ssl_ca=/etc/a%20b.pem") == "/etc/a b.pem"
    assert not any(map(ca_file, ["mysql://u@h/d", "mysql:///d?unix_socket=/s", "sqlite:////x?ssl_ca=/y"]))

"""From a text to a configuration: lines, unknown keys, wrong kinds, and everything in one go."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.config.load import load, parse
from proxyd.errors import ConfigError
from tests.unit.config.texts import AUTH, ENVIRON, MINIMAL, MODEL, UPSTREAM, findings, keys, only, valid


def test_a_minimal_configuration_gets_the_defaults():
    config = valid(MINIMAL)
    assert config.server.listen[0].text == "127.0.0.1:3000"
    assert config.server.drain_timeout == 120.0
    assert config.http.max_body == 8 << 20
    assert config.server.workers >= 1
    assert config.auth.secret_file == ""
    assert config.upstream_by_name["a"].connect_timeout == 3.0
    assert config.model[0].upstreams == (("a",),)


def test_a_configuration_is_frozen():
    config = valid(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.server.backlog = 1


def test_parsing_touches_no_file(tmp_path):
    """The demo builds its configuration from a text whose secrets come from the environment."""
    assert valid(MINIMAL.replace('"JWT"', '"NOT_SET_HERE"')).auth.secret_env == "NOT_SET_HERE"


def test_the_star_takes_names_without_an_entry():
    config = valid(MINIMAL + '[[model]]\nname = "*"\nid = 2\nupstreams = ["a"]\n')
    assert config.find_model("m").id == 1
    assert config.find_model("anything").id == 2
    assert valid(MINIMAL).find_model("anything") is None


def test_inner_lists_share_by_weight_and_stay_in_order():
    text = AUTH + UPSTREAM + UPSTREAM.replace('"a"', '"b"') + UPSTREAM.replace('"a"', '"c"')
    assert valid(text + MODEL.replace('["a"]', '[["a", "b"], "c"]')).model[0].upstreams == (("a", "b"), ("c",))


@pytest.mark.parametrize(
    "text, key, line, meant",
    [
        ("[server]\nlisten = []\n\nworker = 3\n", "server.worker", 4, "workers"),
        ("[servr]\nworkers = 3\n", "servr", 1, "server"),
        ("[stream]\nbufer = '1MiB'\n", "stream.bufer", 2, "buffer"),
        ("[http]\nheartbeat = '1s'\n", "http.heartbeat", 2, "heartbeat in [stream]"),
        (
            "[limits.tenants.acme]\ntokens_per_minut = 4\n",
            "limits.tenants.acme.tokens_per_minut",
            2,
            "tokens_per_minute",
        ),
        ("[log]\nx = 1\n", "log.x", 2, "remove it; known here: access, format, level"),
        ("[log]\nfromat_of = 1\n", "log.fromat_of", 2, "format"),
        ("[[models]]\nname = 'm'\n", "models", 1, "did you mean [[model]]?"),
        ("[Server]\n", "Server", 1, "did you mean [server]?"),
        ("[metrics]\n", "metrics", 1, "remove it"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text, key, line, meant):
    found = [finding for finding in findings(text) if finding.key == key]
    assert [finding.line for finding in found] == [line]
    assert "unknown key" in found[0].message
    assert meant in found[0].remedy


@pytest.mark.parametrize("table", ["tasks", "gateway", "bus"])
def test_tables_of_later_versions_are_unknown_keys(table):
    found = only(MINIMAL + f"[{table}]\n")
    assert (found.key, found.line) == (table, MINIMAL.count("\n") + 1)
    assert found.message == "unknown key: not part of this version"
    assert found.remedy == "remove the table"


def test_an_unknown_key_of_the_second_upstream_has_its_own_line():
    text = UPSTREAM + "[[upstream]]\nname = 'b'\nurl = 'https://b/'\nwieght = 3\n" + AUTH + MODEL
    found = only(text)
    assert (found.key, found.line) == ("upstream[1].wieght", 7)
    assert "weight" in found.remedy


def test_a_key_in_a_multi_line_array_has_its_own_line():
    found = only(MINIMAL + '[http]\ntrusted_proxies = [\n  "unix",\n  "10.0.0.1/8", # host bits\n]\n')
    assert found.key == "http.trusted_proxies[1]"
    assert found.line == MINIMAL.count("\n") + 4
    assert '"10.0.0.0/8"' in found.remedy


def test_inline_tables_and_dotted_keys_have_lines():
    found = findings('server.workers = 2\nserver.backlog = "x"\nlog = { level = "loud" }\n')
    assert {(finding.key, finding.line) for finding in found} >= {("server.backlog", 2), ("log.level", 3)}


def test_a_pasted_key_is_told_where_it_belongs_and_not_repeated():
    found = only(AUTH + UPSTREAM + 'api_key = "sk-very-secret"\n' + MODEL)
    assert "api_key_file" in found.remedy
    assert "sk-very-secret" not in found.text()


@pytest.mark.parametrize(
    "extra",
    [
        '[auth]\nsecret_file = "sk-very-secret"\n' + UPSTREAM + MODEL,
        '[auth]\nsecret_env = "sk-very-secret"\n' + UPSTREAM + MODEL,
        AUTH + UPSTREAM + 'api_key_file = "sk-very-secret"\n' + MODEL,
        AUTH + UPSTREAM + 'api_key_env = ["sk-very-secret"]\n' + MODEL,
        AUTH + UPSTREAM.replace("https://", "https://u:sk-very-secret@") + MODEL,
        MINIMAL + '[telemetry]\nsink = "mysql://u:sk-very-secret@h"\n',
        MINIMAL + '[telemetry]\nsink = "postgres://u:sk-very-secret@h/d"\n',
        MINIMAL + "sk-very-secret",
        MINIMAL + '[x]\na = "sk-very-secret\n',
    ],
)
def test_no_finding_repeats_what_may_be_a_secret(extra):
    found = findings(extra)
    assert found
    assert not any("sk-very-secret" in finding.text() for finding in found)


@pytest.mark.parametrize("option", ["server.drain_timeout", "http.max_body", "stream.heartbeat", "telemetry.linger"])
def test_a_bare_integer_is_refused_where_a_unit_is_needed(option):
    section, name = option.split(".")
    found = only(MINIMAL + f"[{section}]\n{name} = 30\n")
    assert found.key == option
    assert "unit" in found.remedy


@pytest.mark.parametrize(
    "line, message",
    [
        ("[server]\nlisten = '127.0.0.1:3000'", "must be a list"),
        ("[server]\nbacklog = '4096'", "must be an integer"),
        ("[server]\nbacklog = true", "must be an integer"),
        ("[server]\nbacklog = 0", "out of range"),
        ("[server]\nworkers = 0", "number of processes"),
        ("[server]\nworkers = 'many'", "number of processes"),
        ("[demo]\npage = 1", "must be true or false"),
        ("[demo]\npage = 'true'", "must be true or false"),
        ("[auth]\nissuer = 4", "must be a string"),
        ("[auth]\nmode = 'of'", "not one of the choices"),
        ("[auth]\ncookie = 'a b'", "not a usable name"),
        ("[auth]\nallowed_origins = ['https://a/b']", "not an origin"),
        ("[telemetry]\ndurability = 'never'", "not one of the choices"),
        ("[log]\naccess = 'here.log'", "not a target"),
        ("[monitoring]\npercentiles = [1.0]", "between 0 and 1"),
        ("[monitoring]\npercentiles = [nan]", "between 0 and 1"),
        ("server = 3", "must be a table"),
        ("model = 3", "must be a list"),
        ("[server]\nstate_dir = 'relative'", "not an absolute path"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_what_it_must_be(line, message):
    found = [finding for finding in findings(line + "\n") if message in finding.message]
    assert found, [finding.text() for finding in findings(line)]
    assert found[0].remedy


@pytest.mark.parametrize(
    "address",
    ["", "3000", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "example.com:80", "::1:80", "[::1]", "[127.0.0.1]:80",
     "unix:", "unix:relative", "unix:/" + "x" * 107, "300.0.0.1:80", "[::1]:80x"],
)  # fmt: skip
def test_what_is_no_listen_address_is_refused(address):
    assert keys(MINIMAL + f'[server]\nlisten = ["{address}"]\n') == ["server.listen[0]"]


@pytest.mark.parametrize(
    "address, text",
    [
        ("[::1]:80", "[::1]:80"),
        ("[0:0::1]:80", "[::1]:80"),
        ("localhost:80", "127.0.0.1:80"),
        ("unix:/a/b", "unix:/a/b"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("127.0.0.1:0", "127.0.0.1:0"),
    ],
)
def test_a_listen_address_has_one_spelling(address, text):
    assert valid(MINIMAL + f'[server]\nlisten = ["{address}"]\n').server.listen[0].text == text


@pytest.mark.parametrize(
    "url",
    ["", "api.openai.com", "ftp://a", "https://", "https://u@h/", "https://h/?q", "https://h/#f", "https://h:0/",
     "https://h:99999/", "https://h /", "https://[::1/", "https://h\\u0000/", "https://ü.example/"],
)  # fmt: skip
def test_what_is_no_base_url_is_refused(url):
    assert keys(MINIMAL.replace("https://api.example.com/v1", url)) == ["upstream[0].url"]


def test_a_missing_option_is_reported_at_its_table():
    text = AUTH + "[[upstream]]\n" + MODEL
    found = {(finding.key, finding.line) for finding in findings(text)}
    assert {("upstream[0].name", 3), ("upstream[0].url", 3)} <= found


def test_everything_is_found_at_once():
    """A bad unit hides neither a bad reference nor a cycle nor a listener that is open to all."""
    text = """[server]
listen = ["127.0.0.1:3000", "nonsense", "127.0.0.1:3000"]
admin = "0.0.0.0:9000"
drain_timeout = 30
[auth]
algorithms = ["HS256", "RS256"]
leeway = 3
[[upstream]]
name = "b ad"
[[upstream]]
name = "a"
url = "gopher://x"
[[model]]
name = "m"
id = "one"
upstreams = ["missing", ["a"]]
fallback = "n"
[[model]]
name = "n"
id = 2
upstreams = ["a"]
fallback = "m"
[tasks]
"""
    assert set(keys(text)) == {
        "server.listen[1]",
        "server.listen[2]",
        "server.admin",
        "server.drain_timeout",
        "auth.algorithms",
        "auth.leeway",
        "upstream[0].name",
        "upstream[0].url",
        "upstream[1].url",
        "model[0].id",
        "model[0].upstreams[0]",
        "model[0].fallback",
        "model[1].fallback",
        "tasks",
    }


def test_findings_come_in_the_order_of_their_lines():
    lines = [finding.line for finding in findings("[log]\nlevel = 1\n[demo]\npage = 1\n[http]\nkeepalive = 1\n")]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    "text, line",
    [("a", 1), ("\n\nx = [1,\n", 3), ("a = 1\na = 2\n", 2), ("[a]\n\n[a]\n", 3), ('x = "\n', 1), ("a = 1\n[b\n", 2)],
)
def test_broken_toml_has_a_line(text, line):
    found = only(text)
    assert found.line == line
    assert "TOML" in found.message


def test_bytes_that_are_no_text_have_a_line(tmp_path):
    path = tmp_path / "p.toml"
    path.write_bytes(b"# fine\nx = '\xff'\n")
    with pytest.raises(ConfigError) as caught:
        load(str(path), ENVIRON)
    assert [(finding.line, finding.message) for finding in caught.value.findings] == [(2, "not UTF-8")]


def test_a_huge_file_is_refused_without_being_parsed():
    assert "larger" in only("#" * (1 << 20) + "\n").message


def test_deep_nesting_is_a_finding():
    assert "nested" in only("a = " + "[" * 20000).message


def test_an_unreadable_file_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load(str(tmp_path / "none.toml"), ENVIRON)


def test_a_finding_about_an_upstream_or_a_model_has_its_name_beside_its_key():
    found = only(MINIMAL.replace("https:", "gopher:"))
    assert (found.key, found.name) == ("upstream[0].url", "a")
    assert " upstream[0].url (a): " in found.text()
    assert only(MINIMAL.replace('["a"]', '["b"]')).text().startswith("error F:9 model[0].upstreams[0] (m): ")


def test_an_upstream_in_place_of_a_list_of_them_is_told_the_list():
    assert only(MINIMAL.replace('["a"]', '"a"')).remedy == 'write ["a"]'


def test_a_loaded_file_knows_its_lines(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(MINIMAL)
    config = load(str(path), ENVIRON)
    assert config.file == str(path)
    assert config.line_of("upstream", 0, "url") == 5
    assert config.line_of("upstream", 0, "weight") == 3
    assert config.line_of("log", "level") == 1


def test_a_finding_is_one_line_of_the_contract():
    text = only(MINIMAL + "[stream]\nheartbeat = 15\n").text()
    assert (
        text == "error F:11 stream.heartbeat: a bare number where a duration is needed; "
        'write it with its unit: "15s" if it is seconds'
    )


_ODD_LINES = """
[server]
listen = [
]
workers = 'x'
[[model]]
id = 1.5
x.y = {}
upstreams = [[]]
[limits.tenants.a]
tokens_per_minute = -1
[limits.tenants]
a = 3
upstream = [1]
[upstream]
[[server]]
name = 4
fallback = 'm'
[auth.x]
percentiles = [[1]]
"""
_LINES = st.sampled_from((MINIMAL + _ODD_LINES).splitlines())


@settings(max_examples=300, deadline=None)
@given(st.lists(_LINES, max_size=14))
def test_no_document_does_worse_than_findings(lines):
    text = "\n".join(lines)
    config, found = parse(text, "F", ENVIRON)
    assert (config is None) == any(finding.severity == "error" for finding in found)
    assert all(1 <= finding.line <= max(1, len(lines)) for finding in found)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert len(found) == 1

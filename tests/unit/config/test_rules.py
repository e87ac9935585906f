"""What crosses options."""

import pytest

from proxyd.access.tenants import _TENANT, is_tenant
from proxyd.config.conditions import MAX_CONDITIONS
from proxyd.config.values import NAME_PATTERN
from tests.unit.config.texts import AUTH, MINIMAL, MODEL, UPSTREAM, findings, keys, only, valid


def model(name: str, number: int, *, fallback: str = "", upstreams: str = '["a"]') -> str:
    return f'[[model]]\nname = "{name}"\nid = {number}\nupstreams = {upstreams}\nfallback = "{fallback}"\n'


def test_no_upstream_and_no_model_are_errors_with_remedies():
    found = findings(AUTH)
    assert {finding.key for finding in found} == {"upstream", "model"}
    assert all("add one" in finding.remedy for finding in found)


def test_a_model_names_existing_upstreams_only():
    found = only(AUTH + UPSTREAM.replace('"a"', '"openai"') + MODEL.replace('["a"]', '["opnai"]'))
    assert found.key == "model[0].upstreams[0]"
    assert 'did you mean "openai"?' in found.remedy


def test_a_model_lists_an_upstream_once():
    assert keys(AUTH + UPSTREAM + MODEL.replace('["a"]', '["a", ["a"]]')) == ["model[0].upstreams[1]"]


@pytest.mark.parametrize("value", ["[]", '"a"', "[[]]", "[3]", '[["a", 3]]'])
def test_upstreams_are_a_list_of_names_or_lists(value):
    assert keys(AUTH + UPSTREAM + MODEL.replace('["a"]', value)) == ["model[0].upstreams"]


def test_names_and_ids_are_taken_once():
    text = AUTH + UPSTREAM + UPSTREAM + model("m", 1) + model("m", 2) + model("n", 1)
    assert keys(text) == ["upstream[1].name", "model[1].name", "model[2].id"]


def test_a_fallback_is_a_configured_model():
    assert keys(AUTH + UPSTREAM + model("m", 1, fallback="x")) == ["model[0].fallback"]
    assert keys(AUTH + UPSTREAM + model("m", 1, fallback="*") + model("*", 2)) == ["model[0].fallback"]
    assert keys(AUTH + UPSTREAM + model("m", 1, fallback="n") + model("n", 2)) == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_fallbacks_do_not_go_round(length):
    ring = "".join(model(f"m{i}", i, fallback=f"m{(i + 1) % length}") for i in range(length))
    found = findings(AUTH + UPSTREAM + ring + model("into", 99, fallback="m0"))
    assert [finding.key for finding in found] == [f"model[{i}].fallback" for i in range(length)]
    assert "m0 -> " in found[0].message


@pytest.mark.parametrize("listen", ["0.0.0.0:3000", "[::]:3000", "192.0.2.1:3000"])
def test_auth_is_off_only_where_nobody_else_can_connect(listen):
    text = f'[server]\nlisten = ["127.0.0.1:1", "{listen}"]\n[auth]\nmode = "off"\n' + UPSTREAM + MODEL
    assert keys(text) == ["server.listen[1]"]


@pytest.mark.parametrize("listen", ["127.0.0.1:3000", "127.9.9.9:3000", "[::1]:3000", "unix:/run/x.sock"])
def test_auth_may_be_off_on_loopback_and_unix_listeners(listen):
    text = f'[server]\nlisten = ["{listen}"]\n[auth]\nmode = "off"\n' + UPSTREAM + MODEL
    assert keys(text) == []


def test_the_admin_address_is_local_and_its_own():
    assert keys(MINIMAL + '[server]\nadmin = "0.0.0.0:9"\n') == ["server.admin"]
    assert keys(MINIMAL + '[server]\nadmin = "[::1]:9"\n') == []
    assert keys(MINIMAL + '[server]\nlisten = ["127.0.0.1:9"]\nadmin = "127.0.0.1:9"\n') == ["server.admin"]


def test_addresses_are_listed_once():
    assert keys(MINIMAL + '[server]\nlisten = ["localhost:1", "127.0.0.1:1"]\n') == ["server.listen[1]"]
    assert keys(MINIMAL + '[server]\nlisten = ["127.0.0.1:0", "127.0.0.1:0"]\n') == []
    assert keys(MINIMAL + "[server]\nlisten = []\n") == ["server.listen"]


@pytest.mark.parametrize(
    "auth, bad",
    [
        ('algorithms = ["HS256", "RS256"]\nsecret_env = "JWT"', ["auth.algorithms"]),
        ('algorithms = []\nsecret_env = "JWT"', ["auth.algorithms"]),
        ('algorithms = ["HS256", "HS256"]\nsecret_env = "JWT"', ["auth.algorithms"]),
        ('algorithms = ["none"]\nsecret_env = "JWT"', ["auth.algorithms[0]"]),
        ('algorithms = ["RS256"]', ["auth.algorithms", "auth.secret_file"]),
        ('algorithms = ["RS256"]\nsecret_env = "JWT"', ["auth.algorithms", "auth.secret_env"]),
        ('algorithms = ["HS256"]\njwks_file = "/k"', ["auth.algorithms", "auth.jwks_file"]),
        ('secret_file = "/a"\nsecret_env = "JWT"', ["auth.secret_env"]),
        ('secret_env = "JWT"\njwks_file = "/k"', ["auth.jwks_file"]),
        ('secret_file = ""', ["auth.algorithms"]),
        ('algorithms = ["ES256"]\njwks_url = "https://h/k"', []),
    ],
)
def test_algorithms_fit_the_key_material(auth, bad):
    assert sorted(keys(f"[auth]\n{auth}\n" + UPSTREAM + MODEL)) == bad


@pytest.mark.parametrize("auth", ['algorithms = ["ES256", "RS256"]\njwks_file = "/k"', 'secret_file = "/a"', ""])
def test_one_family_with_one_key_source_is_accepted(auth):
    assert keys(f"[auth]\n{auth}\n" + UPSTREAM + MODEL) == []


@pytest.mark.parametrize(
    "listen, url, is_self",
    [
        ("127.0.0.1:3000", "http://127.0.0.1:3000/v1", True),
        ("127.0.0.1:3000", "http://localhost:3000", True),
        ("0.0.0.0:3000", "http://127.0.0.1:3000", True),
        ("[::1]:3000", "http://[::1]:3000", True),
        ("192.0.2.1:80", "http://192.0.2.1", True),
        ("127.0.0.1:3000", "http://127.0.0.1:3001", False),
        ("127.0.0.1:3000", "http://127.0.0.2:3000", False),
        ("0.0.0.0:443", "https://api.openai.com", False),
        ("unix:/a", "http://127.0.0.1:3000", False),
    ],
)
def test_an_upstream_is_not_this_daemon(listen, url, is_self):
    text = f'[server]\nlisten = ["{listen}"]\n' + MINIMAL.replace("https://api.example.com/v1", url)
    assert keys(text) == (["upstream[0].url"] if is_self else [])


def test_an_upstream_has_its_keys_from_one_place():
    assert keys(AUTH + UPSTREAM + 'api_key_file = "/k"\napi_key_env = "KEY"\n' + MODEL) == ["upstream[0].api_key_env"]
    both = valid(AUTH + UPSTREAM + 'api_key_env = ["KEY", "KEY2"]\n' + MODEL)
    assert both.upstream[0].api_key_env == ("KEY", "KEY2")


def test_a_key_sent_in_clear_over_a_network_is_a_warning():
    text = AUTH + UPSTREAM.replace("https:", "http:") + 'api_key_env = "KEY"\n' + MODEL
    assert keys(text) == []
    assert keys(text, "warning") == ["upstream[0].url"]
    assert keys(text.replace("api.example.com", "127.0.0.1"), "warning") == []


@pytest.mark.parametrize(
    "dialect, url",
    [
        ("openai", "https://h/v1/chat/completions"),
        ("openai", "https://h/v1/responses"),
        ("anthropic", "https://h/v1/messages"),
    ],
)
def test_a_base_url_is_not_a_route(dialect, url):
    text = AUTH + UPSTREAM.replace("https://api.example.com/v1", url) + f'dialect = "{dialect}"\n' + MODEL
    assert keys(text) == ["upstream[0].url"]


def test_a_turn_fits_the_buffer():
    assert keys(MINIMAL + '[stream]\nbuffer = "32KiB"\n') == ["stream.turn_bytes"]
    assert keys(MINIMAL + '[stream]\nbuffer = "32KiB"\nturn_bytes = "32KiB"\n') == []


@pytest.mark.parametrize(
    "condition, is_good",
    [
        ("queue_depth > 800", True),
        ("p99_latency > 200ms", True),
        ("p999_latency>=1.5s", True),
        ("backpressure_events > 100/min", True),
        ("loop_lag", False),
        ("queue_depth >", False),
        ("queue_depth > many", False),
        ("queue_dept > 1", False),
        ("p99_latency > 200", False),
        ("p99_latency > 200/min", False),
        ("queue_depth > 800; rm -rf", False),
        ("requests > 5ms", False),
        ("", False),
    ],
)
def test_alert_conditions_follow_their_grammar(condition, is_good):
    bad = keys(MINIMAL + f'[monitoring]\nalert_on = ["{condition}"]\n')
    assert bad == ([] if is_good else ["monitoring.alert_on[0]"])


def test_a_condition_stands_once_and_there_are_not_more_than_can_be_told():
    assert keys(MINIMAL + '[monitoring]\nalert_on = ["tokens > 1", "tokens > 1"]\n') == ["monitoring.alert_on[1]"]
    many = ", ".join(f'"tokens > {number}"' for number in range(MAX_CONDITIONS + 1))
    assert keys(MINIMAL + f"[monitoring]\nalert_on = [{many}]\n") == ["monitoring.alert_on"]
    assert keys(MINIMAL + "[monitoring]\nalert_on = []\n") == []


def test_percentiles_are_some_and_differ():
    assert keys(MINIMAL + "[monitoring]\npercentiles = []\n") == ["monitoring.percentiles"]
    assert keys(MINIMAL + "[monitoring]\npercentiles = [0.5, 0.5]\n") == ["monitoring.percentiles"]


@pytest.mark.parametrize(
    "text, key",
    [
        ('[telemetry]\npassword_file = "/p"\n', "telemetry.password_file"),
        ('[quota]\ntokens = 5\nwindow = "30d"\n[telemetry]\nretention = "7d"\n', "quota.window"),
    ],
)
def test_what_has_not_its_whole_effect_is_said_when_it_is_used(text, key):
    assert keys(MINIMAL + text) == []
    assert keys(MINIMAL + text, "warning") == [key]


@pytest.mark.parametrize(
    "text",
    [
        '[quota]\ntokens = 5\nwindow = "1h"\nrefresh = "1s"\n',
        '[quota]\ntokens = 5\nwindow = "90d"\n[telemetry]\nretention = "0s"\n',
        "[limits]\nconcurrent_streams = 5\nrequests_per_minute = 5\ntokens_per_minute = 5\n",
        "[limits.tenants.acme]\ntokens_per_minute = 5\n",
        '[telemetry]\nsink = "mysql://u@h/d"\npassword_file = "/p"\n',
        '[telemetry]\nsink = "mysql://u:p@h/d"\n',
    ],
)
def test_what_works_has_no_finding(text):
    assert keys(MINIMAL + text) == keys(MINIMAL + text, "warning") == []


def test_a_ceiling_for_users_needs_users():
    text = '[auth]\nmode = "off"\n' + UPSTREAM + MODEL + "[quota]\ntokens = 5\n"
    assert keys(text, "warning") == ["quota.tokens"]


def test_a_password_comes_from_one_place():
    found = only(MINIMAL + '[telemetry]\nsink = "mysql://u:hush@h/d"\npassword_file = "/p"\n')
    assert found.key == "telemetry.password_file"
    assert "hush" not in found.text()


def test_streams_have_a_bound_that_is_told():
    found = only(MINIMAL + "[limits]\nconcurrent_streams = 65537\n")
    assert (found.key, found.remedy) == ("limits.concurrent_streams", "write a number from 0 (no limit) to 65536")
    found = only(MINIMAL + "[limits.tenants.acme]\nconcurrent_streams = -1\n")
    assert found.key == "limits.tenants.acme.concurrent_streams"
    assert keys(MINIMAL + "[limits]\nconcurrent_streams = 65536\n") == []


def test_the_table_of_permits_is_as_large_as_the_largest_tenant_s():
    assert valid(MINIMAL).limits.most_streams == 0
    text = "[limits]\nconcurrent_streams = 5\n[limits.tenants.a]\nconcurrent_streams = 9\n[limits.tenants.b]\n"
    assert valid(MINIMAL + text).limits.most_streams == 9
    assert valid(MINIMAL + text.replace("9", "0")).limits.most_streams == 5


def test_a_tenant_overrides_single_limits():
    config = valid(
        MINIMAL
        + "[limits]\nconcurrent_streams = 5\n[limits.tenants.acme]\ntokens_per_minute = 0\nconcurrent_streams = 9\n"
    )
    assert config.limits.for_tenant("acme") == (9, 0, 0)
    assert config.limits.for_tenant("other") == (5, 0, 0)


@pytest.mark.parametrize("url", ["https://api.openai.com", "https://api.openai.com/"])
def test_an_openai_base_without_a_path_is_a_warning(url):
    text = MINIMAL.replace("https://api.example.com/v1", url)
    found = only(text, "warning")
    assert found.key == "upstream[0].url"
    assert "requests will go to /chat/completions" in found.message
    assert '"https://api.openai.com/v1"' in found.remedy
    assert keys(text.replace("url =", 'dialect = "anthropic"\nurl ='), "warning") == []


@pytest.mark.parametrize("sink", ["mysql://h:hush@", "oracle://u@h/d", "mysql:/u@h/d", "sqlite://t.db"])
def test_a_password_file_is_not_judged_by_a_sink_that_is_in_error(sink):
    text = MINIMAL + f'[telemetry]\nsink = "{sink}"\npassword_file = "/p"\n'
    assert only(text).key == "telemetry.sink"
    assert keys(text, "warning") == []


@pytest.mark.parametrize(
    "name", ["a", "a.b_c-D", "7", "x" * 64, "x" * 65, "a/b", "a b", ".a", "-a", "_a", "", "\u00e9", "a:"]
)
def test_a_tenant_has_limits_by_a_name_that_a_token_may_have_and_by_no_other(name):
    found = findings(MINIMAL + f'[limits.tenants."{name}"]\nrequests_per_minute = 5\n')
    assert bool(found) != is_tenant(name)
    assert all("letters, digits, dots, underscores and hyphens" in one.remedy for one in found)
    assert _TENANT.pattern == NAME_PATTERN

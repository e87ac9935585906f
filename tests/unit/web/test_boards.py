"""conf/grafana and conf/prometheus name only what /metrics has, with its labels, and their PromQL is PromQL.

promtool is Prometheus' own; tests/install-deps brings it. Grafana is not in Debian: of its model this checks what an
import needs (ids, places, data sources as a variable, references), so that no edit is asked for.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxyd.config.conditions import LATENCIES, QUANTITIES
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.web.exposition import FAMILIES, render

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "conf/prometheus/proxyd.rules.yml"
BOARD: dict[str, Any] = json.loads((ROOT / "conf/grafana/proxyd.json").read_text())
# CONTRACT section 8.
CONTRACT = {
    f"proxyd_{name}"
    for name in (
        "requests_total", "streams_active", "events_relayed_total", "bytes_relayed_total",
        "time_to_first_event_seconds", "relay_lag_seconds", "task_ack_seconds", "queue_depth",
        "backpressure_events_total", "client_aborts_total", "upstream_connections", "upstream_connects_total",
        "upstream_reuse_ratio", "upstream_errors_total", "breaker_state", "tokens_total", "telemetry_rows_total",
        "telemetry_lag_seconds", "telemetry_spool_bytes", "worker_restarts_total", "loop_lag_seconds",
        "sockets_time_wait",
    )
}  # fmt: skip
# What Prometheus adds to every series of a target, and to a histogram's.
TARGET_LABELS = {"instance", "job"}
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def promtool(*words: str | Path) -> str:
    found = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


# --- what they name --------------------------------------------------------------------------------------------------


def rules() -> list[dict[str, str]]:
    """The alerts: name, expression, and all their text. The file is read as its layout has it, by name and indent."""
    found = []
    for part in re.split(r"^      - alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        folded = re.search(r"^        expr: (?:>-\n((?:          .*\n)+)|(.*)\n)", rest, re.MULTILINE)
        assert folded is not None, name
        found.append({"name": name, "expr": " ".join((folded[1] or folded[2]).split()), "text": rest})
    return found


def targets(panels: list[dict[str, Any]] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in BOARD["panels"] if panels is None else panels:
        yield from targets(panel.get("panels", []))
        for target in panel.get("targets", []):
            yield panel["title"], target


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of everything; Grafana's variables as it would fill them in."""
    found = [(rule["name"], rule["expr"]) for rule in rules()]
    found += [(title, target["expr"]) for title, target in targets()]
    found += [(one["name"], one["expr"]) for one in BOARD["annotations"]["list"] if "expr" in one]
    return [(where, expr.replace("$__rate_interval", "5m").replace("$instance", ".*")) for where, expr in found]


def family_of(name: str) -> str:
    return name if name in FAMILIES else SUFFIX.sub("", name)


def allowed_labels(name: str) -> set[str]:
    more = {"le"} if name.endswith("_bucket") else set()
    return set(FAMILIES[family_of(name)].labels) | TARGET_LABELS | more


@pytest.mark.parametrize(("where", "expr"), expressions())
def test_every_metric_that_is_asked_for_is_exposed_with_these_labels(where: str, expr: str) -> None:
    names = re.findall(r"\bproxyd_\w+", expr)
    assert names or expr == 'up{job="proxyd"} == 0'
    for name in names:
        family = FAMILIES.get(family_of(name))
        assert family is not None, name
        assert (name != family_of(name)) == (family.kind == "histogram"), f"{name}: a histogram is its buckets"
    labels = set().union(*(allowed_labels(name) for name in names), TARGET_LABELS)
    used = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=|!~)", expr))
    for group in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expr):
        used |= {label.strip() for label in group.split(",")}
    assert used <= labels, (where, used - labels)
    for name, selector in re.findall(r"\b(proxyd_\w+)\{([^}]*)\}", expr):
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|=|!~)", selector)) <= allowed_labels(name), name


def test_a_legend_and_an_alert_s_words_name_labels_that_the_result_has() -> None:
    for title, target in targets():
        kept = re.match(r"(?:\w+) by \(([^)]*)\)", target["expr"])
        known = {label.strip() for label in kept[1].split(",")} if kept else TARGET_LABELS
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, title
    for rule in rules():
        kept_by = [set(map(str.strip, group.split(","))) for group in re.findall(r"by \(([^)]*)\)", rule["expr"])]
        named = [allowed_labels(name) for name in re.findall(r"\bproxyd_\w+", rule["expr"])]
        known = set().union(*(kept_by or named or [TARGET_LABELS])) - {"le"}
        assert set(re.findall(r"\$labels\.(\w+)", rule["text"])) <= known, rule["name"]


def test_counters_are_asked_for_as_rates() -> None:
    """A counter's value since the start says nothing on a board, and jumps to 0 with a restart."""
    for where, expr in expressions():
        for name in re.findall(r"\bproxyd_\w+_(?:total|bucket)\b", expr):
            assert re.search(rf"(?:rate|increase|changes)\({name}(?:\{{[^}}]*\}})?\[", expr), (where, name)


def test_the_board_has_a_panel_for_every_metric_and_the_rules_have_the_founding_alerts() -> None:
    shown = {family_of(name) for _, target in targets() for name in re.findall(r"\bproxyd_\w+", target["expr"])}
    assert set(FAMILIES) - shown == set()
    assert shown >= CONTRACT
    founding = {rule["name"]: rule["expr"] for rule in rules()}
    assert "proxyd_queue_depth) > 800" in founding["ProxydQueueDepth"]
    assert founding["ProxydLatencyP99"].endswith("> 0.2")
    assert founding["ProxydBackpressure"].endswith("* 60 > 100")


def test_the_docs_tell_every_alert_and_quantity() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    told = [word for cell in cells for word in re.findall(r"`(\w+)`", cell)]
    assert sorted(word for word in told if word.startswith("Proxyd")) == sorted(rule["name"] for rule in rules())
    quantities = {word for word in told if not word.startswith("Proxyd")}
    assert quantities == set(QUANTITIES) | {f"p99_{name}" for name in LATENCIES}


# --- Prometheus ------------------------------------------------------------------------------------------------------


def test_the_rules_and_the_example_load_in_prometheus() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "--lint-fatal", RULES)
    example = RULES.with_name("prometheus.yml")
    assert "is valid prometheus config" in promtool("check", "config", "--lint-fatal", example)


def test_the_board_s_promql_is_promql(tmp_path: Path) -> None:
    made = [{"record": f"proxyd:{at}", "expr": expr} for at, (_, expr) in enumerate(expressions())]
    path = tmp_path / "board.yml"
    path.write_text(json.dumps({"groups": [{"name": "board", "rules": made}]}))  # JSON is YAML
    assert f"{len(made)} rules found" in promtool("check", "rules", path)


def test_what_is_exposed_is_what_prometheus_wants() -> None:
    region = Region.create(4)
    metrics = Metrics(region, 0)
    for name, family in FAMILIES.items():
        labels = {label: f"{label} of 1" for label in family.labels}
        if family.kind == "histogram":
            metrics.histogram(name).record(0.1)
        elif family.kind == "counter":
            metrics.counter(name, **labels).add(1)
        else:
            metrics.gauge(name, **labels).set(1)
    text = render(read(region, 1000.0), 3, {"kind": "reload", "ok": True})
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr.decode()
    assert {family.name for family in text_string_to_metric_families(text.decode())} == {
        name.removesuffix("_total") for name in FAMILIES
    }


# What makes each alert fire: series with their values, a minute apart, and when it must be there. Before the first of
# them it must not be.
LE = '{instance="a",le="%s"}'
SLOW = {"0.134217728": "0+0x60", "0.268435456": "0+600x60", "+Inf": "0+600x60"}
LATE = {"17.179869184": "0+0x60", "34.359738368": "0+0x60", "68.719476736": "0+60x60", "+Inf": "0+60x60"}


def histogram(name: str, buckets: dict[str, str]) -> dict[str, str]:
    return {f'{name}_bucket{{instance="a",le="{le}"}}': values for le, values in buckets.items()}


FIRING: dict[str, tuple[dict[str, str], int]] = {
    "ProxydQueueDepth": ({'proxyd_queue_depth{instance="a",tenant="x"}': "0 801x60"}, 3),
    "ProxydLatencyP99": (histogram("proxyd_relay_lag_seconds", SLOW), 8),
    "ProxydLoopLagP99": (histogram("proxyd_loop_lag_seconds", SLOW), 8),
    "ProxydTaskAckP99": (histogram("proxyd_task_ack_seconds", SLOW), 8),
    "ProxydBackpressure": ({'proxyd_backpressure_events_total{instance="a",kind="slow_reader"}': "0+120x60"}, 8),
    "ProxydDown": ({'up{instance="a",job="proxyd"}': "1 0x60"}, 3),
    "ProxydOwnAlert": ({'proxyd_alert_active{instance="a",alert="queue_depth > 800"}': "0 1x60"}, 2),
    "ProxydWorkersRestart": ({'proxyd_worker_restarts_total{instance="a"}': "0+1x60"}, 10),
    "ProxydReloadFailed": ({'proxyd_last_reload_successful{instance="a",kind="reload"}': "1 0x60"}, 2),
    "ProxydServerErrors": (
        {
            'proxyd_requests_total{instance="a",route="/v1/models",status="200"}': "0+90x60",
            'proxyd_requests_total{instance="a",route="/v1/models",status="503"}': "0+10x60",
        },
        12,
    ),
    "ProxydBreakerOpen": ({'proxyd_breaker_state{instance="a",upstream="u"}': "0 2x60"}, 3),
    "ProxydUpstreamErrors": ({'proxyd_upstream_errors_total{instance="a",upstream="u",kind="reset"}': "0+61x60"}, 12),
    "ProxydConnectionsNotReused": (
        {
            'proxyd_upstream_connects_total{instance="a",upstream="u"}': "0+600x60",
            'proxyd_upstream_reuse_ratio{instance="a",upstream="u"}': "0.1x60",
        },
        20,
    ),
    "ProxydEgressPortsRunOut": (
        {
            'proxyd_egress_ports_used{instance="a",upstream="u"}': "0 81x60",
            'proxyd_egress_ports_limit{instance="a",upstream="u"}': "100x60",
        },
        3,
    ),
    "ProxydEgressPortsOut": ({'proxyd_egress_ports_out_total{instance="a",upstream="u"}': "0 0 1x60"}, 3),
    "ProxydStoreFailing": ({'proxyd_telemetry_store_failing{instance="a"}': "0 1x60"}, 3),
    "ProxydSpoolFilling": ({'proxyd_telemetry_spool_used_ratio{instance="a"}': "0.1 0.6x60"}, 8),
    "ProxydSpoolNearlyFull": ({'proxyd_telemetry_spool_used_ratio{instance="a"}': "0.1 0.9x60"}, 2),
    "ProxydRowsLate": (histogram("proxyd_telemetry_lag_seconds", LATE), 12),
    "ProxydDeadLetters": ({'proxyd_telemetry_rows_total{instance="a",state="dead"}': "0 0 3x60"}, 4),
}


def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    assert FIRING.keys() == {rule["name"] for rule in rules()}
    tests = []
    for name, (series, minute) in FIRING.items():
        inputs = [{"series": one, "values": values} for one, values in series.items()]
        tests.append(
            {
                "interval": "1m",
                "input_series": inputs,
                # The number of its series that fire: 0 in the first minute, 1 when it is due.
                "promql_expr_test": [
                    {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)', "eval_time": when,
                     "exp_samples": [{"labels": "{}", "value": value}]}
                    for when, value in (("0m", 0), (f"{minute}m", 1))
                ],
            }
        )  # fmt: skip
    path = tmp_path / "tests.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", path)


# --- Grafana ---------------------------------------------------------------------------------------------------------


def test_the_board_asks_for_no_edit_when_it_is_imported() -> None:
    assert (BOARD["uid"], BOARD["title"]) == ("proxyd", "proxyd")
    assert "id" not in BOARD, "a number of somebody's own database"
    assert "__inputs" not in BOARD, "a provisioned file cannot answer them"
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    assert (variables["DS_PROMETHEUS"]["type"], variables["DS_PROMETHEUS"]["query"]) == ("datasource", "prometheus")
    assert BOARD["templating"]["list"][0]["name"] == "DS_PROMETHEUS", "the others are asked of it"
    text = json.dumps(BOARD)
    named = set(re.findall(r'"uid": "([^"]*)"', text)) - {"proxyd", "-- Grafana --"}
    assert named == {"${DS_PROMETHEUS}"}
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == set(variables)
    assert BOARD["schemaVersion"] >= 36


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        right, bottom = place["x"] + place["w"], place["y"] + place["h"]
        cells = {(x, y) for x in range(place["x"], right) for y in range(place["y"], bottom)}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])

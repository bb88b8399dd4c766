"""The dashboard, the alerts, the autoscalers and the documentation name metrics that exist."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.messages import Usage
from common.metric_aliases import ALIASES
from common.metrics import SECONDS
from services.gateway.generation import Ended, GenerationRequest, Piece
from services.gateway.metrics import Metrics
from services.llm.metrics import LlmMetrics
from tests.policy.exported import Family, exported, families_of, stages
from tests.policy.sources import ROOT, sources

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "twinlens.json"
ALERTS = GRAFANA / "alerts.yml"
PROMETHEUS_COMPONENT = ROOT / "k8s" / "components" / "prometheus"
KEDA = ROOT / "k8s" / "components" / "keda" / "autoscaler.yaml"

WORDS = {"by", "on", "and", "or", "unless", "offset", "bool", "ignoring", "group_left"}
"""The words of PromQL that are neither a function nor a metric."""
TARGET_LABELS = {"job", "instance", "service", "le"}
"""The labels that Prometheus adds to what it scrapes, and that of histograms."""
FOREIGN = {"up", "process_resident_memory_bytes"}
"""The series of others that we use."""
STOCK_VLLM = [
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:iteration_tokens_total_count",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
]
"""Every series that the dashboards of vLLM 0.33.0 query (`examples/observability`: the Grafana
boards `grafana.json`, `performance_statistics.json` and `query_statistics.json`, and their Perses
twins). They come without recording rules. They select by `model_name`, and group by `model_name`,
`finished_reason` and `le`."""


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    """The metrics of all roles together."""
    return {name: family for own in exported().values() for name, family in own.items()}


@pytest.fixture(scope="module")
def series(families: dict[str, Family]) -> dict[str, frozenset[str]]:
    """The labels of each series."""
    return {name: family.labels for family in families.values() for name in family.series}


def dashboard_queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    return queries + [variable["definition"] for variable in board["templating"]["list"][1:]]


def rules_in(file: Path) -> list[dict[str, Any]]:
    found = yaml.safe_load(file.read_text())
    groups = found.get("groups") or found["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def autoscaler_queries() -> list[str]:
    return [t["metadata"]["query"] for t in yaml.safe_load(KEDA.read_text())["spec"]["triggers"]]


def names_in(query: str) -> set[str]:
    """Return the series that a PromQL query names."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(?:by|on|without)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"label_values\(([^,]+),[^)]*\)", r"\1", bare)
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])", bare)
    return set(words) - WORDS


def labels_in(query: str) -> set[str]:
    """Return the labels that a query selects or groups by."""
    selected = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query)
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    return set(selected) | {name.strip() for names in grouped for name in names.split(",")}


def unknown_in(query: str, series: dict[str, frozenset[str]]) -> list[str]:
    """Return the names and labels in a query that nothing exports."""
    names = names_in(query)
    known = TARGET_LABELS.union(*(series.get(name, frozenset()) for name in names))
    return sorted((names - set(series) - FOREIGN) | (labels_in(query) - known))


def test_queries_are_taken_apart() -> None:
    query = (
        "histogram_quantile(0.9, sum by (le, stage) (rate(a:b_bucket{job=~\"up\", x='y'}[5m])))"
        ' / on (job) c_total offset 5m > 1.5 * max(d{role!="vision"}) and e'
    )
    assert names_in(query) == {"a:b_bucket", "c_total", "d", "e"}
    assert labels_in(query) == {"le", "stage", "job", "role"}
    series = {
        "a:b_bucket": frozenset({"stage"}),
        "c_total": frozenset[str](),
        "d": frozenset[str](),
    }
    assert unknown_in(query, series) == ["e", "role"]


def test_every_query_of_the_dashboard_finds_its_metrics(series: dict[str, frozenset[str]]) -> None:
    queries = dashboard_queries()
    assert len(queries) > 50
    assert {query: found for query in queries if (found := unknown_in(query, series))} == {}


def test_every_alert_finds_its_metrics(series: dict[str, frozenset[str]]) -> None:
    queries = [rule["expr"] for rule in rules_in(ALERTS)]
    assert len(queries) > 10
    assert {query: found for query in queries if (found := unknown_in(query, series))} == {}


def test_the_autoscaler_finds_its_metrics(series: dict[str, frozenset[str]]) -> None:
    queries = autoscaler_queries()
    assert queries and all(not unknown_in(query, series) for query in queries)


def test_our_own_commands_find_their_metrics(series: dict[str, frozenset[str]]) -> None:
    """They read metrics by name, as a dashboard does."""
    text = "".join((ROOT / file).read_text() for file in sources("services/commands", "benchmarks"))
    names = set(re.findall(r'"(twinlens_[a-z]+_[a-z_]+)"', text))
    assert "twinlens_gateway_requests_total" in names and names <= set(series)


def test_the_alerts_of_kubernetes_are_those_of_compose() -> None:
    assert rules_in(PROMETHEUS_COMPONENT / "alerts.yaml") == rules_in(ALERTS)


def test_the_dashboard_shows_every_metric_of_a_stage(families: dict[str, Family]) -> None:
    """What is worth exporting is worth a panel, but for a few that only alerts and people read."""
    elsewhere = {
        "twinlens_gateway_attempts_total",
        "twinlens_gateway_requests_in_flight",
        "twinlens_gateway_llm_kv_cache_usage_ratio",
        "twinlens_llm_adapters_in_use",
        "twinlens_llm_kv_cache_capacity_tokens",
        "twinlens_member_hung",
    }
    shown = set().union(*map(names_in, dashboard_queries()))
    own = {name for name in families if name.startswith("twinlens_")}
    assert {name for name in own if not families[name].series & shown} == elsewhere


def panels() -> Iterator[dict[str, Any]]:
    yield from json.loads(DASHBOARD.read_text())["panels"]


def test_panels_have_ids_titles_descriptions_units_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_has_these_rows() -> None:
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == [
        "Traffic",
        "Latency",
        "Stages",
        "Vision replicas",
        "Language groups",
        "Failures",
    ]


def test_names_say_stage_and_unit(families: dict[str, Family]) -> None:
    for name, family in families.items():
        if name.startswith("twinlens_"):
            stage = name.split("_")[1]
            assert stage in {*exported(), "member"}, name
            if family.kind == "histogram":
                assert name.endswith(("_seconds", "_tokens")), name
            assert name.endswith("_total") == (family.kind == "counter"), name


def test_every_metric_is_documented_and_every_documented_metric_exists(
    families: dict[str, Family],
) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`((?:twinlens_|vllm:|sglang:)[a-z0-9_:]+)`", text))
    exist = set(families)
    assert exist - named == set(), "not documented"
    assert {name for name in named - exist if not name.endswith("_")} == set(), "do not exist"


# Aliases


def test_no_alias_is_served_by_two_roles() -> None:
    roles: dict[str, list[str]] = {}
    for role, families in exported().items():
        for name in families:
            if not name.startswith("twinlens_"):
                roles.setdefault(name, []).append(role)
    assert all(len(served_by) == 1 for served_by in roles.values()), roles
    assert len(roles) == len(ALIASES), "each alias has a metric that it stands for"


def test_aliases_can_be_switched_off() -> None:
    names = {name for own in exported(aliases=False).values() for name in own}
    assert names and all(name.startswith("twinlens_") for name in names)


def test_the_dashboards_of_vllm_find_every_series_after_one_request() -> None:
    made = stages()
    metrics = made["gateway"]
    group = made["llm"]
    assert isinstance(metrics, Metrics) and isinstance(group, LlmMetrics)
    request = metrics.begin(
        GenerationRequest(request_id="r", prompt_kind="messages", prompt=b""), 0
    )
    timings = {
        "queue_seconds": 0.1,
        "prefill_seconds": 0.2,
        "decode_seconds": 0.3,
        "images": [{"cached": True}],
    }
    request.on_event(Piece(0, [1], "a", []))
    request.on_event(Piece(1, [2], "b", []))
    request.on_event(
        Ended("stop", Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=3), timings)
    )
    request.on_end("stop", None)
    group.observe_step([], 7, 0.2)
    samples = [
        sample
        for registry in (metrics.registry, group.registry)
        for family in registry.collect()
        for sample in family.samples
        if sample.labels.get("model_name") == "org/tiny" and sample.labels.get("engine") == "0"
    ]
    assert set(STOCK_VLLM) - {sample.name for sample in samples} == set()
    value = {sample.name: sample.value for sample in samples if sample.value}
    assert value["vllm:prompt_tokens_total"] == 7
    assert value["vllm:prefix_cache_hits_total"] == 3 and value["vllm:mm_cache_hits_total"] == 1
    assert value["vllm:generation_tokens_total"] == 2
    assert value["vllm:request_prefill_time_seconds_sum"] == 0.2
    assert value["vllm:iteration_tokens_total_count"] == 1
    reasons = {s.labels["finished_reason"]: s.value for s in samples if "success" in s.name}
    assert reasons == {"stop": 1, "length": 0, "repetition": 0, "abort": 0, "error": 0}


def test_the_objectives_that_dashboards_of_vllm_offer_are_bounds_of_buckets() -> None:
    """Its Overview board reads the share of requests within an objective from one bucket."""
    ttft = (0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
    tpot = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
    assert {*ttft, *tpot} <= set(SECONDS)


def test_names_of_families_are_as_in_queries() -> None:
    found = families_of(stages()["vision"].registry)
    assert found["twinlens_vision_items_total"].series == {"twinlens_vision_items_total"}
    assert "sglang:encoder_queue_wait_seconds_bucket" in (
        found["sglang:encoder_queue_wait_seconds"].series
    )

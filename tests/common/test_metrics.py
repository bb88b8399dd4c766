"""The metrics of a stage, and their names in other systems."""

from collections.abc import Callable

import pytest
from prometheus_client import generate_latest

from common.metrics import SECONDS, TOKENS, Alias, StageMetrics


@pytest.fixture
def metrics() -> StageMetrics:
    return StageMetrics("oven")


def lines(metrics: StageMetrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_names_begin_with_the_stage_and_there_are_no_times_of_creation(
    metrics: StageMetrics,
) -> None:
    metrics.counter("loaves", "Loaves.", "kind").labels("rye").inc(2)
    metrics.gauge("heat_celsius", "Heat.", lambda: 220)
    metrics.total("doors", "Openings.", lambda: 7)
    metrics.histogram("bake_seconds", "Time.").observe(0.3)
    found = lines(metrics)
    assert 'twinlens_oven_loaves_total{kind="rye"} 2.0' in found
    assert "twinlens_oven_heat_celsius 220.0" in found
    assert "# TYPE twinlens_oven_doors_total counter" in found
    assert "twinlens_oven_doors_total 7.0" in found
    assert 'twinlens_oven_bake_seconds_bucket{le="0.25"} 0.0' in found
    assert 'twinlens_oven_bake_seconds_bucket{le="0.5"} 1.0' in found
    assert not any("_created" in line for line in found)


def test_gauges_and_totals_are_read_at_each_scrape(metrics: StageMetrics) -> None:
    values = iter([1, 2])
    metrics.gauge("heat", "Heat.", lambda: next(values))
    assert "twinlens_oven_heat 1.0" in lines(metrics)
    assert "twinlens_oven_heat 2.0" in lines(metrics)


@pytest.mark.parametrize("buckets", [SECONDS, TOKENS])
def test_buckets_rise(buckets: tuple[float, ...]) -> None:
    assert list(buckets) == sorted(set(buckets))


def samples(metrics: StageMetrics, name: str) -> dict[str, float]:
    return {
        line.rpartition(" ")[0].removeprefix(name): float(line.rpartition(" ")[2])
        for line in lines(metrics)
        if line.startswith(name)
    }


@pytest.fixture
def serve(metrics: StageMetrics) -> Callable[..., dict[str, float]]:
    def serve(source: str, **fields: object) -> dict[str, float]:
        alias = Alias("kiln:it", f"twinlens_oven_{source}", **fields)  # type: ignore[arg-type]
        metrics.serve_aliases([alias], {"model_name": "m"})
        return samples(metrics, "kiln:it")

    return serve


def test_an_alias_has_the_other_systems_name_and_labels(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    metrics.histogram("bake_seconds", "Time.").observe(0.3)
    found = serve("bake_seconds")
    assert found['_bucket{le="0.25",model_name="m"}'] == 0
    assert found['_bucket{le="+Inf",model_name="m"}'] == 1
    assert found['_sum{model_name="m"}'] == 0.3 and found['_count{model_name="m"}'] == 1


def test_an_alias_sums_over_labels_that_the_other_system_lacks(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    loaves = metrics.counter("loaves", "Loaves.", "kind", "outcome")
    loaves.labels("rye", "eaten").inc(2)
    loaves.labels("rye", "burnt").inc(3)
    loaves.labels("oat", "eaten").inc(4)
    assert serve("loaves", labels={"kind": "grain"}) == {
        '_total{grain="rye",model_name="m"}': 5,
        '_total{grain="oat",model_name="m"}': 4,
    }


def test_an_alias_counts_only_some_values_and_renames_them(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    loaves = metrics.counter("loaves", "Loaves.", "outcome")
    for number, outcome in enumerate(("eaten", "burnt", "sold"), 1):
        loaves.labels(outcome).inc(number)
    found = serve(
        "loaves",
        labels={"outcome": "end"},
        only={"outcome": ("eaten", "sold")},
        values={"sold": "gone"},
    )
    assert found == {
        '_total{end="eaten",model_name="m"}': 1,
        '_total{end="gone",model_name="m"}': 3,
    }


def test_an_alias_may_have_one_name_for_all_other_values_and_a_label_of_its_own(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    loaves = metrics.counter("loaves", "Loaves.", "outcome")
    for number, outcome in enumerate(("eaten", "burnt", "lost"), 1):
        loaves.labels(outcome).inc(number)
    found = serve(
        "loaves",
        labels={"outcome": "end"},
        values={"eaten": "eaten"},
        other="waste",
        fixed={"shop": "1"},
    )
    assert found == {
        '_total{end="eaten",model_name="m",shop="1"}': 1,
        '_total{end="waste",model_name="m",shop="1"}': 5,
    }


def test_an_alias_may_have_another_unit(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    metrics.gauge("store_bytes", "Store.", lambda: 3 * 2**20)
    assert serve("store_bytes", scale=2**-20) == {'{model_name="m"}': 3}


def test_an_alias_of_a_metric_of_another_stage_is_left_out(
    metrics: StageMetrics, serve: Callable[..., dict[str, float]]
) -> None:
    assert serve("nothing") == {}


def test_an_alias_costs_nothing_before_a_scrape(metrics: StageMetrics) -> None:
    """What is observed is only our own metric; the alias reads it later."""
    counter = metrics.counter("loaves", "Loaves.")
    metrics.serve_aliases([Alias("kiln:it", "twinlens_oven_loaves")], {})
    counter.inc(5)
    assert samples(metrics, "kiln:it") == {"_total": 5}

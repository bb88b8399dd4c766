"""The metrics of a stage, and the other systems' names under which they are served as well.

A service observes its own metrics only. The aliases are computed from them when they are scraped,
so they cost the service's work nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

SECONDS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3),
    *(0.5, 0.75, 1, 2.5, 5, 10, 25, 60, 120, 300, 600),
)
"""The buckets of every histogram of times: from a decode step to the deadline of a request.

The objectives that vLLM's dashboards offer for TTFT and TPOT are among them: such a share is read
from one bucket.
"""
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
"""The buckets of every histogram of token counts."""


class StageMetrics:
    """The metrics of one stage, in a registry of their own.

    Their names begin with `twinlens_` and the stage.
    """

    def __init__(self, stage: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._prefix = f"twinlens_{stage}_"
        self._collectors: dict[str, Collector] = {}

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Add a counter. Its exported name ends in `_total`."""
        counter = Counter(self._prefix + name, text, labels, registry=self.registry)
        self._collectors[self._prefix + name] = counter
        return counter

    def histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        """Add a histogram."""
        histogram = Histogram(
            self._prefix + name, text, labels, buckets=buckets, registry=self.registry
        )
        self._collectors[self._prefix + name] = histogram
        return histogram

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read at each scrape, on the thread of the scrape."""
        gauge = Gauge(self._prefix + name, text, registry=self.registry)
        gauge.set_function(read)
        self._collectors[self._prefix + name] = gauge

    def total(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a counter that the service keeps itself, and that is read at each scrape."""
        self.collect(name, Total(self._prefix + name, text, read))

    def collect(self, name: str, collector: Collector) -> None:
        """Add a metric that is collected at each scrape, on the thread of the scrape."""
        self.registry.register(collector)
        self._collectors[self._prefix + name] = collector

    def serve_aliases(self, aliases: Iterable["Alias"], labels: Mapping[str, str]) -> None:
        """Serve the metrics under those `aliases` whose source this stage has, with `labels`."""
        for alias in aliases:
            if source := self._collectors.get(alias.source):
                self.registry.register(AliasCollector(alias, source, labels))


class Total(Collector):
    """A counter whose value is read at each scrape."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


@dataclass(frozen=True, slots=True)
class Alias:
    """Another system's name for one of our metrics."""

    name: str
    """Without the ending `_total` of counters."""
    source: str
    """Our name, likewise."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The other system's name of each of our labels. It is summed over the labels left out."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values of our labels that count, if not all do."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The other system's names of values of labels."""
    other: str = ""
    """Its name of all values that `values` does not have; empty if they keep their names."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Labels that ours does not have, with their only value."""
    scale: float = 1.0
    """What a value of ours is multiplied by."""


class AliasCollector(Collector):
    """Serves one metric under an alias."""

    def __init__(self, alias: Alias, source: Collector, labels: Mapping[str, str]) -> None:
        self._alias = alias
        self._source = source
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            yield self._renamed(family)

    def _renamed(self, family: Metric) -> Metric:
        alias = self._alias
        renamed = Metric(alias.name, f"{family.documentation} ({alias.source})", family.type)
        sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for sample in family.samples:
            if self._counts(sample.labels):
                suffix = sample.name.removeprefix(family.name)
                sums[suffix, tuple(self._renamed_labels(sample.labels))] += sample.value
        for (suffix, labels), value in sums.items():
            given = {**self._labels, **alias.fixed, **dict(labels)}
            renamed.add_sample(alias.name + suffix, given, value * alias.scale)
        return renamed

    def _counts(self, labels: Mapping[str, str]) -> bool:
        return all(labels[name] in values for name, values in self._alias.only.items())

    def _renamed_labels(self, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        alias = self._alias
        for name, value in labels.items():
            if name == "le":
                yield name, value
            elif name in alias.labels:
                yield alias.labels[name], alias.values.get(value, alias.other or value)

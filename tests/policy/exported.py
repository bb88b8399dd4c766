"""What every service exports to Prometheus, from registries like those of the running processes."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from common.health import Health
from common.metric_aliases import serve_aliases
from common.metrics import StageMetrics
from common.settings import ServedModelSettings
from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import MembershipTable
from services.controller.metrics import ControllerMetrics
from services.detokenizer.metrics import DetokenizerMetrics
from services.gateway.metrics import Metrics
from services.llm.block_pool import BlockPool
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.lora_registry import LoraRegistry
from services.llm.metrics import LlmMetrics
from services.llm.scheduler import Scheduler
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.vision_pool import VisionPool
from services.vision.cache import EmbeddingCache
from services.vision.metrics import VisionMetrics

SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
OWN = ("twinlens_", "vllm:", "sglang:")


@dataclass(frozen=True)
class Family:
    """One metric of one service."""

    name: str
    """As in queries: with `_total` if it is a counter, without the endings of a histogram."""
    kind: str
    labels: frozenset[str]

    @property
    def series(self) -> set[str]:
        """The names of its series."""
        if self.kind == "histogram":
            return {self.name + suffix for suffix in SUFFIXES[self.kind]}
        return {self.name}


def gateway() -> Metrics:
    metrics = Metrics()
    metrics.watch(lambda: (0, 0), lambda: 0.0)
    return metrics


def llm() -> LlmMetrics:
    metrics = LlmMetrics()
    metrics.watch(Scheduler(BlockPool(4), 16, 8, 64), EmbeddingBudget(64), LoraRegistry())
    return metrics


def vision() -> VisionMetrics:
    metrics = VisionMetrics(EmbeddingCache(1))
    metrics.watch_load(lambda: (0, 0))
    return metrics


def stages(aliases: bool = True) -> dict[str, StageMetrics]:
    """Return the metrics of one member of each role."""
    made: dict[str, StageMetrics] = {
        "gateway": gateway(),
        "preprocess": PreprocessMetrics(VisionPool()),
        "vision": vision(),
        "llm": llm(),
        "detokenizer": DetokenizerMetrics(),
        "controller": ControllerMetrics(MembershipTable()),
    }
    settings = ServedModelSettings(served_model_name="org/tiny", metric_aliases=aliases)
    for role in ("gateway", "preprocess", "vision", "llm"):
        serve_aliases(made[role], settings)
    for role, metrics in made.items():
        Health(
            control_pb2.Member(id=f"{role}-1", role=role), lambda: (0, 0), registry=metrics.registry
        )
    return made


def families_of(registry: CollectorRegistry) -> dict[str, Family]:
    """Return the metrics of a registry by name, without those of the process."""
    found = {}
    labels = labels_of(registry)
    for family in registry.collect():
        if family.name.startswith(OWN):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            own = {label for sample in family.samples for label in sample.labels}
            found[name] = Family(name, family.type, labels.get(family.name, frozenset()) | own)
    return found


def labels_of(registry: CollectorRegistry) -> Mapping[str, frozenset[str]]:
    """Return the labels of the metrics that have no series before something happens."""
    return {
        collector._name: frozenset(collector._labelnames)
        for collector in registry._collector_to_names
        if hasattr(collector, "_labelnames")
    }


def exported(aliases: bool = True) -> dict[str, dict[str, Family]]:
    """Return the metrics of each role by name."""
    return {role: families_of(made.registry) for role, made in stages(aliases).items()}

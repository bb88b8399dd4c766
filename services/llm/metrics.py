"""The metrics of a language group, which rank 0 serves. Imports no torch."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.metrics import TOKENS, StageMetrics
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.lora_registry import LoraRegistry
from services.llm.request import Request
from services.llm.scheduler import Chunk, Scheduler


class LlmMetrics(StageMetrics):
    """The metrics of one group. Those of its steps are observed, all others read at a scrape."""

    def __init__(self) -> None:
        super().__init__("llm")

    def watch(self, scheduler: Scheduler, budget: EmbeddingBudget, adapters: LoraRegistry) -> None:
        """Add the metrics of rank 0, once it has what they are read from."""
        step_seconds = self.histogram(
            "step_seconds",
            "Seconds of a step, by what it computed: parts of prompts (prefill), one token of each "
            "answer (decode), or both (mixed).",
            "phase",
        )
        self._seconds_of = {
            phase: step_seconds.labels(phase) for phase in ("prefill", "decode", "mixed")
        }
        self.step_tokens = self.histogram(
            "step_tokens", "Tokens that a step computed.", buckets=TOKENS
        )
        self._watch_scheduler(scheduler)
        self._watch_adapters(scheduler, adapters)
        self.gauge(
            "embedding_capacity_tokens",
            "Item tokens whose embeddings have room in memory.",
            lambda: budget.num_tokens,
        )
        self.gauge(
            "embedding_free_tokens",
            "Item tokens whose embeddings have room that no request has reserved.",
            lambda: budget.num_free,
        )

    def _watch_scheduler(self, scheduler: Scheduler) -> None:
        pool = scheduler.pool
        self.gauge(
            "requests_running",
            "Requests that hold blocks of the KV cache.",
            lambda: len(scheduler.running),
        )
        self.gauge(
            "requests_waiting",
            "Requests that hold no blocks yet, or lost them to another one.",
            lambda: len(scheduler.waiting),
        )
        self.gauge(
            "kv_cache_capacity_tokens",
            "Tokens that the KV cache has room for.",
            lambda: scheduler.max_tokens,
        )
        self.gauge(
            "kv_cache_usage_ratio",
            "Share of the KV cache that requests hold, from 0 to 1.",
            lambda: 1 - pool.num_free / pool.num_blocks,
        )
        self.total(
            "preemptions",
            "Requests whose blocks were taken away for another one.",
            lambda: scheduler.num_preemptions,
        )
        self.total(
            "prefix_cache_query_tokens",
            "Prompt tokens that were looked up in the prefix cache.",
            lambda: scheduler.num_queried_tokens,
        )
        self.total(
            "prefix_cache_hit_tokens",
            "Prompt tokens that were found in the prefix cache.",
            lambda: scheduler.num_hit_tokens,
        )

    def _watch_adapters(self, scheduler: Scheduler, adapters: LoraRegistry) -> None:
        self._adapter_requests = self.counter(
            "adapter_requests", "Requests that came for a LoRA adapter.", "adapter"
        )
        self.gauge(
            "adapters_loaded",
            "LoRA adapters in memory, those included that only wait for their last requests.",
            lambda: len(adapters.names) + adapters.num_retired,
        )
        self.collect(
            "adapters_in_use",
            AdaptersInUse(f"{self._prefix}adapters_in_use", scheduler, adapters),
        )

    def count_adapter(self, name: str) -> None:
        """Count a request for an adapter."""
        self._adapter_requests.labels(name).inc()

    def forget_adapter(self, name: str) -> None:
        """Drop the count of an adapter that was unloaded, so that counts do not pile up."""
        with suppress(KeyError):  # it had no requests
            self._adapter_requests.remove(name)

    def observe_step(self, chunks: Sequence[Chunk], num_tokens: int, seconds: float) -> None:
        """Observe a step that computed these chunks, with `num_tokens` tokens in all."""
        num_prefills = sum(chunk.begin < chunk.request.num_prompt_tokens for chunk in chunks)
        phase = (
            "mixed" if 0 < num_prefills < len(chunks) else "prefill" if num_prefills else "decode"
        )
        self._seconds_of[phase].observe(seconds)
        self.step_tokens.observe(num_tokens)


class AdaptersInUse(Collector):
    """The time of the scrape, with the names of the adapters in use as labels.

    There is one series at any time, but its labels change.
    """

    def __init__(self, name: str, scheduler: Scheduler, adapters: LoraRegistry) -> None:
        self._name = name
        self._scheduler = scheduler
        self._adapters = adapters

    def collect(self) -> Iterator[Metric]:
        text = (
            "Seconds since 1970, labelled with the LoRA adapters of running and waiting requests."
        )
        family = GaugeMetricFamily(self._name, text, labels=("running", "waiting", "most"))
        running = names_of(list(self._scheduler.running))
        waiting = names_of(list(self._scheduler.waiting))
        family.add_metric((running, waiting, str(self._adapters.max_loras)), time.time())
        yield family


def names_of(requests: Iterable[Request]) -> str:
    """Return the names of the adapters of some requests, separated by commas."""
    return ",".join(sorted({request.adapter.name for request in requests if request.adapter}))

"""The traces of a running system, as a collector gets them."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.collector import Collector, Received, collecting
from tests.preprocess.cases import encoded, noise
from tests.system.running import GOLDEN, Running, ask_about, until

pytestmark = pytest.mark.system
ENCODE_SECONDS = 1.5
"""Longer than it takes until a replica's load is known."""
ARGUMENTS = (
    "--model",
    str(GOLDEN / "a_image" / "checkpoint"),
    "--dtype",
    "float32",
    "--vision",
    "2",
    "--simulate-vision-ms",
    str(1000 * ENCODE_SECONDS),
)
CLIENT_SPAN = "c" * 16
NUM_TOKENS = 4
STAGES = ("preprocess", "llm", "detokenizer")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def system(collector: Collector) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with Running(*ARGUMENTS, "--otlp-traces-endpoint", collector.endpoint) as running:
            yield running


def ask(system: Running, trace_id: str, *seeds: int) -> tuple[int, Any]:
    """Ask about pictures, as a client that records the request."""
    [message] = ask_about(encoded(noise(56, 56, seeds[0])))
    for seed in seeds[1:]:
        message["content"].insert(0, ask_about(encoded(noise(56, 56, seed)))[0]["content"][0])
    traceparent = f"00-{trace_id}-{CLIENT_SPAN}-01"
    body = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return system.chat([message], {"traceparent": traceparent}, **body)


def names_of(spans: list[Received], parent: Received) -> list[str]:
    return [span.name for span in spans if span.parent_id == parent.span_id]


def test_a_request_is_one_trace_with_every_hop_and_each_image(
    system: Running, collector: Collector
) -> None:
    trace_id = "a" * 32
    status, answer = ask(system, trace_id, 1, 2)
    assert status == 200, answer
    items = ("dispatch image", "vision image", "encode", "prepare image")
    root = f"chat {system.model}"
    spans = collector.wait_for(trace_id, root, *STAGES, *items, *items)
    by_name = {span.name: span for span in spans}
    assert by_name[root].parent_id == CLIENT_SPAN
    assert names_of(spans, by_name[root]) == ["attempt"]
    assert sorted(names_of(spans, by_name["attempt"])) == [
        "detokenizer",
        "dispatch image",
        "dispatch image",
        "llm",
        "preprocess",
    ]
    assert names_of(spans, by_name["preprocess"]) == ["prepare image"] * 2
    assert names_of(spans, by_name["llm"]) == ["queue", "prefill", "decode"]
    assert {span.service for span in spans} == {
        f"twinlens-{role}" for role in ("gateway", "preprocess", "vision", "llm", "detokenizer")
    }
    assert not any(span.error for span in spans)
    for name in ("dispatch image", "vision image", "prepare image"):
        of_items = [span for span in spans if span.name == name]
        assert sorted(span.attributes["twinlens.item.index"] for span in of_items) == [0, 1]
    for encode in (span for span in spans if span.name == "encode"):
        assert encode.ended - encode.began >= ENCODE_SECONDS * 1e9
    usage = answer["usage"]
    assert by_name[root].attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert by_name[root].attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert system.logged(event="answered", trace_id=trace_id)


def test_an_image_whose_replica_dies_shows_both_tries(
    system: Running, collector: Collector
) -> None:
    trace_id = "b" * 32
    system.await_idle()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, system, trace_id, 3)
        [victim] = until(
            lambda: [m for m in system.members("vision") if m.in_flight], "an image is in hand"
        )
        os.kill(victim.pid, signal.SIGKILL)
        assert asked.result()[0] == 200
    spans = collector.wait_for(
        trace_id, f"chat {system.model}", "dispatch image", "dispatch image", "vision image"
    )
    lost, done = [span for span in spans if span.name == "dispatch image"]
    assert lost.error.startswith("the vision replica was lost")
    assert lost.attributes["twinlens.vision"] == victim.id
    assert not done.error
    assert done.attributes["twinlens.vision"] != victim.id
    assert names_of(spans, lost) == []
    assert names_of(spans, done) == ["vision image"]

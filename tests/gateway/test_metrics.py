"""What the gateway observes of requests, and of the language groups behind it."""

import pytest

from common.events import PeerDown, PeerUp, Received
from common.messages import LlmLoad, Usage
from services.gateway import metrics as module
from services.gateway.generation import Ended, GenerationRequest, Piece
from services.gateway.metrics import MeasuredRequest, Metrics
from services.gateway.peers import Peers
from tests.gateway.builders import Gateway

TIMINGS = {
    "preprocess_seconds": 0.01,
    "queue_seconds": 0.02,
    "prefill_seconds": 0.03,
    "decode_seconds": 0.04,
    "images": [
        {"queue_seconds": 0.1, "encode_seconds": 0.2},
        {"queue_seconds": 0.3, "encode_seconds": 0.4, "cached": True},
    ],
}


class Clock:
    """Replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def observed(metrics: Metrics, clock: Clock) -> MeasuredRequest:
    request = GenerationRequest(request_id="r", prompt_kind="messages", prompt=b"")
    return metrics.begin(request, clock.now)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"twinlens_gateway_{name}", labels)


def test_the_times_of_tokens(metrics: Metrics, observed: MeasuredRequest, clock: Clock) -> None:
    for seconds, offset, ids in ((0.5, 0, [1]), (0.5, 1, []), (0.25, 1, [2, 3]), (0.75, 3, [4])):
        clock.now += seconds
        observed.on_event(Piece(offset, ids, "", []))
    clock.now += 1
    observed.on_end("stop", None)
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "inter_token_latency_seconds_sum") == 0.75 / 2 + 0.75
    assert value(metrics, "time_per_output_token_seconds_sum") == 1.5 / 3
    assert value(metrics, "request_seconds_sum") == 3.0


def test_an_answer_of_one_token_has_no_time_per_output_token(
    metrics: Metrics, observed: MeasuredRequest
) -> None:
    observed.on_event(Piece(0, [1], "", []))
    observed.on_end("length", None)
    assert value(metrics, "time_per_output_token_seconds_count") == 0


def test_the_times_of_stages_are_those_of_the_answer(
    metrics: Metrics, observed: MeasuredRequest
) -> None:
    observed.on_event(Ended("stop", Usage(), TIMINGS))
    sums = {
        stage: value(metrics, "stage_seconds_sum", stage=stage)
        for stage in ("preprocess", "llm_queue", "llm_prefill", "llm_decode")
    }
    assert sums == {
        "preprocess": 0.01,
        "llm_queue": 0.02,
        "llm_prefill": 0.03,
        "llm_decode": 0.04,
    }
    assert value(metrics, "stage_seconds_sum", stage="vision_queue") == pytest.approx(0.4)
    assert value(metrics, "stage_seconds_sum", stage="vision_encode") == pytest.approx(0.6)
    assert value(metrics, "stage_seconds_count", stage="vision_encode") == 2


def test_tokens_and_items_are_counted_by_whether_a_cache_had_them(
    metrics: Metrics, observed: MeasuredRequest
) -> None:
    observed.on_event(Ended("stop", Usage(prompt_tokens=9, cached_tokens=2), TIMINGS))
    for source, num_tokens in (("computed", 7), ("cached", 2)):
        assert value(metrics, "prompt_tokens_total", source=source) == num_tokens
        assert value(metrics, "items_total", source=source) == 1


def test_requests_are_in_flight_until_their_end(
    metrics: Metrics, observed: MeasuredRequest
) -> None:
    assert value(metrics, "requests_in_flight") == 1
    observed.on_end("aborted", None)
    assert value(metrics, "requests_in_flight") == 0
    assert value(metrics, "requests_total", outcome="aborted") == 1


def test_the_use_of_the_kv_cache_is_the_mean_of_the_connected_groups() -> None:
    peers = Peers()
    assert peers.kv_cache_usage() == 0
    for name, free in (("llm-1", 25), ("llm-2", 75), ("gone", 0)):
        peers.on_llm_load(name, LlmLoad(1, 0, free, 100))
        assert peers.kv_cache_usage() == 0, "it is not connected"
    for name, free in (("llm-1", 25), ("llm-2", 75)):
        peers.links = Gateway().core.links
        peers.on_peer_up(PeerUp(name, "llm"))
        peers.on_llm_load(name, LlmLoad(1, 0, free, 100))
    assert peers.kv_cache_usage() == 0.5
    peers.on_peer_up(PeerUp("preprocess-1", "preprocess"))
    peers.on_llm_load("preprocess-1", LlmLoad(1, 0, 0, 100))
    assert peers.kv_cache_usage() == 0.5, "it is not a group"
    peers.on_peer_down(PeerDown("llm-1", "llm", "gone"))
    assert peers.kv_cache_usage() == 0.25


@pytest.mark.parametrize("load", [LlmLoad(0, 0, 0), LlmLoad(0, 0, 2**40, 1)])
def test_a_report_that_makes_no_sense_is_no_use(load: LlmLoad) -> None:
    peers = Peers()
    peers.links = Gateway().core.links
    peers.on_peer_up(PeerUp("llm-1", "llm"))
    peers.on_llm_load("llm-1", load)
    assert peers.kv_cache_usage() == 0


def test_the_core_takes_the_load_of_a_group_and_knows_the_delay() -> None:
    core = Gateway().core
    [llm] = core.peers.connected("llm")
    core.on_event(Received(llm, "llm", LlmLoad(1, 0, 25, 100)))
    assert value(core.metrics, "llm_kv_cache_usage_ratio") == 0.75
    assert core.expected_delay() == 0
    core._num_waiting = 3
    core._admission.pace.on_served(0.0, num_waiting=1)
    core._admission.pace.on_served(10.0, num_waiting=1)
    assert core.expected_delay() == 30.0

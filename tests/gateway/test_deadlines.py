"""The error of a missed deadline names the stage, and metrics count refusals and attempts."""

from typing import Any

import pytest

from common.errors import DeadlineExceeded, Exhausted, ServingError, Unavailable
from common.messages import HandedOver, Stopping
from services.gateway.metrics import MeasuredCore
from tests.gateway.builders import Gateway, delta, error_of, request, rest, routed

ENCODED = HandedOver(request_id="r", attempt=0)


@pytest.mark.parametrize(
    ("images", "received", "stage"),
    [
        ((), [], "preprocess"),
        ((), [routed()], "llm"),
        ((b"png",), [routed()], "vision"),
        ((b"png",), [routed(), ENCODED], "llm"),
        ((b"png",), [routed(), delta(0, [10], "a")], "llm"),
    ],
)
async def test_a_deadline_that_passes_names_the_stage(
    images: tuple[bytes, ...], received: list[Any], stage: str
) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(images=images, timeout=0.01)) as events:
        for message in received:
            message.request_id = "r"
        gateway.on_event(*received)
        error = await error_of(events)
    assert (
        isinstance(error, DeadlineExceeded)
        and error.stage == stage
        and f"the {stage}" in error.message
    )
    assert gateway.is_idle


async def test_a_request_ends_at_its_deadline_even_if_nobody_reads_its_events() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(timeout=0.01)) as events:
        gateway.on_event(routed(), delta(0, [10], "a"))
        await gateway.core.idle.wait()
        assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]
        gateway.on_event(delta(1, [11], "too late", "stop"))
        assert isinstance(await error_of(events), DeadlineExceeded)


def metric(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.core.metrics.registry.get_sample_value(f"twinlens_gateway_{name}", labels) or 0.0


async def refusal(gateway: Gateway, **fields: Any) -> ServingError:
    with pytest.raises(ServingError) as refused:
        async with MeasuredCore(gateway.core, gateway.core.metrics).generate(
            request("new", **fields)
        ):
            pass
    return refused.value


async def test_refusals_are_counted_by_cause() -> None:
    gateway = Gateway(max_waiting=1)
    gateway.core._admission.pace.on_served(0.0, num_waiting=1)
    gateway.core._admission.pace.on_served(10.0, num_waiting=1)
    async with gateway.core.generate(request()):
        assert isinstance(await refusal(gateway), Exhausted)
        gateway.core._admission._max_waiting = 2
        assert isinstance(await refusal(gateway, timeout=5.0), Exhausted)
        await gateway.core.stop(grace=0)
        assert isinstance(await refusal(gateway), Unavailable)
    assert isinstance(await refusal(Gateway(replicas=0)), Unavailable)
    for reason in ("too_many_waiting", "deadline_unreachable", "stopping"):
        assert metric(gateway, "rejections_total", reason=reason) == 1, reason


async def test_a_refused_client_is_told_to_wait_for_the_running_request() -> None:
    """The pace is not known before a second request was served."""
    gateway = Gateway(max_waiting=1)
    running = request("a", stopping=Stopping(max_tokens=11), timeout=100.0)
    async with gateway.core.generate(running):
        gateway.on_event(routed("a"), delta(0, [10], "a", request_id="a"))
        gateway.on_event(delta(1, [11], "b", request_id="a"))
        [record] = gateway.core._records.values()
        assert record.first_token is not None
        record.first_token -= 2.0
        async with gateway.core.generate(request("b")):
            refused = await refusal(gateway)
            assert refused.retry_after is not None and 18 <= refused.retry_after < 30
            record.timeout = 1.0
            refused = await refusal(gateway)
            assert refused.retry_after == 1.0, "it cannot run beyond its deadline"


async def test_attempts_failovers_and_waiting_requests_are_counted() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request("a")) as a, gateway.core.generate(request("b")):
        assert (metric(gateway, "requests_waiting"), gateway.core.load()) == (2, (0, 2))
        gateway.on_event(routed("a"), delta(0, [10], "a", request_id="a"))
        assert (metric(gateway, "requests_waiting"), gateway.core.load()) == (1, (1, 1))
        gateway.lose("llm")
        assert (metric(gateway, "requests_waiting"), metric(gateway, "attempts_total")) == (1, 2), (
            "it has its first token"
        )
        gateway.regain("llm", 2)
        assert (
            metric(gateway, "attempts_total"),
            metric(gateway, "failovers_total", stage="llm"),
        ) == (3, 1)
        gateway.on_event(
            routed("a", "llm-2", attempt=1), delta(1, [11], "b", "stop", "a", attempt=1)
        )
        await rest(a)
    assert (metric(gateway, "requests_waiting"), gateway.core.load()) == (0, (0, 0))

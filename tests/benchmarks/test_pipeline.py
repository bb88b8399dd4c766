"""The arithmetic of the pipeline benchmark, with made-up measurements."""

import os

import pytest

from benchmarks.picture_load import IMAGES_A_REQUEST, Measured, make_requests, pictures
from benchmarks.pipeline import cpu, gain, latency
from benchmarks.processes import Cpu, cpu_of, resident_bytes
from proto.twinlens.inference.v1 import inference_pb2


def test_the_rate_leaves_out_the_first_answers() -> None:
    measured = Measured(ends=[5.0, 6.0, 6.5, 7.0, 7.5, 8.0])
    assert measured.images_a_second(skip=2) == pytest.approx(IMAGES_A_REQUEST * 4 / 2)


def test_no_two_pictures_are_alike() -> None:
    files = [image.data for request in make_requests(1, 4) for image in request.images]
    assert len(files) == len(set(files)) == 4 * IMAGES_A_REQUEST
    assert next(pictures(2)) not in files


def answered(encode: float, queue: float, total_queue: float) -> inference_pb2.Timings:
    images = [
        inference_pb2.ImageTimings(encode_seconds=encode, queue_seconds=queue)
    ] * IMAGES_A_REQUEST
    return inference_pb2.Timings(
        preprocess_seconds=0.02, images=images, queue_seconds=total_queue, prefill_seconds=0.01
    )


def test_latency_is_the_time_added_to_the_ideal() -> None:
    alone = Measured(seconds=[0.16] * 3, timings=[answered(0.101, 0.004, 0.12)] * 3)
    found = latency(alone, replicas=8)
    assert found == {
        "added": 60.0,
        "preprocess": 20.0,
        "encode": 1.0,
        "prefill": 10.0,
        "other hops": 10.0,
        "to vision": 4.0,
    }
    assert (
        latency(Measured(seconds=[0.46], timings=[answered(0.1, 0.2, 0.4)]), replicas=2)["added"]
        == 60.0
    )


def test_cpu_is_counted_by_role_and_image() -> None:
    before = Cpu({1: 1.0, 2: 1.0, 3: 0.0}, busy=10.0, idle=10.0)
    after = Cpu({1: 1.2, 2: 1.1, 3: 0.4}, busy=11.5, idle=10.5)
    found = cpu(before, after, {1: "vision", 2: "vision"}, images=100)
    assert found["cpu_ms"] == {"vision": 3.0, "client": 4.0}
    assert found["cpu_ms_services"] == 3.0
    assert found["busy_share"] == 0.75
    assert found["foreign_share"] == pytest.approx((1.5 - 0.7) / 2.0)


def test_the_gain_of_the_pool_is_known_if_both_ends_were_measured() -> None:
    rows = [{"replicas": n, "images_a_second": rate} for n, rate in ((1, 10.0), (4, 39.0))]
    assert gain(rows) == 3.9
    assert gain(rows[:1]) is None


def test_the_use_of_this_process_is_measured() -> None:
    before = cpu_of([os.getpid()])
    while cpu_of([os.getpid()]).by_pid[os.getpid()] < before.by_pid[os.getpid()] + 0.05:
        sum(range(10**5))
    assert cpu_of([2**22 + 1]).by_pid == {2**22 + 1: 0.0}
    assert resident_bytes([os.getpid()]) > 2**20

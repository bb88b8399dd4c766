"""The whole system under Docker Compose is scaled, crashed and cut off under load."""

from collections.abc import Iterator

import pytest

from tests.deploy.composed import PROJECT, Composed, crash, docker, inspect, under_load
from tests.system.running import RECEIPT, ROOT, ask_about, text_of, until

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("images"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def system(images: float) -> Iterator[Composed]:
    with Composed() as system:
        yield system
    assert (
        docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}")
        == ""
    )
    assert (
        docker(
            "network", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}"
        )
        == ""
    )


def test_the_sample_is_read_through_the_published_port(system: Composed) -> None:
    status, answer = system.chat(ask_about(RECEIPT), max_tokens=512)
    assert status == 200
    assert (
        text_of(answer).split()[:3] == (ROOT / "examples" / "receipt.txt").read_text().split()[:3]
    )


def test_only_the_gateway_is_reached_from_outside_and_on_loopback(system: Composed) -> None:
    published = {}
    for container in system.containers():
        bound = inspect(container, ".NetworkSettings.Ports")
        published[inspect(container, ".Config.Labels")["com.docker.compose.service"]] = {
            port: [binding["HostIp"] for binding in bindings]
            for port, bindings in bound.items()
            if bindings
        }
    assert published.pop("gateway") == {"8000/tcp": ["127.0.0.1"], "50051/tcp": ["127.0.0.1"]}
    assert not any(published.values())


def test_every_container_is_healthy_by_its_own_probe(system: Composed) -> None:
    for container in system.containers():
        until(
            lambda: inspect(container, ".State.Health.Status") == "healthy",  # noqa: B023
            f"{container} is healthy",
        )


def test_scaling_up_and_down_under_load_fails_no_request(system: Composed) -> None:
    with under_load(system) as load:
        system.scale(vision=3, preprocess=2)
        load.more(40)
        system.scale(vision=1, preprocess=1)
        load.more()
        assert [len(system.containers(role)) for role in ("vision", "preprocess")] == [1, 1]


@pytest.mark.parametrize("role", ["vision", "preprocess", "detokenizer", "llm", "controller"])
def test_a_crashed_container_comes_back_and_its_requests_go_on(role: str, system: Composed) -> None:
    (container,) = system.containers(role)
    with under_load(system) as load:
        crash(container)
        load.more()
    until(lambda: system.states(role) == ["ready"], f"{role} is ready again")


def test_a_vision_replica_that_is_cut_off_mid_encode_fails_no_request(system: Composed) -> None:
    network = f"{PROJECT}_twinlens"
    with under_load(system) as load:
        system.scale(vision=2)
        busy = until(
            lambda: next((m for m in system.members("vision") if m.in_flight), None),
            "a replica encodes",
        )
        docker("network", "disconnect", network, busy.host)
        load.more()
        docker("network", "connect", network, busy.host)
        until(
            lambda: system.states("vision") == ["ready"] * 2, "the replica that was cut off is back"
        )
        load.more()
        system.scale(vision=1)


def test_a_missing_model_directory_is_refused(system: Composed) -> None:
    system.environment["TWINLENS_MODEL"] = "/no/such/model"
    try:
        with pytest.raises(AssertionError, match="/no/such/model"):
            system.compose("run", "--rm", "--no-deps", "detokenizer")
    finally:
        del system.environment["TWINLENS_MODEL"]

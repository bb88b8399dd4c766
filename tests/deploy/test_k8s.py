"""The CPU overlay on a real cluster: nothing that an operator does under load fails a request."""

from collections.abc import Iterator

import pytest

from tests.deploy.cluster import Cluster, deployed
from tests.system.running import RECEIPT, ROOT
from tests.system.test_first_use import error_rate

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(900)]
CLIENTS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with deployed("cpu") as running:
        yield running


def assert_nothing_failed(outcomes: dict[str, int]) -> None:
    print(outcomes)
    assert set(outcomes) == {"answered"}


def test_the_sample_is_read_through_the_service(cluster: Cluster) -> None:
    assert (
        error_rate(cluster.ask(RECEIPT), (ROOT / "examples" / "receipt.txt").read_text().strip())
        < 0.25
    )


def test_vision_is_scaled_under_load(cluster: Cluster) -> None:
    with cluster.load(CLIENTS) as outcomes:
        cluster.scale("deployment/vision", 4)
        cluster.scale("deployment/vision", 1)
    assert_nothing_failed(outcomes)


def test_a_vision_pod_is_lost_under_load(cluster: Cluster) -> None:
    cluster.scale("deployment/vision", 2)
    with cluster.load(CLIENTS) as outcomes:
        cluster.kubectl("delete", "pod", cluster.pods("vision")[0], "--grace-period=0", "--force")
        cluster.roll_out("deployment/vision")
    assert_nothing_failed(outcomes)
    cluster.scale("deployment/vision", 1)


@pytest.mark.parametrize("role", ["vision", "preprocess", "detokenizer", "gateway", "controller"])
def test_a_deployment_is_updated_under_load(cluster: Cluster, role: str) -> None:
    before = cluster.pods(role)
    with cluster.load(CLIENTS) as outcomes:
        cluster.restart(f"deployment/{role}")
    assert_nothing_failed(outcomes)
    assert not set(before) & set(cluster.pods(role))


def test_the_only_language_group_is_updated_under_load(cluster: Cluster) -> None:
    """Requests wait until it is back."""
    with cluster.load(CLIENTS) as outcomes:
        cluster.restart("statefulset/llm")
    assert_nothing_failed(outcomes)


def test_a_group_of_two_pods_meets_and_answers(cluster: Cluster) -> None:
    whole = cluster.ask(RECEIPT)
    cluster.kubectl("set", "env", "statefulset/llm", "TWINLENS_TP=2")
    cluster.scale("statefulset/llm", 2)
    cluster.roll_out("deployment/gateway")
    assert error_rate(cluster.ask(RECEIPT), whole) < 0.05

"""Bodies that are held before admission share one budget, and no client takes all of it."""

import pytest

from common.errors import Exhausted
from services.gateway.body_budget import BodyBudget, client_of
from services.gateway.limits import SMALL_BODY_BYTES

MIB = 2**20


def test_one_client_gets_half_and_the_next_half_of_the_rest() -> None:
    budget = BodyBudget(256 * MIB)
    first = [budget.reserve("10.0.0.1", 64 * MIB) for _ in range(2)]
    with pytest.raises(Exhausted):
        budget.reserve("10.0.0.1", MIB)
    second = budget.reserve("10.0.0.2", 64 * MIB)
    with pytest.raises(Exhausted):
        budget.reserve("10.0.0.2", MIB)
    for reservation in [*first, second]:
        reservation.release()
    assert budget.num_held == 0
    budget.reserve("10.0.0.2", 128 * MIB)


def test_small_bodies_always_fit() -> None:
    budget = BodyBudget(0)
    small = [budget.reserve("10.0.0.1", SMALL_BODY_BYTES) for _ in range(1000)]
    assert budget.num_held == 0
    with pytest.raises(Exhausted):
        small[0].grow(1)
    for reservation in small:
        reservation.release()
    assert budget.num_held == 0


def test_a_body_of_unknown_length_is_counted_as_it_grows() -> None:
    budget = BodyBudget(4 * MIB)
    with budget.reserve("10.0.0.1", 0) as body:
        body.grow(SMALL_BODY_BYTES)
        body.grow(MIB - SMALL_BODY_BYTES)
        assert budget.num_held == MIB
        body.grow(MIB)
        with pytest.raises(Exhausted):
            body.grow(1)
        assert budget.num_held == 2 * MIB
    body.release()
    assert budget.num_held == 0


def test_a_refusal_leaves_nothing_behind() -> None:
    budget = BodyBudget(MIB)
    for n in range(100):
        with pytest.raises(Exhausted):
            budget.reserve(f"10.0.0.{n}", MIB)
    assert not budget._shares._held


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_network_is_one_client(address: str, client: str) -> None:
    assert client_of(address) == client

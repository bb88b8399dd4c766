"""A member on another host must advertise an address at which the others reach it."""

from pathlib import Path

import pytest

from tests.system.hosts import Host, two_hosts
from tests.system.running import until

pytestmark = pytest.mark.system
SIMULATED = "--simulate-vision-ms=1"


def ready_addresses(host: Host) -> list[str]:
    """Return the addresses of the vision replicas that are ready."""
    return [m["address"] for m in host.members() if m["role"] == "vision" and m["state"] == "ready"]


def test_a_member_that_the_others_could_not_reach_is_refused_with_the_flags_to_set(
    tmp_path: Path,
) -> None:
    with two_hosts(tmp_path) as (here, there):
        here.start("controller", here, f"--control-listen={here.address}:50050")
        here.start("gateway", here, f"--host={here.address}", "--drain-delay=0")
        refused = there.start(
            "vision", here, "--listen=tcp://127.0.0.1:*", "--advertise=", SIMULATED
        )
        assert refused.wait(60) == 2
        said = "".join(log.read_text() for log in tmp_path.glob("vision-*.log"))
        assert (
            "tcp://127.0.0.1:" in said
            and "--listen tcp://0.0.0.0:5555 --advertise HOSTNAME" in said
        )

        there.start("vision", here, SIMULATED)
        # On its controller's host, the loopback address will do.
        here.start("vision", here, "--listen=tcp://127.0.0.1:*", "--advertise=", SIMULATED)

        until(lambda: len(ready_addresses(here)) == 2, "both are ready")
        assert sorted(address.split(":")[1] for address in ready_addresses(here)) == [
            f"//{there.address}",
            "//127.0.0.1",
        ]

        # It would have to reach both replicas, and cannot reach the one at the loopback address.
        refused = there.start("preprocess", here)
        assert refused.wait(60) == 2
        said = "".join(log.read_text() for log in tmp_path.glob("preprocess-*.log"))
        assert "start the vision with an address" in said

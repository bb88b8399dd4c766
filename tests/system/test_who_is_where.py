"""A member on another host must say by which address the others reach it."""

from pathlib import Path

import pytest

from tests.system.hosts import two_hosts
from tests.system.running import until

pytestmark = pytest.mark.system
SIMULATED = "--simulate-vision-ms=1"


def test_a_member_that_the_others_could_not_reach_is_refused_and_told_what_to_set(
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
        # Beside its controller it may.
        here.start("vision", here, "--listen=tcp://127.0.0.1:*", "--advertise=", SIMULATED)

        def ready():
            return [
                m["address"]
                for m in here.members()
                if m["role"] == "vision" and m["state"] == "ready"
            ]

        until(lambda: len(ready()) == 2, "both are ready")
        assert sorted(address.split(":")[1] for address in ready()) == [
            f"//{there.address}",
            "//127.0.0.1",
        ]

        # It would have to talk to both of them.
        refused = there.start("preprocess", here)
        assert refused.wait(60) == 2
        said = "".join(log.read_text() for log in tmp_path.glob("preprocess-*.log"))
        assert "start the vision with an address" in said

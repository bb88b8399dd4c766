"""What clients share, such that what one client takes never refuses another."""

from collections import Counter

from common.errors import Exhausted


class Shares:
    """How much of a total each client holds. One gets at most half of what the others leave.

    So one client alone never takes more than half, and there is always room for the next one.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.num_held = 0
        """How much all clients hold together."""
        self._held = Counter[str]()

    def wanted_and_share(self, client: str, amount: int) -> tuple[int, int]:
        """Return what the client would hold with this much more, and what it may hold."""
        held = self._held[client]
        return held + amount, (self.total - (self.num_held - held)) // 2

    def add(self, client: str, amount: int) -> None:
        """Count this much more for the client."""
        self._held[client] += amount
        self.num_held += amount

    def remove(self, client: str, amount: int) -> None:
        """Count this much less for the client."""
        self._held[client] -= amount
        self.num_held -= amount
        if not self._held[client]:
            del self._held[client]


class FairShare:
    """A number of slots that clients share. Each one gets at least one while any is free."""

    def __init__(self, total: int, reason: str) -> None:
        """Create the slots. `reason` is what a client is told that gets none."""
        self._shares = Shares(total)
        self._reason = reason

    def take(self, client: str) -> None:
        """Take a slot for the client, or raise Exhausted."""
        shares = self._shares
        wanted, share = shares.wanted_and_share(client, 1)
        if wanted > max(1, share) or shares.num_held >= shares.total:
            raise Exhausted(self._reason, "gateway", retry_after=1.0, cause="too_many_calls")
        shares.add(client, 1)

    def put_back(self, client: str) -> None:
        self._shares.remove(client, 1)

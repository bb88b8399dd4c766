"""The LoRA adapters of a language group, as rank 0 knows them. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.messages import Adapter


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """An adapter that every rank has loaded."""

    number: int
    """What step plans call it: 1 or more, and never given again."""
    name: str
    path: str
    """Its directory, as it was given."""
    identity: bytes
    """Hash of its files: adapters with equal hashes compute the same."""


class LoraRegistry:
    """Which adapter a name means, and which adapters only wait for their last requests to end."""

    def __init__(self, residents: Iterable[Resident] = (), max_loras: int = 0) -> None:
        self.max_loras = max_loras
        """The most adapters that may have a name at once."""
        self._named = {resident.name: resident for resident in residents}
        self._retired: list[Resident] = []
        self._last_number = max((r.number for r in self._named.values()), default=0)

    def find(self, name: str) -> Resident | None:
        """Return the adapter of this name that new requests get; None if there is none."""
        return self._named.get(name)

    @property
    def names(self) -> set[str]:
        return set(self._named)

    @property
    def num_retired(self) -> int:
        """The adapters that no new request gets, and that are still loaded."""
        return len(self._retired)

    def listed(self) -> tuple[Adapter, ...]:
        """Return the adapters that requests may choose, as peers learn of them."""
        return tuple(Adapter(r.name, r.path) for r in self._named.values())

    def next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def add(self, resident: Resident) -> None:
        """Give new requests this adapter, in place of the one that had the name."""
        self.retire(resident.name)
        self._named[resident.name] = resident

    def retire(self, name: str) -> bool:
        """Give no new request the adapter of this name. Returns whether there was one."""
        if resident := self._named.pop(name, None):
            self._retired.append(resident)
        return resident is not None

    def take_unused(self, used: Iterable[Resident | None]) -> list[Resident]:
        """Forget the retired adapters that are not among the used ones, and return them."""
        if not self._retired:
            return []
        numbers = {resident.number for resident in used if resident}
        unused = [resident for resident in self._retired if resident.number not in numbers]
        self._retired = [resident for resident in self._retired if resident.number in numbers]
        return unused

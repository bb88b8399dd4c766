"""The blocks of the paged KV cache: who holds them, and which computed tokens they can be found by.
Imports no torch."""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Block numbers 0..num_blocks-1.

        free  --allocate-->  held by one, its writer  --name-->  held by any number, read-only
         ^                       |                                      |
         +-------- free ---------+            free, still named  <------+  free
         +------------------- allocate (forgets the name) <-+  |
                                                               +-- share: held again

    Only a full block whose tokens are computed is named, so that what is found by its name never
    changes. Unnamed free blocks are handed out first, then named ones, least recently freed first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, the named ones among them."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Blocks for one request alone, to be written."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.forget(blocks)
        self._hold(blocks)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more request holds these, which were found by their names."""
        for block in blocks:
            assert block in self._names, f"block {block} may still be written"
            self._free.pop(block, None)
        self._hold(blocks)

    def free(self, blocks: Iterable[int]) -> None:
        """One request less holds these, which are in its order: of a prefix, the end is forgotten
        first."""
        for block in reversed(list(blocks)):
            assert self._num_holders[block] > 0, f"block {block} was freed twice"
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._names)

    def name(self, block: int, name: bytes) -> None:
        """The block is full and computed. Where another has the name already, this one stays its
        holder's alone."""
        assert self._num_holders[block] == 1 and block not in self._names
        if name not in self._by_name:
            self._by_name[name] = block
            self._names[block] = name

    def find(self, name: bytes) -> int | None:
        return self._by_name.get(name)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds these by their names any more; who holds them keeps them."""
        for block in blocks:
            if name := self._names.pop(block, None):
                del self._by_name[name]

    def _hold(self, blocks: list[int]) -> None:
        for block in blocks:
            self._num_holders[block] += 1

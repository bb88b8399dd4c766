"""The blocks of the paged KV cache: who holds them, and by which names they are found.

Imports no torch.
"""

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
        """The number of blocks that nobody holds, including named ones."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Return blocks that one request alone holds and may write."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.forget(blocks)
        self._hold(blocks)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Let one more request hold these blocks, which were found by their names."""
        for block in blocks:
            assert block in self._names, f"block {block} may still be written"
            self._free.pop(block, None)
        self._hold(blocks)

    def share_held(self, blocks: list[int]) -> None:
        """Let one more request hold these full blocks of another one, which need no names."""
        assert all(self._num_holders[block] for block in blocks)
        self._hold(blocks)

    def free(self, blocks: Iterable[int]) -> None:
        """Let one request less hold these blocks, given in the order of its tokens.

        The end of a prefix is reused before its beginning.
        """
        for block in reversed(list(blocks)):
            assert self._num_holders[block] > 0, f"block {block} was freed twice"
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._names)

    def name(self, block: int, name: bytes) -> None:
        """Name a full, computed block, so that it can be found.

        If another block has the name already, this one stays unnamed.
        """
        assert self._num_holders[block] == 1 and block not in self._names
        if name not in self._by_name:
            self._by_name[name] = block
            self._names[block] = name

    def find(self, name: bytes) -> int | None:
        return self._by_name.get(name)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the names of these blocks away. Their holders keep them."""
        for block in blocks:
            if name := self._names.pop(block, None):
                del self._by_name[name]

    def _hold(self, blocks: list[int]) -> None:
        for block in blocks:
            self._num_holders[block] += 1

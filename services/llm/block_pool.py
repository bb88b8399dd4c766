"""The blocks of the paged KV cache: which are free. Imports no torch."""


class BlockPool:
    """Hands out block numbers 0..num_blocks-1. Every block is either free or owned by exactly one request."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))
        assert self.num_free <= self.num_blocks, "a block was freed twice"

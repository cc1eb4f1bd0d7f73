"""What one replica of a model is expected to have in its prompt cache.

It is a model of the cache of another process: the least recently used blocks go first, and there is room for
``capacity`` bytes. The blocks of a prompt are touched from the last one to the first, so a block is never forgotten
before those behind it: what is here of a prompt is always its beginning, and is found by bisection.

The true capacity is seldom known, and other masters use the cache, too. Answers report how much of their prompts was
cached: less than expected makes the capacity smaller at once, and as much as expected lets it grow slowly, up to what
was declared.
"""

from __future__ import annotations

from typing import Final

from .prompt import ENDS, Prompt

__all__ = ["DEFAULT_CAPACITY", "PrefixCache"]

#: Bytes that a cache holds of which nothing was declared: about 250 000 tokens.
DEFAULT_CAPACITY: Final = 1024 * 1024
#: It is never believed to be smaller.
_SMALLEST: Final = 16 * 1024
#: The factors of the capacity when an answer reports less than was expected, and when it reports as much.
_SHRINK, _GROW = 0.75, 1.02
#: Conversations of which it is remembered that they were here.
_CONVERSATIONS: Final = 4096


class PrefixCache:
    """The blocks and conversations that a replica has read.

    Args:
        capacity: bytes of prompts that it holds, as far as anybody knows.

    Attributes:
        capacity: the present belief, in bytes.
    """

    __slots__ = ("_blocks", "_conversations", "_limit", "_size", "capacity")

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._limit = self.capacity = max(_SMALLEST, capacity)
        # By hash: the bytes of the block. Least recently used first.
        self._blocks: dict[int, int] = {}
        self._size = 0
        # By name: the bytes of its last prompt. Least recently used first.
        self._conversations: dict[str, int] = {}

    def hit(self, prompt: Prompt) -> int:
        """Return how many bytes of the beginning of a prompt are cached, as far as is known."""
        here, blocks = self._blocks, prompt.blocks
        cached = 0
        if blocks and blocks[0] in here:
            low, high = 1, len(blocks)
            while low < high:
                middle = (low + high + 1) // 2
                if blocks[middle - 1] in here:
                    low = middle
                else:
                    high = middle - 1
            cached = ENDS[low - 1]
        if prompt.conversation and prompt.conversation in self._conversations:
            # The client says that this goes on from there, even where its text does not tell (a summary, or an id).
            cached = max(cached, min(self._conversations[prompt.conversation], prompt.size))
        return cached

    def add(self, prompt: Prompt) -> None:
        """Record that the replica reads a prompt."""
        blocks = prompt.blocks
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            size = self._blocks.pop(block, 0)
            if not size:
                size = ENDS[index] - (ENDS[index - 1] if index else 0)
                self._size += size
            self._blocks[block] = size
        if prompt.conversation:
            self._conversations.pop(prompt.conversation, None)
            self._conversations[prompt.conversation] = prompt.size
            if len(self._conversations) > _CONVERSATIONS:
                del self._conversations[next(iter(self._conversations))]
        if self._size > self.capacity:
            self._evict()

    def correct(self, expected: int, reported: int) -> None:
        """Compare what was expected to be cached of a prompt with what the answer has reported, both in bytes."""
        if expected <= 0:
            return
        # A block is the least that either side can tell apart, and tokens are no exact measure of bytes.
        if reported < 0.75 * expected - ENDS[0]:
            self.capacity = max(_SMALLEST, int(min(self.capacity, self._size) * _SHRINK))
            self._evict()
        elif self.capacity < self._limit:
            self.capacity = min(self._limit, int(self.capacity * _GROW) + 1)

    def _evict(self) -> None:
        blocks = self._blocks
        while self._size > self.capacity:
            self._size -= blocks.pop(next(iter(blocks)))

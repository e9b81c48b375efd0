"""`WaitingQueue`: the order in which sequences that wait are admitted: what is cached of them decides."""

from __future__ import annotations

from attn_dispatch.cache.manager import CacheManager
from attn_dispatch.cache.sequence import Sequence

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """Sequences in order of arrival, of which the one with the longest cached prefix goes first.

    Prompts that share a prefix run one after another while it is cached, instead of evicting each other's prefixes in
    turn (RadixAttention's cache-aware scheduling, arXiv 2312.07104, section 3). None starves: one that `max_passed`
    others have overtaken goes next.

    Attributes:
        max_passed: how often a sequence is overtaken at most (0: order of arrival).
        window: only so many of the oldest are compared.
    """

    def __init__(self, manager: CacheManager, *, max_passed: int = 16, window: int = 64) -> None:
        self._manager = manager
        self.max_passed = max_passed
        self.window = window
        self._waiting: dict[Sequence, int] = {}  # how many have overtaken each

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, seq: Sequence) -> None:
        """Let a sequence wait."""
        self._waiting[seq] = 0

    def first(self) -> Sequence:
        """Return the sequence that goes next; it goes on waiting until it is removed.

        Raises:
            StopIteration: none waits.
        """
        oldest = next(iter(self._waiting))
        if self._waiting[oldest] >= self.max_passed:
            return oldest
        candidates = [seq for seq, _ in zip(self._waiting, range(self.window), strict=False)]
        return max(candidates, key=self._manager.cached_tokens)  # the oldest of those that are equal

    def remove(self, seq: Sequence) -> None:
        """Let a sequence wait no longer: it was admitted, or has ended."""
        del self._waiting[seq]
        for other, passed in self._waiting.items():
            if other.id > seq.id:
                break
            self._waiting[other] = passed + 1

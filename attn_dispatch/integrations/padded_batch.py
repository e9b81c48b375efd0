"""`PaddedBatch`: the sequences of a padded batch, row by row, in the blocks of a cache manager."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attn_dispatch.cache import CacheManager, OutOfBlocks, ScheduledStep, Sequence
from attn_dispatch.errors import CacheError

__all__ = ["PaddedBatch", "schedule"]


class PaddedBatch:
    """Rows of a batch as sequences of a manager. Their token ids are unknown, so no prefix of theirs is cached.

    Attributes:
        rows: the sequences.
    """

    def __init__(self, manager: CacheManager, *, grows: bool) -> None:
        self._manager = manager
        self._grows = grows
        self.rows: list[Sequence] = []

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.rows)

    @property
    def lens(self) -> npt.NDArray[np.int32]:
        """Tokens in the cache, i32[rows]."""
        return np.array([seq.computed for seq in self.rows], np.int32)

    def begin(self, count: int) -> None:
        """End all sequences and begin others."""
        self.clear()
        self.rows = [self._manager.begin((), cacheable=False) for _ in range(count)]

    def extend(self, new: npt.NDArray[np.int32]) -> ScheduledStep:
        """Give each sequence room for its new tokens and return the step, of those that have any.

        Raises:
            CacheError: there are too few blocks. Nothing has been changed.
        """
        requests = [seq for seq, count in zip(self.rows, new.tolist(), strict=True) if count]
        for seq, count in zip(self.rows, new.tolist(), strict=True):
            self._manager.append(seq, np.zeros(count, np.int64))
        try:
            step = schedule(self._manager, [(seq, seq.remaining) for seq in requests], grows=self._grows)
        except CacheError:
            for seq in requests:
                self._manager.truncate(seq, seq.computed)
            raise
        self._manager.commit(step)
        return step

    def truncate(self, count: int) -> None:
        """Forget the last `count` tokens of every sequence.

        Raises:
            CacheError: a sequence has fewer. Nothing has been changed.
        """
        for row, seq in enumerate(self.rows):
            if seq.computed < count:
                raise CacheError(f"sequence {row}: {count} tokens are to be removed, it has {seq.computed}")
        for seq in self.rows:
            self._manager.truncate(seq, seq.computed - count)

    def select(self, order: npt.NDArray[np.intp]) -> None:
        """Make row i what row `order[i]` was: sequences named twice share their blocks, ones not named end.

        Raises:
            CacheError: a row does not exist. Nothing has been changed.
        """
        rows = order.tolist()
        if any(not 0 <= row < self.count for row in rows):
            raise CacheError(f"rows {rows} are to be kept of a batch of {self.count} sequences")
        before, unused = self.rows, dict(enumerate(self.rows))
        self.rows = [unused.pop(row) if row in unused else self._manager.fork(before[row])[0] for row in rows]
        for seq in unused.values():
            self._manager.free(seq)

    def clear(self) -> None:
        """End all sequences."""
        for seq in self.rows:
            self._manager.free(seq)
        self.rows = []


def schedule(manager: CacheManager, requests: list[tuple[Sequence, int]], *, grows: bool) -> ScheduledStep:
    """Return the manager's next step, with more blocks if there are too few and it may have them.

    Raises:
        CacheError: it may not. Nothing has been changed.
    """
    while isinstance(step := manager.step(requests), OutOfBlocks):
        if not grows:
            raise CacheError(f"{step}, or give the cache more with num_blocks= (it has {manager.num_blocks})")
        manager.grow(manager.num_blocks + max(manager.num_blocks, step.needed))
    return step

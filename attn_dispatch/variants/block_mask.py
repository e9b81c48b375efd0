"""Which key blocks a query block attends to: patterns for `BlockSparse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attn_dispatch.contract.side import I64
from attn_dispatch.errors import SpecError

__all__ = ["BlockMask", "LocalStride", "Pattern"]

Bools = npt.NDArray[np.bool_]


class Pattern(Protocol):
    """A block mask, of any length.

    Attributes:
        num_patterns: 1 when all heads share it, else one for every key/value head (K) or every query head (H).
    """

    @property
    def num_patterns(self) -> int:
        """See above."""

    def keeps(self, query_blocks: I64, num_key_blocks: int) -> Bools:
        """Return which key blocks each query block attends to, bool[num_patterns, len(query_blocks), num_key_blocks].

        What lies above the diagonal is left out by the layer when it is causal.
        """


@dataclass(frozen=True)
class LocalStride:
    """Local blocks and vertical stripes, as Phi-3-small has them.

    Query block `i` attends to key block `j` iff `i - j < local_blocks` or `(j + offset) % vert_stride == 0`.

    Attributes:
        local_blocks: blocks up to and with the query's own.
        vert_stride: every so many blocks there is one that all attend to.
        offsets: one for all heads (1 in the original), or one per key/value or query head; see `per_head`.
    """

    local_blocks: int
    vert_stride: int
    offsets: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.local_blocks < 0 or self.vert_stride < 1 or not self.offsets:
            raise SpecError(f"{self}: local_blocks must be 0 or more, vert_stride 1 or more, and there is an offset")

    @classmethod
    def per_head(
        cls, local_blocks: int, vert_stride: int, num_heads: int, first: int = 0, count: int | None = None
    ) -> LocalStride:
        """Return a pattern whose stripes move from query head to query head, as with `homo_head=False`.

        Args:
            local_blocks: see above.
            vert_stride: see above.
            num_heads: of the whole model.
            first: the first head of this part of it (tensor parallelism).
            count: heads of this part (None: those from `first` on).

        Raises:
            SpecError: the part has heads that the model has not.
        """
        last = num_heads if count is None else first + count
        if not 0 <= first < last <= num_heads:
            raise SpecError(f"heads {first}..{last - 1} are not among the model's {num_heads}")
        step = max(1, vert_stride // num_heads)
        return cls(local_blocks, vert_stride, tuple(head * step + 1 for head in range(first, last)))

    @property
    def num_patterns(self) -> int:
        """One for every offset."""
        return len(self.offsets)

    def keeps(self, query_blocks: I64, num_key_blocks: int) -> Bools:
        """See `Pattern.keeps`."""
        key = np.arange(num_key_blocks)
        ahead = query_blocks[:, None] - key
        local = (ahead >= 0) & (ahead < self.local_blocks)
        offsets = np.array(self.offsets)[:, None]
        stripes = (key + offsets) % self.vert_stride == 0
        kept: Bools = local[None] | (stripes[:, None, :] & (ahead >= 0)[None])
        return kept


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Any mask that was computed elsewhere (a router, a top-k of block scores, a drawing).

    Attributes:
        mask: bool[num_patterns, query blocks, key blocks], or bool[query blocks, key blocks] for all heads.
    """

    mask: Bools

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        if mask.dtype != np.bool_ or mask.ndim not in (2, 3) or 0 in mask.shape:
            raise SpecError(
                f"a block mask is bool [patterns, query blocks, key blocks], found {mask.dtype} {mask.shape}"
            )
        object.__setattr__(self, "mask", mask if mask.ndim == 3 else mask[None])

    @property
    def num_patterns(self) -> int:
        """The mask's first axis."""
        return len(self.mask)

    def keeps(self, query_blocks: I64, num_key_blocks: int) -> Bools:
        """See `Pattern.keeps`.

        Raises:
            SpecError: a sequence is longer than the mask.
        """
        last = int(query_blocks.max(initial=-1))
        if last >= self.mask.shape[1] or num_key_blocks > self.mask.shape[2]:
            raise SpecError(
                f"the mask is for {self.mask.shape[1]} query and {self.mask.shape[2]} key blocks, the step has "
                f"{last + 1} and {num_key_blocks}"
            )
        kept: Bools = self.mask[:, query_blocks, :num_key_blocks]
        return kept

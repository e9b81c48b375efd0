"""Between the rectangle of columns that transformers counts in, and the sequences without padding that are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attn_dispatch.contract.side import I32
from attn_dispatch.errors import CacheError

__all__ = ["Columns", "pack", "unpack"]


class Columns:
    """The columns of a padded batch so far.

    Attributes:
        length: how many, padding included.
        plain: the last so many hold a token of every sequence.
    """

    def __init__(self) -> None:
        self.length = 0
        self.plain = 0
        self._padded = False

    def take(self, mask: Any, batch: int, length: int, held: I32) -> tuple[I32, Any]:
        """Return how many of the last `length` columns are tokens of each sequence, and which rows of the rectangle.

        Args:
            mask: bool[batch, columns], True for tokens, of all columns so far; None when nothing is padding.
            batch: sequences.
            length: new columns, counted in `self.length` already.
            held: i32[batch], tokens of the earlier columns.

        Returns:
            i32[batch], and i64[tokens] on the mask's device (None: all rows are tokens).

        Raises:
            CacheError: the mask does not fit what the earlier columns were.
        """
        if mask is None:
            if self._padded:
                raise CacheError("earlier columns were padding, but no attention_mask says which: give all of it")
            self.plain += length
            return np.full(batch, length, np.int32), None
        host = mask.to("cpu").numpy()
        if host.shape != (batch, self.length):
            raise CacheError(
                f"attention_mask is {host.shape}, but {self.length - length} columns are in the cache and {length} are "
                f"new: it has to be ({batch}, {self.length})"
            )
        recent, earlier = host[:, -length:], host[:, :-length].sum(1)
        if (earlier != held).any():
            s = int(np.argmax(earlier != held))
            raise CacheError(
                f"sequence {s}: attention_mask keeps {int(earlier[s])} of the earlier columns, the cache has "
                f"{int(held[s])}: what is in a cache cannot be masked afterwards"
            )
        self._padded = True
        if recent.all():
            self.plain += length
            return np.full(batch, length, np.int32), None
        self.plain = int(np.argmin(recent.all(0)[::-1]))  # the first from the right that is padding somewhere
        return recent.sum(1, dtype=np.int32), torch.from_numpy(np.flatnonzero(recent)).to(mask.device)

    def drop(self, count: int) -> None:
        """Forget the last columns.

        Raises:
            CacheError: there is padding among them.
        """
        if count > self.plain:
            raise CacheError(
                f"{count} columns are to be removed, but only the last {self.plain} hold a token of every sequence: "
                "padding cannot be put back"
            )
        self.length -= count
        self.plain -= count


def pack(states: Any, rows: Any) -> Any:
    """Return the tokens of [batch, heads, length, size] as [tokens, heads, size]: a view when all rows are tokens."""
    batch, heads, length, size = states.shape
    flat = states.transpose(1, 2).reshape(batch * length, heads, size)
    return flat if rows is None else flat[rows]


def unpack(out: Any, rows: Any, batch: int, length: int) -> Any:
    """Return [tokens, heads, size] as [batch, length, heads, size], zeros where there is padding."""
    if rows is not None:
        full = out.new_zeros((batch * length, *out.shape[1:]))
        full[rows] = out
        out = full
    return out.view(batch, length, *out.shape[1:])

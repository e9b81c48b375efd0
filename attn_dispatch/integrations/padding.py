"""Between the rectangle of columns that transformers counts in, and the sequences without padding that are computed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.contract.side import I32
from attn_dispatch.errors import CacheError
from attn_dispatch.integrations.masks import LayerMask

__all__ = ["Columns", "pack", "token_rows", "unpack"]


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

    def take(self, mask: LayerMask, batch: int, length: int, cached_lens: I32, device: Any) -> tuple[I32, Any]:
        """Return how many of the last `length` columns are tokens of each sequence, and which rows of the rectangle.

        Args:
            mask: of all columns so far.
            batch: sequences.
            length: new columns, counted in `self.length` already.
            cached_lens: i32[batch], tokens of the earlier columns.
            device: of the rows.

        Returns:
            i32[batch], and i64[tokens] (None: all rows are tokens).

        Raises:
            CacheError: the mask does not fit what the earlier columns were.
        """
        padding = mask.padding
        if padding is None:
            if self._padded:
                raise CacheError("earlier columns were padding, but no attention_mask says which: give all of it")
            self.plain += length
            return token_rows(None, batch, length, device)
        if padding.shape != (batch, self.length):
            raise CacheError(
                f"attention_mask is {padding.shape}, but {self.length - length} columns are in the cache and {length} "
                f"are new: it has to be ({batch}, {self.length})"
            )
        recent, earlier = padding[:, -length:], padding[:, :-length].sum(1)
        if (earlier != cached_lens).any():
            s = int(np.argmax(earlier != cached_lens))
            raise CacheError(
                f"sequence {s}: attention_mask keeps {int(earlier[s])} of the earlier columns, the cache has "
                f"{int(cached_lens[s])}: what is in a cache cannot be masked afterwards"
            )
        ends_early = padding.any(1) & ~padding[:, -1]
        if ends_early.any():
            warnings.warn(
                f"sequence {int(np.argmax(ends_early))} is padded on the right: its last row of logits is that of a "
                "padding token, and generate() goes on from there; transformers' own kernels give another one. Pad on "
                "the left",
                stacklevel=2,
            )
        self._padded = True
        if recent.all():
            self.plain += length
            return token_rows(None, batch, length, device)
        self.plain = int(np.argmin(np.flip(recent.all(axis=0))))  # the first from the right that is padding somewhere
        return token_rows(recent, batch, length, device)

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


def token_rows(padding: npt.NDArray[np.bool_] | None, batch: int, columns: int, device: Any) -> tuple[I32, Any]:
    """Return how many columns of each sequence are tokens, i32[batch], and which rows of the rectangle, i64[tokens].

    The rows are None when all are tokens.
    """
    if padding is None or padding.all():
        return np.full(batch, columns, np.int32), None
    return padding.sum(1, dtype=np.int32), torch.from_numpy(np.flatnonzero(padding)).to(device)


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

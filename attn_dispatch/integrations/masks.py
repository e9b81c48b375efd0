"""`LayerMask`: what transformers' mask for a kind of layer means, and what is derived from it in one forward.

Layers state causality and windows in their attributes and arguments, and not always truly; the mask is what
transformers' own kernels obey. `padding_mask` reads the pattern off the mask function, and the bool[batch, columns]
tensor that it returns carries it to the attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attn_dispatch.errors import ModelError

__all__ = ["LayerMask", "MaskPattern", "mask_of", "padding_mask"]

_ATTRIBUTE = "attn_dispatch_mask"
_NO_FORM = (
    "this model's mask is more than causality, a window and padding (packed sequences without a cache, image tokens "
    "that see each other, prefix language models): the contract has no form for it"
)


@dataclass(frozen=True)
class MaskPattern:
    """Which keys a query sees, padding aside.

    Attributes:
        causal: none after its own.
        window: (left, right) tokens beside its own; -1: all.
        chunk: only those in its own chunk of so many tokens (None: no chunks).
    """

    causal: bool
    window: tuple[int, int] = (-1, -1)
    chunk: int | None = None


class LayerMask:
    """The mask of one kind of layer in one forward.

    Attributes:
        pattern: padding aside; or why there is none: the error of the first layer that attends with it.
        padding: bool[batch, columns] on the host, True for tokens; None when all are tokens.
        memo: batches and plans that layers with this mask share.
    """

    def __init__(self, pattern: MaskPattern | str, padding: npt.NDArray[np.bool_] | None = None) -> None:
        self._pattern = pattern
        self.padding = padding
        self.memo: dict[Hashable, Any] = {}

    @property
    def pattern(self) -> MaskPattern:
        """Which keys a query sees, padding aside.

        Raises:
            ModelError: the mask is more than causality, a window, chunks and padding.
        """
        if isinstance(self._pattern, str):
            raise ModelError(self._pattern)
        return self._pattern

    @cached_property
    def has_gaps(self) -> bool:
        """Whether there is padding between two tokens of a sequence."""
        if self.padding is None:
            return False
        begins = np.diff(self.padding.astype(np.int8), axis=1, prepend=0) == 1
        return bool((begins.sum(1) > 1).any())

    def memoize(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, called once for each key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """Return bool[batch, columns], True for tokens; as transformers calls it.

    Models make masks that none of their layers uses: one that has no form here is refused by the first layer that does.

    Args:
        batch_size: sequences.
        q_length: columns of queries.
        kv_length: columns of keys.
        q_offset: the first query's column.
        kv_offset: the first key's column.
        mask_function: (batch, head, query, key) -> bool, padding aside.
        attention_mask: bool[batch, columns], True for tokens (None: all are).
        local_size: of windows or chunks.
        allow_is_causal_skip: causality says all that the mask says, padding and windows aside.
        allow_is_bidirectional_skip: likewise for layers that see both sides.
        device: the model's.
        kwargs: what other implementations take.
    """
    # transformers allows its own kernels to skip the mask exactly when causality (or its absence) says it all.
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        pattern: MaskPattern | str = _NO_FORM
    else:
        pattern = MaskPattern(causal=True) if mask_function is None else _pattern(mask_function, local_size)
    if attention_mask is None:
        mask, host = torch.ones(batch_size, int(kv_length), dtype=torch.bool, device=device), None
    else:
        mask = attention_mask.detach()  # another object: each kind of layer has its own pattern
        host = mask.to("cpu", copy=True).numpy()
    if isinstance(pattern, str):
        mask = mask[:, None, None]  # in case that a model makes another tensor of it: this shape is refused as well
    setattr(mask, _ATTRIBUTE, LayerMask(pattern, None if host is None or host.all() else host))
    return mask


def _pattern(mask_function: Callable[..., Any], local_size: int | None) -> MaskPattern | str:
    """Read a mask's pattern off its function, by asking it about a few queries and keys.

    Returns:
        The pattern, or a sentence when it is none of those that `MaskPattern` describes.
    """

    def sees(queries: list[int], keys: list[int]) -> list[bool]:
        zero = torch.zeros((), dtype=torch.long)
        answer = mask_function(zero, zero, torch.tensor(queries), torch.tensor(keys))
        return [bool(seen) for seen in answer.expand(len(queries)).tolist()]

    far = 1 << 30
    size = far if local_size is None else int(local_size)
    # A query's own key, the next one, those at the window's edges, and those just beyond.
    itself, ahead, back, beyond, right, right_beyond = sees([0, 0, size, size, 0, 0], [0, 1, 1, 0, size, size + 1])
    if itself and local_size is None and back and beyond and ahead == right == right_beyond:
        return MaskPattern(causal=not ahead)
    if itself and local_size is not None and not ahead and not right:
        # The previous key is always in a window, and in another chunk once in `size` tokens.
        neighbours = sees(list(range(1, size + 1)), list(range(size))) if size > 1 else [True]
        if all(neighbours) and back and not beyond:
            return MaskPattern(causal=True, window=(size - 1, 0))
        if neighbours.count(False) == 1:
            return MaskPattern(causal=True, chunk=size)
    if itself and local_size is not None and ahead and right and not right_beyond and back and beyond:
        return MaskPattern(causal=False, window=(size, size))
    return "this model's mask has a pattern that is neither causal, a window, chunks, nor none at all"


def mask_of(attention_mask: Any, module: Any, causal: bool, window: int | None) -> LayerMask:
    """Return what a layer's mask means.

    Args:
        attention_mask: from `padding_mask`; or bool[batch, columns] that the model made itself; or None.
        module: for messages.
        causal: what the layer says, for a mask without a pattern.
        window: tokens that the layer says it sees, its own included (None: all), likewise.

    Raises:
        ModelError: the mask has another form.
    """
    mask = getattr(attention_mask, _ATTRIBUTE, None)
    if isinstance(mask, LayerMask):
        return mask
    # What transformers tells the attention function counts the token itself, on either side.
    sides = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
    pattern = MaskPattern(causal, sides)
    if attention_mask is None:
        return LayerMask(pattern)
    if attention_mask.ndim != 2 or attention_mask.dtype != torch.bool:
        raise ModelError(
            f"{type(module).__name__} brings a mask of shape {tuple(attention_mask.shape)} ({attention_mask.dtype}); "
            "attn_dispatch takes bool[batch, columns] for padding"
        )
    host = attention_mask.detach().to("cpu", copy=True).numpy()
    return LayerMask(pattern, None if host.all() else host)

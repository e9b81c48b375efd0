"""FlashInfer's own merge of partial results, for the contract's natural LSE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flashinfer
import torch

__all__ = ["merged"]

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


def merged(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two results, or more, by one kernel that rounds once.

    Its LSE is of base 2. A row that attended to nothing in every part stays 0 with an LSE of -inf: the kernels of
    0.7.2 see to that themselves.

    Args:
        states: (out [T, H, D], lse f32[T, H], natural) as `flashinfer.merges` accepts them.
    """
    outs = [out.contiguous() for out, _ in states]
    lses = [(lse * _LOG2_E).contiguous() for _, lse in states]
    if len(states) == 2:
        out, lse = flashinfer.merge_state(outs[0], lses[0], outs[1], lses[1])
    else:
        out, lse = flashinfer.merge_states(torch.stack(outs, 1), torch.stack(lses, 1))
    return out, lse.mul_(_LN_2)

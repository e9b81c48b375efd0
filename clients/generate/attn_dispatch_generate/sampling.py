"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from attn_dispatch.errors import ModelError

__all__ = ["Sampler"]


class _Indexed(Protocol):
    index: int


class Sampler:
    """Greedy at temperature 0, else a draw from the most likely tokens that together have probability `top_p`.

    Every prompt has a random generator of its own: what it draws does not depend on what else is in the batch.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ModelError(f"temperature={temperature} must be 0 or more, top_p={top_p} above 0 and at most 1")
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self._generators: dict[int, Any] = {}

    def choose(self, logits: Any, sequences: Sequence[_Indexed]) -> list[int]:
        """Return one token for each row of logits [S, vocabulary]."""
        if not self.temperature:
            greedy: list[int] = logits.argmax(-1).tolist()
            return greedy
        ordered, tokens = torch.softmax(logits.float() / self.temperature, -1).cpu().sort(-1, descending=True)
        # A token stays when those before it do not reach top_p: the first always does.
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
        return [
            int(tokens[i, torch.multinomial(ordered[i], 1, generator=self._generator(sequence.index))])
            for i, sequence in enumerate(sequences)
        ]

    def _generator(self, index: int) -> Any:
        if index not in self._generators:
            self._generators[index] = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return self._generators[index]

"""`Engine`: several prompts at once through one transformers model and one paged cache, without a token of padding.

Each step is one row of tokens, [1, T]: whole prompts side by side (long ones in pieces), or one token of every
sequence that is still going. A sequence that ends leaves the batch, and its blocks are free for one that waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError
from attn_dispatch.integrations.paged_cache import PagedCache
from attn_dispatch.integrations.sampling import Sampler

__all__ = ["Completion", "Engine", "Run"]

_WARM_UP_TOKENS = 8  # of a prompt: enough to be one


@dataclass(slots=True)
class Completion:
    """One prompt and what followed it.

    Attributes:
        index: of the prompt.
        prompt: its token ids.
        tokens: the new ones; a stop token is the last of them.
        finish_reason: "stop" or "length" ("" while it is going).
    """

    index: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    row: int = -1
    done: int = 0  # tokens that are in the cache


@dataclass(slots=True)
class Run:
    """What `Engine.generate` did, with times in seconds.

    Attributes:
        completions: in the order of the prompts.
        warmup_s: of two forwards beforehand, in which backends are chosen, imported and compiled.
        prefill_s, prefill_tokens, prefill_steps: prompts; the first new token of each is part of it.
        decode_s, decode_tokens, decode_steps: every further token.
        blocks_peak: the most blocks that were in use at once.
        tokens_at_peak: tokens that they held.
        padded_tokens: what a rectangular cache would hold at the end: sequences x the longest of them.
        tokens: what was held instead, all sequences together.
    """

    completions: list[Completion]
    warmup_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    prefill_steps: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    blocks_peak: int = 0
    tokens_at_peak: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return sum(len(c.prompt) + len(c.tokens) for c in self.completions)

    @property
    def padded_tokens(self) -> int:
        """Tokens of a rectangle that holds all sequences."""
        return len(self.completions) * max((len(c.prompt) + len(c.tokens) for c in self.completions), default=0)


class Engine:
    """A model with a paged cache, for generation."""

    def __init__(
        self,
        model: Any,
        *,
        backend: str | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        kv_cache_dtype: str | None = None,
        max_sequences: int = 64,
        max_step_tokens: int = 2048,
    ) -> None:
        """Prepare to generate.

        Args:
            model: a transformers model whose attn_implementation is "attn_dispatch", on its device.
            backend: the one that every layer is to run on (None: chosen).
            block_size: B.
            num_blocks: N; prompts wait until there is room for them (None: grows).
            kv_cache_dtype: type that is stored (None: the model's).
            max_sequences: at once.
            max_step_tokens: prompt tokens of one step.

        Raises:
            ModelError: the model cannot run on a paged cache.
        """
        self.model = model
        self.cache = PagedCache(
            model, block_size=block_size, num_blocks=num_blocks, backend=backend, kv_cache_dtype=kv_cache_dtype
        )
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop: Iterable[int] = (),
        sampler: Sampler | None = None,
        on_token: Callable[[Completion], None] = lambda completion: None,
    ) -> Run:
        """Continue every prompt.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: of each prompt.
            stop: token ids that end a sequence.
            sampler: how a token is chosen (None: greedily).
            on_token: called after each new token of a sequence.

        Raises:
            CacheError: a prompt is empty, or needs more blocks than there are. Nothing has been computed.
            NoBackendError: no backend runs one of the model's layers.
        """
        run = Run([Completion(i, list(prompt)) for i, prompt in enumerate(prompts)])
        self._check(run.completions, max_new_tokens)
        sampler = sampler or Sampler()
        stop = frozenset(stop)
        began = time.perf_counter()
        if run.completions:
            self._warm_up(run.completions[0].prompt)
        run.warmup_s = time.perf_counter() - began
        waiting, running = deque(run.completions), list[Completion]()

        def accept(sequences: list[Completion], logits: Any) -> None:
            """Give each of these sequences its next token; those that end by it leave."""
            for sequence, token in zip(sequences, sampler.choose(logits, sequences), strict=True):
                sequence.tokens.append(token)
                ended = token in stop
                if ended or len(sequence.tokens) == max_new_tokens:
                    sequence.finish_reason = "stop" if ended else "length"
                    running.remove(sequence)
                    self.cache.sequences.remove(np.array([sequence.row]))
                on_token(sequence)

        while waiting or running:
            self._admit(waiting, running, max_new_tokens)
            pieces = self._prompt_pieces(running)
            began = time.perf_counter()
            if pieces:
                logits = self._step(run, pieces)
                whole = [sequence for sequence, _ in pieces if sequence.done == len(sequence.prompt)]
                if whole:
                    accept(whole, logits)
                run.prefill_s += time.perf_counter() - began
                run.prefill_tokens += sum(count for _, count in pieces)
                run.prefill_steps += 1
            else:
                sequences = list(running)
                accept(sequences, self._step(run, [(sequence, 1) for sequence in sequences]))
                run.decode_s += time.perf_counter() - began
                run.decode_tokens += len(sequences)
                run.decode_steps += 1
        return run

    def _check(self, completions: list[Completion], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise CacheError(f"max_new_tokens={max_new_tokens} must be 1 or more")
        pool = self.cache.pool
        for sequence in completions:
            if not sequence.prompt:
                raise CacheError(f"prompt {sequence.index} has no tokens")
            needed = self._blocks(sequence, max_new_tokens)
            if not pool.grows and needed > pool.num_blocks:
                raise CacheError(
                    f"prompt {sequence.index}: {len(sequence.prompt)} tokens and {max_new_tokens} new ones need "
                    f"{needed} blocks of {self.cache.sequences.block_size}, the cache has {pool.num_blocks}"
                )

    def _blocks(self, sequence: Completion, max_new_tokens: int) -> int:
        # The last new token is never written: nothing comes after it.
        return -(-(len(sequence.prompt) + max_new_tokens - 1) // self.cache.sequences.block_size)

    def _admit(self, waiting: deque[Completion], running: list[Completion], max_new_tokens: int) -> None:
        """Let prompts in while there is room for all that they may become: nothing is thrown out later."""
        pool = self.cache.pool
        promised = sum(self._blocks(sequence, max_new_tokens) for sequence in running)
        while waiting and len(running) < self.max_sequences:
            promised += self._blocks(waiting[0], max_new_tokens)
            if not pool.grows and promised > pool.num_blocks:
                return
            sequence = waiting.popleft()
            sequence.row = int(self.cache.sequences.add(1)[0])
            running.append(sequence)

    def _prompt_pieces(self, running: list[Completion]) -> list[tuple[Completion, int]]:
        """Return what of the prompts is computed next, within a step's number of tokens."""
        pieces, room = [], self.max_step_tokens
        for sequence in running:
            count = min(len(sequence.prompt) - sequence.done, room)
            if count > 0:
                pieces.append((sequence, count))
                room -= count
        return pieces

    def _step(self, run: Run, pieces: list[tuple[Completion, int]]) -> Any:
        """Run the model over the next tokens of these sequences; return the logits after each complete one."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for sequence, count in pieces:
            begin, prompt = sequence.done, len(sequence.prompt)
            tokens += sequence.prompt[begin : begin + count] if begin < prompt else sequence.tokens[-1:]
            positions += range(begin, begin + count)
            sequence.done = begin + count
            if sequence.done >= prompt:
                last.append(len(tokens) - 1)
        rows = np.array([sequence.row for sequence, _ in pieces], np.intp)
        logits = self._forward(rows, np.array([count for _, count in pieces], np.int32), tokens, positions, last)
        used = self.cache.pool.in_use
        if used >= run.blocks_peak:
            run.blocks_peak, run.tokens_at_peak = used, self.cache.sequences.num_tokens
        return logits

    def _forward(self, rows: Any, new: Any, tokens: list[int], positions: list[int], last: list[int]) -> Any:
        device = self.model.device
        self.cache.next_step(rows, new)
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(last, device=device, dtype=torch.long),
            )
        return output.logits[0]

    def _warm_up(self, prompt: Sequence[int]) -> None:
        """Let backends be chosen, imported and compiled: with a piece of a prompt, then with one token."""
        for piece in (list(prompt[:_WARM_UP_TOKENS]), list(prompt[:1])):
            row = self.cache.sequences.add(1)
            self._forward(row, np.array([len(piece)], np.int32), piece, list(range(len(piece))), [len(piece) - 1])
            self.cache.sequences.remove(row)

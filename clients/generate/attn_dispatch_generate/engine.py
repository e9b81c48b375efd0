"""`Engine`: several prompts at once through one transformers model and one paged cache, without a token of padding.

Each step is one row of tokens, [1, T]: whole prompts side by side (long ones in pieces), or one token of every
sequence that is still going. What several prompts begin with is computed once: the first one computes it, the others
wait for that step and then share its blocks. A sequence that ends leaves the batch; its blocks are available to those
that wait, and until then what they store is found again by prompts that begin with the same tokens, which therefore go
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from attn_dispatch import cache
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError, ModelError
from attn_dispatch.integrations.transformers import PagedCache
from attn_dispatch_generate.run import Completion, Run
from attn_dispatch_generate.sampling import Sampler

__all__ = ["Completion", "Engine", "Run"]

_WARM_UP_TOKENS = 8  # of a prompt: enough to be one


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
        prefix_sharing: bool = True,
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
            prefix_sharing: compute what prompts begin with once, and keep it until room is needed.

        Raises:
            ModelError: the model cannot run on a paged cache.
        """
        self.model = model
        self.cache = PagedCache(
            model,
            block_size=block_size,
            num_blocks=num_blocks,
            backend=backend,
            kv_cache_dtype=kv_cache_dtype,
            prefix_sharing=prefix_sharing,
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
            ModelError: a prompt goes beyond the model's positions (nothing has been computed), or the model's logits
                are not numbers.
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
        manager = self.cache.manager
        before = manager.usage()
        unfinished, running = dict[cache.Sequence, Completion](), list[Completion]()
        waiting = cache.WaitingQueue(manager)

        def accept(completions: list[Completion], logits: Any) -> None:
            """Give each of these its next token; those that end by it leave."""
            for completion, token in zip(completions, sampler.choose(logits, completions), strict=True):
                completion.tokens.append(token)
                ended = token in stop
                if ended or len(completion.tokens) == max_new_tokens:
                    completion.finish_reason = "stop" if ended else "length"
                    running.remove(completion)
                    del unfinished[completion.sequence]
                    manager.free(completion.sequence)
                else:
                    manager.append(completion.sequence, [token])
                on_token(completion)

        try:
            for completion in run.completions:
                completion.sequence = manager.begin(completion.prompt)
                unfinished[completion.sequence] = completion
                waiting.append(completion.sequence)
            blocked, pieces = len(unfinished) + 1, list[tuple[Completion, int]]()
            while unfinished:
                if pieces or len(unfinished) < blocked:  # else nothing was cached since, and no room made
                    blocked = self._admit(waiting, running, unfinished, max_new_tokens)
                pieces = self._prompt_pieces(running)
                began = time.perf_counter()
                chosen = [completion for completion, _ in pieces] if pieces else list(running)
                tokens, logits = self._step(run, pieces or [(completion, 1) for completion in chosen])
                accept([completion for completion in chosen if not completion.sequence.remaining], logits)
                run.add(time.perf_counter() - began, tokens, prompts=bool(pieces))
        finally:
            for sequence in unfinished:  # something went wrong: leave the cache to the next call
                manager.free(sequence)
        run.count(before, manager.usage())
        return run

    def _check(self, completions: list[Completion], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise CacheError(f"max_new_tokens={max_new_tokens} must be 1 or more")
        pool = self.cache.pool
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for completion in completions:
            length = len(completion.prompt)
            if not length:
                raise CacheError(f"prompt {completion.index} has no tokens")
            if positions is not None and length + max_new_tokens - 1 > positions:
                raise ModelError(
                    f"prompt {completion.index}: {length} tokens and {max_new_tokens} new ones are more than the "
                    f"{positions} positions that the model knows"
                )
            needed = self._blocks(completion, max_new_tokens)
            if not self.cache.grows and needed > pool.num_blocks:
                raise CacheError(
                    f"prompt {completion.index}: {length} tokens and {max_new_tokens} new ones need "
                    f"{needed} blocks of {self.cache.manager.block_size}, the cache has {pool.num_blocks}"
                )

    def _blocks(self, completion: Completion, max_new_tokens: int) -> int:
        return -(-_most_tokens(completion, max_new_tokens) // self.cache.manager.block_size)

    def _admit(
        self,
        waiting: cache.WaitingQueue,
        running: list[Completion],
        unfinished: dict[cache.Sequence, Completion],
        max_new_tokens: int,
    ) -> int:
        """Admit prompts while there is room for all that they may become: nothing is thrown out later.

        Returns:
            How many are unfinished now: when there are fewer, there is room again.
        """
        manager = self.cache.manager
        promised = sum(self._blocks(other, max_new_tokens) - other.sequence.num_blocks for other in running)
        while waiting and len(running) < self.max_sequences:
            completion = unfinished[waiting.first()]
            if self.cache.grows:
                manager.acquire_cached_prefix(completion.sequence)
            elif not manager.try_admit(
                completion.sequence, _most_tokens(completion, max_new_tokens), reserved=promised
            ):
                break
            promised += self._blocks(completion, max_new_tokens) - completion.sequence.num_blocks
            waiting.remove(completion.sequence)
            running.append(completion)
        return len(unfinished)

    def _prompt_pieces(self, running: list[Completion]) -> list[tuple[Completion, int]]:
        """Return what of the prompts is computed next, within a step's number of tokens."""
        manager, pieces, room = self.cache.manager, [], self.max_step_tokens
        prompts = {completion.sequence: completion for completion in running if not completion.tokens}
        for sequence in manager.without_common_prefix(prompts):
            count = min(sequence.length - manager.cached_tokens(sequence), room)
            if count > 0:
                pieces.append((prompts[sequence], count))
                room -= count
        return pieces

    def _step(self, run: Run, pieces: list[tuple[Completion, int]]) -> tuple[int, Any]:
        """Run the model over the next tokens of these completions.

        Returns:
            How many tokens that were, and the logits after each sequence of which all tokens are computed now.

        Raises:
            ModelError: logits are not numbers.
        """
        step = self.cache.next_step([(completion.sequence, count) for completion, count in pieces])
        logits = self._forward(step)
        run.observe(self.cache.manager)
        if bool(logits.isnan().any()):
            raise ModelError("the model's logits are not numbers: its weights are NaN, or overflow in this dtype")
        self.cache.manager.commit(step)
        return step.num_tokens, logits

    def _forward(self, step: cache.ScheduledStep) -> Any:
        device = self.model.device
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(step.tokens)[None].to(device),
                position_ids=torch.from_numpy(step.positions)[None].to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.from_numpy(step.last_rows).to(device),
            )
        return output.logits[0]

    def _warm_up(self, prompt: Sequence[int]) -> None:
        """Let backends be chosen, imported and compiled: with a piece of a prompt, then with one token."""
        manager = self.cache.manager
        for piece in (list(prompt[:_WARM_UP_TOKENS]), list(prompt[:1])):
            sequence = manager.begin(piece)
            try:
                self._forward(self.cache.next_step([(sequence, len(piece))]))  # not committed: nobody finds it
            finally:
                manager.free(sequence)


def _most_tokens(completion: Completion, max_new_tokens: int) -> int:
    # The last new token is never written: nothing comes after it.
    return len(completion.prompt) + max_new_tokens - 1

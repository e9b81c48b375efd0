"""Results of an `Engine`: completions, and figures of how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attn_dispatch import cache

__all__ = ["Completion", "Run"]


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
    _sequence: cache.Sequence | None = None

    @property
    def begun(self) -> bool:
        """Whether it is a sequence of the cache manager's."""
        return self._sequence is not None

    @property
    def sequence(self) -> cache.Sequence:
        """The cache manager's sequence, once it has begun."""
        assert self._sequence is not None
        return self._sequence

    @sequence.setter
    def sequence(self, sequence: cache.Sequence) -> None:
        self._sequence = sequence


@dataclass(slots=True)
class Run:
    """What `Engine.generate` did, with times in seconds.

    Attributes:
        completions: in the order of the prompts.
        warmup_s: of two forwards beforehand, in which backends are chosen, imported and compiled.
        prefill_s, prefill_tokens, prefill_steps: prompts; the first new token of each is part of it. Only tokens that
            were computed.
        decode_s, decode_tokens, decode_steps: every further token.
        prompt_tokens: of all prompts.
        hit_tokens: those of them that were found in the cache, and not computed.
        evicted_blocks: cached prefixes that made room.
        blocks_peak: the most blocks that were in use at once.
        blocks_unshared: what the sequences would have held then, each with blocks of its own.
        blocks_shared: the most that several sequences held at once.
        tokens_at_peak: slots that were in use at the peak.
        waste: slots of blocks in use that held no token, as a share of all their slots, over all steps.
    """

    completions: list[Completion]
    warmup_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    prefill_steps: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    blocks_peak: int = 0
    blocks_unshared: int = 0
    blocks_shared: int = 0
    tokens_at_peak: int = 0
    _slots: int = 0
    _unused_slots: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return sum(len(c.prompt) + len(c.tokens) for c in self.completions)

    @property
    def padded_tokens(self) -> int:
        """Tokens of a rectangle that holds all sequences."""
        return len(self.completions) * max((len(c.prompt) + len(c.tokens) for c in self.completions), default=0)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that did not have to be computed."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def waste(self) -> float:
        """Share of the slots in use that held no token, over all steps."""
        return self._unused_slots / self._slots if self._slots else 0.0

    # What follows is the engine's.

    def add(self, seconds: float, tokens: int, *, prompts: bool) -> None:
        """Record a step."""
        if prompts:
            self.prefill_s += seconds
            self.prefill_tokens += tokens
            self.prefill_steps += 1
        else:
            self.decode_s += seconds
            self.decode_tokens += tokens
            self.decode_steps += 1

    def observe(self, manager: cache.CacheManager) -> None:
        """Record what is in use during a step."""
        usage = manager.usage()
        slots = usage.used_blocks * manager.block_size
        self._slots += slots
        self._unused_slots += usage.unused_slots
        self.blocks_shared = max(self.blocks_shared, usage.shared_blocks)
        if usage.used_blocks >= self.blocks_peak:
            self.blocks_peak, self.tokens_at_peak = usage.used_blocks, slots - usage.unused_slots
            self.blocks_unshared = sum(seq.num_blocks for seq in manager.sequences)

    def count(self, before: cache.Usage, after: cache.Usage) -> None:
        """Record what the manager counted between the beginning and the end."""
        self.prompt_tokens = after.prompt_tokens - before.prompt_tokens
        self.hit_tokens = after.hit_tokens - before.hit_tokens
        self.evicted_blocks = after.evicted_blocks - before.evicted_blocks

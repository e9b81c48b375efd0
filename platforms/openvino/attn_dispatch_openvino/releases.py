"""What each OpenVINO release's attention op takes and does, read from package metadata: no vendor import.

The op is experimental: its inputs grew from 13 to 28, and a release may accept an input that it then ignores. What
stands here was measured release by release with the conformance kit, never inferred from the list of inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from attn_dispatch.adapters.environment import Packages

__all__ = ["INPUTS", "RELEASES", "Release", "Target", "installed_version", "known_releases", "release_of"]

INPUTS = (
    "q", "k", "v", "key_cache", "value_cache",
    "past_lens", "subsequence_begins", "block_indices", "block_indices_begins",
    "scale", "sliding_window", "alibi_slopes", "max_context_len",
    "score_aggregation_window",
    "rotated_block_indices", "rotation_deltas", "rotation_trig_lut",
    "xattention_threshold", "xattention_block_size", "xattention_stride",
    "sinks",
    "adaptive_rkv_start_size", "adaptive_rkv_evictable_sizes",
    "adaptive_rkv_diversity_block_set_indices", "adaptive_rkv_diversity_block_set_indices_begins",
    "token_type_ids",
    "qq_bias", "qq_bias_begins",
)  # fmt: skip
"""The op's inputs in order. Releases have only ever added at the end: an older one takes the first so many."""


class Release(NamedTuple):
    """One minor release, as measured.

    Attributes:
        inputs: how many of `INPUTS` the op takes.
        window: a sliding window is exactly so many tokens (before, it was wrong).
        sinks: sinks are applied (before, ignored or not compiled).
        reads_only: the op can be told not to write; else new tokens that must not be written again are rewritten with
            the very bits that the cache holds.
        token_types: token types make the new tokens of a sequence see each other (before, they were ignored or wrong).
        trees: a mask among the new tokens is applied.
        float16_exact: a float16 cache is written with rounding to nearest.
        clears_keys: what the op clears (see `device_batch._tails`) is in the keys too, and in caches of every type.
    """

    inputs: int
    window: bool = True
    sinks: bool = True
    reads_only: bool = False
    token_types: bool = False
    trees: bool = False
    float16_exact: bool = True
    clears_keys: bool = False


class Target(NamedTuple):
    """What computes: the installed release, OpenVINO's name of the device, and how many threads (of the CPU)."""

    release: Release
    device: str
    threads: int


RELEASES: dict[tuple[int, int], Release] = {
    (2025, 4): Release(21, window=False, sinks=False, clears_keys=True),
    (2026, 0): Release(25),
    (2026, 1): Release(26),
    (2026, 2): Release(28, float16_exact=False),
    (2026, 3): Release(28, reads_only=True, token_types=True, trees=True),
    (2026, 4): Release(28, reads_only=True, token_types=True, trees=True),
}


@cache
def installed_version() -> str:
    """Return the version of the installed OpenVINO; empty when there is none."""
    return Packages().version("openvino")


@cache
def release_of(text: str) -> Release | None:
    """Return what is known of a version such as "2026.4.1", or None."""
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return RELEASES.get((int(major), int(minor))) if major.isdecimal() and minor.isdecimal() else None


def known_releases() -> str:
    """Return the releases that are known, for messages."""
    return ", ".join(f"{major}.{minor}" for major, minor in RELEASES)

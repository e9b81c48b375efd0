"""`AttentionSpec`: what one layer needs, static, frozen, hashable."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from typing import Literal, NamedTuple

from attn_dispatch.contract.dtypes import CACHE_DTYPES, COMPUTE_DTYPES, dtype_name
from attn_dispatch.errors import SpecError

__all__ = ["DEFAULT_BLOCK_SIZE", "AttentionSpec", "CacheGeometry", "Kind"]

Kind = Literal["decoder", "encoder", "cross"]
_KINDS: tuple[Kind, ...] = ("decoder", "encoder", "cross")

DEFAULT_BLOCK_SIZE = 32
"""Tokens in a block unless said otherwise: what every runtime of this project accepts."""


class CacheGeometry(NamedTuple):
    """What a cache must have in common with a spec, whoever allocated it."""

    num_kv_heads: int
    head_size: int
    value_head_size: int
    block_size: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one attention layer needs. The defaults are a Llama layer's.

    Attributes:
        num_heads: query heads, H.
        num_kv_heads: key/value heads, K; divides H (None: H).
        head_size: query and key head size, D.
        value_head_size: value head size, Dv (None: D).
        dtype: type of queries, new keys, new values and outputs.
        kv_cache_dtype: type that the cache stores (None: `dtype`).
        block_size: tokens in a cache block, B (None: what the chosen backend prefers; the layer's `spec` has it).
        scale: factor on the scores (None: 1 / sqrt(D)).
        causal: bottom-right aligned: the last query sees every key (None: True for decoders, else False).
        window: tokens visible to the (left, right) of a query's own position, -1 = open. `(W - 1, 0)` is the last W
            tokens, the token itself included.
        logits_soft_cap: `cap * tanh(scores / cap)` (None or 0: off).
        alibi: a bias of `-slope * |query position - key position|`; the layer gives `alibi_slopes`, f32[H].
        sinks: one more logit per head in the softmax's denominator; the layer gives `sinks`, f32[H].
        kind: "decoder" (self-attention over the cache), "encoder" (self-attention over the batch's own tokens),
            "cross" (over an encoder's tokens in a cache).
        writes_kv: False for a layer that reads another layer's cache and never writes.
        returns_lse: the layer wants log-sum-exp, natural log, f32[T, H].

    Raises:
        SpecError: a field has a value that no backend could give a meaning.
    """

    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in by __post_init__, as all that are None here
    head_size: int = 128
    value_head_size: int = None  # type: ignore[assignment]
    dtype: str = "bfloat16"
    kv_cache_dtype: str = None  # type: ignore[assignment]
    block_size: int = DEFAULT_BLOCK_SIZE  # or None; see above
    scale: float = None  # type: ignore[assignment]
    causal: bool = None  # type: ignore[assignment]
    window: tuple[int, int] = (-1, -1)
    logits_soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    kind: Kind = "decoder"
    writes_kv: bool = True
    returns_lse: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_size", "value_head_size", "block_size"):
            value = getattr(self, name)
            if value is None and name == "block_size":
                continue
            if value is None:
                value = self.num_heads if name == "num_kv_heads" else self.head_size
            self._set(name, _positive(name, value))
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        self._set("dtype", dtype_name(self.dtype))
        if self.dtype not in COMPUTE_DTYPES:
            raise SpecError(f"dtype={self.dtype}: attention is computed in one of {', '.join(COMPUTE_DTYPES)}")
        stored = self.dtype if self.kv_cache_dtype in (None, "auto") else dtype_name(self.kv_cache_dtype)
        if stored not in CACHE_DTYPES:
            raise SpecError(f"kv_cache_dtype={stored} is not one of {', '.join(CACHE_DTYPES)}")
        self._set("kv_cache_dtype", stored)
        if self.kind not in _KINDS:
            raise SpecError(f"kind={self.kind!r} is not one of {', '.join(_KINDS)}")
        for name in ("alibi", "sinks", "writes_kv", "returns_lse", "causal"):
            given = getattr(self, name)
            if given is None and name == "causal":
                given = self.kind == "decoder"
            if not isinstance(given, bool):
                raise SpecError(f"{name}={given!r} must be True or False")
            self._set(name, given)
        scale = self.head_size**-0.5 if self.scale is None else _finite("scale", self.scale)
        self._set("scale", scale)
        cap = None if self.logits_soft_cap is None else _finite("logits_soft_cap", self.logits_soft_cap) or None
        if cap is not None and cap < 0:
            raise SpecError(f"logits_soft_cap={cap} must be positive, or None for none")
        self._set("logits_soft_cap", cap)
        self._set("window", self._normal_window())
        if self.kind == "cross":
            self._check_cross()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _normal_window(self) -> tuple[int, int]:
        """Check the window and write it in its one normal form, so that equal specs compare equal."""
        try:
            left, right = (operator.index(side) for side in self.window)
        except (TypeError, ValueError):
            raise SpecError(f"window={self.window!r} must be two integers (left, right), -1 for an open side") from None
        if left < -1 or right < -1:
            raise SpecError(f"window={self.window!r}: a side is a count of tokens, or -1 for open")
        if not self.causal:
            return left, right
        if right > 0:
            raise SpecError(
                f"window={self.window!r} looks {right} tokens ahead, but the layer is causal: use ({left}, 0)"
            )
        return (left, 0) if left >= 0 else (-1, -1)

    def _check_cross(self) -> None:
        # Positions in the decoder and in the encoder are of two different sequences: nothing can be measured between.
        if self.causal or self.window != (-1, -1) or self.alibi:
            raise SpecError(
                "kind='cross' attends to another sequence, in which the query has no position: "
                f"causal={self.causal}, window={self.window}, alibi={self.alibi} must be False, (-1, -1), False"
            )

    @property
    def has_block_size(self) -> bool:
        """Whether there is one, not left to the backend."""
        return self.block_size is not None

    @cached_property
    def group_size(self) -> int:
        """Query heads that share a key/value head, H / K."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def geometry(self) -> CacheGeometry:
        """What a cache must have in common with this spec.

        Raises:
            SpecError: its block size is left to the backend.
        """
        if not self.has_block_size:
            raise SpecError("block_size=None is for ad.attention() to fill in: use the spec of the layer, attn.spec")
        return CacheGeometry(
            self.num_kv_heads, self.head_size, self.value_head_size, self.block_size, self.kv_cache_dtype
        )

    @cached_property
    def sees_every_key(self) -> bool:
        """Whether each query attends to every key, none of them its own step's: cross layers, and reads alike.

        Positions mean nothing then: a query may be given alone, in any order.
        """
        plain = not (self.causal or self.writes_kv or self.alibi or self.has_window)
        return self.kind == "cross" or (self.kind == "decoder" and plain)

    @property
    def has_window(self) -> bool:
        """Whether a side of the window is closed (beyond what causality closes)."""
        return self.window != (-1, -1)

    def __str__(self) -> str:
        """One line: the heads, then every field that is not a Llama layer's."""
        parts = [f"heads={self.num_heads}/{self.num_kv_heads}", f"head_size={self.head_size}"]
        plain = AttentionSpec(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_size=self.head_size)
        always = ("dtype", "block_size")
        for field in fields(self):
            if field.name in ("num_heads", "num_kv_heads", "head_size"):
                continue
            value = getattr(self, field.name)
            derived = {
                "value_head_size": self.head_size,
                "kv_cache_dtype": self.dtype,
                "causal": self.kind == "decoder",
            }
            if field.name in always or value != derived.get(field.name, getattr(plain, field.name)):
                parts.append(f"{field.name}={value}")
        return " ".join(parts)


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise SpecError(f"{name}={value!r} must be a positive integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SpecError(f"{name}={value!r} must be a positive integer") from None
    if number < 1:
        raise SpecError(f"{name}={number} must be at least 1")
    return number


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise SpecError(f"{name}={value!r} must be a finite number")
    return float(value)

"""From what a transformers attention layer says when it is called to an `AttentionSpec`."""

from __future__ import annotations

from typing import Any, NamedTuple

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.contract.spec import Kind
from attn_dispatch.errors import ModelError
from attn_dispatch.integrations.masks import MaskPattern

__all__ = ["LayerCall", "tensor_key"]


class LayerCall(NamedTuple):
    """One call of the attention function: the layer and what it asks for.

    Attributes:
        module: the attention module.
        query: [batch, H, T, D].
        key: [batch, K, columns, D].
        value: [batch, K, columns, Dv].
        pattern: which keys a query sees.
        scaling: factor on the scores (None: 1 / sqrt(D)).
        softcap: of the scores.
        sinks: one logit per head, or None.
    """

    module: Any
    query: Any
    key: Any
    value: Any
    pattern: MaskPattern
    scaling: float | None
    softcap: float | None
    sinks: Any

    @property
    def options(self) -> tuple[Any, ...]:
        """What its spec depends on."""
        _, heads, _, size = self.query.shape
        rest = (self.key.shape[1], self.value.shape[3], self.query.dtype, self.pattern, self.scaling, self.softcap)
        return (heads, size, *rest, self.sinks is not None)

    def spec(
        self,
        kind: Kind,
        block_size: int,
        *,
        kv_cache_dtype: str | None = None,
        writes_kv: bool = True,
    ) -> AttentionSpec:
        """Return what the layer needs.

        Args:
            kind: decoder (with a paged cache), encoder (without a cache) or cross.
            block_size: B.
            kv_cache_dtype: type that the cache stores (None: the layer's).
            writes_kv: False for a layer that reads another layer's keys and values.

        Raises:
            ModelError: the layer is one that a paged cache has no form for.
        """
        pattern = self.pattern
        if kind == "decoder" and not pattern.causal:
            raise ModelError(
                f"{type(self.module).__name__} looks ahead, and a cache holds no tokens that are still to come: "
                "run it without a cache (use_cache=False)"
            )
        if kind == "decoder" and pattern.chunk is not None:
            raise ModelError(
                f"{type(self.module).__name__} attends in chunks of {pattern.chunk} tokens; a paged cache has full and "
                "sliding attention only: run it without a cache (use_cache=False)"
            )
        return AttentionSpec(
            num_heads=self.query.shape[1],
            num_kv_heads=self.key.shape[1],
            head_size=self.query.shape[3],
            value_head_size=self.value.shape[3],
            dtype=dtype_name(self.query.dtype),
            kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]  # None: the spec fills in the layer's
            block_size=block_size,
            scale=self.scaling,  # type: ignore[arg-type]  # likewise
            causal=pattern.causal,
            window=pattern.window,
            logits_soft_cap=self.softcap,
            sinks=self.sinks is not None,
            kind=kind,
            writes_kv=writes_kv,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments of `attention` for what the layer owns."""
        return {} if self.sinks is None else {"sinks": self.sinks.detach().float().cpu().numpy()}

    @property
    def parameters_key(self) -> object:
        """What changes whenever `parameters` do."""
        return None if self.sinks is None else tensor_key(self.sinks)


def tensor_key(tensor: Any) -> object:
    """Return what changes whenever a small tensor's contents do.

    On the CPU that is the contents; elsewhere, where reading them would wait for the device, address and version.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.float().numpy().tobytes()
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version

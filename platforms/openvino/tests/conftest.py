"""What the tests of this folder share: layers with numbers, and the proof that the backend still computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import attn_dispatch as ad
from attn_dispatch.conformance import CASES, run_case
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import registry

NAME = "openvino/paged"
Arrays = npt.NDArray[Any]


@dataclass
class Layer:
    """A layer of random numbers. `arrays(n)` gives q, k and v of n new tokens."""

    spec: ad.AttentionSpec
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def on(self, backend: str = NAME) -> Any:
        return ad.attention(self.spec, backend, **self.parameters)

    def arrays(self, tokens: int) -> tuple[Arrays, Arrays, Arrays]:
        s, dtype = self.spec, numpy_dtype(self.spec.dtype)
        shapes = ((s.num_heads, s.head_size), (s.num_kv_heads, s.head_size), (s.num_kv_heads, s.value_head_size))
        q, k, v = (self._rng.standard_normal((tokens, *shape)).astype(dtype) for shape in shapes)
        return q, k, v


@pytest.fixture(autouse=True)
def _available() -> None:
    found = ad.backends()[NAME]
    if not found:
        pytest.skip(f"not run: {found.reason}")


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """Return a maker of layers: `layer(head_size=72)`; 4 heads of 64 over 2, float32, unless said otherwise."""

    def make(parameters: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> Layer:
        plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32"}
        return Layer(ad.AttentionSpec(**(plain | fields)), parameters or {}, seed)

    return make


@pytest.fixture
def still_computes() -> Iterator[None]:
    """After the test, the same process still computes a mixed batch as float64 does."""
    yield
    result = run_case(registry().load(NAME), next(case for case in CASES if case.name == "mixed float32"))
    assert result.verdict
    assert result.error <= result.allowed

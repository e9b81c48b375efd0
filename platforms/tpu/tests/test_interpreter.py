"""JAX's interpreter with the rules that are replaced in it: what it would get wrong without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import attn_dispatch as ad
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.dispatch import registry
from attn_dispatch_tpu import simulator


def test_what_a_kernel_stores_in_its_scalars_is_there_in_the_next_step() -> None:
    def count(scalars: jax.Array, out: jax.Array) -> None:
        out[...] = jnp.full(out.shape, scalars[0])
        scalars[0] += 1

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(3,), in_specs=[], out_specs=pl.BlockSpec((8, 128), lambda i, *_: (i, 0))
    )
    with simulator.running():
        out = pl.pallas_call(count, grid_spec=grid, out_shape=jax.ShapeDtypeStruct((24, 128), jnp.int32))(
            jnp.array([5], jnp.int32)
        )
    assert np.asarray(out)[::8, 0].tolist() == [5, 6, 7]


# The kernel remembers in its scalars which of two buffers is next: an odd number of blocks shows when it forgets.
@pytest.mark.parametrize("heads", [(16, 8), (32, 16)])
@pytest.mark.parametrize(("context", "new"), [((63,), (1,)), ((0,), (300,)), ((40, 0, 7), (1, 33, 5))])
def test_more_heads_than_a_grid_step_takes(
    heads: tuple[int, int], context: tuple[int, ...], new: tuple[int, ...]
) -> None:
    spec = ad.AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_size=64, dtype="float32", block_size=64)
    assert run_case(registry().load("tpu/pallas"), Case("several groups of heads", "", spec, context, new)).verdict

"""Ahead-of-time compilation for TPUs on a machine without one: the same libtpu, and the step that runs. Imports JAX.

`Target(generation)` describes chips of that generation to the compiler; what it compiles is machine code for them. It
shows that Mosaic takes the kernel and that XLA updates the cache in place. It does not show a number that comes out.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from attn_dispatch.contract.dtypes import itemsize
from attn_dispatch_tpu.options import ProgramOptions

__all__ = ["GENERATIONS", "Compiled", "Target", "prepare"]

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""The smallest topology of each, as libtpu names it."""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # there is no TPU to be initialised
    "TPU_SKIP_MDS_QUERY": "1",  # nor a cloud to be asked about it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}

CACHE_TOKENS = 1 << 16
"""Of a cache: enough that a copy of it would be larger than whatever else a program needs."""


def prepare() -> None:
    """Set what libtpu reads when it is loaded; to be called before JAX is used."""
    os.environ.update(_ENVIRONMENT)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    Attributes:
        code_bytes: machine code.
        temporary_bytes: device memory beside arguments and results.
        aliased_bytes: results that lie in the memory of an argument.
        cache_bytes: the pages that were donated.
        seconds: for tracing, lowering and compiling.
    """

    code_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    cache_bytes: int
    seconds: float

    @property
    def in_place(self) -> bool:
        """Whether the whole cache is updated where it is."""
        return self.aliased_bytes == self.cache_bytes


class Target:
    """One chip of a generation, as the compiler sees it."""

    def __init__(self, generation: str) -> None:
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh, SingleDeviceSharding

        self.generation = generation
        topology = topologies.get_topology_desc(topology_name=GENERATIONS[generation], platform="tpu")
        self.kind = topology.devices[0].device_kind
        self._mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
        self._sharding = SingleDeviceSharding(topology.devices[0])

    def compile(
        self,
        options: ProgramOptions,
        page: tuple[int, ...],
        *,
        dtype: str,
        writes: bool = True,
        scaled: bool = False,
    ) -> Compiled:
        """Compile one step; raises whatever JAX or the compiler raise when they refuse.

        Args:
            options: what for.
            page: shape of a page.
            dtype: of queries.
            writes: new keys and values are written.
            scaled: the layer's scales are not 1.
        """
        import jax
        from jax.sharding import PartitionSpec

        from attn_dispatch_tpu import fused, programs

        def like(shape: tuple[int, ...], dtype: str) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)

        began = time.monotonic()
        pages, tokens = (max(64, CACHE_TOKENS // page[0]), *page), options.batch.tokens
        rows = [like((tokens, options.heads, options.head_size), dtype)]
        if writes:
            rows += [like((tokens, options.kv_heads, n), dtype) for n in (options.head_size, options.value_size)]
        batch = [
            like((sum(size for _, size in options.batch.parts),), "int32"),
            like((2 + options.heads,), "float32"),
        ]
        function = partial(programs.attend_and_write if writes else programs.attend, options=options, scaled=scaled)
        # Inside shard_map the kernel is lowered for the mesh's chip; by itself it would be for the CPU that JAX sees.
        whole = PartitionSpec()
        mapped = jax.shard_map(function, mesh=self._mesh, in_specs=whole, out_specs=whole, check_vma=False)
        jitted = jax.jit(mapped, donate_argnums=(0,) if writes or options.keeps_pages else ())
        if options.kernel != "ragged":
            # It looks at the device that JAX runs on, which is no TPU here, for what differs between generations.
            number = int(self.generation.strip("vx")[0])
            fused.kernel_module(options.kernel).get_tpu_version = lambda: number  # type: ignore[attr-defined]
        memory = jitted.lower(like(pages, options.cache_dtype), *rows, *batch).compile().memory_analysis()
        return Compiled(
            code_bytes=memory.generated_code_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            cache_bytes=int(math.prod(pages) * itemsize(options.cache_dtype)) if writes or options.keeps_pages else 0,
            seconds=time.monotonic() - began,
        )

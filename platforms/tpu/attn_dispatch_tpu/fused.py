"""tpu-inference's kernels, which write the cache and attend in one: v3, and the one for heads of 64. Imports JAX.

Importing `tpu_inference` starts vLLM. The kernels need neither: their modules are loaded by themselves, from the
installed package's files, and leave no trace of the package behind.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import threading
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from attn_dispatch.errors import MissingPackageError

from .options import ProgramOptions

__all__ = ["attend", "kernel_module"]

Array = Any

_PACKAGE = "tpu_inference"
_FOLDER = f"{_PACKAGE}.kernels.ragged_paged_attention.v3"
_MODULES = {"fused": f"{_FOLDER}.kernel", "fused64": f"{_FOLDER}.kernel_hd64"}
_SIMULATED_VMEM = 64 << 20  # the simulator has no chip to be asked for its memory
_lock = threading.Lock()


def attend(
    pages: Array,
    q: Array,
    new: tuple[Array, ...] | None,
    parts: dict[str, Array],
    sinks: Array,
    options: ProgramOptions,
) -> tuple[Array, Array]:
    """Return the output [tokens, H, Dv] and the pages.

    Args:
        pages: [N, B, rows / packed, packed, lanes].
        q: [tokens, H, D].
        new: this step's keys and values as stored, to be written; None when the pages hold all there is.
        parts: the batch.
        sinks: f32[H].
        options: static.
    """
    module = kernel_module(options.kernel)
    keys, values = _own_rows(pages, parts["own"], options) if new is None else new
    width = options.head_size if options.kernel == "fused64" else options.lanes
    q, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]))) for x in (q, keys, values))
    sequences, decodes = parts["counts"][0], parts["counts"][1]
    arguments = (
        q,
        keys,
        values,
        pages,
        parts["lengths"],
        parts["table"],
        parts["starts"],
        jnp.stack([decodes, decodes, sequences]),
    )
    settings: dict[str, Any] = {
        "sm_scale": options.scale,
        "sliding_window": options.window,
        "soft_cap": options.soft_cap,
        "vmem_limit_bytes": _SIMULATED_VMEM if options.simulated else None,
    }
    if options.kernel == "fused64":
        out, pages = module.ragged_paged_attention_hd64(
            *arguments,
            sinks if options.sinks else None,
            num_kv_pages_per_block=options.tile_pages,
            num_queries_per_block=options.tile_queries,
            **settings,
        )
    else:
        block = pages.shape[1]
        keys_per_step = options.tile_pages * block
        out, pages = module.ragged_paged_attention(
            *arguments,
            use_causal_mask=options.causal,
            update_kv_cache=new is not None,
            d_block_sizes=(1, keys_per_step, 1, keys_per_step),
            m_block_sizes=(options.tile_queries, keys_per_step, options.tile_queries, keys_per_step),
            **settings,
        )
    return out[:, :, : options.value_size], pages


def _own_rows(pages: Array, own: Array, options: ProgramOptions) -> tuple[Array, Array]:
    """Return what the pages hold for each row's own token: the kernels read a step's tokens from beside the cache."""
    flat = pages.reshape(-1, options.padded_kv_heads, 2, options.lanes)
    rows = flat.at[own].get(mode="fill", fill_value=0)[:, : options.kv_heads]
    return rows[:, :, 0, : options.head_size], rows[:, :, 1, : options.value_size]


@functools.cache
def kernel_module(name: str) -> ModuleType:
    """Return the module of a kernel.

    Raises:
        MissingPackageError: tpu-inference is not installed.
    """
    with _lock:
        if _PACKAGE in sys.modules:  # somebody runs vLLM here: theirs is as good
            return importlib.import_module(_MODULES[name])
        found = importlib.util.find_spec(_PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise MissingPackageError("this kernel is of tpu-inference, which is missing")
        before = set(sys.modules)
        try:
            _stand_in(found.submodule_search_locations[0])
            return importlib.import_module(_MODULES[name])
        finally:
            for key in [key for key in sys.modules if key.partition(".")[0] == _PACKAGE and key not in before]:
                del sys.modules[key]


def _stand_in(folder: str) -> None:
    """Put empty packages where the kernels' parents are, and the two helpers that their tables of sizes import.

    The tables are never asked (a plan has chosen the sizes), so that a logger and a device's name are all that is
    missing.
    """
    path, name = folder, _PACKAGE
    for part in ("", "kernels", "ragged_paged_attention", "v3"):
        if part:
            path, name = f"{path}/{part}", f"{name}.{part}"
        package = ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    logger, helpers = ModuleType(f"{_PACKAGE}.logger"), ModuleType(f"{_PACKAGE}.utils")
    logger.init_logger = logging.getLogger  # type: ignore[attr-defined]
    helpers.get_device_name = lambda *_: ""  # type: ignore[attr-defined]
    sys.modules |= {logger.__name__: logger, helpers.__name__: helpers}

"""Programs for the simulator are kept between runs, per machine, outside the checkout."""

from __future__ import annotations

import jax

import attn_dispatch as ad
from attn_dispatch.adapters.environment import cache_folder

# Machine code is for the CPU that it was made on.
folder = cache_folder("jax", str(ad.platform.facts.get("fingerprint", "any")))
jax.config.update("jax_compilation_cache_dir", str(folder))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

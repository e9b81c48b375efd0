"""Programs for the simulator take seconds to compile: kept between runs, per machine, outside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import jax

import attn_dispatch as ad

_FOLDER = Path(
    os.environ.get("ATTN_DISPATCH_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "attn-dispatch"
).expanduser()

# Machine code is for the CPU that it was made on.
jax.config.update("jax_compilation_cache_dir", str(_FOLDER / "jax" / str(ad.platform.facts.get("fingerprint", "any"))))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

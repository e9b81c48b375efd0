"""attn_dispatch: one paged-attention contract over every vendor runtime.

    import attn_dispatch as ad

    spec = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16", block_size=32)
    attn = ad.attention(spec)                       # the fastest correct backend of this machine
    cache = attn.allocate(num_blocks=1024)
    batch = ad.AttentionMetadata.build(query_lens=[5, 1], seq_lens=[5, 130], block_tables=[[7], [3, 9, 0, 4, 1]])
    out = attn.run(attn.plan(batch), q, k, v, cache)

The platform is detected and the installed backends are ranked when this module is imported; a vendor's library is
imported when its backend is first used.
"""

import os as _os
import warnings as _warnings
from dataclasses import replace as _replace

from attn_dispatch import dispatch as _dispatch
from attn_dispatch import errors
from attn_dispatch import observe as _observe
from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.block_size import common_size as common_block_size
from attn_dispatch.cache import CacheManager
from attn_dispatch.caches import Caches
from attn_dispatch.contract import (
    CONTRACT_VERSION,
    HND,
    NHD,
    AttentionMetadata,
    AttentionSpec,
    CacheLayout,
    KVCache,
    LayerParameters,
)
from attn_dispatch.dispatch import Explanation, backends, explain, use_backend
from attn_dispatch.hardware import Platform
from attn_dispatch.merge import merge_states
from attn_dispatch.observe import stats

_observe.configure(_os.environ)

platform: Platform = _dispatch.machine()
"""What this machine is: `.name` ("cpu", "cuda"...), `.description`, `.facts`. With ATTN_DISPATCH_PLATFORM, what it is
to be treated as."""

default_backend: str | None
"""The backend that is tried first: the one that is named, or the first that could run here; a spec that it refuses
goes to the next. Worked out when it is asked for, as plug-ins have to be loaded to say whether they could."""


def __getattr__(name: str) -> str | None:
    if name == "default_backend":
        return _dispatch.default_backend()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    platform = _replace(platform, name=_dispatch.platform())
except (errors.EnvironmentVariableError, errors.UnknownBackendError) as _error:
    # Raised again by whatever chooses a backend; importing must still be possible, to be able to say so.
    _warnings.warn(errors.AttentionDispatchWarning(str(_error)), stacklevel=2)

__all__ = [
    "CONTRACT_VERSION",
    "HND",
    "NHD",
    "Attention",
    "AttentionMetadata",
    "AttentionSpec",
    "Availability",
    "Backend",
    "CacheLayout",
    "CacheManager",
    "Caches",
    "Call",
    "Capabilities",
    "Explanation",
    "KVCache",
    "LayerParameters",
    "Plan",
    "Platform",
    "Refusal",
    "Verdict",
    "attention",
    "backends",
    "common_block_size",
    "default_backend",
    "errors",
    "explain",
    "merge_states",
    "platform",
    "stats",
    "use_backend",
]

"""The cache manager: which blocks belong to whom. Host bookkeeping only; it never sees a key or a value."""

from attn_dispatch.cache.manager import CacheManager
from attn_dispatch.cache.pool import BlockPool
from attn_dispatch.cache.radix import PrefixTree
from attn_dispatch.cache.results import OutOfBlocks, ScheduledStep, Swap, Usage
from attn_dispatch.cache.sequence import Sequence
from attn_dispatch.cache.waiting import WaitingQueue

__all__ = [
    "BlockPool", "CacheManager", "OutOfBlocks", "PrefixTree", "ScheduledStep", "Sequence", "Swap", "Usage",
    "WaitingQueue",
]  # fmt: skip

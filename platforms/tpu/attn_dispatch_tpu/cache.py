"""The cache of a functional library: each step makes the next version of the pages out of the one before.

JAX's arrays cannot be written to. A step is given the live pages to keep ("donated") and returns them with the new
tokens in; the memory is the same, the array object is another. So there is one live version, the cache has it, and an
array that somebody took from the cache before a step is dead after it: JAX raises when it is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_dispatch.contract import KVCache
from attn_dispatch.errors import CacheError

__all__ = ["FunctionalCache"]


class FunctionalCache(KVCache):
    """A `KVCache` whose arrays are replaced, not written."""

    __slots__ = ()

    def live(self, name: str) -> Any:
        """Return the live version of an array.

        Raises:
            CacheError: somebody else donated it, or a step failed half-way: what it held is gone.
        """
        array = self.arrays[name]
        if array.is_deleted():
            raise CacheError(
                f"the cache's {name!r} has been deleted: it was donated to a computation that is not attn_dispatch's, "
                "or a step on it failed. Allocate a new cache and prefill it again"
            )
        return array

    def replace(self, name: str, array: Any) -> None:
        """Make this the live version."""
        self.arrays[name] = array

    def arrays_as(self, library: str) -> Mapping[str, Any]:
        """Return the arrays, of JAX only: a view in another library would go stale with the next step, unnoticed.

        Raises:
            CacheError: another library was asked for.
        """
        if library != "jax":
            raise CacheError(
                f"the cache's pages are JAX's, and replaced by every step: a view of {library} would be stale after "
                "the next one. gather() copies blocks out"
            )
        return self.arrays

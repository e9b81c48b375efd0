"""Every error of the library: each says what was asked, what was found and what to do.

All are `AttentionDispatchError`; what is by nature also a `ValueError` or a `RuntimeError` is that too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArrayError",
    "AttentionDispatchError",
    "AttentionDispatchWarning",
    "BackendLoadError",
    "BackendRefusedError",
    "CacheError",
    "ContractVersionError",
    "EnvironmentVariableError",
    "FallbackWarning",
    "GradientError",
    "MetadataError",
    "MissingPackageError",
    "ModelError",
    "NoBackendError",
    "PlanError",
    "SpecError",
    "UnknownBackendError",
    "nearest",
]


class AttentionDispatchError(Exception):
    """The base of every error that this library raises on its own account."""


class SpecError(AttentionDispatchError, ValueError):
    """A field of an `AttentionSpec` (or a layer's parameter) cannot be what it was said to be."""


class MetadataError(AttentionDispatchError, ValueError):
    """A batch contradicts itself: lengths, block ids or slots. Nothing has been written."""


class ArrayError(AttentionDispatchError, ValueError):
    """A query, key, value or output array has the wrong shape, dtype, library or device."""


class GradientError(AttentionDispatchError, RuntimeError):
    """A gradient was asked of attention over a paged cache, which has none."""


class CacheError(AttentionDispatchError, ValueError):
    """A cache does not fit the call: too few blocks, another layout, another shape."""


class PlanError(AttentionDispatchError, ValueError):
    """A plan was given to a layer that it was not made for."""


class UnknownBackendError(AttentionDispatchError, ValueError):
    """No installed backend has that name."""


class EnvironmentVariableError(AttentionDispatchError, ValueError):
    """An `ATTN_DISPATCH_*` variable is not known, or its value makes no sense."""


class NoBackendError(AttentionDispatchError, RuntimeError):
    """Nothing that is installed can run the spec. The message is the verdict table."""


class BackendRefusedError(NoBackendError):
    """The backend that was asked for by name cannot run the spec; nothing else was tried."""


class BackendLoadError(AttentionDispatchError, RuntimeError):
    """An installed backend could not be imported."""


class ContractVersionError(BackendLoadError):
    """An installed backend was written for another version of the contract."""


class MissingPackageError(AttentionDispatchError, RuntimeError):
    """A package that the call needs is not installed. The message ends with the command that installs it."""


class ModelError(AttentionDispatchError, ValueError):
    """A model cannot be found, or asks for something that the contract has no word for."""


class AttentionDispatchWarning(UserWarning):
    """The base of the library's warnings."""


class FallbackWarning(AttentionDispatchWarning):
    """Nobody named a backend, and the one that was chosen is not one for this machine's accelerator."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the known name most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""

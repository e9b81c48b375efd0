"""Importing a vendor, with whatever it dies of turned into an error that says what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

from attn_dispatch.errors import BackendLoadError

__all__ = ["load"]


def load(module: str, remedy: str) -> ModuleType:
    """Import torch and a vendor's module.

    Raises:
        BackendLoadError: either does not import (a torch without the libraries that its build links to, an extension
            built for another torch). IPEX ends the whole process when it dislikes the torch that it finds: that, too.
    """
    for name in ("torch", module):
        try:
            found = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a vendor dies of is the reason
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise BackendLoadError(f"{name} is installed but does not import ({text}). {remedy}") from error
    return found

"""The environment variables: which exist, what they say, and an error for one that does not exist (clause 8)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attn_dispatch import hardware
from attn_dispatch.errors import EnvironmentVariableError, nearest

__all__ = ["PREFIX", "VARIABLES", "Settings"]

PREFIX = "ATTN_DISPATCH_"

VARIABLES: Mapping[str, str] = {
    "ATTN_DISPATCH_BACKEND": "the one backend to use: it runs, or raises its verdict",
    "ATTN_DISPATCH_PREFER": "backends to try first, in order, separated by commas",
    "ATTN_DISPATCH_DISABLE": "backends that are not chosen unless named, separated by commas",
    "ATTN_DISPATCH_PLATFORM": f"the platform to choose for, instead of the detected one: {', '.join(hardware.NAMES)}",
    "ATTN_DISPATCH_NUM_THREADS": "threads of backends that compute on the CPU (default: what the process was given)",
    "ATTN_DISPATCH_CACHE_DIR": "folder for converted models, machine code and tuning tables",
    "ATTN_DISPATCH_LOG": "debug, info, warning or error: a log on standard error; anything else: a file for all of it",
    "ATTN_DISPATCH_STATS": "1: count runs and print the counters when the process ends; a file: as JSON there",
}
"""The core's own. A plug-in declares its by entry point, in the group `attn_dispatch.environment`."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    backend: str | None = None
    prefer: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    platform: str | None = None

    @classmethod
    def read(cls, known: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Args:
            known: names that installed plug-ins declare.
            environ: instead of the process's own.

        Raises:
            EnvironmentVariableError: a name that nobody declares, or a value that makes no sense.
        """
        environ = os.environ if environ is None else environ
        names = sorted({*VARIABLES, *known})
        for name in environ:
            if name.startswith(PREFIX) and name not in names:
                raise EnvironmentVariableError(
                    f"environment variable {name} is not known.{nearest(name, names)} Known: {', '.join(names)}"
                )
        platform = environ.get(f"{PREFIX}PLATFORM") or None
        if platform is not None and platform not in hardware.NAMES:
            raise EnvironmentVariableError(
                f"{PREFIX}PLATFORM={platform!r} is not a platform.{nearest(platform, hardware.NAMES)} "
                f"Known: {', '.join(hardware.NAMES)}"
            )
        threads = environ.get(f"{PREFIX}NUM_THREADS") or None
        if threads is not None and not (threads.isdecimal() and int(threads) > 0):
            raise EnvironmentVariableError(f"{PREFIX}NUM_THREADS={threads!r} must be a whole number, 1 or more")
        return cls(
            backend=environ.get(f"{PREFIX}BACKEND") or None,
            prefer=_names(environ.get(f"{PREFIX}PREFER", "")),
            disable=_names(environ.get(f"{PREFIX}DISABLE", "")),
            platform=platform,
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())

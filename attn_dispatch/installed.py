"""What is installed on which machine, and what each backend says: the facts that selection works with."""

from __future__ import annotations

from functools import cache

from attn_dispatch import hardware
from attn_dispatch.backend import Availability, Backend, Refusal, Verdict
from attn_dispatch.block_size import resolved
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import BackendLoadError, EnvironmentVariableError, UnknownBackendError, nearest
from attn_dispatch.explanation import Specs, alternatives
from attn_dispatch.registry import Registry
from attn_dispatch.settings import Settings

__all__ = ["availability", "machine", "registry", "settings", "verdict_of"]


@cache
def registry() -> Registry:
    """Return the installed backends (their metadata is read once)."""
    return Registry()


@cache
def machine() -> hardware.Platform:
    """Return what this machine is (its files are read once)."""
    return hardware.detect()


def settings() -> Settings:
    """Return what the environment asks for now.

    Raises:
        EnvironmentVariableError: a variable is not known, or one names a backend that is not installed.
        UnknownBackendError: the latter, of ATTN_DISPATCH_BACKEND.
    """
    asked = Settings.read(registry().environment)
    known = registry().names()
    variables = (
        ("BACKEND", [asked.backend] if asked.backend else []),
        ("PREFER", asked.prefer),
        ("DISABLE", asked.disable),
    )
    for variable, names in variables:
        for name in names:
            if name not in known:
                error = UnknownBackendError if variable == "BACKEND" else EnvironmentVariableError
                raise error(
                    f"ATTN_DISPATCH_{variable} names {name!r}, which is not installed.{nearest(name, known)} "
                    f"Installed: {', '.join(known)}"
                )
    return asked


def availability(name: str | Backend) -> Availability:
    """Return what a backend's probe says; that it cannot be asked is a no as well."""
    try:
        available: object = (registry().load(name) if isinstance(name, str) else name).probe()
    except (BackendLoadError, EnvironmentVariableError) as error:
        return Availability(False, str(error), "attn-dispatch doctor shows each plug-in")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in is somebody else's code
        return Availability(False, f"its probe raised {type(error).__name__}: {error}", "Report it to its maintainers")
    if not isinstance(available, Availability):
        return Availability(False, f"its probe returned {available!r}, not an Availability")
    return available


def verdict_of(name: str | Backend, specs: AttentionSpec | Specs, scaled: bool = False) -> Verdict:
    """Return what a backend says on this machine; one that cannot be loaded or has no hardware says no.

    Args:
        name: the backend.
        specs: what the layer needs, or everything that a variant is made of: the first no is then the answer.
        scaled: the layer has a k_scale or v_scale that is not 1.

    Raises:
        EnvironmentVariableError: a variable of the backend's own makes no sense.
    """
    try:
        backend = registry().load(name) if isinstance(name, str) else name
        if isinstance(name, str) and (failure := registry().vendor_failure(name)):
            raise failure
        available = backend.probe()
        if not available:
            return Verdict(backend.name, (Refusal("", None, available.reason, available.remedy),))
        if scaled and not backend.capabilities.applies_scales:
            accepts = "its kernels ignore scales of a quantised cache"
            return backend.refuse(Refusal("k_scale, v_scale", "not 1", accepts, "Use scales of 1, or another backend"))
        return _verdict(backend, specs)
    except EnvironmentVariableError:
        raise
    except BackendLoadError as error:
        return Verdict(str(name), (Refusal("", None, str(error)),), failed=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in is somebody else's code
        text = f"asking it raised {type(error).__name__}: {error}"
        return Verdict(str(name), (Refusal("", None, text, "Report it to its maintainers"),), failed=True)


def _verdict(backend: Backend, specs: AttentionSpec | Specs) -> Verdict:
    verdicts = []
    for options in alternatives(specs):
        answers = [backend.verdict(resolved(backend, option)) for option in options]
        for answer in answers:
            _check_verdict(answer)
        verdicts.append(next((answer for answer in answers if answer), answers[0]))
    return next((verdict for verdict in verdicts if not verdict), verdicts[0])


def _check_verdict(answer: object) -> None:
    if not isinstance(answer, Verdict):
        raise TypeError(f"verdict() returned {answer!r}, not a Verdict")

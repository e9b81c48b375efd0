"""What loading a backend by name does: it imports no vendor, and the backend that was named is the one that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from attn_dispatch.attention import attention
from attn_dispatch.backend import Backend
from attn_dispatch.conformance.adaptation import plain_spec
from attn_dispatch.conformance.case import Case
from attn_dispatch.conformance.checks import run_case
from attn_dispatch.conformance.findings import ConformanceError, NotRun
from attn_dispatch.dispatch import registry, use_backend

__all__ = ["check_loading", "check_selection", "loaded_vendors"]

_PROBE = """
import json, sys
import attn_dispatch as ad
from attn_dispatch.dispatch import registry, verdict_of
print(json.dumps(sorted(sys.modules)))
entry = registry().entry(sys.argv[1])
try:
    backend = registry().load(sys.argv[1])
    verdict_of(backend, ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64))
finally:
    print(json.dumps([entry.entry_point.value.partition(":")[0].partition(".")[0], sorted(sys.modules)]))
"""

_LIGHT = frozenset({"packaging", "typing_extensions"})
"""Pure Python that reads versions and names types: no vendor's."""


def loaded_vendors(name: str) -> list[str]:
    """Return which packages a new process imports when it loads, probes and asks the backend of this name.

    Of any package, whether anybody has heard of it or not: left out are the standard library, the core with what it
    needs, and the backend's own package.

    Raises:
        ConformanceError: the process failed.
    """
    done = subprocess.run([sys.executable, "-c", _PROBE, name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConformanceError(f"loading {name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    first, second = map(json.loads, done.stdout.splitlines()[-2:])
    own, after = second
    packages = {module.partition(".")[0] for module in set(after) - set(first)}
    return sorted(
        package
        for package in packages - {own, "attn_dispatch"} - _LIGHT
        if package not in sys.stdlib_module_names and not package.startswith(("__editable__", "__mp_main__"))
    )


def _installed(backend: Backend) -> str:
    if backend.name not in registry().names() or registry().load(backend.name) is not backend:
        raise NotRun("this backend is not installed, and has no name to be loaded by")
    return backend.name


def check_loading(backend: Backend) -> None:
    """Loading, probing and asking it costs no vendor import and initialises no device."""
    vendors = loaded_vendors(_installed(backend))
    if vendors:
        raise ConformanceError(
            f"clause 9: loading {backend.name}, probing it and asking for a verdict imported {', '.join(vendors)}: "
            "import a vendor in the methods that compute"
        )


def check_selection(backend: Backend) -> None:
    """Named by argument, context or variable, it runs; no other is asked to."""
    name = _installed(backend)
    spec = plain_spec(backend)
    with use_backend(name):
        chosen = [attention(spec)]
    before = os.environ.get("ATTN_DISPATCH_BACKEND")
    os.environ["ATTN_DISPATCH_BACKEND"] = name
    try:
        chosen += [attention(spec), attention(spec, name)]
    finally:
        if before is None:
            del os.environ["ATTN_DISPATCH_BACKEND"]
        else:
            os.environ["ATTN_DISPATCH_BACKEND"] = before
    if any(attn.backend is not backend for attn in chosen):
        raise ConformanceError(f"clause 8: {name} was named, {', '.join(str(attn.backend) for attn in chosen)} chosen")
    ran: list[str] = []
    others = [registry().load(other) for other in registry().names() if _loads(other)]
    for other in others:
        vars(other)["run"] = _recorded(other.name, other.run, ran)
    try:
        run_case(backend, Case("proof", "proof", spec, (5, 0), (1, 9)), mutations=False)
    finally:
        for other in others:
            vars(other).pop("run")
    if set(ran) != {name}:
        raise ConformanceError(f"clause 8: {name} was named, and {', '.join(sorted(set(ran))) or 'nothing'} ran")


def _loads(name: str) -> bool:
    try:
        registry().load(name)
    except RuntimeError:
        return False
    return True


def _recorded(name: str, run: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def recorded(*args: Any, **keywords: Any) -> Any:
        ran.append(name)
        return run(*args, **keywords)

    return recorded

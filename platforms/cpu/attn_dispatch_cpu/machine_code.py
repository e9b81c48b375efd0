"""Compiled kernels: one per kind of cache, kept on disk so that only the first process of a machine compiles.

A file holds the object code of one kernel; its name is a hash of all that the code depends on (this package's source,
Numba, llvmlite, Python, the CPU and its flags), so that nothing is ever overwritten by something different: two
processes that compile at once write the same file, each in one rename. A folder that cannot be read or written, and a
file that is damaged, cost a compilation and nothing else. Code is run from files and folders only that nobody but this
user and root may change (see `trusted_files`). Numba itself is imported to compile, not to load.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from attn_dispatch.adapters import environment
from attn_dispatch_cpu import trusted_files
from attn_dispatch_cpu.kernels.isa import cpu_identity, host_isa, target_machine

Kernel = Callable[[int, int, int], None]
"""`(address of the arguments, address of the call, number of the worker)`; runs without the GIL."""

_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_SYMBOL = "attn_dispatch_kernel"
_FOLDER = "cpu-numba"

_compiled: dict[tuple[str, int, str], Kernel] = {}
_engines: list[llvm.ExecutionEngine] = []  # own the code that `_compiled` points into
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child of a process that compiles at this moment would find Numba and LLVM locked for ever: it is made after.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def kernel(name: str, kind: int = 0, path: str = "fma") -> Kernel:
    """Return a kernel, compiled at most once per process.

    Args:
        name: "decode", "prefill", "write", "merge", "wait" or "rate".
        kind: of the cache's elements (see `kernels.kinds`); 0 for "merge" and "wait".
        path: see `code_path`.
    """
    key = (name, kind, path)
    compiled = _compiled.get(key)
    if compiled is None:
        with _lock:
            compiled = _compiled.get(key)
            if compiled is None:
                compiled = _compiled[key] = _load(*key)
    return compiled


def cache_folder() -> Path:
    """Return the folder of machine code; it need not exist."""
    return environment.cache_folder(_FOLDER)


def cache_file(stem: str, suffix: str) -> Path:
    """Return where something that depends on this CPU and this package's source is kept."""
    return cache_folder() / f"{stem}-{_fingerprint()}.{suffix}"


def _load(name: str, kind: int, path: str) -> Kernel:
    stem = f"{name}-{kind}-{path}"
    file = cache_file(stem, "o")
    code = trusted_files.read(file)
    if code is None:
        start = time.perf_counter()
        _tell(f"attn_dispatch: compiling cpu/numba {stem} for this CPU... ")
        code = _compile(name, kind, path)
        refusal = keep(file, code)
        outcome = f"not kept: {refusal}" if refusal else f"kept in {file.parent}"
        _tell(f"{time.perf_counter() - start:.1f} s, {outcome}\n")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return _PROTOTYPE(engine.get_function_address(_SYMBOL))


def _compile(name: str, kind: int, path: str) -> bytes:
    from attn_dispatch_cpu.kernels.build import compile_module

    code: bytes = target_machine().emit_object(compile_module(name, kind, path, _SYMBOL))
    return code


def keep(file: Path, content: bytes) -> str:
    """Write a file; return why it could not be, or ""."""
    try:
        environment.make_cache_folder(_FOLDER)
    except OSError as error:
        return str(error)
    return trusted_files.write(file, content)


@cache
def _fingerprint() -> str:
    """A hash of everything that machine code depends on."""
    digest = hashlib.sha256()
    source = Path(__file__).parent
    for path in sorted([*source.glob("kernels/*.py"), source / "machine_code.py"]):
        digest.update(path.read_bytes())
    versions = (version("numba"), version("llvmlite"), sys.version, sys.platform, *cpu_identity(), repr(host_isa()))
    digest.update("\0".join(versions).encode())
    return digest.hexdigest()[:24]


def _tell(text: str) -> None:
    """Say it to a person: nothing is written where nobody sits."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(text)
        sys.stderr.flush()


__all__ = ["Kernel", "cache_file", "cache_folder", "keep", "kernel"]

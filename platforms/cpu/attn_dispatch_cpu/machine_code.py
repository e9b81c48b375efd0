"""Compiled kernels: one per kind of cache, kept on disk so that only the first process of a machine compiles.

The folder is `ATTN_DISPATCH_CACHE_DIR`, else the user's cache folder. A file holds one kernel; its name is a hash of
all that its code depends on (this package's source, Numba, llvmlite, Python, the CPU and its flags), so that nothing is
ever overwritten by something different: two processes that compile at once write the same file, each in one rename. A
folder that cannot be read or written, and a file that is damaged, cost a compilation and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import platformdirs
from numba import int64, njit, void
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from attn_dispatch_cpu.kernels.isa import cpu_identity, host_isa
from attn_dispatch_cpu.kernels.merge import make_merge_kernel
from attn_dispatch_cpu.kernels.narrow import make_narrow_kernel
from attn_dispatch_cpu.kernels.wait import make_wait_kernel
from attn_dispatch_cpu.kernels.wide import make_wide_kernel
from attn_dispatch_cpu.kernels.write import make_write_kernel

Kernel = Callable[[int, int], None]
"""`(address of a job, number of the worker)`; runs without the GIL."""

SIGNATURE = void(int64, int64)
# No flag that lets LLVM assume NaN or infinity away: masked rows and empty rows depend on them.
OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
_DIGEST_BYTES = 32

_compiled: dict[tuple[str, int, bool], Kernel] = {}
_lock = threading.Lock()


def kernel(name: str, kind: int = 0, dot: bool = False) -> Kernel:
    """Return a kernel, compiled at most once per process.

    Args:
        name: "narrow", "wide", "write", "merge" or "wait".
        kind: of the cache's elements (see `kernels.elements`); 0 for "merge" and "wait".
        dot: queries and cache are bf16, and the CPU multiplies pairs of them.
    """
    key = (name, kind, dot)
    found = _compiled.get(key)
    if found is None:
        with _lock:
            found = _compiled.get(key)
            if found is None:
                found = _compiled[key] = _load(*key)
    return found


def cache_folder() -> Path:
    """Return the folder of machine code; it need not exist."""
    chosen = os.environ.get("ATTN_DISPATCH_CACHE_DIR")
    return Path(chosen or platformdirs.user_cache_dir("attn-dispatch", appauthor=False)) / "cpu-numba"


def _load(name: str, kind: int, dot: bool) -> Kernel:
    isa = host_isa()
    if name == "narrow":
        function = make_narrow_kernel(isa, kind, dot)
    elif name == "wide":
        function = make_wide_kernel(isa, kind, dot)
    elif name == "write":
        function = make_write_kernel(isa, kind)
    elif name == "merge":
        function = make_merge_kernel(isa)
    else:
        function = make_wait_kernel()
    dispatcher = njit(**OPTIONS)(function)
    stem = f"{name}-{kind}{'-dot' if dot else ''}"
    dispatcher._cache = KernelFile(cache_folder() / f"{stem}-{_fingerprint()}.code", stem)
    dispatcher.compile(SIGNATURE)
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


@cache
def _fingerprint() -> str:
    """A hash of everything that machine code depends on."""
    digest = hashlib.sha256()
    source = Path(__file__).parent
    for path in sorted([*source.glob("kernels/*.py"), source / "machine_code.py"]):
        digest.update(path.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, sys.version, sys.platform, *cpu_identity(), repr(host_isa()))
    digest.update("\0".join(versions).encode())
    return digest.hexdigest()[:24]


class KernelFile(_Cache):  # type: ignore[misc]
    """Numba's cache of one function with one signature, as one file: SHA-256 of the rest, then a pickle.

    Numba's own keeps an index beside the code, which processes rewrite in turn, and checks neither; and its folder is a
    setting of the whole process, which belongs to the user's other Numba code.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._started = 0.0

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(self._path.parent)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the kernel from its file, or None: then Numba compiles."""
        target_context.refresh()
        try:
            data = self._path.read_bytes()
        except OSError:  # none yet, or not for us to read: compile
            data = b""
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() == data[:_DIGEST_BYTES]:
            return CompileResult._rebuild(target_context, *pickle.loads(data[_DIGEST_BYTES:]))
        self._started = time.perf_counter()
        _tell(f"attn_dispatch: compiling cpu/numba {self._what} for this CPU... ")
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the file, in one rename; a folder that cannot be written is no error."""
        body = dumps(data._reduce())
        temporary = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        kept = f"kept in {self._path.parent}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(body).digest() + body)
            os.replace(temporary, self._path)
        except OSError as error:
            kept = f"not kept: {error}"
            temporary.unlink(missing_ok=True) if os.access(self._path.parent, os.W_OK) else None
        _tell(f"{time.perf_counter() - self._started:.1f} s, {kept}\n")

    def enable(self) -> None:
        """Always on."""

    def disable(self) -> None:
        """Always on."""

    def flush(self) -> None:
        """Nothing is pending."""


def _tell(text: str) -> None:
    """Say it to a person: nothing is written where nobody sits."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(text)
        sys.stderr.flush()


__all__ = ["Kernel", "KernelFile", "cache_folder", "kernel"]

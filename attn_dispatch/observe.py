"""What happens, for people and tools: a log, ranges in a profiler's trace, counters. All of it is off by default.

    ATTN_DISPATCH_LOG=info       what was chosen and why, on standard error (`debug`: plans too; else a file's name)
    ATTN_DISPATCH_STATS=1        `ad.stats()` counts, and is printed when the process ends (else a JSON file's name)

The log is `logging.getLogger("attn_dispatch")`: INFO what was chosen for a spec and why, WARNING fallbacks, DEBUG
plans.
Under torch's profiler (and so in NVTX and whatever else reads its ranges) each run is a range that is called
`attn_dispatch::cpu/numba::decode`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from attn_dispatch.contract import AttentionSpec
from attn_dispatch.contract.dtypes import itemsize

__all__ = ["LOGGER", "PhaseCounters", "compiling", "configure", "log_plan", "phase_of", "run_observer", "stats"]

LOGGER = logging.getLogger("attn_dispatch")
LOGGER.addHandler(logging.NullHandler())

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _View(Protocol):
    """What is read of a plan's view: see `contract.BatchView`."""

    max_query_len: int
    query_lens: Any
    kv_lens: Any


class _Plan(Protocol):
    """What is read of a plan: see `backend.Plan`."""

    spec: AttentionSpec
    num_tokens: int

    @property
    def view(self) -> Any: ...


@dataclass
class PhaseCounters:
    """What the runs of one backend in one phase came to.

    Attributes:
        calls: of `Attention.run`.
        tokens: query tokens.
        moved_bytes: queries, outputs, and the keys and values that were attended to, at the cache's width.
        seconds: of the caller's thread; of a device that works by itself, the time to launch.
    """

    calls: int = 0
    tokens: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Statistics:
    """Everything that was counted: by backend, then by phase; and seconds of compiling by backend."""

    runs: dict[str, dict[str, PhaseCounters]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_run(self, backend: str, plan: _Plan, seconds: float) -> None:
        with self.lock:
            counters = self.runs.setdefault(backend, {}).setdefault(phase_of(plan), PhaseCounters())
            counters.calls += 1
            counters.tokens += plan.num_tokens
            counters.moved_bytes += _moved_bytes(plan)
            counters.seconds += seconds

    def as_dict(self) -> dict[str, dict[str, Any]]:
        with self.lock:
            names = dict.fromkeys([*self.runs, *self.compile_seconds])
            return {
                name: {
                    "phases": {phase: asdict(counters) for phase, counters in self.runs.get(name, {}).items()},
                    "compile_seconds": self.compile_seconds.get(name, 0.0),
                }
                for name in names
            }


_statistics = _Statistics()
_counting = False


def configure(environ: Mapping[str, str]) -> None:
    """Switch on what the environment asks for. A file that cannot be opened is a warning in the log, no error."""
    if log := environ.get("ATTN_DISPATCH_LOG"):
        _configure_log(log)
    if report := environ.get("ATTN_DISPATCH_STATS"):
        stats(enable=report != "0")
        if report != "0":
            atexit.register(_write_report, report)


def _configure_log(target: str) -> None:
    handler: logging.Handler = logging.StreamHandler()
    level = _LEVELS.get(target.lower(), logging.DEBUG)
    if target.lower() not in _LEVELS:
        try:
            handler = logging.FileHandler(os.path.expanduser(target), encoding="utf-8")
        except OSError as error:
            LOGGER.addHandler(handler)
            LOGGER.warning("ATTN_DISPATCH_LOG: %s. Names of levels: %s", error, ", ".join(_LEVELS))
            return
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)


def _write_report(target: str) -> None:
    if target != "1":
        with contextlib.suppress(OSError), open(os.path.expanduser(target), "w", encoding="utf-8") as file:
            json.dump(stats(), file, indent=1)
        return
    for backend, counted in stats().items():
        for phase, c in counted["phases"].items():
            sys.stderr.write(
                f"attn_dispatch: {backend} {phase}: {c['calls']} calls, {c['tokens']} tokens, "
                f"{c['moved_bytes'] / 1e9:.3f} GB, {c['seconds']:.3f} s\n"
            )
        if counted["compile_seconds"]:
            sys.stderr.write(f"attn_dispatch: {backend}: compiled for {counted['compile_seconds']:.1f} s\n")


def stats(enable: bool | None = None) -> dict[str, dict[str, Any]]:
    """Return what was counted: by backend its `phases` (decode, prefill, mixed) and its `compile_seconds`.

    Args:
        enable: begin to count from nothing, or stop (None: leave it as it is). ATTN_DISPATCH_STATS=1 begins at import.
    """
    global _counting, _statistics
    if enable is not None:
        if enable:
            _statistics = _Statistics()
        _counting = enable
    return _statistics.as_dict()


def phase_of(plan: _Plan) -> str:
    """Return "decode" (no sequence has more than one query), "prefill" (all have) or "mixed"."""
    view: _View = plan.view
    if view.max_query_len <= 1:
        return "decode"
    return "mixed" if (view.query_lens == 1).any() else "prefill"


def log_plan(backend: str, plan: _Plan) -> None:
    """Write a plan to the log, where somebody reads that much."""
    if LOGGER.isEnabledFor(logging.DEBUG):
        view = plan.view
        LOGGER.debug(
            "%s planned a %s step: %d sequences, %d tokens, longest query %d, longest context %d",
            backend, phase_of(plan), len(view.kv_lens), plan.num_tokens, view.max_query_len, view.max_kv_len,
        )  # fmt: skip


def _moved_bytes(plan: _Plan) -> int:
    spec = plan.spec
    query_bytes = spec.num_heads * (spec.head_size + spec.value_head_size) * itemsize(spec.dtype)
    key_bytes = spec.num_kv_heads * (spec.head_size + spec.value_head_size) * itemsize(spec.kv_cache_dtype)
    return int(plan.num_tokens * query_bytes + int(plan.view.kv_lens.sum()) * key_bytes)


def _no_profiler() -> bool:
    """Say whether torch's profiler records; once torch is imported, its own function takes this one's place."""
    global _profiling
    torch = sys.modules.get("torch")
    enabled = getattr(getattr(getattr(torch, "_C", None), "_autograd", None), "_profiler_enabled", None)
    if enabled is None:
        return False
    _profiling = enabled
    return bool(enabled())


_profiling: Callable[[], bool] = _no_profiler


def run_observer() -> Callable[[str, Any], AbstractContextManager[None]] | None:
    """Return what a run is to be wrapped in, given the backend's name and the plan; None, as a rule, for nothing."""
    return _observed if _counting or _profiling() else None


@contextlib.contextmanager
def _observed(backend: str, plan: _Plan) -> Iterator[None]:
    record: Any = contextlib.nullcontext()
    if _profiling():
        record = sys.modules["torch"].profiler.record_function(f"attn_dispatch::{backend}::{phase_of(plan)}")
    started = time.perf_counter()
    with record:
        yield
    if _counting:
        _statistics.add_run(backend, plan, time.perf_counter() - started)


@contextlib.contextmanager
def compiling(backend: str, what: str) -> Iterator[None]:
    """Tell of something that takes seconds, once: a line on a terminal, a record in the log, a time in `stats()`.

    Args:
        backend: its name.
        what: is compiled, for people ("the decode kernel for bfloat16").
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    line = f"{backend}: compiling {what}"
    if terminal:
        sys.stderr.write(f"{line}...")
        sys.stderr.flush()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        if terminal:
            sys.stderr.write(f"\r{' ' * (len(line) + 3)}\r")
            sys.stderr.flush()
        LOGGER.info("%s took %.1f s", line, seconds)
        if _counting:
            with _statistics.lock:
                _statistics.compile_seconds[backend] = _statistics.compile_seconds.get(backend, 0.0) + seconds

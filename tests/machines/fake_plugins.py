"""Backends for machines that are not here: they compute as the reference does, and say what the vendors' would say."""

from __future__ import annotations

from importlib.metadata import EntryPoint

from attn_dispatch import Availability, installed
from attn_dispatch.hardware import by_name
from attn_dispatch.reference import ReferenceBackend


class Compiled(ReferenceBackend):
    """Computes on the CPU, as cpu/numba."""


class Vendor(ReferenceBackend):
    """A vendor's kernels, of which the package is found but cannot be imported."""

    def import_vendor(self) -> None:
        raise ImportError("libvendor.so.9: undefined symbol: _ZN3c104cuda9SetDeviceEi")


class Portable(ReferenceBackend):
    """Computes where torch does, as torch/sdpa."""

    def probe(self) -> Availability:
        machine = installed.machine()
        if machine.torch_device != by_name(machine.name).torch_device:
            return Availability(True, "computes on the CPU here", evidence="ran on CPU")
        return Availability(True)


class NeverRun(ReferenceBackend):
    def probe(self) -> Availability:
        return Availability(True, "written against the vendor's signatures", evidence="never run")


class NotInstalled(ReferenceBackend):
    def probe(self) -> Availability:
        return Availability(False, "its vendor is not installed", "pip install vendor")


class ProbeRaises(ReferenceBackend):
    def probe(self) -> Availability:
        raise RuntimeError("the driver said [/no]")


class VerdictExits(ReferenceBackend):
    def verdict(self, spec: object) -> object:  # type: ignore[override]
        raise SystemExit(3)


class VerdictIsADict(ReferenceBackend):
    def verdict(self, spec: object) -> object:  # type: ignore[override]
        return {"yes": True}


def entry(rank: int, name: str, value: str, platform: str) -> EntryPoint:
    """Declare one backend of this file, or the reference."""
    module = "attn_dispatch.reference" if value == "ReferenceBackend" else "fake_plugins"
    return EntryPoint(f"{rank} {name}", f"{module}:{value}", f"attn_dispatch.backends.{platform}")


REFERENCE = entry(99, "reference", "ReferenceBackend", "any")
COMPILED = entry(20, "cpu/compiled", "Compiled", "cpu")


def portable() -> list[EntryPoint]:
    """Declare the portable backend as torch/sdpa is: on every platform that torch has devices of, and on the CPU."""
    return [entry(80, "torch/portable", "Portable", platform) for platform in ("cuda", "rocm", "xpu", "cpu")]

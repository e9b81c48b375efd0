"""One accelerator, and how it is called in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Device", "count"]

_MAKERS = {"nvidia": "NVIDIA", "amd": "AMD", "intel-gpu": "Intel GPU", "tpu": "TPU"}


@dataclass(frozen=True)
class Device:
    """One accelerator that the operating system shows to this process.

    Attributes:
        kind: `nvidia`, `amd`, `intel-gpu` or `tpu`.
        name: what the operating system says: a model ("NVIDIA H200"), a target ("gfx942"), a generation ("v5e") or a
            PCI id ("8086:e20b").
        evidence: the file and the value that proved it.
        facts: what else the files say, such as `pci` (id), `slot` (PCI address), `node` (device file), `driver`,
            `integrated` ("yes" for a GPU that is a part of the CPU and has no memory of its own).
    """

    kind: str
    name: str
    evidence: str
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def integrated(self) -> bool:
        """It is a part of the CPU."""
        return self.facts.get("integrated") == "yes"

    def __str__(self) -> str:
        maker = _MAKERS.get(self.kind, self.kind)
        text = self.name if self.name.startswith(maker) else f"{maker} {self.name}"
        return f"{text} (integrated)" if self.integrated else text


def count(devices: Iterable[Device]) -> str:
    """Return devices in words: `8x AMD gfx942`."""
    words = [str(device) for device in devices]
    return ", ".join(f"{words.count(word)}x {word}" for word in dict.fromkeys(words))

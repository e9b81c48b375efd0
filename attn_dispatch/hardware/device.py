"""One accelerator, and how it is called in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .platforms import by_kind

__all__ = ["Device", "describe"]


@dataclass(frozen=True)
class Device:
    """One accelerator that the operating system shows to this process.

    Attributes:
        kind: one of `platforms.DEVICE_KINDS`.
        name: what the operating system says: a model ("NVIDIA H200"), a target ("gfx942"), a generation ("v5e") or a
            PCI id ("8086:e20b").
        evidence: the file and the value that proved it.
        facts: what else the files say, such as `pci` (id), `slot` (PCI address), `node` (device file), `driver`,
            `integrated` ("yes" for a GPU that is a part of the CPU and has no memory of its own), `access` ("no" for
            one whose device file this user may not open).
    """

    kind: str
    name: str
    evidence: str
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def integrated(self) -> bool:
        """It is a part of the CPU."""
        return self.facts.get("integrated") == "yes"

    @property
    def openable(self) -> bool:
        """This user may open its device file."""
        return self.facts.get("access") != "no"

    def __str__(self) -> str:
        maker = by_kind(self.kind).maker
        text = self.name if self.name.startswith(maker) else f"{maker} {self.name}"
        return f"{text} (integrated)" if self.integrated else text


def describe(devices: Iterable[Device]) -> str:
    """Return devices in words: `8x AMD gfx942`."""
    words = [str(device) for device in devices]
    return ", ".join(f"{words.count(word)}x {word}" for word in dict.fromkeys(words))

"""What every candidate said of a spec, as data and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attn_dispatch.backend import Verdict
from attn_dispatch.contract import AttentionSpec

__all__ = ["Explanation", "Specs", "alternatives", "table"]

Specs = Sequence[AttentionSpec | tuple[AttentionSpec, ...]]
"""Everything that one backend has to run; of a tuple, any one spec will do."""


def alternatives(specs: AttentionSpec | Specs) -> list[tuple[AttentionSpec, ...]]:
    """Return every need as its alternatives."""
    if isinstance(specs, AttentionSpec):
        return [(specs,)]
    return [need if isinstance(need, tuple) else (need,) for need in specs]


def table(head: str, verdicts: Iterable[Verdict]) -> str:
    """Return a sentence and a line for each verdict."""
    rows = [(verdict.backend, verdict.answer, str(verdict)) for verdict in verdicts]
    width = max((len(backend) for backend, _, _ in rows), default=0)
    return "\n".join([f"{head}:", *(f"  {name:<{width}}  {answer:<3}  {text}".rstrip() for name, answer, text in rows)])


@dataclass(frozen=True)
class Explanation:
    """The verdict table of one spec, as data; `str()` is for people.

    Attributes:
        spec: what was asked.
        platform: what it was chosen for.
        requested: the backend that was named, if one was.
        source: what decided: an argument, a variable, the platform's order.
        chosen: the backend that runs, or None.
        verdicts: what each candidate said, in the order of choice.
        disabled: backends that ATTN_DISPATCH_DISABLE keeps out of the choice.
        system: operating system and architecture, as in "linux/x86_64".
    """

    spec: AttentionSpec
    platform: str
    requested: str | None
    source: str
    chosen: str | None
    verdicts: tuple[Verdict, ...]
    disabled: tuple[str, ...] = ()
    system: str = "?/?"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [
            {
                "backend": v.backend,
                "answer": v.answer,
                "note": v.note,
                "refusals": [{**asdict(r), "value": None if r.value is None else str(r.value)} for r in v.refusals],
            }
            for v in self.verdicts
        ]
        return {
            "spec": asdict(self.spec),
            "platform": self.platform,
            "requested": self.requested,
            "source": self.source,
            "chosen": self.chosen,
            "verdicts": rows,
            "disabled": list(self.disabled),
        }

    def __str__(self) -> str:
        where = f"{self.platform} ({self.system})"
        if self.chosen:
            head = f"{self.chosen} runs {self.spec} on {where}, by {self.source}"
        elif self.requested:
            head = f"{self.requested}, named by {self.source}, cannot run {self.spec} on {where}"
        else:
            head = f"no backend can run {self.spec} on {where}"
        disabled = [f"  disabled by ATTN_DISPATCH_DISABLE: {', '.join(self.disabled)}"] if self.disabled else []
        return "\n".join([table(head, self.verdicts), *disabled])

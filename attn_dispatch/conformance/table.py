"""The support table as data: what the kit showed of each backend, written one entry per line, read back, printed.

Never written by hand. `attn-dispatch verify --json` writes it, `docs/evidence` keeps it, `as_markdown` shows it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from attn_dispatch.conformance.checklist import FEATURES
from attn_dispatch.contract import CONTRACT_VERSION

__all__ = ["KIT_VERSION", "Entry", "Row", "as_markdown", "report_text", "rows_of"]

KIT_VERSION = 3
"""Raised when a report made before a change can no longer be compared with one made after it."""


@dataclass(frozen=True)
class Entry:
    """One feature of one backend.

    Attributes:
        feature: what.
        state: "yes" (every check of it passed), "yes, N of M" (the others are refused or were not run), "no" (refused
            by verdict), "FAILED", "not run"; without the hardware, the evidence itself instead of a yes.
        evidence: how a yes is known: "ran", "ran on CPU"...
        detail: the refusals, or what failed.
        cases: the checks that passed.
        mutations: how many mistakes those were shown to notice.
    """

    feature: str
    state: str
    evidence: str
    detail: str
    cases: tuple[str, ...]
    mutations: int = 0


@dataclass(frozen=True)
class Row:
    """One backend on one machine: whether it could run there, and what each feature showed."""

    backend: str
    available: bool
    reason: str
    version: str
    evidence: str
    machine: str
    entries: tuple[Entry, ...]

    @property
    def failed(self) -> bool:
        """Whether a case of a spec that it accepts failed."""
        return any(entry.state == "FAILED" for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Return the row that `as_dict` described."""
        entries = tuple(Entry(**{**entry, "cases": tuple(entry["cases"])}) for entry in data["entries"])
        return cls(**{**data, "entries": entries})


def report_text(rows: Iterable[Row], machine: Mapping[str, str], command: str, **more: Any) -> str:
    """Return a report as JSON with one line per entry.

    Args:
        rows: of the table.
        machine: name and description of where it was made.
        command: that makes it anew.
        **more: what else the report holds (times, a doctor's report), one line each.
    """
    head = {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "contract": CONTRACT_VERSION,
        "kit": KIT_VERSION,
        "command": command,
        "machine": dict(machine),
        **more,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    blocks = []
    for row in rows:
        plain = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "entries"}
        block = [f"  {{{json.dumps(plain)[1:-1]},", '   "entries": [']
        block += [f"    {json.dumps(asdict(entry))}," for entry in row.entries]
        block[-1] = block[-1].removesuffix(",")
        blocks.append("\n".join([*block, "  ]}"]))
    return "\n".join(["{", *lines, ' "rows": [', ",\n".join(blocks), " ]", "}", ""])


def rows_of(file: Path) -> list[Row]:
    """Return the rows of a report (none, if it is a report of something else)."""
    return [Row.from_dict(row) for row in json.loads(file.read_text(encoding="utf-8")).get("rows", [])]


def commit() -> str:
    """Return the commit of this checkout, or the version of an installed package."""
    folder = Path(__file__).parents[2]
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    try:
        return metadata.version("attn-dispatch")
    except metadata.PackageNotFoundError:
        return "unknown"


def as_markdown(rows: Iterable[Row]) -> str:
    """Return the table: features down, backends across, refusals as notes below."""
    rows = list(rows)
    lines = [
        "| feature | " + " | ".join(f"`{row.backend}`" for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
        "| evidence | " + " | ".join(row.evidence for row in rows) + " |",
    ]
    by_feature = [{entry.feature: entry for entry in row.entries} for row in rows]
    lines += [
        f"| {feature} | " + " | ".join(_sign(entries.get(feature)) for entries in by_feature) + " |"
        for feature in FEATURES
    ]
    notes = []
    for row in rows:
        version = f" {row.version}" if row.version else ""
        notes += ["", f"### `{row.backend}`{version}", "", f"{row.evidence}, on {row.machine}. {row.reason}".rstrip()]
        features_of: dict[str, list[str]] = {}
        for entry in row.entries:
            if entry.detail:
                features_of.setdefault(entry.detail, []).append(entry.feature)
        notes += ["", *(f"- {', '.join(names)}: {text}" for text, names in features_of.items())] if features_of else []
    return "\n".join([*lines, *notes, ""])


def _sign(entry: Entry | None) -> str:
    if entry is None:
        return "not run"
    return "**FAILED**" if entry.state == "FAILED" else entry.state

"""`attn-dispatch doctor`: what this machine is, what is installed, what runs, and what to do about the rest.

Needs none of the packages of the extra `cli`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attn_dispatch import dispatch, hardware
from attn_dispatch.backend import Verdict
from attn_dispatch.block_size import resolved
from attn_dispatch.cli.installable import install_commands
from attn_dispatch.cli.model_config import layer_kinds
from attn_dispatch.cli.options import add_spec_options, spec_of
from attn_dispatch.cli.probe import Report, ask
from attn_dispatch.cli.text import emphasised, paragraph, table
from attn_dispatch.contract import AttentionSpec
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["main"]

_STATES = {"ok": "runs", "absent": "not here", "untried": "untried", "broken": "BROKEN"}


@dataclass
class Diagnosis:
    """What was found out.

    Attributes:
        platform: what is chosen for.
        reports: what came of asking each backend, in a process of its own.
        disabled: backends that ATTN_DISPATCH_DISABLE keeps out of the choice.
        problems: what stands in the way, in words.
        layers: for each kind of layer its title and who would run it.
    """

    platform: str
    reports: list[Report]
    disabled: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    layers: list[tuple[str, dispatch.Explanation]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Something does not work that should."""
        return bool(self.problems) or any(report.state == "broken" for report in self.reports)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        machine, registry = dispatch.machine(), dispatch.registry()
        return {
            "machine": {"name": machine.name, "description": machine.description, "facts": dict(machine.facts)},
            "platform": self.platform,
            "platforms": {name: registry.ranked(name) for name in hardware.NAMES},
            "installable": {name: install_commands(name) for name in hardware.NAMES},
            "backends": [asdict(report) for report in self.reports],
            "disabled": list(self.disabled),
            "problems": [*registry.problems, *self.problems],
            "explanation": self.layers[0][1].as_dict() if self.layers else None,
            "layers": [{"layers": title, **explanation.as_dict()} for title, explanation in self.layers],
        }


def diagnose(specs: Sequence[tuple[str, AttentionSpec]]) -> Diagnosis:
    """Ask everything that is installed.

    Args:
        specs: the layers to ask about, each with its title.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        diagnosis = Diagnosis(dispatch.machine().name, list(pool.map(ask, dispatch.registry().names())))
    crashing = [report.name for report in diagnosis.reports if "killed by" in report.reason]
    try:
        settings = dispatch.settings()
        diagnosis.platform, diagnosis.disabled = settings.platform or diagnosis.platform, settings.disable
        if crashing:
            text = f"{', '.join(crashing)}: crashes when it is loaded or used, so no backend was asked in this process"
            diagnosis.problems.append(text)
        else:
            diagnosis.layers = [(title, dispatch.explain(spec)) for title, spec in specs]
    except AttentionDispatchError as error:
        diagnosis.problems.append(str(error))
    return diagnosis


def page(diagnosis: Diagnosis) -> str:
    """Return the diagnosis for people."""
    machine, registry = dispatch.machine(), dispatch.registry()
    parts = [paragraph("Machine", f"{machine.name}: {machine.description}")]
    parts += [paragraph("  !", str(note)) for key in ("problems", "notes") for note in machine.facts.get(key, ())]
    parts += [f"\n{emphasised('Platforms')}", table([_platform_row(name, diagnosis) for name in hardware.NAMES])]
    if commands := install_commands(diagnosis.platform, registry.names()):
        mark = "  +" if registry.ranked(diagnosis.platform) else "  !"
        parts.append(f"More for {diagnosis.platform}:")
        parts += [paragraph(mark, command) for command in commands]
    parts += [f"\n{emphasised('Backends')}", table([_backend_row(report, diagnosis) for report in diagnosis.reports])]
    parts += [paragraph("!", text) for text in [*registry.problems, *diagnosis.problems]]
    absent = {report.name for report in diagnosis.reports if report.state == "absent"}
    for title, explanation in diagnosis.layers:
        # What was said above of a backend that is not here is not said again for each layer.
        asked = [v for v in explanation.verdicts if v.backend not in absent or v.backend == explanation.requested]
        rows = [
            [f"{v.backend}{' <' * (v.backend == explanation.chosen)}", v.answer, _why(v, explanation.spec)]
            for v in asked
        ]
        parts += [f"\n{emphasised('Who runs')} {title}{explanation.spec}", table(rows)]
        parts.append(
            f"{emphasised(explanation.chosen)} would run, by {explanation.source}."
            if explanation.chosen
            else emphasised("Nothing can run this layer.", "1;31")
        )
    return "\n".join(parts)


def _why(verdict: Verdict, spec: AttentionSpec) -> str:
    """Return what a verdict says beyond its yes: a note, and the block size where it was left to the backend."""
    if not verdict:
        return str(verdict)
    parts = [verdict.note] if verdict.note else []
    if not spec.has_block_size:
        parts.append(f"block_size={resolved(dispatch.registry().load(verdict.backend), spec).block_size}")
    return ", ".join(parts)


def _platform_row(name: str, diagnosis: Diagnosis) -> list[str]:
    ranked = dispatch.registry().ranked(name)
    return [f"{name}{' <' * (name == diagnosis.platform)}", ", ".join(ranked) or "no backend installed"]


def _backend_row(report: Report, diagnosis: Diagnosis) -> list[str]:
    text = ". ".join(part.rstrip(".") for part in (report.reason, report.remedy) if part)
    if report.state == "broken" and report.details:
        text = f"{text}\n{report.details.splitlines()[-1]}"
    state = "disabled" if report.name in diagnosis.disabled else _STATES[report.state]
    return [report.name, state, report.version, text]


def main(arguments: Sequence[str]) -> int:
    """Show the machine, each backend with what it needs, and who would run a layer.

    Returns:
        The exit status: 0 well, 1 something does not work, 2 the request was wrong.
    """
    parser = argparse.ArgumentParser(prog="attn-dispatch doctor", description=main.__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a transformers model: ask about each kind of its layers"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    add_spec_options(parser, num_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16")
    options = parser.parse_args(arguments)
    try:
        specs = [("", spec_of(options))]
        if options.model is not None:
            kinds = layer_kinds(options.model, options.block_size, options.kv_cache_dtype)
            specs = [(f"{count} layers, {kind}: ", spec) for count, kind, spec in kinds]
    except AttentionDispatchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    diagnosis = diagnose(specs)
    sys.stdout.write(json.dumps(diagnosis.as_dict(), indent=2, default=str) if options.json else page(diagnosis))
    sys.stdout.write("\n")
    return 1 if diagnosis.failed else 0

"""A layer on the command line: an option for every field of an `AttentionSpec`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from attn_dispatch.contract import AttentionSpec

__all__ = ["add_spec_options", "spec_of"]

_TYPES = {"int": int, "float": float, "str": str, "Kind": str}
_SHORT = {"num_heads": ["--heads"], "num_kv_heads": ["--kv-heads"]}


def _window(text: str) -> tuple[int, int]:
    left, _, right = text.partition(",")
    return int(left), int(right)


def add_spec_options(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add an option for every field.

    Args:
        parser: to add to.
        defaults: of fields; what has none is left to the spec.
    """
    group = parser.add_argument_group("the layer to ask about (see AttentionSpec)")
    for field in fields(AttentionSpec):
        name = f"--{field.name.replace('_', '-')}"
        names = [*_SHORT.get(field.name, []), name]
        default = defaults.get(field.name)
        text = f"(default: {default})" if default is not None else ""
        kind = str(field.type).partition(" ")[0]
        if kind == "bool":
            group.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
        elif field.name == "window":
            group.add_argument(
                *names, dest=field.name, type=_window, metavar="LEFT,RIGHT", help="-1: open; --window=-1,0"
            )
        else:
            group.add_argument(*names, dest=field.name, type=_TYPES[kind], default=default, help=text)


def spec_of(arguments: argparse.Namespace) -> AttentionSpec:
    """Return the spec that the options describe.

    Raises:
        SpecError: there is no such layer.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(AttentionSpec)}
    # Without a block size each backend is asked for the one that it prefers.
    return AttentionSpec(**{n: value for n, value in values.items() if value is not None or n == "block_size"})

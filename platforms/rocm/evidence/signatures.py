"""Functions of a vendor's sources: what they take, read without importing them."""

from __future__ import annotations

import ast
import inspect
from functools import lru_cache
from pathlib import Path

__all__ = ["functions", "signature"]


@lru_cache
def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Return the top-level functions of a source file by name; of several of one name, the last (it is what runs)."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def signature(file: Path, name: str) -> inspect.Signature:
    """Return the signature of a function of a source file; defaults are text.

    Raises:
        LookupError: the file has no such function.
    """
    node = functions(file).get(name)
    if node is None:
        raise LookupError(f"{file.name} defines no {name}")
    given, kind = node.args, inspect.Parameter
    plain = [*given.posonlyargs, *given.args]
    first_default = len(plain) - len(given.defaults)
    parameters = []
    for i, argument in enumerate(plain):
        default = ast.unparse(given.defaults[i - first_default]) if i >= first_default else kind.empty
        parameters.append(kind(argument.arg, kind.POSITIONAL_OR_KEYWORD, default=default))
    for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = kind.empty if value is None else ast.unparse(value)
        parameters.append(kind(argument.arg, kind.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)

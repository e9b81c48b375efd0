"""Signatures of functions in a vendor's sources, without importing them."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

__all__ = ["signature"]


@cache
def signature(file: Path, name: str, within: str | None = None) -> inspect.Signature:
    """Return the signature of a function of a source file, or of a method of a class in it."""
    body = ast.parse(file.read_text()).body
    if within is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == within).body
    # Overloads come first; what is defined last is what runs.
    function = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name][-1]
    given = function.args
    kind = inspect.Parameter
    parameters = []
    plain = [*given.posonlyargs, *given.args]
    first_default = len(plain) - len(given.defaults)
    for i, argument in enumerate(plain):
        default = ast.unparse(given.defaults[i - first_default]) if i >= first_default else kind.empty
        parameters.append(kind(argument.arg, kind.POSITIONAL_OR_KEYWORD, default=default))
    if given.vararg is not None:
        parameters.append(kind(given.vararg.arg, kind.VAR_POSITIONAL))
    for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = kind.empty if value is None else ast.unparse(value)
        parameters.append(kind(argument.arg, kind.KEYWORD_ONLY, default=default))
    if given.kwarg is not None:
        parameters.append(kind(given.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)

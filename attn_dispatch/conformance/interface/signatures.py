"""Signatures of functions in a vendor's sources, without importing them."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

__all__ = ["signature"]

_Kind = inspect.Parameter


@cache
def signature(file: Path, name: str, within: str | None = None) -> inspect.Signature:
    """Return the signature of a function of a source file; defaults are text.

    Args:
        file: the source.
        name: of the function. Of several, the last is meant: it is what runs (overloads come first).
        within: a class that it is a method of.

    Raises:
        LookupError: the file has no such function.
    """
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if within is not None:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == within), [])
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        raise LookupError(f"{file.name} defines no {f'{within}.' if within else ''}{name}")
    arguments = functions[-1].args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    defaults = [_Kind.empty] * required + [ast.unparse(value) for value in arguments.defaults]
    parameters = [
        _Kind(argument.arg, _Kind.POSITIONAL_OR_KEYWORD, default=default)
        for argument, default in zip(positional, defaults, strict=True)
    ]
    if arguments.vararg is not None:
        parameters.append(_Kind(arguments.vararg.arg, _Kind.VAR_POSITIONAL))
    parameters += [
        _Kind(argument.arg, _Kind.KEYWORD_ONLY, default=_Kind.empty if value is None else ast.unparse(value))
        for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        parameters.append(_Kind(arguments.kwarg.arg, _Kind.VAR_KEYWORD))
    return inspect.Signature(parameters)

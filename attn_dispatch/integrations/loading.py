"""Models from local files, without a network: a transformers folder, or a GGUF file converted into one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    """Refuse to begin what would fail in the middle for want of a package. Nothing is imported.

    Raises:
        MissingPackageError: with the one command that installs what is missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        wanted = " ".join(f"'{_REQUIREMENTS[name]}'" for name in missing)
        raise MissingPackageError(
            f"this needs {', '.join(missing)}, not installed here. Install with: python -m pip install {wanted}"
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


def usable_device(wanted: str) -> str:
    """Return the device if this build of torch can use it, else "cpu"."""
    if wanted == "cpu":
        return wanted
    module = getattr(importlib.import_module("torch"), wanted, None)
    return wanted if module is not None and module.is_available() else "cpu"


def load(folder: Path, dtype: str, device: str, num_threads: int | None = None) -> tuple[Any, Any]:
    """Return the model, ready for a `PagedCache`, and its tokenizer.

    Args:
        folder: a transformers model folder.
        dtype: "float32", "bfloat16"...
        device: as torch names it.
        num_threads: of torch on the CPU, in the whole process (None: as many as it would take).

    Raises:
        MissingPackageError: torch or transformers is not installed.
        ModelError: the folder is not a model that transformers can load.
    """
    require("torch", "transformers", "safetensors")
    transformers = _transformers()
    torch = importlib.import_module("torch")
    from attn_dispatch.integrations.transformers import NAME, register

    register()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=NAME, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded as a language model: {error}") from error
    return model.to(device).eval(), tokenizer


def convert_gguf(
    source: Path, target: Path, progress: Callable[[str, float], None] = lambda phase, share: None
) -> None:
    """Write a GGUF file's model and tokenizer as a transformers folder, unpacked to float32: nothing is lost.

    Args:
        source: the file.
        target: an existing folder, written into.
        progress: told what is being done, and what share of the work lies behind.

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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source} cannot be read as a GGUF model: {error}") from error
    progress("writing safetensors", 0.9)
    model.save_pretrained(target)
    progress("done", 1.0)

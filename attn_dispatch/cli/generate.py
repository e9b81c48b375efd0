"""`attn-dispatch generate`: a real language model answers through the paged cache, on the backend that was selected."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from attn_dispatch import dispatch
from attn_dispatch.cli import models
from attn_dispatch.cli.generate_report import as_json, summary
from attn_dispatch.contract.dtypes import COMPUTE_DTYPES, dtype_name
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import NoBackendError

if TYPE_CHECKING:
    from attn_dispatch.integrations.engine import Completion

__all__ = ["generate"]

_TORCH_DEVICES = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to say to the model.", show_default=False)] = None,
    prompts_file: Annotated[
        str | None, typer.Option(help="A file with one prompt per line; - reads standard input.", metavar="FILE")
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"A transformers model folder, or one of {', '.join(models.PACKAGED)}.")
    ] = "smollm2",
    backend: Annotated[str | None, typer.Option(help="The backend of every layer (default: selected).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU).")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it (default: where the backend runs).")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a cache block.")] = DEFAULT_BLOCK_SIZE,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of the cache; prompts wait for room (default: grows).")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Type that the cache stores (default: dtype).")] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Prompts that run at once.")] = 64,
    no_prefix_sharing: Annotated[
        bool, typer.Option("--no-prefix-sharing", help="Compute every prompt for itself, whatever they have in common.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="With a temperature: draw from this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With a temperature: of the draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, with no chat template.")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say more about times, the cache and verdicts.")] = False,
) -> None:
    """Run a language model through the paged KV cache and print what it answers."""
    prompts = _prompts(prompt, prompts_file)
    named = _named_backend(backend)
    number_type = None if dtype is None else _compute_dtype(dtype)
    from attn_dispatch.integrations.loading import load, require, usable_device

    require("torch", "transformers", "safetensors")
    folder = models.find_model(model, Console(stderr=True))
    where = device or usable_device(_preferred_device(named))
    began = perf_counter()
    number_type = number_type or ("float32" if where == "cpu" else "bfloat16")
    network, tokenizer = load(folder, number_type, where, dispatch.settings().num_threads)
    load_s = perf_counter() - began

    from attn_dispatch.integrations.engine import Engine
    from attn_dispatch.integrations.sampling import Sampler

    engine = Engine(
        network,
        backend=backend,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_dtype=kv_cache_dtype,
        max_sequences=max_sequences,
        prefix_sharing=not no_prefix_sharing,
    )

    def text_of(completion: Completion) -> str:
        return str(tokenizer.decode(completion.tokens, skip_special_tokens=True))

    run = engine.generate(
        [_encode(tokenizer, text, raw) for text in prompts],
        max_new_tokens,
        stop=_stop_tokens(network, tokenizer),
        sampler=Sampler(temperature, top_p, seed),
        on_token=(lambda completion: None) if as_object else _printer(prompts, text_of),
    )
    texts = [text_of(completion) for completion in run.completions]
    facts = as_json(run, engine.cache, prompts, texts, backend, load_s)
    facts.update(model=str(folder), dtype=str(network.dtype).removeprefix("torch."), device=where)
    if as_object:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    else:
        Console().print(summary(facts, engine.cache, stats))


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    prompts = [] if prompt is None else [prompt]
    if file is not None:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="--prompts-file") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not any(text.strip() for text in prompts):
        raise typer.BadParameter('nothing to say: give "PROMPT" or --prompts-file with a line in it')
    return prompts


def _named_backend(backend: str | None) -> str | None:
    """Check the selection before a model is loaded; return the backend that was named, if one was.

    Raises:
        UnknownBackendError, EnvironmentVariableError: nothing has that name.
        NoBackendError: it cannot run on this machine.
    """
    dispatch.settings()
    named, source = dispatch.requested(backend)
    if named is None:
        return None
    dispatch.registry().entry(named)
    available = dispatch.registry().load(named).probe()
    if not available:
        remedy = f" {available.remedy}" if available.remedy else ""
        raise NoBackendError(f"{named}, named by {source}, cannot run on this machine: {available.reason}.{remedy}")
    return named


def _compute_dtype(dtype: str) -> str:
    name = dtype_name(dtype)
    if name not in COMPUTE_DTYPES:
        raise typer.BadParameter(f"{dtype} is not one of {', '.join(COMPUTE_DTYPES)}", param_hint="--dtype")
    return name


def _preferred_device(named: str | None) -> str:
    """Return the torch device on which the backends that may run find their arrays."""
    here = dispatch.platform()
    ranked = dispatch.registry().ranked(here)
    on_device = named in ranked if named else any(dispatch.registry().load(name).probe() for name in _loadable(ranked))
    return _TORCH_DEVICES.get(here, "cpu") if on_device else "cpu"


def _loadable(names: list[str]) -> list[str]:
    return [name for name, available in dispatch.backends().items() if name in names and available]


def _encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    if tokenizer.chat_template and not raw:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def _stop_tokens(network: Any, tokenizer: Any) -> set[int]:
    found = network.generation_config.eos_token_id
    stop = set(found) if isinstance(found, list) else {found}
    return (stop | {tokenizer.eos_token_id}) - {None}


def _printer(prompts: list[str], text_of: Callable[[Completion], str]) -> Callable[[Completion], None]:
    """Return what prints tokens: as they come for one prompt, each answer when it is whole for several."""
    shown = ""

    def stream(completion: Completion) -> None:
        nonlocal shown
        text = text_of(completion)
        # An incomplete character is shown when its last byte has come.
        if completion.finish_reason or not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
        if completion.finish_reason:
            sys.stdout.write("\n\n")

    def whole(completion: Completion) -> None:
        if completion.finish_reason:
            head = f"[{completion.index + 1}/{len(prompts)}] {prompts[completion.index]}"
            sys.stdout.write(f"{head}\n{text_of(completion).strip()}\n\n")
            sys.stdout.flush()

    return stream if len(prompts) == 1 else whole

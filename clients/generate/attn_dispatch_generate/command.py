"""`attn-dispatch generate`: a real language model answers through the paged cache, on the backend that was selected."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console

import attn_dispatch as ad
from attn_dispatch.contract.dtypes import COMPUTE_DTYPES, dtype_name, numpy_dtype
from attn_dispatch.contract.spec import DEFAULT_BLOCK_SIZE
from attn_dispatch.errors import CacheError, ModelError, NoBackendError
from attn_dispatch_generate import models
from attn_dispatch_generate.loading import load, require, usable_device
from attn_dispatch_generate.report import as_json, summary
from attn_dispatch_generate.run import Completion

__all__ = ["generate"]

_TYPICAL_LAYER = ad.AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16", block_size=32)


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
    preferred = _device(backend)
    number_type = None if dtype is None else _compute_dtype(dtype)
    require("torch", "transformers", "safetensors")
    folder = models.find_model(model, Console(stderr=True))
    where = device or usable_device(preferred)
    began = perf_counter()
    number_type = number_type or ("float32" if where == "cpu" else "bfloat16")
    network, tokenizer = load(folder, number_type, where)
    _check_memory(network, block_size, num_blocks, kv_cache_dtype)
    load_s = perf_counter() - began

    # These import torch, which asking for help should not.
    from attn_dispatch_generate.engine import Engine
    from attn_dispatch_generate.sampling import Sampler

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
    facts = as_json(run, engine.cache, prompts, texts, load_s)
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
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter(f"{text!r} is not UTF-8: {error}") from error
    if not any(text.strip() for text in prompts):
        raise typer.BadParameter('nothing to say: give "PROMPT" or --prompts-file with a line in it')
    return prompts


def _device(backend: str | None) -> str:
    """Check the selection before a model is loaded, and return where the chosen backend finds its arrays, for torch.

    Raises:
        UnknownBackendError, EnvironmentVariableError: nothing has that name.
        NoBackendError: the backend that was named cannot run on this machine.
    """
    explanation = ad.explain(_TYPICAL_LAYER, backend)
    named = explanation.requested
    if named is not None and not (available := ad.backends()[named]):
        remedy = f" {available.remedy}" if available.remedy else ""
        raise NoBackendError(
            f"{named}, named by {explanation.source}, cannot run on this machine: {available.reason}.{remedy}"
        )
    if ad.platform.name == "cpu" or explanation.chosen is None:
        return "cpu"
    return str(ad.attention(_TYPICAL_LAYER, explanation.chosen).allocate(1).device)


def _check_memory(network: Any, block_size: int, num_blocks: int | None, kv_cache_dtype: str | None) -> None:
    """Refuse a cache that is larger than the memory it is for.

    Raises:
        CacheError: with both sizes.
    """
    import torch

    config = network.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = network.dtype.itemsize if kv_cache_dtype is None else numpy_dtype(kv_cache_dtype).itemsize
    needed = (num_blocks or 1) * block_size * config.num_hidden_layers * 2 * heads * size * element
    if network.device.type == "cuda":
        memory = torch.cuda.mem_get_info(network.device)[1]
    else:
        memory = ad.platform.facts.get("memory_bytes")
    if memory is not None and needed > memory:
        blocks = f"{num_blocks} blocks" if num_blocks else "one block"
        raise CacheError(
            f"{blocks} of {block_size} tokens need {needed / 2**30:.1f} GiB, {network.device} has "
            f"{memory / 2**30:.1f} GiB: ask for fewer (--num-blocks) or smaller ones (--block-size)"
        )


def _compute_dtype(dtype: str) -> str:
    name = dtype_name(dtype)
    if name not in COMPUTE_DTYPES:
        raise typer.BadParameter(f"{dtype} is not one of {', '.join(COMPUTE_DTYPES)}", param_hint="--dtype")
    return name


def _encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    if tokenizer.chat_template and not raw:
        message = [{"role": "user", "content": text}]
        try:
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs of their own
            raise ModelError(f"the model's chat template fails: {error}. --raw does without it") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def _stop_tokens(network: Any, tokenizer: Any) -> set[int]:
    ends = network.generation_config.eos_token_id
    stop = set(ends) if isinstance(ends, list) else {ends}
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

"""Write docs/architectures.md: which transformers architectures give transformers' own results through attn_dispatch.

    python docs/make_architectures.py [--check] [--seed N] [--lengths 9,14] [ARCHITECTURE ...]

With names of architectures, only their rows are computed; with another seed or lengths, nothing is written.

Every architecture is built from a tiny configuration with random weights and run in float32, on transformers' own
eager kernels and through attn_dispatch (the reference backend: the table is about the integration, not about
kernels), with ragged padded batches that are longer than every window and chunk. `--check` compares with the file.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import attn_dispatch as ad
from attn_dispatch.errors import AttentionDispatchError
from attn_dispatch.integrations.transformers import NAME, PagedCache, attention_forward, register

TARGET = Path(__file__).with_name("architectures.md")
COLUMNS = ("cacheless", "cached", "compiled", "generate_batch")
LENGTHS = "9,14"
FAR = 1e-3  # of the largest logit

# Sizes of a tiny model, by every name that configurations have for them. Only those that a configuration has are given.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "head_dim", "d_kv", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 97,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "sliding_window": 6,
    "attention_chunk_size": 5,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_mel_bins": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "forced_eos_token_id": None,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
# By group; in brackets, what `compiled` is checked on by every CI run (the others when the table is written).
ARCHITECTURES = {
    "decoder": """
        [llama] [llama4_text] [gemma2] [gemma3_text] [gemma4_text] [gpt_oss] [mistral] [qwen2] [gpt2] [deepseek_v3]
        afmoe apertus arcee aria_text biogpt bitnet bloom cohere cohere2 cwm deepseek_v2 deepseek_v32 deepseek_v4
        diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 flex_olmo gemma glm glm4 glm4_moe
        gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax
        inkling_text internlm3 jais2 jamba jetmoe lfm2 longcat_flash mimo_v2_flash minicpm3 minimax minimax_m2 ministral
        ministral3 mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe
        qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu""",
    "encoder": """[bert] [modernbert] albert camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm
        eurobert layoutlm mobilebert nomic_bert roberta splinter xlm-roberta""",
    "encoder and decoder": """[bart] [marian] blenderbot blenderbot-small m2m_100 mbart mt5 pegasus plbart t5""",
    "vision and spectrograms": """
        [vit] audio-spectrogram-transformer beit clip_vision_model deit dinov2 dinov3_vit ijepa
        siglip_vision_model""",
    "audio": """[wav2vec2] data2vec-audio hubert unispeech unispeech-sat""",
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}  # multi-head latent attention
SLIDING = ["sliding_attention", "full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97, "layer_types": SLIDING},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash", "minicpm3", "youtu"), LATENT),
    "llama4_text": {"intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "unispeech-sat": {"eos_token_id": 2},
    "qwen2": {"use_sliding_window": True, "layer_types": SLIDING},
}


class Own(Exception):
    """transformers' own kernels do not run this configuration, or the model never calls the attention interface."""


def build(kind: str, changes: dict[str, Any], auto: Any, seed: int) -> Any:
    """Return a tiny model with random weights, large enough that a wrong mask shows."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    names = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    config = config_class(**{name: value for name, value in (SIZES | changes).items() if name in names})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > 3e6:
        raise Own(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    return model


class Calls:
    """Counts the calls of the attention function."""

    count = 0


def counted(*args: Any, **kwargs: Any) -> Any:
    """Attend, and count."""
    Calls.count += 1
    return attention_forward(*args, **kwargs)


@contextlib.contextmanager
def attending(model: Any) -> Iterator[None]:
    """Run a model through attn_dispatch.

    Raises:
        Own: the model never called it.
    """
    model.set_attn_implementation(NAME)
    Calls.count = 0
    with ad.use_backend("reference"):
        yield
    if not Calls.count:
        raise Own("attends outside transformers' AttentionInterface")


def ragged(lengths: list[int], seed: int, *, right: bool) -> tuple[Any, Any]:
    """Return padded prompts and their mask."""
    torch.manual_seed(seed)
    width = max(lengths)
    rows = [[1] * n + [0] * (width - n) for n in lengths]
    mask = torch.tensor(rows if right else [row[::-1] for row in rows])
    return torch.randint(3, 97, mask.shape) * mask, mask


def compare(found: Any, expected: Any, where: Any = None) -> str:
    """Return how two results compare; what is padding in `where` does not count."""
    if where is not None:
        found, expected = found[where.bool()], expected[where.bool()]
    if found.shape != expected.shape or not torch.isfinite(expected).all():
        return f"WRONG: {tuple(found.shape)} for {tuple(expected.shape)}, or not finite"
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return "equal" if error < FAR else f"WRONG by {error:.2g}"


Row = dict[str, str]
Entry = Callable[[], str]


def judge(entry: Entry) -> str:
    """Return what comes of an entry: equal, refused or failing, with the words."""
    try:
        return entry()
    except Own as error:
        return f"not run: {error}"
    except AttentionDispatchError as error:
        return f"refused: {error}"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return f"refused: {error}" if "not supported for continuous batching" in words else f"FAILS: {words}"


def own(entry: Callable[[], Any]) -> Any:
    """Return what transformers' own kernels give."""
    try:
        return entry()
    except Exception as error:
        raise Own(f"transformers itself: {type(error).__name__}: {str(error)[:80]}") from error


def generating(model: Any, inputs: dict[str, Any], lengths: list[int], compiles: bool) -> Row:
    """Judge a model that generates, alone or from an encoder's states."""
    encoder_decoder = model.config.is_encoder_decoder
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    target = {"decoder_input_ids": inputs["input_ids"].flip(1).clamp(min=3)} if encoder_decoder else {}
    where = None if encoder_decoder else inputs["attention_mask"]

    def logits() -> Any:
        return model(**inputs, **target, use_cache=False).logits

    def cacheless() -> str:
        expected = own(logits)
        with attending(model):
            return compare(logits(), expected, where)

    def paged() -> Any:
        cache = PagedCache(model, block_size=4, backend="reference")
        return EncoderDecoderCache(cache, DynamicCache()) if encoder_decoder else cache

    def cached() -> str:
        expected = own(lambda: model.generate(**inputs, **options))
        with attending(model):
            found = model.generate(**inputs, **options, past_key_values=paged())
        return compare(torch.stack(found.logits), torch.stack(expected.logits))

    def compiled() -> str:
        def steps(run: Any, cache: Any) -> Any:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            more = torch.full_like(ids[:, :1], 5)
            if encoder_decoder:
                return run(**inputs, decoder_input_ids=more, past_key_values=cache).logits
            run(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            mask = torch.cat([mask, torch.ones_like(more)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            return run(more, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits

        config = model.config.get_text_config(decoder=True)
        dynamic = DynamicCache(config=config)
        expected = own(
            lambda: steps(model, EncoderDecoderCache(dynamic, DynamicCache()) if encoder_decoder else dynamic)
        )
        with attending(model):
            torch._dynamo.reset()
            return compare(steps(torch.compile(model, backend="eager"), paged()), expected)

    def generate_batch() -> str:
        prompts = [list(range(3, 3 + n)) for n in lengths]
        with attending(model):
            model.generate_batch(prompts, generation_config=transformers.GenerationConfig(max_new_tokens=2))
        return "equal"

    entries: dict[str, Entry] = {"cacheless": cacheless, "cached": cached}
    if compiles:
        entries["compiled"] = compiled
    if not encoder_decoder:
        entries["generate_batch"] = generate_batch
    row = {}
    for name, entry in entries.items():
        model.set_attn_implementation("eager")
        row[name] = judge(entry)
    return row


def encoding(model: Any, inputs: dict[str, Any], compiles: bool) -> Row:
    """Judge a model that encodes: it has no cache."""
    where = inputs.get("attention_mask")
    if "input_values" in inputs and where is not None:
        where = model._get_feature_vector_attention_mask(own(lambda: model(**inputs)).last_hidden_state.shape[1], where)

    def states(run: Any) -> Any:
        return run(**inputs).last_hidden_state

    def cacheless() -> str:
        expected = own(lambda: states(model))
        with attending(model):
            return compare(states(model), expected, where)

    def compiled() -> str:
        expected = own(lambda: states(model))
        with attending(model):
            torch._dynamo.reset()
            return compare(states(torch.compile(model, backend="eager")), expected, where)

    row = {"cacheless": judge(cacheless)}
    model.set_attn_implementation("eager")
    return row | ({"compiled": judge(compiled)} if compiles else {})


def pixels(model: Any, seed: int) -> dict[str, Any]:
    """Return random inputs of a vision or audio model."""
    torch.manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (2, getattr(config, "num_channels", 3), 32, 32)
        frames = getattr(config, "num_frames", None)
        return {"pixel_values": torch.randn(shape if frames is None else (2, frames, *shape[1:]))}
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)}
    samples = 400
    padding = torch.tensor([[1] * samples, [1] * 250 + [0] * 150])
    return {"input_values": torch.randn(2, samples) * padding, "attention_mask": padding}


def judge_architecture(group: str, kind: str, seed: int, lengths: list[int], compiles: bool) -> Row:
    """Return an architecture's row."""
    autos = {"decoder": transformers.AutoModelForCausalLM, "encoder and decoder": transformers.AutoModelForSeq2SeqLM}
    try:
        model = own(lambda: build(kind, CHANGES.get(kind, {}), autos.get(group, transformers.AutoModel), seed))
    except Own as error:
        return {"cacheless": f"not run: {error.__cause__ or error}"}
    with torch.no_grad():
        if group in autos:
            ids, mask = ragged(lengths, seed, right=group != "decoder")
            return generating(model, {"input_ids": ids, "attention_mask": mask}, lengths, compiles)
        if group == "encoder":
            ids, mask = ragged(lengths, seed, right=True)
            return encoding(model, {"input_ids": ids, "attention_mask": mask}, compiles)
        return encoding(model, pixels(model, seed), compiles)


def resolved(text: str) -> str:
    """Return an entry's words without names of layers, numbers of layers, and advice of transformers."""
    word, _, reason = text.partition(": ")
    if not reason or word.startswith("WRONG"):
        return text
    reason = re.sub(r"\b[A-Z][a-zA-Z0-9]*(Attention|Layer|ForCausalLM)\b", "the layer", reason)
    reason = re.sub(r" ?\(?layer \d+\)?", "", re.sub(r"\s+", " ", reason))
    return f"{word}: {reason[:230].strip()}"


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Return the document."""
    notes: dict[str, int] = {}

    def entry(text: str) -> str:
        word, _, reason = text.partition(": ")
        return f"{word} [{notes.setdefault(reason, len(notes) + 1)}]" if reason else text

    lines = []
    for group in ARCHITECTURES:
        chosen = {kind: row for (own_group, kind), row in rows.items() if own_group == group}
        columns = [column for column in COLUMNS if any(column in row for row in chosen.values())]
        lines += [f"\n## {group.capitalize()}\n", f"| architecture | {' | '.join(columns)} |"]
        lines += ["|" + "---|" * (len(columns) + 1)]
        lines += [f"| {kind} | {' | '.join(entry(row.get(c, '')) for c in columns)} |" for kind, row in chosen.items()]
    counts = Counter(text.partition(":")[0] for row in rows.values() for text in row.values())
    head = f"""# transformers architectures

Which results agree with transformers' own eager kernels (transformers {transformers.__version__}; tiny configurations
with random weights, float32, ragged padded batches longer than every window and chunk). Written by
`python docs/make_architectures.py`, checked by CI with `--check`; for other inputs `--seed 7 --lengths 11,17,4`.

- **cacheless**: `model(..., use_cache=False)`; **cached**: `generate` on a `PagedCache`; **compiled**: prefill and a
  decode step (an encoder's forward) under `torch.compile`, whose graph breaks at each attention;
  **generate_batch**: transformers' continuous batching.
- **equal**: to {FAR} of the largest logit; **refused**: with the words below; **not run**: transformers' own kernels
  do not run the configuration, or the model attends outside `AttentionInterface`.

{len(rows)} architectures: {", ".join(f"{count} {word}" for word, count in sorted(counts.items()))}.
"""
    foot = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return head + "\n".join(lines) + "\n\n## Words\n\n" + foot + "\n"


def written() -> dict[str, Row]:
    """Return the entries of the document, by architecture."""
    text = TARGET.read_text()
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        first, *entries = line.split(" | ")
        if first == "architecture":
            columns = entries
        else:
            whole = [re.sub(r" \[(\d+)\]", lambda note: f": {notes[note[1]]}", entry) for entry in entries]
            rows[first] = {column: entry for column, entry in zip(columns, whole, strict=True) if entry}
    return rows


def main() -> int:
    """Write or check the table; 1 if an architecture is wrong or fails, or the document says otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", default=LENGTHS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    register()
    AttentionInterface.register(NAME, torch.compiler.disable(counted))
    lengths = [int(number) for number in arguments.lengths.split(",")]
    known = written() if TARGET.exists() else {}
    rows: dict[tuple[str, str], Row] = {}
    for group, kinds in ARCHITECTURES.items():
        for name in kinds.split():
            kind = name.strip("[]")
            if arguments.architecture and kind not in arguments.architecture:
                continue
            compiles = not arguments.check or name != kind
            row = judge_architecture(group, kind, arguments.seed, lengths, compiles)
            rows[group, kind] = {column: resolved(text) for column, text in row.items()}
            print(f"{kind:28}", "  ".join(f"{k}={v[:90]!r}" for k, v in row.items()), file=sys.stderr, flush=True)
    bad = [f"{kind} {c}" for (_, kind), row in rows.items() for c, t in row.items() if t.startswith(("WRONG", "FAILS"))]
    if arguments.check:
        bad += [f"{kind} {c}: {t}" for (_, kind), row in rows.items() for c, t in row.items() if known[kind][c] != t]
        bad += sorted(known.keys() - {kind for _, kind in rows} if not arguments.architecture else ())
    elif (arguments.seed, arguments.lengths) == (0, LENGTHS):
        order = [(group, name.strip("[]")) for group, kinds in ARCHITECTURES.items() for name in kinds.split()]
        TARGET.write_text(table({name: rows[name] if name in rows else known[name[1]] for name in order}))
    for line in bad:
        print(f"{line}: wrong, failing, or not what {TARGET.name} says")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

"""What verdicts rest upon, each looked up in the vendor's real sources: a release that changes one fails a test.

A fact is a statement and a pattern that must be found in a file of the package (or must not).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FACTS", "Fact"]

_CK = "aiter_meta/3rdparty/composable_kernel"
_FMHA = f"{_CK}/include/ck_tile/ops/fmha"
_CODEGEN = f"{_CK}/example/ck_tile/01_fmha/codegen/ops"
_PREFILL = "aiter_meta/csrc/py_itfs_ck/mha_batch_prefill_kernels.cu"
_PIPELINE = f"{_FMHA}/pipeline/block_fmha_batch_prefill_pipeline_qr_ks_vs_async.hpp"
_DECODE = "aiter_meta/csrc/cpp_itfs/pa/pa_kernels.cuh"
_VARLEN_CK = "csrc/flash_attn_ck/mha_varlen_fwd.cpp"


@dataclass(frozen=True)
class Fact:
    """One statement about a vendor's package.

    Attributes:
        package: of `packages.PACKAGES`.
        says: the statement, for people.
        file: relative to the package's folder.
        pattern: regular expression over the file, in which a blank stands for any white space; or the name of one of
            this module's checks.
    """

    package: str
    says: str
    file: str
    pattern: str

    def holds(self, folder: Path) -> bool:
        """Say whether it is so in an unpacked package."""
        file = folder / self.file
        if self.pattern in _CHECKS:
            return _CHECKS[self.pattern](file)
        return re.search(self.pattern.replace(" ", r"\s+"), file.read_text(encoding="utf-8")) is not None


def _functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Return the top-level functions of a source file by name."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def _slopes_as_bias(file: Path) -> bool:
    """Of the operator's arguments, the one after the output is the slopes: its C++ side has the bias there."""
    (call,) = [
        node
        for node in ast.walk(_functions(file)["_mha_batch_prefill"])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "mha_batch_prefill"
    ]
    names = [argument.id if isinstance(argument, ast.Name) else "" for argument in call.args]
    header = (file.parents[2] / "aiter_meta/csrc/include/rocm_ops.hpp").read_text(encoding="utf-8")
    block = header.partition("#define MHA_BATCH_PREFILL_PYBIND")[2].partition("#define")[0]
    taken = re.findall(r'py::arg\("(\w+)"\)', block)
    return names[taken.index("bias")] == "alibi_slopes"


def _tables_unread(file: Path) -> bool:
    """No function that takes a block table does anything with it but print it."""
    takes_tables = False
    for function in _functions(file).values():
        for name in (a.arg for a in function.args.args if "block_table" in a.arg):
            takes_tables = True
            printed = {
                id(inner)
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                for inner in ast.walk(node)
            }
            uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
            if any(id(use) not in printed for use in uses):
                return False
    return takes_tables


_CHECKS = {"slopes-as-bias": _slopes_as_bias, "tables-unread": _tables_unread}

_A, _F = "amd-aiter", "flash-attn"
FACTS: tuple[Fact, ...] = (
    Fact(
        _A,
        "unified_attention is causal only",
        "aiter/ops/triton/unified_attention.py",
        r'assert causal, "Only causal attention is supported"',
    ),
    Fact(
        _A,
        "unified_attention takes a page as the tile of a decode",
        "aiter/ops/triton/unified_attention.py",
        r"TILE_SIZE = block_size",
    ),
    Fact(
        _A,
        "unified_attention's window is (left, ...), the token itself included",
        "aiter/ops/triton/unified_attention.py",
        r"SLIDING_WINDOW = 1 \+ window_size\[0\]",
    ),
    Fact(
        _A,
        "unified_attention counts ALiBi from the step's first query",
        "aiter/ops/triton/_triton_kernels/unified_attention.py",
        r"alibi_slope\[:, None\] \* \(seq_offset - context_len\)",
    ),
    Fact(
        _A,
        "unified_attention looks up blocks of a whole tile, used or not",
        "aiter/ops/triton/_triton_kernels/unified_attention.py",
        r"tl\.load\( block_tables_ptr \+ block_table_offset \+ seq_offset // BLOCK_SIZE \)",
    ),
    Fact(
        _A,
        "paged_attention_v1 is compiled for heads of 64 and 128, pages of 1, 16 and 32, groups of 1 to 16",
        "aiter/aot/pa_v1.py",
        r"range\(1, 17\):[\s\S]*block_size in \[1, 16, 32\]:[\s\S]*range\(1, 9\):[\s\S]*head_size in \[64, 128\]:",
    ),
    Fact(
        _A,
        "paged_attention_v1 is for gfx90a, gfx942 and gfx950",
        "aiter_meta/csrc/cpp_itfs/pa/pa_v1.cuh",
        r"defined\(__gfx90a__\) \|\| defined\(__gfx942__\) \|\| defined\(__gfx950__\)",
    ),
    Fact(
        _A,
        "paged_attention_v1 caps logits after bias and window",
        _DECODE,
        r"// apply alibi[\s\S]*// apply sliding window[\s\S]*// apply soft-capping to logits",
    ),
    Fact(
        _A,
        "paged_attention_v1's window is as many tokens, the query's own included",
        _DECODE,
        r"local_token_idx \+ i < context_len - sliding_window",
    ),
    Fact(
        _A,
        "paged_attention_v1 rounds queries to fp8 for an fp8 cache",
        _DECODE,
        r"__builtin_amdgcn_cvt_pk_fp8_f32\( to_float<scalar_t>\(qptr\[0\]\) \* q_scale",
    ),
    Fact(
        _A,
        "paged_attention_v1's room: f32 sums and maxima, then outputs of the query's type",
        "aiter_meta/csrc/cpp_itfs/pa/pa_v1.cpp.jinja",
        r"float\* max_logits_ptr = exp_sums_ptr \+ \(num_seqs \* num_heads \* max_num_partitions\)",
    ),
    Fact(
        _A,
        "mha_batch_prefill takes tokens: pages of one",
        _PREFILL,
        r"CHECK_SHAPE\(k, num_blocks, num_heads_k, head_size_q\)",
    ),
    Fact(
        _A,
        "mha_batch_prefill takes keys of the query's type",
        _PREFILL,
        r"k\.dtype\(\) == q_dtype",
    ),
    Fact(
        _A,
        "mha_batch_prefill aligns its mask at the bottom right",
        _PREFILL,
        r'mask_identify = "b:" \+ std::to_string\(window_size_left\)',
    ),
    Fact(
        _A,
        "mha_batch_prefill has kernels for heads of at most 128",
        f"{_CODEGEN}/fmha_batch_prefill.py",
        r"return \{ 128 : \[FmhaFwdTileSize\([^\]]*\)\], \}",
    ),
    Fact(
        _A,
        "mha_batch_prefill_func hands slopes to its operator as the bias",
        "aiter/ops/mha.py",
        "slopes-as-bias",
    ),
    Fact(
        _A,
        "mha_batch_prefill looks up tokens ahead of the tile that it computes",
        _PIPELINE,
        r"page_idx \+= kN0",
    ),
    Fact(
        _A,
        "mha_batch_prefill reckons places in 32 bits",
        _PIPELINE,
        r"statically_indexed_array<index_t, NRepeat> k_offsets",
    ),
    Fact(
        _A,
        "Composable Kernel's LSE is natural",
        _PIPELINE,
        r"m_\[i_idx\] \* scale_s \* R_LOG2E \+ log\(l_\[i_idx\]\)",
    ),
    Fact(
        _A,
        "pa_fwd_asm scales by the head size, whatever was asked",
        "aiter_meta/csrc/py_itfs_cu/asm_pa.cu",
        r"float k_scalar = sqrt\(dim\)",
    ),
    Fact(
        _A,
        "Composable Kernel counts a causal layer's ALiBi from the first key",
        f"{_FMHA}/block/block_position_encoding.hpp",
        r"is_causal \? AlibiMode::VERTICAL",
    ),
    Fact(
        _F,
        "the CK build reads pages of multiples of 128",
        _VARLEN_CK,
        r"!paged_KV \|\| page_block_size % 128 == 0",
    ),
    Fact(
        _F,
        "the CK build has heads of at most 256, multiples of 8",
        _VARLEN_CK,
        r"head_size <= 256[\s\S]*head_size % 8 == 0",
    ),
    Fact(_F, "the CK build ignores a soft-cap", _VARLEN_CK, r"const float /\*softcap\*/"),
    Fact(_F, "the CK build ignores seqused_k", _VARLEN_CK, r"std::optional<at::Tensor> & ?/\*seqused_k\*/"),
    Fact(
        _F,
        "the CK build's LSE is that of the function",
        _VARLEN_CK,
        r"softmax_lse = torch::empty\(\{num_heads, total_q\}",
    ),
    Fact(
        _F,
        "the CK build is compiled for gfx90a, gfx942 and gfx950",
        "setup.py",
        r'allowed_archs = \["native", "gfx90a", "gfx950", "gfx942"\]',
    ),
    Fact(
        _F,
        "the CK build is chosen unless FLASH_ATTENTION_TRITON_AMD_ENABLE is TRUE",
        "flash_attn/flash_attn_interface.py",
        r'os\.getenv\("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE"\) == "TRUE"[\s\S]*import flash_attn_2_cuda',
    ),
    Fact(
        _F,
        "the Triton build takes block tables and reads none",
        "flash_attn/flash_attn_triton_amd/interface_fa.py",
        "tables-unread",
    ),
)

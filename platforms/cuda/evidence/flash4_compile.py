"""FlashAttention 4's kernels, compiled for GPUs that are not here, from the very calls of this package.

    python -m platforms.cuda.evidence.flash4_compile [--arch sm_90 sm_100] [--path FOLDER] [--again]

Each case is a layer that the verdict says yes to; the arguments of its call, as tensors without contents, go through
`flash_attn_varlen_func`, which compiles the kernel that they need. Exit status 0: all compiled (or had been, by the
same versions from the same sources); 1: something did not. `--path`: a folder with flash-attn-4, which may then stay
out of the environment (where it keeps xFormers from being imported).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.adapters.environment import make_cache_folder
from attn_dispatch.contract import LayerParameters
from attn_dispatch_cuda.flash_versions import Installed, choose

__all__ = ["CASES", "main"]

CASES: dict[str, dict[str, Any]] = {
    "pages of 64": {},
    "pages of 128": {"block_size": 128},
    "pages of 16, float16": {"block_size": 16, "dtype": "float16"},
    "window": {"window": (100, 0)},
    "soft-cap and sinks": {"logits_soft_cap": 30.0, "sinks": True},
    "head size 64": {"head_size": 64},
    "head size 256": {"head_size": 256},
    "encoder, two-sided window": {"kind": "encoder", "window": (20, 9)},
}
_ARCHITECTURES = {"sm_90": ((9, 0), "sm_90a", "132"), "sm_100": ((10, 0), "sm_100a", "148")}
_DISTRIBUTIONS = ("flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "quack-kernels", "torch")


def main(arguments: list[str] | None = None) -> int:
    """Compile every case for every architecture, each architecture in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=list(_ARCHITECTURES), choices=list(_ARCHITECTURES))
    parser.add_argument("--path", default="", help="folder that holds flash-attn-4")
    parser.add_argument("--again", action="store_true", help="compile what was compiled already")
    parser.add_argument("--one", choices=list(_ARCHITECTURES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return compile_all(options.one)
    failed = False
    for arch in options.arch:
        done = make_cache_folder("flashinfer") / f"flash4-{key(arch, options.path)}.json"
        if done.exists() and not options.again:
            rows = json.loads(done.read_text())
            print(f"{arch}: {len(rows)} kernels, compiled before")
            continue
        _, target, processors = _ARCHITECTURES[arch]
        environ = os.environ | {
            "FLASH_ATTENTION_ARCH": arch,
            "CUTE_DSL_ARCH": target,
            "FLASH_ATTENTION_NUM_SMS": processors,
            "PYTHONPATH": os.pathsep.join(filter(None, [options.path, os.environ.get("PYTHONPATH", "")])),
        }
        command = [sys.executable, "-W", "ignore", "-m", "platforms.cuda.evidence.flash4_compile", "--one", arch]
        ran = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
        *lines, last = ran.stdout.splitlines() or [""]
        print("\n".join(lines))
        if ran.returncode:
            print(f"{arch}: FAILED {last}")
            failed = True
            continue
        done.write_text(last)
    return 1 if failed else 0


def key(arch: str, path: str) -> str:
    """Return the hash of the versions and of this package's sources that decide what is compiled."""
    folders = [*filter(None, [path]), *sys.path]
    parts = [arch]
    for name in _DISTRIBUTIONS:
        installed = next(iter(distributions(name=name, path=folders)), None)
        parts.append(f"{name} {installed.version if installed else 'absent'}")
    import attn_dispatch.adapters.batch
    import attn_dispatch_cuda.flash_attention_call

    own = Path(attn_dispatch_cuda.flash_attention_call.__file__)
    sources = (Path(__file__), own, own.with_name("flash_versions.py"), Path(attn_dispatch.adapters.batch.__file__))
    parts += [source.read_text() for source in sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def compile_all(arch: str) -> int:
    """Compile every case for one architecture; the last line is the result, as JSON."""
    import torch

    from attn_dispatch_cuda.flash_attention_call import Flash4

    capability = _ARCHITECTURES[arch][0]
    version = Installed("fa4", "FlashAttention 4", "", Path(), module="flash_attn.cute")
    rows: list[dict[str, Any]] = []
    failed = 0
    for name, fields in CASES.items():
        spec = AttentionSpec(**({"num_heads": 32, "num_kv_heads": 8, "block_size": 64} | fields))
        chosen, refusals = choose([version], capability, spec, fp8_queries=False)
        if chosen is None:
            print(f"{arch}  {name:<28} FAILED: the verdict is no: {refusals[0]}")
            failed += 1
            continue
        functions = Flash4(version)
        function, arguments = functions.arguments(_call(spec, functions, capability))
        started = time.monotonic()
        try:
            shapes = _compiled(torch, getattr(functions.module, function), arguments)
        except Exception as error:  # whatever the compiler dies of is the result
            print(f"{arch}  {name:<28} FAILED: {type(error).__name__}: {str(error)[-600:]}")
            failed += 1
            continue
        seconds = round(time.monotonic() - started, 1)
        rows.append({"case": name, "seconds": seconds, "shapes": shapes})
        print(f"{arch}  {name:<28} {seconds:5.1f} s")
    print(json.dumps(rows) if not failed else f"{failed} of {len(CASES)} cases")
    return 1 if failed else 0


def _call(spec: AttentionSpec, functions: Any, capability: tuple[int, int]) -> Any:
    """Return the call for a mixed batch, its tensors in host memory."""
    import numpy as np
    import torch

    from attn_dispatch.adapters.torch.cache_tensors import CacheTensors
    from attn_dispatch.adapters.torch.layer_pass import DeviceCall
    from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
    from attn_dispatch.adapters.torch.plan import DevicePlan
    from attn_dispatch_cuda.flash_attention import FlashAttentionBackend
    from attn_dispatch_cuda.flash_attention_call import FlashBatch

    host = torch.device("cpu")
    paged = spec.kind != "encoder"
    tables = [[0], list(range(1, 40)), [40, 41, 42]] if paged else None
    lens = [9, 600, 40] if paged else [9, 300, 40]
    metadata = AttentionMetadata.build([1, 300, 40] if paged else lens, lens, tables, spec.block_size)
    plan = DevicePlan(spec=spec, view=metadata.view(spec.kind))
    batch = FlashBatch(plan, host, paged=paged, functions=functions, capability=capability)
    q, k = (
        torch.empty(metadata.num_tokens, heads, spec.head_size, dtype=getattr(torch, spec.dtype))
        for heads in (spec.num_heads, spec.num_kv_heads)
    )
    cache = CacheTensors(FlashAttentionBackend("compiled").allocate(spec, 64, "cpu")) if paged else None
    own: dict[str, Any] = {"sinks": np.zeros(spec.num_heads, np.float32)} if spec.sinks else {}
    layer = LayerTensors.of(LayerParameters(spec, **own), host)
    return DeviceCall(batch, q, k, k.clone(), cache, layer, None, True)


def _compiled(torch: Any, function: Any, arguments: dict[str, Any]) -> list[list[int]]:
    """Call a function with tensors of a GPU that have no contents; return the shapes of what it gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        fake = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }
        return [list(result.shape) for result in function(**fake)[:2]]


if __name__ == "__main__":
    sys.exit(main())

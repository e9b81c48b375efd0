"""attn_dispatch on Intel hardware through IPEX and through what follows it. Importing this imports no vendor.

paged_cpu      `ipex/paged-cpu`, on any x86-64 CPU with AVX2; paged_cpu_batch: a batch cut up for its two ops
paged_xpu      `ipex/paged-xpu`: IPEX on an Intel GPU
vllm_xpu       `ipex/vllm-xpu`: vllm-xpu-kernels on an Intel GPU
xpu            what the two backends for Intel GPUs have in common
availability   what is installed, and what to do about what is not

The module `<backend>_call` beside each backend's own calls its vendor.
"""

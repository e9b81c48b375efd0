"""attn_dispatch on Intel hardware through IPEX and through what follows it.

`paged_cpu` runs on any x86-64 CPU with AVX2; `paged_xpu` (IPEX) and `vllm_xpu` (vllm-xpu-kernels) need an Intel GPU.
`steps` prepares batches for all three and `availability` says what is missing; neither imports a vendor.
"""

"""attn_dispatch on NVIDIA GPUs through the vendors' wheels. Importing this imports no vendor.

flash_attention    the backend `cuda/flash-attention`; flash_versions: what is installed and what it computes;
                   flash_attention_call: the functions of FlashAttention 2, 3 and 4
flashinfer         the backend `cuda/flashinfer`; flashinfer_call: a batch in parts, planned and run;
                   flashinfer_wrappers: its wrappers, made and leased, and the memory that they share;
                   flashinfer_mixed: what its one kernel for mixed batches computes
xformers           the backend `cuda/xformers`; xformers_call: its masks, and its operator
backend            what the three have in common, on `attn_dispatch.adapters`
machine, gpus      what is asked of a machine: GPUs, their compute capability, installed packages (files alone)

Beside the package, in platforms/cuda/evidence, outside of the wheel: every call checked against the vendors' real
packages (signature_check), and their kernels compiled for GPUs that are not here.
"""

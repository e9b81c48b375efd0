"""attn_dispatch on AMD GPUs through the vendors' packages. Importing this imports no vendor.

aiter            the backend `rocm/aiter`; aiter_kernels: which of AITER's kernels computes what
aiter_call       a call to AITER's arguments
flash_attention  the backend `rocm/flash-attention`: the CK build, and why the Triton build is refused
flash_attention_call  a call to flash_attn's arguments
backend          what the two have in common, on `attn_dispatch.adapters`
vendor_function  a vendor's function: imported when first called
machine          what is asked of a machine: GPUs by target, torch's build, installed packages (files alone)
layouts          the named layouts of vLLM's first paged kernels
"""

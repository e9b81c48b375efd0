"""attn_dispatch on AMD GPUs through the vendors' packages. Importing this imports no vendor.

aiter              the backend `rocm/aiter`; aiter_kernels: which of AITER's kernels computes what; aiter_calls: how
flash_attention    the backend `rocm/flash-attention`: the CK build, why the Triton build is refused; flash_calls: how
calls              what a vendor's call is here
paged, layer       what the two have in common: the backend's side, and one layer's pass around a vendor's call
machine            what is asked of a machine: GPUs by target, torch's build, installed packages (files alone)
batch              a batch without what kernels cannot be given; lists of tokens (NumPy)
step, packing      a batch on a device, brought in one copy
store, layouts     a cache's memory, and writing to it; the named layouts of vLLM's first paged kernels
signatures         functions of a vendor's sources, without importing them
vendors            the vendors' real packages as files, fetched to be compared with
interface_cell     the command that holds every call against those, and writes the rows of the support table
report             the command for owners of an AMD GPU: everything that such a machine can show, in one file
"""

"""attn_dispatch through Triton: one kernel pair for NVIDIA, AMD and Intel GPUs. Importing this imports no vendor.

paged         the backend: what it says of itself
paged_call    a call to the kernels' arguments: a batch as tiles on a device, one layer's launches
targets       GPUs that Triton compiles for, and what a kernel may take of each (no vendor)
tiles         how much one program takes, by kind of GPU (no vendor)
constants     what kernels are compiled for, of a spec (no vendor)
planning      a batch as tiles of query rows (NumPy)
fixed_maximum an option of split decode (no vendor)
kernels       the Triton kernels: prefill over pages, split decode, merge, cache write
elements      what the kernels share: reading stored elements, one tile's pass over its keys
"""

"""attn_dispatch through Triton: one kernel pair for NVIDIA, AMD and Intel GPUs. Importing this imports no vendor.

paged         the backend: what it says of itself, and the door to the rest
targets       GPUs that Triton compiles for, and what a kernel may take of each (no vendor)
tiles         how much one program takes, by kind of GPU (no vendor)
constants     what kernels are compiled for, of a spec (no vendor)
planning      a batch as tiles of query rows (NumPy)
packing       a batch's arrays on a device, in one copy; renewed in place for graphs
kernels       the Triton kernels: prefill over pages, split decode, merge, cache write
elements      what the kernels share: reading stored elements, one tile's pass over its keys
launch        torch tensors to kernels: a step on a device, writing, attending
compiling     one kernel compiled ahead of time for one target, and the resources that it takes
matrix        what is compiled (no vendor)
bounds        what it may take of a target (no vendor)
compile_cell  all of them, for every target, as a command: no GPU is needed
"""

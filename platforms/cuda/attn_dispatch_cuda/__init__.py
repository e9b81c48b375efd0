"""attn_dispatch on NVIDIA GPUs through the vendors' wheels. Importing this imports no vendor.

flash_attention    the backend `cuda/flash-attention`; flash_versions: what is installed and what it computes;
                   flash_calls: the calls of FlashAttention 2, 3 and 4
flashinfer         the backend `cuda/flashinfer`; flashinfer_step: a batch in parts, planned and run;
                   flashinfer_wrappers: its wrappers, made and leased; flashinfer_merge: partial results
xformers           the backend `cuda/xformers`; xformers_step: its masks and calls
paged, layer       what the three have in common: the backend's side, and one layer's pass around a vendor's call
machine, gpus      what is asked of a machine: GPUs, their compute capability, installed packages (files alone)
batch              a batch without what kernels cannot be given; lists of pages (NumPy)
plans, step        a plan; a batch on a device, brought in one copy, renewed in place for CUDA graphs
packing, store     several arrays in one copy; a cache's memory, and writing to it
interface_cell     every call held against the vendors' real packages, as a command: no GPU is needed; doors: where
                   the vendors' functions would be entered
vendors            those packages, fetched; signatures: of functions in sources
compile_cell       FlashInfer's kernels through nvcc, as a command: no GPU is needed
flash4_cell        FlashAttention 4's kernels through their own compiler, likewise
"""

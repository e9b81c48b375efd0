"""attn_dispatch on any torch device. Importing this imports no torch; `sdpa` is loaded by entry point.

sdpa       the backend: what it says of itself, and the door to the rest
grouping   which sequences one call attends for (NumPy)
step       a plan on a device: every index and mask that no layer changes
store      a cache's memory as rows: writing, gathering, widening
attend     the computation
ops        the same as torch.library operators, for torch.compile
"""

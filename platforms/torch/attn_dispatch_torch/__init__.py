"""attn_dispatch on any torch device. Importing this imports no torch; `sdpa` is loaded by entry point.

sdpa         the backend: what it says of itself
sdpa_call    the computation: write, gather, attend
grouping     which sequences one call attends for (NumPy)
launch_plan  a batch on a device: every index and mask that no layer changes
gathering    a cache's memory as rows: writing, gathering, widening
ops          the same as torch.library operators, for torch.compile
"""

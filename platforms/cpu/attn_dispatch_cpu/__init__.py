"""attn_dispatch on any CPU: paged attention in Python, compiled by Numba. No torch, no compiler at install."""

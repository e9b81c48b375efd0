"""attn_dispatch on any torch device. Importing this imports no torch; `sdpa` is loaded by entry point."""

"""Text generation by transformers models on the paged KV cache: the command `attn-dispatch generate`."""

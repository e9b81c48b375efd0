"""A backend to copy: `paged` says what it is, `paged_call` computes."""

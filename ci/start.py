"""Run the command line from a fresh checkout: `python3 ci/start.py generate "Why is the sky blue?"`.

Makes the environment of the cell `generate` (the CPU build of torch, never several GB of CUDA, unless an NVIDIA GPU is
here), then runs `attn-dispatch` with whatever follows. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys

from cells import cells
from environment import CannotBuild, environment


def main() -> int:
    """Set up, then hand over."""
    cell = next(cell for cell in cells() if cell.name == "generate")
    try:
        python = environment(cell, lambda text: print(f"[set-up] {text}", file=sys.stderr, flush=True))
    except CannotBuild as error:
        print(f"[set-up] {error}", file=sys.stderr)
        return 2
    return subprocess.run([str(python), "-m", "attn_dispatch", *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

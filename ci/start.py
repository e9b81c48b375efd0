"""Run the command line from a fresh checkout: `python3 ci/start.py generate "Why is the sky blue?"`.

Makes the environment of the job `generate` (the CPU build of torch, never several GB of CUDA, unless an NVIDIA GPU is
here), then runs `attn-dispatch` with whatever follows. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys

from environment import CannotBuild, environment
from jobs import jobs


def main() -> int:
    """Set up, then hand over."""
    job = next(job for job in jobs() if job.name == "generate")
    try:
        python = environment(job, lambda text: print(f"[set-up] {text}", file=sys.stderr, flush=True))
    except CannotBuild as error:
        print(f"[set-up] {error}", file=sys.stderr)
        return 2
    return subprocess.run([str(python), "-m", "attn_dispatch", *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

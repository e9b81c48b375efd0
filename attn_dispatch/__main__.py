"""`python -m attn_dispatch` and `attn-dispatch`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say what to install when its packages are missing."""
    try:
        from attn_dispatch.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.stderr.write(f"the command line needs {error.name}: pip install 'attn-dispatch[cli]'\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()

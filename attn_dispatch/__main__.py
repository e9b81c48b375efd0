"""`python -m attn_dispatch` and `attn-dispatch`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its packages `doctor` runs all the same, the other commands say what to install."""
    if sys.argv[1:2] == ["doctor"]:
        from attn_dispatch.cli.doctor import main as doctor

        sys.exit(doctor(sys.argv[2:]))
    try:
        from attn_dispatch.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.stderr.write(f"the command line needs {error.name}: pip install typer rich platformdirs\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()

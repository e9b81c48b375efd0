"""Reading a machine's files below a root folder; an error is kept, not raised and not swallowed."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Files"]


class Files:
    """The files of one machine.

    Attributes:
        root: the folder that they are under.
        problems: what was there and could not be read.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.problems: list[str] = []

    @property
    def is_here(self) -> bool:
        """Whether these are the files of the machine that this process runs on."""
        return str(self.root) == os.sep

    def text(self, path: str, limit: int = 1 << 16) -> str:
        """Return the beginning of a file, stripped; "" if there is none, or if it cannot be read (a problem then)."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(limit).decode("utf-8", "replace").strip("\0\n\r\t ")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            self.problems.append(f"/{path} could not be read: {error.strerror or error}")
            return ""

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if there is no such folder, or it cannot be read (a problem)."""
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.problems.append(f"/{folder} could not be read: {error.strerror or error}")
            return []

    def exists(self, path: str) -> bool:
        """Tell whether something has that name."""
        return os.path.lexists(self.root / path)

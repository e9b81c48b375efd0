"""The files that facts are read from: the machine's own, or a copy of them under another folder."""

from __future__ import annotations

import os

__all__ = ["SystemRoot"]

_CHUNK_BYTES = 65536


class SystemRoot:
    """Files under one root.

    An absent file is an answer (None, False, an empty list); any other failure is kept in `problems`, in words.

    Attributes:
        root: the folder, absolute.
        live: it is the machine that this process runs on, so that what is in no file may be asked too.
        problems: what could not be read and why.
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = os.path.abspath(os.fspath(root))
        self.live = self.root == os.path.abspath(os.sep)
        self.problems: list[str] = []

    def read(self, name: str, limit_bytes: int = _CHUNK_BYTES) -> str | None:
        """Return the beginning of a file, or None when there is none."""
        try:
            handle = os.open(os.path.join(self.root, name), os.O_RDONLY)
            try:
                data = chunk = os.read(handle, limit_bytes)
                while chunk and len(data) < limit_bytes:
                    chunk = os.read(handle, limit_bytes - len(data))
                    data += chunk
            finally:
                os.close(handle)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._keep(name, error)
            return None
        return data.decode("utf-8", "replace")

    def word(self, name: str) -> str:
        """Return a one-line file without its line end (and a device tree's NUL), or an empty string."""
        return (self.read(name) or "").strip().rstrip("\0")

    def names(self, name: str) -> list[str]:
        """Return the names in a folder, shorter ones first so that 2 comes before 10; none when there is no folder."""
        try:
            return sorted(os.listdir(os.path.join(self.root, name)), key=lambda entry: (len(entry), entry))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._keep(name, error)
            return []

    def numbered(self, folder: str, prefix: str) -> list[str]:
        """Return the names in a folder that are a prefix and a number: `nvidia0`, not `nvidiactl`."""
        return [
            entry
            for entry in self.names(folder)
            if entry.startswith(prefix) and entry[len(prefix) :].isascii() and entry[len(prefix) :].isdecimal()
        ]

    def exists(self, name: str) -> bool:
        """Say whether there is such a file or folder."""
        try:
            os.stat(os.path.join(self.root, name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._keep(name, error)
            return False
        return True

    def access(self, name: str, remedy: str) -> dict[str, str]:
        """Return the fact that this user may not open a device node, which is a problem too; none when it may.

        The device is not opened to find out.
        """
        if os.access(os.path.join(self.root, name), os.R_OK | os.W_OK):
            return {}
        self.problems.append(f"/{name}: this user may not open it. {remedy}")
        return {"access": "no"}

    def _keep(self, name: str, error: OSError) -> None:
        self.problems.append(f"/{name.lstrip('/')}: {error.strerror or error}")

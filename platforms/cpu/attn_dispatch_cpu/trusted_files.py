"""Files of machine code that may be run: of this user or root, and nobody else may have changed them.

A file begins with the SHA-256 of the rest: what a crash or a full disk left half is not used. Who owns it is asked of
the open file. Where a folder or a file cannot be trusted nothing is read or written there, and a warning says so once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import warnings
from pathlib import Path

_DIGEST_BYTES = 32
_HAS_OWNERS = hasattr(os, "geteuid")  # not on Windows: the user's folder is nobody else's there

_warned: set[str] = set()


def read(path: Path) -> bytes | None:
    """Return a file's content, or None: absent, damaged, or not to be trusted."""
    if not os.path.exists(path) or _folder_refused(path.parent):
        return None
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            reason = _stranger(os.fstat(file.fileno()))
            if reason:
                _warn(f"{path} {reason}")
                return None
            data = file.read()
    except OSError:
        return None
    body = data[_DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == data[:_DIGEST_BYTES] else None


def write(path: Path, content: bytes) -> str:
    """Write a file in one rename, for this user alone; return why it could not be, or ""."""
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        if reason := _folder_refused(path.parent):
            return reason
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        return str(error)
    return ""


def _folder_refused(folder: Path) -> str:
    """Return why code from a folder is not run, or "". A folder of this user's own is made 0700 on the way."""
    if not _HAS_OWNERS:
        return ""
    try:
        status = folder.stat()
        reason = _stranger(status)
        if not reason and status.st_uid == os.geteuid() and status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        return str(error)
    if reason:
        reason = f"{folder} {reason}"
        _warn(reason)
    return reason


def _stranger(status: os.stat_result) -> str:
    """Return what is wrong with an owner or a mode, or ""."""
    if not _HAS_OWNERS:
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}, who is neither user {os.geteuid()} nor root"
    if status.st_mode & 0o022:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _warn(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"cpu/numba runs no machine code from there: {reason}. It compiles instead, each time; "
        "chmod 700 a folder of your own, or name another in ATTN_DISPATCH_CACHE_DIR",
        RuntimeWarning,
        stacklevel=3,
    )


__all__ = ["read", "write"]

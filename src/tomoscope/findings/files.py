"""Writing so that a crash leaves either the old file or the new one, and a full disk leaves neither half.

Every file is written beside its place, synced, and renamed. Errors of the system become `LedgerError` with the remedy,
and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tomoscope.errors import LedgerError


def ledger_error(path: Path, error: OSError) -> LedgerError:
    """The system's refusal in the user's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LedgerError(
            f"The disk is full: {path} could not be written.",
            remedy="Free some space, or give another folder with --out; what was done is kept and resumes.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LedgerError(
            f"No permission to write {path} ({error.strerror}).", remedy="Give a folder of your own with --out."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return LedgerError(
            f"{path} cannot be a folder, because a file stands there or on the way.", remedy="Give another --out."
        )
    return LedgerError(f"{path} could not be written: {error.strerror or error}.", remedy="Give another --out.")


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn an OSError inside the block into a LedgerError about `path`."""
    try:
        yield
    except OSError as error:
        raise ledger_error(path, error) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically: temporary file beside it, fsync, rename, fsync of the folder."""
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, in ASCII: a name may hold half a surrogate pair, which UTF-8 cannot."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii"))


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines and sync; if the disk fills half way, the file is cut back to what it was."""
    if not lines:
        return
    with writing(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            data = "".join(line + "\n" for line in lines).encode()
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def acquire_lock(path: Path) -> int:
    """Lock the folder; the kernel frees it when the process ends, however it ends."""
    import fcntl

    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise LedgerError(
            f"Another process is writing the run at {path}.", remedy="Wait for it, or give another --out."
        ) from error
    except OSError as error:
        os.close(handle)
        raise ledger_error(path, error) from error
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path / ".lock").st_ino == os.fstat(handle).st_ino:
            return handle
    os.close(handle)  # its former owner removed the file between our opening and our locking it
    return acquire_lock(path)


def release_lock(path: Path, handle: int) -> None:
    """Free a lock, and leave no file behind."""
    with contextlib.suppress(OSError):  # unlink while still holding it; a new writer makes a new file
        os.unlink(path / ".lock")
    os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

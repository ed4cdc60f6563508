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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Files that are written atomically, and folders that only one process uses at a time."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import warnings

from filelock import FileLock, SoftFileLock, Timeout

from harness.errors import FREE_SPACE_HINT, DiskFullError, UserError, is_disk_full, warn

UNFINISHED = ".unfinished"  # suffix of a file while it is being written; no other program uses it
LOCK = ".lock"  # name of the file that locks a folder for one process
# Error numbers of file systems without locks: NFS without its lock service, Lustre without flock, and others.
LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, keep_as: str | None = None, sync: bool = False):
    """
    Context manager that writes a file atomically. It yields the path of an unfinished file, and at the end renames that
    file to `path`. If the block raises an error or the process is killed, the existing file remains. Raises a UserError
    if the file cannot be written.
    Inputs:
        path - Path of the file.
        keep_as - Path to which the existing file is renamed, or None.
        sync - If True, the file is flushed to the disk before it is renamed, in case the machine crashes.
    """
    unfinished = f"{path}{UNFINISHED}"
    try:
        yield unfinished
        if sync:
            with open(unfinished, "r+b") as file:  # Windows cannot sync a file that is open only for reading
                os.fsync(file.fileno())
        if keep_as is not None and os.path.exists(path):
            os.replace(path, keep_as)
        os.replace(unfinished, path)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)  # on a full disk it would occupy the remaining space
        if not isinstance(error, OSError):
            raise
        problem = f"cannot write {path} ({error.strerror or error})"
        raise (DiskFullError(f"{problem}; {FREE_SPACE_HINT}") if is_disk_full(error) else UserError(problem)) from error


def write_text(path: str | os.PathLike, text: str, sync: bool = False):
    """Writes a text file atomically, see atomic_write."""
    with atomic_write(path, sync=sync) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def checksum(file) -> str:
    """Returns the SHA-256 checksum of an open file. Reads it in blocks, because it may be larger than the memory."""
    digest = hashlib.sha256()
    for block in iter(functools.partial(file.read, 2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def read_results(folder: str, metric: str) -> dict:
    """
    Returns the content of the results.json of a finished run, with at least test_METRIC and best_val_METRIC. Raises an
    OSError if the file does not exist or cannot be read, and a ValueError if it is damaged or another program's.
    """
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
        try:
            results = json.load(file)
        except RecursionError as error:
            raise ValueError(str(error)) from error
    if not (
        isinstance(results, dict)
        and isinstance(results.get("hyperparameters"), dict)
        and all(
            type(results.get(name)) in (int, float) and math.isfinite(results[name])
            for name in [f"test_{metric}", f"best_val_{metric}"]
        )
    ):
        raise ValueError("contains no results of a run")
    return results


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike, timeout: float):
    """
    Context manager in which only this process uses a folder. Raises a UserError if another process still uses the
    folder after `timeout` seconds, and an OSError if the folder cannot be written.
    """
    path = os.path.join(folder, LOCK)
    lock, hint = FileLock(path, timeout=timeout), ""
    try:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="flock not supported")
                lock.acquire()
        except (OSError, NotImplementedError, UserWarning) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in LOCKS_UNSUPPORTED:
                raise
            # This lock is a file with the names of host and process. Only that host can recognise an abandoned lock.
            lock = SoftFileLock(f"{path}.soft", timeout=timeout)
            hint = f", or delete {lock.lock_file} if that process has ended"
            warn(
                f"note: {folder} is on a file system without locks: {lock.lock_file} reserves it for this process "
                "instead"
            )
            lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by another process: wait for it{hint}, or choose another --run_name"
        ) from None
    try:
        yield
    finally:
        lock.release()

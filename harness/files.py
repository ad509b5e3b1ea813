"""Files are written atomically, and a folder is used by one process at a time."""

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

UNFINISHED = ".unfinished"  # the end of a file's name as long as it is being written; of no file of anybody else's
LOCK = ".lock"  # the file that keeps a folder to one process
# What file systems without locks say: NFS without its lock service, Lustre without flock, and others.
LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, keep_as: str | None = None, sync: bool = False):
    """
    A context in which to write a file under the name that it yields; at its end the file gets its own name. If the
    context ends with an error, or the process with it, the file that was there before is still there. Raises a
    UserError if the file cannot be written.
    Inputs:
        path - The file to write.
        keep_as - Where the file that was there before is kept, or None.
        sync - If True, the file is on the disk before it gets its name, in case that the machine goes down.
    """
    unfinished = f"{path}{UNFINISHED}"
    try:
        yield unfinished
        if sync:
            with open(unfinished, "r+b") as file:  # Windows syncs no file that is open for reading alone
                os.fsync(file.fileno())
        if keep_as is not None and os.path.exists(path):
            os.replace(path, keep_as)
        os.replace(unfinished, path)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)  # on a full disk it would take the room that is left
        if not isinstance(error, OSError):
            raise
        problem = f"cannot write {path} ({error.strerror or error})"
        raise (DiskFullError(f"{problem}; {FREE_SPACE_HINT}") if is_disk_full(error) else UserError(problem)) from error


def write_text(path: str | os.PathLike, text: str, sync: bool = False):
    """Writes a text file, see atomic_write."""
    with atomic_write(path, sync=sync) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def checksum(file) -> str:
    """The SHA-256 checksum of an open file, which is read in blocks: it may be larger than the memory."""
    digest = hashlib.sha256()
    for block in iter(functools.partial(file.read, 2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def read_results(folder: str, metric: str) -> dict:
    """
    What the results.json of a finished run contains: test_METRIC and best_val_METRIC at least. Raises an OSError if it
    is not there or cannot be read, and a ValueError if it is damaged, or another program's.
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
        raise ValueError("holds no results of a run")
    return results


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike, timeout: float):
    """
    A context in which a folder is this process's alone. Raises a UserError if another process still has it after
    `timeout` seconds, and an OSError if the folder cannot be written.
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
            # A file with host and process in it, which only its own host can tell from one that was left behind.
            lock = SoftFileLock(f"{path}.soft", timeout=timeout)
            hint = f", or delete {lock.lock_file} if that process is gone"
            warn(f"note: {folder} is on a file system without locks: {lock.lock_file} keeps it to this process instead")
            lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by another process: wait for it{hint}, or choose another --run_name for this one"
        ) from None
    try:
        yield
    finally:
        lock.release()

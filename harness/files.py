"""Files are written whole or not at all, and a folder is one process's at a time."""

import contextlib
import errno
import json
import math
import os
import warnings

from filelock import FileLock, SoftFileLock, Timeout

from harness.program import MAKE_ROOM, NoRoomError, UserError, has_no_room, note

UNFINISHED = ".unfinished"  # the end of a file's name as long as it is being written; of no file of anybody else's
BPDS = ["test_bpd", "best_val_bpd"]  # the results that a run has at least
LOCK = ".lock"  # the file that keeps a folder to one process
# What file systems without locks say: NFS without its lock service, Lustre without flock, and others.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524}


@contextlib.contextmanager
def written_whole(path, keep_as=None, sync=False):
    """
    A context in which to write a file under the name that it yields; at its end the file gets its own name. Where the
    context ends with an error, or the process with it, the file that was there before is still there.
    Inputs:
        path - The file to write.
        keep_as - Where the file that was there before is kept, or None.
        sync - If True, the file is on the disk before it gets its name, in case that the machine goes down.
    Raises:
        UserError - where it cannot be written.
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
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)  # on a full disk it would take the room that is left
        if not isinstance(error, OSError) or isinstance(error, UserError):
            raise
        problem = f"cannot write {path} ({error.strerror or error})"
        raise (NoRoomError(f"{problem}; {MAKE_ROOM}") if has_no_room(error) else UserError(problem)) from error


def write_text(path, text, sync=False):
    """Writes a text file, see written_whole."""
    with written_whole(path, sync=sync) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def read_results(folder):
    """
    Reads the results.json of a run, which it leaves once it is finished.
    Inputs:
        folder - The run's folder.
    Outputs:
        results - What it holds.
    Raises:
        FileNotFoundError - where there is none.
        ValueError - where it is damaged, or another program's.
        OSError - where it cannot be read.
    """
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
        try:
            results = json.load(file)
        except RecursionError as error:
            raise ValueError(str(error)) from error
    if not (
        isinstance(results, dict)
        and isinstance(results.get("hyperparameters"), dict)
        and all(type(results.get(name)) in (int, float) and math.isfinite(results[name]) for name in BPDS)
    ):
        raise ValueError("holds no results of a run")
    return results


@contextlib.contextmanager
def only_process(folder, timeout):
    """
    A context in which a folder is this process's alone.
    Inputs:
        folder - The folder.
        timeout - Number of seconds to wait for another process that has it.
    Raises:
        UserError - where another process has it.
        OSError - where the folder cannot be written.
    """
    path = os.path.join(folder, LOCK)
    lock, hint = FileLock(path, timeout=timeout), ""
    try:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="flock not supported")
                lock.acquire()
        except (OSError, NotImplementedError, UserWarning) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise
            # A file with host and process in it, which only its own host can tell from one that was left behind.
            lock = SoftFileLock(f"{path}.soft", timeout=timeout)
            hint = f", or delete {lock.lock_file} if that process is gone"
            note(f"{folder} is on a file system without locks: {lock.lock_file} keeps it to this process instead")
            lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by another process: wait for it{hint}, or choose another --run_name for this one"
        ) from None
    try:
        yield
    finally:
        lock.release()

"""Files are written whole or not at all."""

import contextlib
import os

UNFINISHED = ".tmp"  # the end of a file's name as long as it is being written


@contextlib.contextmanager
def written_whole(path, keep_as=None, sync=False):
    """
    A context in which to write a file under the name that it yields; at its end the file gets its own name. Where the
    context ends with an error, or the process with it, the file that was there before is still there.
    Inputs:
        path - The file to write.
        keep_as - Where the file that was there before is kept, or None.
        sync - If True, the file is on the disk before it gets its name, in case that the machine goes down.
    """
    unfinished = f"{path}{UNFINISHED}"
    yield unfinished
    if sync:
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
    if keep_as is not None and os.path.exists(path):
        os.replace(path, keep_as)
    os.replace(unfinished, path)


def write_text(path, text):
    """Writes a text file."""
    with written_whole(path) as unfinished, open(unfinished, "w", newline="") as file:
        file.write(text)

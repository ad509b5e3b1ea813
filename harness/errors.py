"""Errors that a user can mend, how a program ends on them, and lines of output."""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import sysconfig
import textwrap
import threading
import traceback

DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # of a disk, or within a quota
FREE_SPACE_HINT = "make room and give the same command again"
OUT_OF_MEMORY = (  # what Python and torch say then
    "OutOfMemory|MemoryError|allocate memory|Storage size calculation overflowed|integer multiplication overflow|"
    "Overflow when unpacking long|out of memory|ALLOC_FAILED"
)


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what is wrong and what to do."""


class FlagError(UserError, ValueError):
    """A flag's value is invalid; the message names the flag."""


class DataError(UserError):
    """The data is missing, damaged or invalid; the message says which file and what to do."""


class DiskFullError(UserError):
    """A disk is full or a quota used up: with room again, the same command resumes the run."""


class Terminated(SystemExit):
    """SIGTERM has come. Raised where the program is, it ends it with the exit code that a shell expects then, 143."""

    already_reported = False  # whether the user has been told

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def exit_on_error(parser: argparse.ArgumentParser):
    """
    Runs a program's main body: a UserError, a full disk, a lack of memory, Ctrl-C and SIGTERM end it with a one-line
    message and an exit code that is not 0. Any other error is a bug, the user's or ours, and ends with its traceback.
    Inputs:
        parser - The program's argparse.ArgumentParser, whose name begins the message.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be printed on any terminal
    try:
        with sigterm_raises():
            yield
    except FlagError as error:
        parser.error(error)
    except UserError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")
    except Terminated as end:
        if not end.already_reported:
            warn(f"{parser.prog}: terminated")
        raise
    except Exception as error:
        if is_disk_full(error):
            sys.exit(f"{parser.prog}: error: {error}; {FREE_SPACE_HINT}")
        if is_out_of_memory(error):
            sys.exit(f"{parser.prog}: error: the memory is too small ({one_line(error)})")
        raise


@contextlib.contextmanager
def sigterm_raises():
    """A context in which SIGTERM raises Terminated, unless the program handles it already."""
    handles_it = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handles_it:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if handles_it:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def terminate(signum, frame):
    """A handler of SIGTERM."""
    raise Terminated


def print_line(text: str):
    """Prints lines at once. If they go nowhere any more, as into a closed pipe, the program goes on without."""
    try:
        print(text, flush=True)
    except OSError as error:
        warn(f"note: nothing more can be printed here ({error.strerror}); everything else goes on")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def warn(text: str, num_processes: int = 1):
    """Prints a line on stderr, at once, if it can be; of several processes of a run, rank 0 alone does."""
    lightning = sys.modules.get("pytorch_lightning.utilities")
    if num_processes > 1 and lightning and lightning.rank_zero_only.rank != 0:
        return
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def supports_progress_bar(stream):
    """Whether stdout or stderr is a terminal or a notebook, where a progress bar can be drawn."""
    return stream is not None and (stream.isatty() or hasattr(sys, "ps1"))


@contextlib.contextmanager
def best_effort(what: str):
    """
    A context for what may fail without harm to the rest, such as a picture: its error becomes a line on stderr. If a
    disk is full, the rest will fail, too, so that error is raised.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise
        warn(f"warning: {what} failed, the rest goes on ({one_line(error)}{location_of(error)})")


def is_disk_full(error):
    """Whether an error says that a disk is full or a quota used up."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL)


def is_out_of_memory(error):
    """Whether an error, or None, says that memory is too small, a GPU's or the machine's."""
    return re.search(OUT_OF_MEMORY, repr(error)) is not None


def location_of(error: BaseException) -> str:
    """Where an error comes from, as ", FILE, line N": the last line outside of libraries and this folder, if any."""
    frames = [] if isinstance(error, UserError) else traceback.extract_tb(error.__traceback__)
    others = (sysconfig.get_path("stdlib") + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")
    own = [frame for frame in frames if not frame.filename.startswith(others) and "-packages" not in frame.filename]
    return f", {own[-1].filename}, line {own[-1].lineno}" if own else ""


def one_line(error: BaseException) -> str:
    """An error in one line: its type, unless it is a UserError or an OSError, and the beginning of its text."""
    text = textwrap.shorten(str(error).split("\n\n")[0], 300, placeholder=" ...")
    return text if isinstance(error, (UserError, OSError)) and text else f"{type(error).__name__}: {text}"

"""Errors that a user can fix, how they end a program, and printed lines."""

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

DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # a full disk, a size limit, a quota
FREE_SPACE_HINT = "free disk space and give the same command again"
OUT_OF_MEMORY = (  # parts of the messages of Python and torch
    "OutOfMemory|MemoryError|allocate memory|Storage size calculation overflowed|integer multiplication overflow|"
    "Overflow when unpacking long|out of memory|ALLOC_FAILED"
)


class UserError(Exception):
    """An error that the user can fix; the message is one line that says what is wrong and what to do."""


class FlagError(UserError, ValueError):
    """A flag's value is invalid; the message names the flag."""


class DataError(UserError):
    """The data is missing, damaged or invalid; the message says which file and what to do."""


class DiskFullError(UserError):
    """The disk is full, or a quota is used up. Once disk space is free again, the same command resumes the run."""


class Terminated(SystemExit):
    """SIGTERM was received. Ends the program with exit code 143, which shells use for this signal."""

    already_reported = False  # whether a message has been printed

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def exit_on_error(parser: argparse.ArgumentParser):
    """
    Context manager for a program's main body. A UserError, a full disk, out of memory, Ctrl-C and SIGTERM end the
    program with a one-line message and a nonzero exit code. Any other error is a bug, in the user's code or in this
    package, and ends the program with a traceback.
    Inputs:
        parser - The program's argparse.ArgumentParser; messages begin with its program name.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # any file name can be printed on any terminal
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
            sys.exit(f"{parser.prog}: error: out of memory ({one_line(error)})")
        raise


@contextlib.contextmanager
def sigterm_raises():
    """Context manager in which SIGTERM raises Terminated, unless the program has its own handler."""
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
    """Handler of SIGTERM."""
    raise Terminated


def print_line(text: str):
    """Prints text and flushes it. If stdout is broken, such as a closed pipe, the program continues without output."""
    try:
        print(text, flush=True)
    except OSError as error:
        warn(f"note: the output cannot be printed any more ({error.strerror}); the program continues")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def warn(text: str, num_processes: int = 1):
    """Prints a line on stderr and flushes it. If a run has several processes, only rank 0 prints."""
    lightning = sys.modules.get("pytorch_lightning.utilities")
    if num_processes > 1 and lightning and lightning.rank_zero_only.rank != 0:
        return
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def supports_progress_bar(stream):
    """Returns whether stdout or stderr is a terminal or a notebook, which can show a progress bar."""
    return stream is not None and (stream.isatty() or hasattr(sys, "ps1"))


@contextlib.contextmanager
def best_effort(what: str):
    """
    Context manager for code whose failure does not harm the rest of the program, such as saving a picture. An error
    becomes a warning on stderr. Only the error of a full disk is raised, because the rest would fail too.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise
        warn(f"warning: {what} failed and is skipped ({one_line(error)}{location_of(error)})")


def is_disk_full(error):
    """Returns whether an error says that the disk is full or a quota is used up."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL)


def is_out_of_memory(error):
    """Returns whether an error, or None, says that a GPU or the machine is out of memory."""
    return re.search(OUT_OF_MEMORY, repr(error)) is not None


def location_of(error: BaseException) -> str:
    """Returns the innermost line of an error outside of libraries and this folder, as ", FILE, line N", or ''."""
    frames = [] if isinstance(error, UserError) else traceback.extract_tb(error.__traceback__)
    others = (sysconfig.get_path("stdlib") + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")
    own = [frame for frame in frames if not frame.filename.startswith(others) and "-packages" not in frame.filename]
    return f", {own[-1].filename}, line {own[-1].lineno}" if own else ""


def one_line(error: BaseException) -> str:
    """Returns the start of an error's message as one line, after its type unless it is a UserError or OSError."""
    text = textwrap.shorten(str(error).split("\n\n")[0], 300, placeholder=" ...")
    return text if isinstance(error, (UserError, OSError)) and text else f"{type(error).__name__}: {text}"

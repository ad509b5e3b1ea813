"""What every program shares: errors of one line and how to end on them, lines of output, and flags as plain values."""

import argparse
import contextlib
import difflib
import enum
import errno
import math
import numbers
import os
import re
import reprlib
import signal
import sys
import textwrap
import threading
from collections.abc import Mapping

# Flags that say where and how a run is computed, not what: another value continues the same run.
CHANGEABLE_FLAGS = {
    *("run_name", "log_dir", "data_dir", "num_workers", "progress_bar"),
    *("accelerator", "devices", "num_nodes", "no_cuda_graph", "threads"),
}
CHECKSUM = "dataset_sha256"  # a flag that no one gives: it tells a file of one's own from others
MAX_INT, MAX_FLOAT = 2**32 - 1, 3.4e38  # of a flag: a seed's, and what 32 bits can hold of other numbers
MAX_THREADS = 1024  # with millions, OpenMP ends a program without a word
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # of a disk, or within a quota
MAKE_ROOM = "make room and give the same command again"
NO_MEMORY = (  # in what Python and torch say then
    "OutOfMemory|MemoryError|allocate memory|Storage size calculation overflowed|integer multiplication overflow|"
    "Overflow when unpacking long|out of memory|ALLOC_FAILED"
)


class UserError(OSError):
    """
    Something that the user can mend; the message is one line that says what is wrong and what to do.

    It is an OSError, as is the DataError of bmnist.py, which imports nothing of ours: what the world outside of the
    program does wrong, full disks and missing files too, has that one base.
    """


class FlagError(UserError, ValueError):
    """A flag's value is of no use; the message names the flag."""


class NoRoomError(UserError):
    """A disk is full or a quota used up: with room again, the same command goes on."""


class Terminated(SystemExit):
    """SIGTERM has come. Raised where the program is, it ends it with the exit code that a shell expects then, 143."""

    told = False  # whether the user has been told already

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class Parser(argparse.ArgumentParser):
    """
    A parser that shows defaults, and ends with exit code 2 and one line on a flag that is of no use.
    Inputs:
        description - What the program does.
        flags - Dict from a group's title to its flags, a dict from a flag's name to (default, possible, help).
            `possible` is a list of values, or the smallest number, or None: anything; or a function that returns the
            flag's value for what was given, and raises a ValueError. The default's type is the flag's.
    """

    def __init__(self, description, flags=None):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.flags = {name: flag for group in (flags or {}).values() for name, flag in group.items()}
        for title, group in (flags or {}).items():
            arguments = self.add_argument_group(title)
            for name, (default, possible, help) in group.items():
                arguments.add_argument(f"--{name}", default=default, help=help, **kind_of_flag(default, possible))

    @property
    def defaults(self):
        """Dict of the flags' defaults."""
        return {name: default for name, (default, _, _) in self.flags.items()}

    def complete(self, args):
        """
        Completes flags, which may come from a notebook, and checks them.
        Inputs:
            args - Namespace of some flags. Numbers may be NumPy's or tensors, lists arrays or tuples, texts paths.
        Outputs:
            args - Namespace of every flag, as plain values, with the default of each one that was not there.
        Raises:
            FlagError - where a value is of no use, or a name is no flag's but close to one.
        """
        flags = {**self.defaults, **vars(args)}
        for name, given in flags.items():
            if name not in self.flags and (meant := difflib.get_close_matches(name, self.flags, 1, cutoff=0.75)):
                raise FlagError(f"--{name} is no flag: give --{meant[0]}, or leave it out")
            try:
                value = plain_value(given)
                flags[name] = fitting(value, *self.flags[name][:2]) if name in self.flags else value
            except ValueError as error:
                got = " ".join(reprlib.repr(given).split())
                raise FlagError(f"--{name} must be {error}, got {got}") from None
        if others := flags.keys() - self.flags:
            note(f"no flags, and without effect: {', '.join(sorted(others))}")
        return argparse.Namespace(**flags)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def kind_of_flag(default, possible):
    """What argparse's add_argument is told of a flag with this default and these possible values."""
    if isinstance(default, bool):
        return {"action": "store_true"}
    if isinstance(default, list):
        return {"type": type(default[0]), "nargs": "+", "metavar": "N"}
    choices = possible if isinstance(possible, list) else None
    return {"type": str if default is None else type(default), "choices": choices}


def plain_value(value):
    """
    A value as Python's own type, which can be written into any file: numbers, texts, truth values, None, and lists and
    dicts of them.
    Raises:
        ValueError - where it is none of these.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    with contextlib.suppress(RuntimeError, TypeError):  # a sparse tensor, or one without values
        value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and torch's
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        text = str(os.fspath(value))
        if "\0" in text or text != text.encode(errors="replace").decode():
            raise ValueError("a text that files and their names can hold")
        return text
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Number) and not isinstance(value, complex):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if isinstance(value, (list, tuple, range)):
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items()}
    raise ValueError("a number, a text, or a list of them")


def fitting(value, default, possible):
    """
    A plain value as that of a flag.
    Inputs:
        value - The value.
        default, possible - The flag's, see Parser.
    Outputs:
        value - The same, of the flag's type.
    Raises:
        ValueError - where it is of no use; its text says what the flag must be.
    """
    if value is default is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    most = {int: MAX_INT, float: MAX_FLOAT}.get(type(default), math.inf)
    if is_number and most < value < math.inf:
        raise ValueError(f"at most {most:,}")
    if callable(possible):
        return possible(value)
    if isinstance(default, bool):
        if value in (False, True):  # 0 and 1, too
            return bool(value)
        raise ValueError("True or False")
    if isinstance(default, list):
        with contextlib.suppress(ValueError):
            values = [fitting(item, default[0], possible) for item in (value if isinstance(value, list) else [value])]
            if values:
                return values
        raise ValueError(f"one or more numbers from {possible} to {MAX_INT:,}")
    if isinstance(default, int) and is_number and value == value // 1:
        value = int(value)
    if isinstance(possible, list):
        value = str(value) if is_number and isinstance(default, str) else value  # 32 for "32"
        if value in possible and not isinstance(value, bool):
            return value
        raise ValueError(f"one of {', '.join(map(str, possible))}")
    if isinstance(default, float):
        if is_number and possible < value < math.inf:
            return float(value)
        raise ValueError(f"a finite number above {possible:g}")
    if isinstance(default, int):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("a whole number")
        if possible is not None and value < possible:
            raise ValueError(f"at least {possible}")
    elif not isinstance(value, str):
        raise ValueError("a text")
    return value


def auto_or_number(value):
    """The value of --threads. Raises a ValueError that says what it must be."""
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise ValueError(f"auto, or a whole number from 1 to {MAX_THREADS:,}")
    return int(value)


def not_negative(value):
    """A flag's value as a float, from 0 on. Raises a ValueError that says what it must be."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ValueError("a finite number of at least 0")


# Of every run, whatever it trains; as train_pl.FLAGS.
RUN_FLAGS = {
    "run": {
        "log_dir": ("VAE_logs", None, "Directory in which the runs' folders are made"),
        "run_name": (None, None, "The run's folder in log_dir, continued if it is there; by default a new one"),
        "progress_bar": (False, None, "Show a progress bar instead of a line per epoch; not for batch jobs"),
    },
    "devices": {
        "accelerator": ("auto", ["auto", "cpu", "gpu"], "Device that trains; auto takes a GPU where there is one"),
        "devices": (1, 1, "Number of GPUs, or of processes on a CPU, per node"),
        "num_nodes": (1, 1, "Number of nodes"),
        "precision": ("32", ["32", "bf16"], "Of the networks' arithmetic: float32, or bfloat16 where it is safe"),
        "threads": ("auto", auto_or_number, "Of a CPU: a number, or auto, as many as there are idle cores"),
        "no_cuda_graph": (False, None, "On a GPU, train without CUDA graphs, in ordinary steps"),
    },
}


@contextlib.contextmanager
def ending(parser):
    """
    A context that a program works in. An error of the world outside ends it with one line, and never with code 0, and
    so do Ctrl-C and SIGTERM. What it prints can be printed on any terminal.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with sigterm_raises(), signals_come_again():
            yield
    except FlagError as error:
        parser.error(error)
    except OSError as error:
        remedy = "" if isinstance(error, UserError) or not has_no_room(error) else f"; {MAKE_ROOM}"
        sys.exit(f"{parser.prog}: error: {error}{remedy}")
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if not has_no_memory(error):
            raise
        sys.exit(f"{parser.prog}: error: the memory is too small ({one_line(error)})")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")
    except Terminated as end:
        if not end.told:
            note(f"{parser.prog}: terminated")
        raise


@contextlib.contextmanager
def sigterm_raises():
    """A context in which SIGTERM raises Terminated, unless the program does something else at it already."""
    takes_it = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if takes_it:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if takes_it:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def signals_come_again():
    """
    A context in which Ctrl-C and SIGTERM are not lost where Python ignores errors, as in a `__del__` or when a weak
    reference ends: they come again, a moment later.
    """
    hook = sys.unraisablehook

    def again(ignored):
        numbers = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}
        if ignored.exc_type in numbers:
            threading.Timer(0.1, signal.raise_signal, [numbers[ignored.exc_type]]).start()
        else:
            hook(ignored)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def terminate(signum, frame):
    """A handler of SIGTERM."""
    raise Terminated


def say(text):
    """Prints lines at once. Where they go nowhere any more, as into a closed pipe, the program goes on without."""
    try:
        print(text, flush=True)
    except OSError as error:
        note(f"nothing more can be printed here ({error.strerror}); everything else goes on")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def note(text):
    """Prints a line on stderr, at once, if it can be."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def is_screen(stream):
    """Whether what goes to stdout or stderr is on a terminal or in a notebook, where it can be drawn over itself."""
    return stream is not None and (stream.isatty() or hasattr(sys, "ps1"))


@contextlib.contextmanager
def optional(what):
    """
    A context for what may fail without harm to the rest, such as a picture: its error becomes a line on stderr. Where
    a disk is full, the rest will fail, too, so that error is raised.
    """
    try:
        yield
    except Exception as error:
        if has_no_room(error):
            raise
        note(f"{what} failed, the rest goes on ({one_line(error)})")


def has_no_room(error):
    """Whether an error is of a full disk or a quota."""
    return isinstance(error, NoRoomError) or (isinstance(error, OSError) and error.errno in NO_ROOM)


def has_no_memory(error):
    """Whether an error, or None, is of memory that is too small, a GPU's or the machine's."""
    return re.search(NO_MEMORY, repr(error)) is not None


def one_line(error):
    """An error in one line: its kind, if it is none of the world outside, and the beginning of its text."""
    text = textwrap.shorten(str(error).split("\n\n")[0], 300, placeholder=" ...")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"

"""Flags: what each one may be, one validation for the command line and for notebooks, and the flags of every run."""

import argparse
import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Callable
from typing import Any

from harness.errors import FlagError, UserError, warn
from harness.files import checksum

# Flags that say where and how a run is computed, not what: with another value the same run resumes.
RUNTIME_FLAGS = {
    *("run_name", "log_dir", "data_dir", "num_workers", "progress_bar"),
    *("accelerator", "devices", "num_nodes", "no_cuda_graph", "threads"),
}
CHECKSUM = "_sha256"  # NAME_sha256 is the checksum of the file that the flag NAME gives; it, not the path, is compared
MAX_INT, MAX_FLOAT = 2**32 - 1, 3.4e38  # the largest seed, and the largest float32
MAX_THREADS = 1024  # with millions, OpenMP ends a program without a message


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line. Its type is that of its default; None is that of an optional string."""

    default: Any
    help: str
    choices: list | None = None  # the possible values
    minimum: float | None = None  # the smallest value of a number, or of each number in a list
    above: float | None = None  # what a number must be larger than
    parse: Callable | None = None  # returns the flag's value for what was given; a ValueError says what it must be


class Parser(argparse.ArgumentParser):
    """
    A parser that shows defaults, and ends with exit code 2 and one line on an invalid flag.
    Inputs:
        description - What the program does.
        flags - Dict from a group's title to its flags, a dict from a flag's name to its Flag.
    """

    def __init__(self, description: str, flags: dict[str, dict[str, Flag]] | None = None):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.flags = {name: flag for group in (flags or {}).values() for name, flag in group.items()}
        for title, group in (flags or {}).items():
            arguments = self.add_argument_group(title)
            for name, flag in group.items():
                arguments.add_argument(f"--{name}", default=flag.default, help=flag.help, **argparse_options(flag))

    @property
    def defaults(self) -> dict:
        """Dict of the flags' defaults."""
        return {name: flag.default for name, flag in self.flags.items()}

    def complete(self, args: argparse.Namespace) -> argparse.Namespace:
        """
        Completes flags, which may come from a notebook, and validates them.
        Inputs:
            args - Namespace of some flags. Numbers may be NumPy's or tensors, lists arrays or tuples, strings paths.
        Outputs:
            args - Namespace of every flag, as plain values, with the default of each one that was not there.
        Raises:
            FlagError - if a value is invalid, or a name is that of no flag but close to one.
        """
        given = vars(args)
        others = sorted(given.keys() - self.flags)
        for name in others:
            if meant := difflib.get_close_matches(name, self.flags, 1, cutoff=0.75):
                raise FlagError(f"unknown flag --{name}: did you mean --{meant[0]}?")
        flags = {}
        for name, flag in self.flags.items():
            value = given.get(name, flag.default)
            try:
                flags[name] = validate(plain_value(value), flag)
            except ValueError as error:
                got = " ".join(reprlib.repr(value).split())
                raise FlagError(f"--{name} must be {error}, got {got}") from None
        if others:
            num_processes = flags.get("devices", 1) * flags.get("num_nodes", 1)
            warn(f"warning: no flags, and without effect: {', '.join(others)}", num_processes)
        return argparse.Namespace(**flags)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def complete_file(args: argparse.Namespace, name: str, open_file: Callable | None = None):
    """
    Completes a flag that gives a file by what identifies it: its absolute path, and its checksum as NAME_sha256.
    Inputs:
        args - Namespace of the flags.
        name - Name of the flag. Its value is None if no file is given.
        open_file - Function from a path to the context of an open file; by default Python's.
    Raises:
        UserError - if the file cannot be read.
    """
    vars(args).pop(f"{name}{CHECKSUM}", None)  # of another run's flags
    given = vars(args)[name]
    if given is not None:
        path = os.path.abspath(os.path.expanduser(given))
        try:
            with open_file(path) if open_file else open(path, "rb") as file:
                vars(args).update({name: path, f"{name}{CHECKSUM}": checksum(file)})
        except OSError as error:
            raise UserError(f"--{name} {given!r} cannot be read ({error.strerror})") from error


def argparse_options(flag: Flag) -> dict:
    """What argparse's add_argument is told about a flag."""
    if isinstance(flag.default, bool):
        return {"action": "store_true"}
    if isinstance(flag.default, list):
        return {"type": type(flag.default[0]), "nargs": "+", "metavar": "N"}
    return {"type": str if flag.default is None else type(flag.default), "choices": flag.choices}


def plain_value(value):
    """A value as Python's own type: numbers and arrays of NumPy or torch, paths, tuples; any other as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = str(os.fspath(value))
    return [plain_value(item) for item in value] if isinstance(value, (list, tuple, range)) else value


def validate(value, flag: Flag):
    """
    A plain value as one of the flag's type: an int for 20.0, "32" for 32. Raises a ValueError if it is invalid, whose
    text says what the flag must be.
    """
    kind, is_number = type(flag.default), isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and flag.default is None:
        return None
    if flag.parse:
        return flag.parse(value)
    if kind is bool:
        if value in (False, True):  # 0 and 1, too
            return bool(value)
        raise ValueError("True or False")
    if kind is list:
        item_flag, items = (
            dataclasses.replace(flag, default=flag.default[0]),
            value if isinstance(value, list) else [value],
        )
        try:
            values = [validate(item, item_flag) for item in items]
        except ValueError:
            values = []
        if values:
            return values
        raise ValueError(f"one or more numbers from {flag.minimum} to {MAX_INT:,}")
    if flag.choices:
        value = str(value) if is_number and kind is str else value  # 32 for "32"
        if value in flag.choices and not isinstance(value, bool):
            return flag.choices[flag.choices.index(value)]
        raise ValueError(f"one of {', '.join(map(str, flag.choices))}")
    if kind not in (int, float):
        if not isinstance(value, str):
            raise ValueError("a text")
        if "\0" in value or value != value.encode(errors="replace").decode():
            raise ValueError("a text that files and their names can hold")
        return value
    if kind is int and not (is_number and value == value // 1):
        raise ValueError("a whole number")
    most = MAX_INT if kind is int else MAX_FLOAT
    if is_number and most < value < math.inf:
        raise ValueError(f"at most {most:,}")
    if flag.above is not None and not (is_number and flag.above < value < math.inf):
        raise ValueError(f"a finite number above {flag.above:g}")
    if flag.minimum is not None and not (is_number and flag.minimum <= value < math.inf):
        raise ValueError(f"{'a finite number of ' * (kind is float)}at least {flag.minimum:g}")
    return kind(value)


def parse_threads(value):
    """The value of --threads. Raises a ValueError that says what it must be."""
    if value == "auto":
        return value
    value = int(value) if isinstance(value, float) and value == value // 1 else value
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise ValueError(f"auto, or a whole number from 1 to {MAX_THREADS:,}")
    return int(value)


def run_flags(log_dir: str) -> dict[str, dict[str, Flag]]:
    """
    The flags of every run, whatever it trains, for a Parser; log_dir is the default of the directory of all runs. A run
    also has the flags epochs, batch_size and seed, which stand with those of the training.
    """
    return {
        "run": {
            "log_dir": Flag(log_dir, "Directory in which the runs' folders are made"),
            "run_name": Flag(None, "The run's folder in log_dir, continued if it is there; by default a new one"),
            "progress_bar": Flag(False, "Show a progress bar instead of a line per epoch; not for batch jobs"),
        },
        "devices": {
            "accelerator": Flag("auto", "Device that trains; auto takes a GPU if there is one", ["auto", "cpu", "gpu"]),
            "devices": Flag(1, "Number of GPUs, or of processes on a CPU, per node", minimum=1),
            "num_nodes": Flag(1, "Number of nodes", minimum=1),
            "precision": Flag("32", "Of the networks: float32, or bfloat16 where it is safe", ["32", "bf16"]),
            "threads": Flag("auto", "Threads of a CPU: a number, or auto, at most 8", parse=parse_threads),
            "no_cuda_graph": Flag(False, "On a GPU, train without CUDA graphs, in ordinary steps"),
        },
    }


def check_run_flags(args: argparse.Namespace):
    """Checks the flags that say where a run is and what computes it. Raises a FlagError if one is invalid."""
    if args.batch_size % (args.devices * args.num_nodes):
        raise FlagError(
            f"--batch_size {args.batch_size} is the minibatch over all devices: it must be a multiple of "
            f"--devices {args.devices} x --num_nodes {args.num_nodes}"
        )
    name = args.run_name
    if name is None:
        return
    log_dir = os.path.join(os.path.realpath(os.path.expanduser(args.log_dir)), "")
    if os.path.isdir(name) and not os.path.isdir(os.path.join(log_dir, name)):
        path = os.path.realpath(name)  # from the working directory, as a shell completes it
        if path.startswith(log_dir):
            raise FlagError(f"--run_name {name} is not found from the log directory: give {path.removeprefix(log_dir)}")
    if os.path.isabs(name) or os.path.splitdrive(name)[0] or os.path.normpath(name).split(os.sep)[0] in (".", ".."):
        raise FlagError(f"--run_name must be a folder inside the log directory, got {name!r}")
    if not name.isprintable():
        raise FlagError(f"--run_name must be a name that can be printed, got {name!r}")

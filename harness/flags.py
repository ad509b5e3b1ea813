"""Flags: their types and limits, one validation for the command line and for notebooks, and the flags of every run."""

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

# Flags that say where and how a run is computed, not what it computes. A run resumes even if their values change.
RUNTIME_FLAGS = {
    *("run_name", "log_dir", "data_dir", "num_workers", "progress_bar"),
    *("accelerator", "devices", "num_nodes", "no_cuda_graph", "threads"),
}
CHECKSUM = "_sha256"  # NAME_sha256 is the checksum of the file of the flag NAME; runs compare checksums, not paths
MAX_INT, MAX_FLOAT = 2**32 - 1, 3.4e38  # the largest seed, and the largest float32
MAX_THREADS = 1024  # with millions of threads, OpenMP ends a program without a message


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line. Its type is the type of its default; None stands for an optional string."""

    default: Any
    help: str
    choices: list | None = None  # the possible values
    minimum: float | None = None  # the smallest value of a number, or of each number in a list
    above: float | None = None  # a number must be larger than this
    parse: Callable | None = None  # converts the given value; its ValueError says what the value must be


class Parser(argparse.ArgumentParser):
    """
    Parser whose help shows the defaults. An invalid flag ends the program with exit code 2 and a one-line message.
    Inputs:
        description - What the program does.
        flags - Dict from the title of a group to its flags, which are a dict from a flag's name to its Flag.
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
        """Dict from a flag's name to its default."""
        return {name: flag.default for name, flag in self.flags.items()}

    def complete(self, args: argparse.Namespace) -> argparse.Namespace:
        """
        Completes and validates flags, which may come from a notebook.
        Inputs:
            args - Namespace of some flags. Numbers may be NumPy's or tensors, lists may be arrays or tuples, and
                strings may be paths.
        Outputs:
            args - Namespace of all flags, as plain values. A flag that was not given has its default.
        Raises:
            FlagError - if a value is invalid, or if a name is unknown but similar to a flag's name.
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
            warn(f"warning: ignored unknown flags: {', '.join(others)}", num_processes)
        return argparse.Namespace(**flags)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def complete_file(args: argparse.Namespace, name: str, open_file: Callable | None = None):
    """
    Completes a flag whose value is a file: makes the path absolute, and adds the file's checksum as NAME_sha256.
    Inputs:
        args - Namespace of the flags.
        name - Name of the flag. Its value is None if no file is given.
        open_file - Function that opens a path as a context manager; by default Python's open.
    Raises:
        UserError - if the file cannot be read.
    """
    vars(args).pop(f"{name}{CHECKSUM}", None)  # may be left from the flags of another run
    given = vars(args)[name]
    if given is not None:
        path = os.path.abspath(os.path.expanduser(given))
        try:
            with open_file(path) if open_file else open(path, "rb") as file:
                vars(args).update({name: path, f"{name}{CHECKSUM}": checksum(file)})
        except OSError as error:
            raise UserError(
                f"--{name} {given!r} cannot be read ({error.strerror}): check the path and its permissions"
            ) from error


def argparse_options(flag: Flag) -> dict:
    """Returns the keyword arguments of argparse's add_argument for a flag."""
    if isinstance(flag.default, bool):
        return {"action": "store_true"}
    if isinstance(flag.default, list):
        return {"type": type(flag.default[0]), "nargs": "+", "metavar": "N"}
    return {"type": str if flag.default is None else type(flag.default), "choices": flag.choices}


def plain_value(value):
    """Converts numbers and arrays of NumPy and torch, paths and tuples to Python's types; returns others unchanged."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = str(os.fspath(value))
    return [plain_value(item) for item in value] if isinstance(value, (list, tuple, range)) else value


def validate(value, flag: Flag):
    """
    Converts a plain value to the type of a flag, such as 20.0 to 20 or 32 to "32". Raises a ValueError if the value is
    invalid; its message says what the flag must be.
    """
    kind, is_number = type(flag.default), isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and flag.default is None:
        return None
    if flag.parse:
        return flag.parse(value)
    if kind is bool:
        if value in (False, True):  # also 0 and 1
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
        raise ValueError(f"one or more whole numbers from {flag.minimum} to {MAX_INT:,}")
    if flag.choices:
        value = str(value) if is_number and kind is str else value  # 32 means "32"
        if value in flag.choices and not isinstance(value, bool):
            return flag.choices[flag.choices.index(value)]
        raise ValueError(f"one of {', '.join(map(str, flag.choices))}")
    if kind not in (int, float):
        if not isinstance(value, str):
            raise ValueError("a string")
        if "\0" in value or value != value.encode(errors="replace").decode():
            raise ValueError("valid Unicode text without NUL characters")
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
    """Converts the value of --threads. Raises a ValueError that says what it must be."""
    if value == "auto":
        return value
    value = int(value) if isinstance(value, float) and value == value // 1 else value
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise ValueError(f"auto, or a whole number from 1 to {MAX_THREADS:,}")
    return int(value)


def run_flags(log_dir: str) -> dict[str, dict[str, Flag]]:
    """
    Returns the flags of every run for a Parser, independent of the model. `log_dir` is the default of --log_dir. A run
    also has the flags epochs, batch_size and seed, which belong to the group of the training.
    """
    return {
        "run": {
            "log_dir": Flag(log_dir, "Directory that contains the run folders"),
            "run_name": Flag(None, "Name of the run folder in --log_dir; an existing run is resumed"),
            "progress_bar": Flag(False, "Show a progress bar instead of a line per epoch, in a terminal or notebook"),
        },
        "devices": {
            "accelerator": Flag("auto", "Device for training; auto uses a GPU if possible", ["auto", "cpu", "gpu"]),
            "devices": Flag(1, "Number of GPUs per node, or of processes per node on a CPU", minimum=1),
            "num_nodes": Flag(1, "Number of nodes", minimum=1),
            "precision": Flag("32", "Arithmetic of the networks: float32, or bfloat16 mixed", ["32", "bf16"]),
            "threads": Flag("auto", "Number of CPU threads, or auto (at most 8)", parse=parse_threads),
            "no_cuda_graph": Flag(False, "On a GPU, train without CUDA graphs"),
        },
    }


def check_run_flags(args: argparse.Namespace):
    """Checks the flags for a run's folder and its devices. Raises a FlagError if one is invalid."""
    if args.batch_size % (args.devices * args.num_nodes):
        raise FlagError(
            f"--batch_size {args.batch_size} counts the images of all devices, so it must be a multiple "
            f"of --devices {args.devices} x --num_nodes {args.num_nodes}"
        )
    name = args.run_name
    if name is None:
        return
    log_dir = os.path.join(os.path.realpath(os.path.expanduser(args.log_dir)), "")
    if os.path.isdir(name) and not os.path.isdir(os.path.join(log_dir, name)):
        path = os.path.realpath(name)  # relative to the working directory, as a shell completes it
        if path.startswith(log_dir):
            raise FlagError(
                f"--run_name must be relative to --log_dir, got {name}: use --run_name {path.removeprefix(log_dir)}"
            )
    if os.path.isabs(name) or os.path.splitdrive(name)[0] or os.path.normpath(name).split(os.sep)[0] in (".", ".."):
        raise FlagError(f"--run_name must be a path relative to --log_dir and stay inside it, got {name!r}")
    if not name.isprintable():
        raise FlagError(f"--run_name must be printable, got {name!r}")

"""What every program shares: errors of one line and how to end on them, and flags as plain values."""

import argparse
import contextlib
import json
import math
import sys

# Flags that say where and how a run is computed, not what: another value continues the same run.
CHANGEABLE_FLAGS = {
    *("run_name", "log_dir", "data_dir", "num_workers", "progress_bar"),
    *("accelerator", "devices", "num_nodes", "plain"),
}


class UserError(OSError):
    """
    Something that the user can mend; the message is one line that says what is wrong and what to do.

    It is an OSError, as is the DataError of bmnist.py, which imports nothing of ours: what the world outside of the
    program does wrong, full disks and missing files too, has that one base.
    """


class FlagError(UserError, ValueError):
    """A flag's value is of no use; the message names the flag."""


class Parser(argparse.ArgumentParser):
    """
    A parser that shows defaults, and ends with exit code 2 and one line on a flag that is of no use.
    Inputs:
        description - What the program does.
        flags - Dict from a group's title to its flags, a dict from a flag's name to (default, possible, help).
            `possible` is a list of values, or the smallest number, or None: anything. The default's type is the flag's.
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
            args - Namespace of some flags.
        Outputs:
            args - Namespace of every flag, with the default of each one that was not there.
        Raises:
            FlagError - where a value is of no use.
        """
        args = argparse.Namespace(**{**self.defaults, **vars(args)})
        for name, (default, possible, _) in self.flags.items():
            value = getattr(args, name)
            if value == default:
                continue
            if isinstance(possible, list):
                if value not in possible:
                    raise FlagError(f"--{name} must be one of {', '.join(map(str, possible))}, got {value!r}")
            elif isinstance(default, list):
                if not value or min(value) < possible:
                    raise FlagError(f"--{name} must be one or more numbers of at least {possible}, got {value}")
            elif isinstance(default, float):
                if not (math.isfinite(value) and value > possible):
                    raise FlagError(f"--{name} must be a finite number above {possible:g}, got {value}")
            elif possible is not None and value < possible:
                raise FlagError(f"--{name} must be at least {possible}, got {value}")
        return args

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


@contextlib.contextmanager
def ending(parser):
    """A context that a program works in: an error of the world outside ends it with one line, and not with code 0."""
    try:
        yield
    except FlagError as error:
        parser.error(error)
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")


def plain_values(flags):
    """A dict of flags as it comes back from a file: tuples as lists."""
    return json.loads(json.dumps(flags))

"""Tests of harness/program.py: `python -m unittest tests/unit/test_program.py`."""

import argparse
import contextlib
import enum
import io
import json
import math
import os
import signal
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from harness.errors import (
    MAKE_ROOM,
    DiskFullError,
    FlagError,
    Terminated,
    UserError,
    best_effort,
    exit_on_error,
    print_line,
    sigterm_raises,
    warn,
)
from harness.flags import RUNTIME_FLAGS, Parser, auto_or_number, not_negative
from tests.helpers import SeededTest
from train_pl import FLAGS as TRAINING_FLAGS

FLAGS = {
    "shape": {
        "kind": ("round", ["round", "square"], "Kind of shape"),
        "sizes": ([3, 4], 1, "Sizes of the parts"),
        "number": (5, 1, "Number of parts"),
    },
    "other": {
        "rate": (0.5, 0.0, "Rate of change"),
        "weight": (1.0, not_negative, "Weight"),
        "seed": (0, 0, "Seed"),
        "side": (1, [1, 2], "Side"),
        "colour": (None, ["red", "blue"], "Colour, none by default"),
        "name": (None, None, "Name, none by default"),
        "count": (1, None, "Any number"),
        "shiny": (False, None, "Whether it shines"),
    },
}


class Kind(str, enum.Enum):
    SQUARE = "square"


DEFAULTS = {name: flag[0] for group in FLAGS.values() for name, flag in group.items()}


class TestParser(SeededTest):
    def parse(self, *words):
        return vars(Parser("Draws.", FLAGS).parse_args(words))

    def exit(self, *words):
        """Exit code, stdout and stderr of a command that ends at its flags."""
        with (
            self.assertRaises(SystemExit) as caught,
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as error,
        ):
            self.parse(*words)
        return caught.exception.code, output.getvalue(), error.getvalue()

    def test_defaults(self):
        self.assertEqual(Parser("Draws.", FLAGS).defaults, DEFAULTS)
        self.assertEqual(self.parse(), DEFAULTS)
        self.assertEqual((Parser("Draws.").defaults, vars(Parser("Draws.").parse_args([]))), ({}, {}))

    def test_types(self):
        """The type of a flag is that of its default."""
        words = "--kind square --sizes 7 8 9 --number 2 --rate 1e-3 --side 2 --colour red --name 1 --count -4 --shiny"
        expected = dict(kind="square", sizes=[7, 8, 9], number=2, rate=0.001, seed=0, side=2, colour="red")
        expected.update(name="1", count=-4, shiny=True, weight=1.0)
        flags = self.parse(*words.split())
        self.assertEqual(flags, expected)
        self.assertEqual(
            {name: type(value) for name, value in flags.items()}, {k: type(v) for k, v in expected.items()}
        )

    def test_help(self):
        code, output, error = self.exit("--help")
        self.assertEqual((code, error), (0, ""))
        text = " ".join(output.split())
        self.assertIn("Draws.", text)
        shape, other = text.index(" shape: --kind {round,square}"), text.index(" other: --rate RATE")
        for part, group in [
            ("--kind {round,square} Kind of shape (default: round)", shape),
            ("--sizes N [N ...] Sizes of the parts (default: [3, 4])", shape),
            ("--side {1,2} Side (default: 1)", other),
            ("--colour {red,blue} Colour, none by default", other),
            ("--shiny Whether it shines (default: False)", other),
        ]:
            self.assertEqual(text.index(part) < other, group < other, part)

    def test_flags_of_no_use_end_it_with_one_line(self):
        for words, part in [
            (["--kind", "flat"], "flat"),
            (["--number", "many"], "--number"),
            (["--number", "2.5"], "--number"),
            (["--side", "3"], "--side"),
            (["--sizes"], "--sizes"),
            (["--rate"], "--rate"),
            (["--shiny", "yes"], "yes"),
            (["--unknown", "1"], "--unknown"),
        ]:
            with mock.patch("sys.argv", ["draw.py"]):
                code, output, error = self.exit(*words)
            self.assertEqual((code, output, error.count("\n")), (2, "", 1), words)
            self.assertRegex(error, rf"^draw.py: error: .*{part}.* \(--help lists the flags\)\n$")


class TestComplete(SeededTest):
    """Flags that come from a notebook."""

    def complete(self, **flags):
        return vars(Parser("Draws.", FLAGS).complete(argparse.Namespace(**flags)))

    def test_defaults_of_what_is_not_there(self):
        self.assertEqual(self.complete(), DEFAULTS)
        with contextlib.redirect_stderr(io.StringIO()) as error:
            self.assertEqual(self.complete(number=7, more="kept"), {**DEFAULTS, "number": 7, "more": "kept"})
        self.assertEqual(error.getvalue(), "no flags, and without effect: more\n")

    def test_a_name_that_is_nearly_a_flags(self):
        for name, meant in [("numbers", "number"), ("side_", "side"), ("seeds", "seed")]:
            with self.assertRaises(FlagError) as caught:
                self.complete(**{name: 1})
            self.assertEqual(str(caught.exception), f"--{name} is no flag: give --{meant}, or leave it out")

    def test_the_namespace_is_left_as_it_is(self):
        args = argparse.Namespace(number=7)
        self.assertIsNot(Parser("Draws.", FLAGS).complete(args), args)
        self.assertEqual(vars(args), {"number": 7})

    def test_values_of_use(self):
        for flags in [
            dict(kind="square", side=2, colour="blue", sizes=[1], number=1, rate=1e-9, seed=2**32 - 1, weight=3.4e38),
            dict(sizes=[9, 1], rate=3.0, name="x", count=-5, shiny=True),
            dict(colour=None, name=None),
        ]:
            self.assertEqual(self.complete(**flags), {**DEFAULTS, **flags})

    def test_values_of_any_usual_type_become_plain(self):
        for name, value, plain in [
            ("rate", np.logspace(-3, -4, 2)[0], 0.001),
            ("rate", np.float32(0.5), 0.5),
            ("rate", torch.tensor(0.5, requires_grad=True), 0.5),
            ("rate", Fraction(1, 8), 0.125),
            ("rate", Decimal("0.25"), 0.25),
            ("rate", 3, 3.0),
            ("number", np.int64(7), 7),
            ("number", torch.tensor(7), 7),
            ("number", 1e2, 100),
            ("side", np.uint8(2), 2),
            ("sizes", (9, 1), [9, 1]),
            ("sizes", np.array([9, 1]), [9, 1]),
            ("sizes", torch.tensor([9.0, 1.0]), [9, 1]),
            ("sizes", range(2, 4), [2, 3]),
            ("sizes", 9, [9]),
            ("shiny", np.bool_(True), True),
            ("shiny", 0, False),
            ("kind", np.str_("square"), "square"),
            ("kind", Kind.SQUARE, "square"),
            ("name", Path("a") / "b", "a/b"),
            ("more", {"a": (np.int8(1), Path("b"))}, {"a": [1, "b"]}),
        ]:
            with contextlib.redirect_stderr(io.StringIO()):
                found = self.complete(**{name: value})[name]
            self.assertEqual((repr(found), json.dumps(found)), (repr(plain), json.dumps(plain)), value)

    def test_values_of_no_use(self):
        for name, value, message in [
            ("kind", "flat", "--kind must be one of round, square, got 'flat'"),
            ("kind", None, "--kind must be one of round, square, got None"),
            ("side", 3, "--side must be one of 1, 2, got 3"),
            ("side", "1", "--side must be one of 1, 2, got '1'"),
            ("colour", "green", "--colour must be one of red, blue, got 'green'"),
            ("sizes", [], "--sizes must be one or more numbers from 1 to 4,294,967,295, got []"),
            ("sizes", None, "--sizes must be one or more numbers from 1 to 4,294,967,295, got None"),
            ("sizes", [3, 0], "--sizes must be one or more numbers from 1 to 4,294,967,295, got [3, 0]"),
            ("rate", 0.0, "--rate must be a finite number above 0, got 0.0"),
            ("rate", -1, "--rate must be a finite number above 0, got -1"),
            ("rate", math.inf, "--rate must be a finite number above 0, got inf"),
            ("rate", math.nan, "--rate must be a finite number above 0, got nan"),
            ("rate", None, "--rate must be a finite number above 0, got None"),
            ("rate", "0.1", "--rate must be a finite number above 0, got '0.1'"),
            ("rate", 10**400, "--rate must be at most 3.4e+38, got 100000000000000000...0000000000000000000"),
            ("rate", 3.5e38, "--rate must be at most 3.4e+38, got 3.5e+38"),
            ("weight", 10**39, "--weight must be at most 3.4e+38, got 1000000000000000000000000000000000000000"),
            ("number", 2**32, "--number must be at most 4,294,967,295, got 4294967296"),
            ("sizes", [2**32], "--sizes must be one or more numbers from 1 to 4,294,967,295, got [4294967296]"),
            ("rate", torch.ones(2), "--rate must be a finite number above 0, got tensor([1., 1.])"),
            ("number", "3", "--number must be a whole number, got '3'"),
            ("number", 2.5, "--number must be a whole number, got 2.5"),
            ("number", math.nan, "--number must be a whole number, got nan"),
            ("number", True, "--number must be a whole number, got True"),
            ("side", True, "--side must be one of 1, 2, got True"),
            ("sizes", "34", "--sizes must be one or more numbers from 1 to 4,294,967,295, got '34'"),
            ("sizes", [[3]], "--sizes must be one or more numbers from 1 to 4,294,967,295, got [[3]]"),
            ("shiny", "no", "--shiny must be True or False, got 'no'"),
            ("name", 3, "--name must be a text, got 3"),
            ("name", 2**40, "--name must be a text, got 1099511627776"),
            ("shiny", 2**40, "--shiny must be True or False, got 1099511627776"),
            ("name", "b\udcff", "--name must be a text that files and their names can hold, got 'b\\udcff'"),
            ("name", "a\0b", "--name must be a text that files and their names can hold, got 'a\\x00b'"),
            ("name", b"x", "--name must be a number, a text, or a list of them, got b'x'"),
            ("rate", Decimal("sNaN"), "--rate must be a number, a text, or a list of them, got Decimal('sNaN')"),
            (
                "rate",
                torch.empty((), device="meta"),
                "--rate must be a number, a text, or a list of them, got tensor(..., d...eta', size=())",
            ),
            ("more", {1}, "--more must be a number, a text, or a list of them, got {1}"),
            ("number", 0, "--number must be at least 1, got 0"),
            ("seed", -1, "--seed must be at least 0, got -1"),
        ]:
            with self.assertRaises(FlagError) as caught:
                self.complete(**{name: value})
            self.assertEqual(str(caught.exception), message)

    def test_threads(self):
        self.assertEqual([auto_or_number(value) for value in ["auto", "3", 1024]], ["auto", 3, 1024])
        for value in [0, 1025, 10**9, 1.5, True, "many"]:
            with self.assertRaisesRegex(ValueError, "auto, or a whole number from 1 to 1,024"):
                auto_or_number(value)


class TestEnding(SeededTest):
    def end(self, error=None):
        """Exit code and what is on stderr of a program that meets an error; None where it goes on."""
        output = io.StringIO()
        with mock.patch("sys.argv", ["draw.py"]), contextlib.redirect_stderr(output):
            parser = Parser("Draws.", FLAGS)
            try:
                with exit_on_error(parser):
                    if error is not None:
                        raise error
            except SystemExit as caught:
                if isinstance(caught.code, str):  # Python prints it and ends with code 1
                    return 1, caught.code + "\n"
                return caught.code, output.getvalue()
            except KeyboardInterrupt as caught:  # which would end the tests
                return caught, output.getvalue()
        return None, output.getvalue()

    def test_no_error(self):
        self.assertEqual(self.end(), (None, ""))

    def test_errors_of_the_user_and_of_the_world_outside(self):
        for error, code, message in [
            (FlagError("--x is bad"), 2, "draw.py: error: --x is bad (--help lists the flags)\n"),
            (UserError("no run"), 1, "draw.py: error: no run\n"),
            (OSError(28, "No space"), 1, f"draw.py: error: [Errno 28] No space; {MAKE_ROOM}\n"),
            (DiskFullError(f"no room; {MAKE_ROOM}"), 1, f"draw.py: error: no room; {MAKE_ROOM}\n"),
            (FileNotFoundError(2, "Not there", "a"), 1, "draw.py: error: [Errno 2] Not there: 'a'\n"),
            (MemoryError("of 9 GiB"), 1, "draw.py: error: the memory is too small (MemoryError: of 9 GiB)\n"),
            (
                RuntimeError("can't allocate memory"),
                1,
                "draw.py: error: the memory is too small (RuntimeError: can't allocate memory)\n",
            ),
            (KeyboardInterrupt(), 1, "draw.py: interrupted\n"),
        ]:
            self.assertEqual(self.end(error), (code, message))

    def test_too_little_memory(self):
        """Of a CPU, or of a GPU, in the words of its libraries."""
        for text in ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "integer multiplication overflow"]:
            message = f"draw.py: error: the memory is too small (RuntimeError: {text})\n"
            self.assertEqual(self.end(RuntimeError(text)), (1, message))

    def test_faults_of_the_program_are_left_alone(self):
        for error in [ValueError, RuntimeError, TypeError]:
            with self.assertRaises(error):
                self.end(error())

    def test_sigterm(self):
        """It ends the program with the code that a shell expects, and with a line unless that was said already."""
        with mock.patch("sys.argv", ["draw.py"]), contextlib.redirect_stderr(io.StringIO()) as output:
            for told in [False, True]:
                with self.assertRaises(SystemExit) as caught, exit_on_error(Parser("Draws.")):
                    try:
                        signal.raise_signal(signal.SIGTERM)
                    except Terminated as end:
                        end.already_reported = told
                        raise
                self.assertEqual((caught.exception.code, output.getvalue()), (143, "draw.py: terminated\n"))
        self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    def test_a_signal_where_python_ignores_errors(self):
        """In the midst of what frees an object, for example, whose errors Python passes over."""

        class Dies:
            def __init__(self, number):
                self.number = number

            def __del__(self):
                signal.raise_signal(self.number)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it left behind
        self.addCleanup(signal.signal, signal.SIGINT, before)
        for number, line in [(signal.SIGTERM, "draw.py: terminated\n"), (signal.SIGINT, "draw.py: interrupted")]:
            with (
                mock.patch("sys.argv", ["draw.py"]),
                contextlib.redirect_stderr(io.StringIO()) as output,
                self.assertRaises(SystemExit) as caught,
                exit_on_error(Parser("Draws.")),
            ):
                Dies(number)
                for _ in range(50):
                    time.sleep(0.1)
            self.assertIn(line, [output.getvalue(), caught.exception.code])
            self.assertIs(sys.unraisablehook, sys.__unraisablehook__)

    def test_a_handler_of_sigterm_that_is_there_is_kept(self):
        """As in a batch job, which must not end by itself when it is preempted."""
        signals = []
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: signals.append(1)))
        with sigterm_raises():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(signals, [1, 1])

    def test_kinds(self):
        """As an error of the flags it is a ValueError, too, for who calls a program's functions."""
        self.assertTrue(issubclass(FlagError, UserError) and issubclass(FlagError, ValueError))
        self.assertTrue(issubclass(UserError, OSError))


class TestLines(SeededTest):
    """What is printed, on whatever it goes to."""

    def test_a_terminal_that_lacks_letters(self):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as output:
            with mock.patch("sys.argv", ["draw.py"]), exit_on_error(Parser("Draws.")):
                print_line("läuft in 実験")
            output.flush()
        self.assertEqual(output.buffer.getvalue(), b"l\\xe4uft in \\u5b9f\\u9a13" + os.linesep.encode())

    def test_a_closed_pipe(self):
        """As of `train_pl.py | head -1`: no line may cost a run its results."""
        reader, writer = os.pipe()
        os.close(reader)
        with (
            open(writer, "w") as pipe,
            contextlib.redirect_stderr(io.StringIO()) as error,
            contextlib.redirect_stdout(pipe),
        ):
            for line in ["one", "two"]:
                print_line(line)
        self.assertEqual(error.getvalue(), "nothing more can be printed here (Broken pipe); everything else goes on\n")

    def test_optional(self):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            for problem in [ZeroDivisionError("a\nb\n\nlong"), OSError(5, "No disk", "x.png"), KeyError("a"), None]:
                with best_effort("the picture"):
                    if problem:
                        raise problem
        self.assertEqual(
            error.getvalue().splitlines(),
            [
                "the picture failed, the rest goes on (ZeroDivisionError: a b)",
                "the picture failed, the rest goes on ([Errno 5] No disk: 'x.png')",
                "the picture failed, the rest goes on (KeyError: 'a')",
            ],
        )
        for end in [KeyboardInterrupt(), SystemExit(), OSError(28, "No space"), DiskFullError()]:
            with self.assertRaises(type(end)), best_effort("the picture"):
                raise end

    def test_note_without_stderr(self):
        with mock.patch.object(sys, "stderr", mock.Mock(write=mock.Mock(side_effect=OSError))):
            warn("nobody reads it")


class TestFlags(SeededTest):
    def test_flags_that_may_change_are_flags(self):
        flags = {name for group in TRAINING_FLAGS.values() for name in group}
        self.assertLessEqual(RUNTIME_FLAGS, flags)

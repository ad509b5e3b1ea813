"""Tests of harness/flags.py: `python -m unittest tests/unit/test_flags.py`."""

import argparse
import contextlib
import io
import json
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from harness.errors import FlagError
from harness.flags import (
    MAX_FLOAT,
    MAX_INT,
    MAX_THREADS,
    RUNTIME_FLAGS,
    Flag,
    Parser,
    auto_or_number,
    check_run_flags,
    run_flags,
)
from tests.helpers import SeededTest


def length(value):
    """A flag's own function."""
    if str(value).endswith("cm"):
        return float(value[:-2])
    raise ValueError("a length in cm")


FLAGS = {
    "shape": {
        "kind": Flag("round", "Kind of shape", choices=["round", "square"]),
        "sizes": Flag([3, 4], "Sizes of the parts", minimum=1),
        "number": Flag(5, "Number of parts", minimum=1),
        "width": Flag("1cm", "Width", parse=length),
    },
    "other": {
        "rate": Flag(0.5, "Rate of change", above=0),
        "weight": Flag(1.0, "Weight", minimum=0),
        "side": Flag(1, "Side", choices=[1, 2]),
        "code": Flag("32", "Code", choices=["32", "x"]),
        "name": Flag(None, "Name, none by default"),
        "count": Flag(1, "Any number"),
        "shiny": Flag(False, "Whether it shines"),
    },
}
DEFAULTS = {name: flag.default for group in FLAGS.values() for name, flag in group.items()}
COMPLETE = {**DEFAULTS, "width": 1.0}


class TestCommandLine(SeededTest):
    def parse(self, *words):
        return vars(Parser("Draws.", FLAGS).parse_args(words))

    def exit(self, *words):
        """Exit code, stdout and stderr of a command that ends at its flags."""
        with (
            mock.patch("sys.argv", ["draw.py"]),
            self.assertRaises(SystemExit) as caught,
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as error,
        ):
            self.parse(*words)
        return caught.exception.code, output.getvalue(), error.getvalue()

    def test_flags_that_are_not_given_have_their_defaults(self):
        self.assertEqual(Parser("Draws.", FLAGS).defaults, DEFAULTS)
        self.assertEqual(self.parse(), DEFAULTS)
        self.assertEqual((Parser("Draws.").defaults, vars(Parser("Draws.").parse_args([]))), ({}, {}))

    def test_the_type_of_a_flag_is_that_of_its_default(self):
        words = "--kind square --sizes 7 8 9 --number 2 --rate 1e-3 --side 2 --code 32 --name 1 --count -4 --shiny"
        expected = dict(kind="square", sizes=[7, 8, 9], number=2, rate=0.001, side=2, code="32", name="1", count=-4)
        self.assertEqual(repr(self.parse(*words.split())), repr({**DEFAULTS, **expected, "shiny": True}))

    def test_help_shows_the_groups_of_flags_with_their_choices_and_defaults(self):
        code, output, error = self.exit("--help")
        self.assertEqual((code, error), (0, ""))
        text = " ".join(output.split())
        shape, other = text.index(" shape: --kind {round,square}"), text.index(" other: --rate RATE")
        for part, group in [
            ("--kind {round,square} Kind of shape (default: round)", shape),
            ("--sizes N [N ...] Sizes of the parts (default: [3, 4])", shape),
            ("--side {1,2} Side (default: 1)", other),
            ("--name NAME Name, none by default", other),
            ("--shiny Whether it shines (default: False)", other),
        ]:
            with self.subTest(part):
                self.assertEqual(text.index(part) > other, group == other)

    def test_an_invalid_flag_ends_the_program_with_one_line(self):
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
            with self.subTest(words):
                code, output, error = self.exit(*words)
                self.assertEqual((code, output, error.count("\n")), (2, "", 1))
                self.assertRegex(error, rf"^draw.py: error: .*{part}.* \(--help lists the flags\)\n$")


class TestComplete(SeededTest):
    """Flags that come from a notebook."""

    def complete(self, **flags):
        return vars(Parser("Draws.", FLAGS).complete(argparse.Namespace(**flags)))

    def test_flags_that_are_not_given_get_their_defaults_and_the_namespace_stays_as_it_is(self):
        self.assertEqual(self.complete(), COMPLETE)
        args = argparse.Namespace(number=7)
        self.assertEqual(vars(Parser("Draws.", FLAGS).complete(args)), {**COMPLETE, "number": 7})
        self.assertEqual(vars(args), {"number": 7})

    def test_a_name_that_is_no_flag_is_dropped_with_one_line(self):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            self.assertEqual(self.complete(number=7, more={1}, angle=2), {**COMPLETE, "number": 7})
        self.assertEqual(error.getvalue(), "no flags, and without effect: angle, more\n")

    def test_a_name_that_is_close_to_a_flags_is_refused(self):
        for name, meant in [("numbers", "number"), ("side_", "side"), ("rates", "rate")]:
            with self.subTest(name), self.assertRaises(FlagError) as caught:
                self.complete(**{name: 1})
            self.assertEqual(str(caught.exception), f"--{name} is no flag: give --{meant}, or leave it out")

    def test_valid_values_are_kept(self):
        for flags in [
            dict(kind="square", side=2, sizes=[1], number=1, rate=1e-9, weight=0.0, code="x", name="b", shiny=True),
            dict(sizes=[9, MAX_INT], number=MAX_INT, rate=MAX_FLOAT, count=-5, name=None),
        ]:
            self.assertEqual(self.complete(**flags), {**COMPLETE, **flags})

    def test_values_of_other_types_become_those_of_the_default(self):
        for name, value, plain in [
            ("rate", np.float32(0.5), 0.5),
            ("rate", torch.tensor(0.5, requires_grad=True), 0.5),
            ("rate", 3, 3.0),
            ("number", np.int64(7), 7),
            ("number", torch.tensor(7), 7),
            ("number", 1e2, 100),
            ("side", np.uint8(2), 2),
            ("code", 32, "32"),
            ("sizes", (9, 1), [9, 1]),
            ("sizes", np.array([9, 1]), [9, 1]),
            ("sizes", torch.tensor([9.0, 1.0]), [9, 1]),
            ("sizes", range(2, 4), [2, 3]),
            ("sizes", 9, [9]),
            ("shiny", np.bool_(True), True),
            ("shiny", 0, False),
            ("kind", np.str_("square"), "square"),
            ("name", Path("a") / "b", os.path.join("a", "b")),
            ("width", "2cm", 2.0),
        ]:
            with self.subTest(name, value=value):
                found = self.complete(**{name: value})[name]
                self.assertEqual((repr(found), json.dumps(found)), (repr(plain), json.dumps(plain)))

    def test_an_invalid_value_is_refused_with_a_message_that_says_what_it_must_be(self):
        sizes = f"one or more numbers from 1 to {MAX_INT:,}"
        rate, weight = "a finite number above 0", "a finite number of at least 0"
        for name, value, must_be, got in [
            *(("kind", value, "one of round, square", repr(value)) for value in ["flat", None, ["round"], {}]),
            *(("side", value, "one of 1, 2", repr(value)) for value in [3, "1", True]),
            *(("sizes", value, sizes, repr(value)) for value in [[], None, "34", [[3]], [3, 0], [MAX_INT + 1]]),
            *(("rate", value, rate, repr(value)) for value in [0.0, -1, math.inf, math.nan, None, "0.1"]),
            ("rate", torch.ones(2), rate, "tensor([1., 1.])"),
            ("rate", 2 * MAX_FLOAT, f"at most {MAX_FLOAT:,}", "6.8e+38"),
            ("rate", 10**400, f"at most {MAX_FLOAT:,}", "100000000000000000...0000000000000000000"),
            *(("weight", value, weight, repr(value)) for value in [-0.1, math.nan, math.inf, "x"]),
            *(("number", value, "a whole number", repr(value)) for value in ["3", 2.5, math.nan, True, math.inf]),
            ("number", MAX_INT + 1, f"at most {MAX_INT:,}", str(MAX_INT + 1)),
            ("number", 0, "at least 1", "0"),
            *(("shiny", value, "True or False", repr(value)) for value in ["no", 2, None]),
            *(("name", value, "a text", repr(value)) for value in [3, b"x", ["a"]]),
            *(("name", value, "a text that files and their names can hold", repr(value)) for value in ["a\0", "\udcff"]),
            ("width", 3, "a length in cm", "3"),
        ]:
            with self.subTest(name, value=value):
                with self.assertRaises(FlagError) as caught:
                    self.complete(**{name: value})
                self.assertEqual(str(caught.exception), f"--{name} must be {must_be}, got {got}")


class TestRunFlags(SeededTest):
    """The flags of every run."""

    def check(self, **flags):
        """Checks the flags of a run; they are as by default unless they are given."""
        parser = Parser("Trains.", {"training": {"batch_size": Flag(12, "Images", minimum=1)}, **run_flags("logs")})
        check_run_flags(parser.complete(argparse.Namespace(**flags)))

    def test_the_number_of_threads_is_auto_or_a_whole_number(self):
        for value, expected in [("auto", "auto"), ("3", 3), (MAX_THREADS, MAX_THREADS)]:
            self.assertEqual(auto_or_number(value), expected)
        for value in [0, MAX_THREADS + 1, 10**9, 1.5, True, "many", None]:
            with self.subTest(value), self.assertRaisesRegex(ValueError, "auto, or a whole number from 1 to "):
                auto_or_number(value)

    def test_flags_that_may_change_when_a_run_resumes_are_flags(self):
        flags = {name for group in run_flags("logs").values() for name in group}
        self.assertEqual(RUNTIME_FLAGS - flags, {"data_dir", "num_workers"})  # of those that load data
        self.assertEqual(flags - RUNTIME_FLAGS, {"precision"})

    def test_a_minibatch_is_a_multiple_of_the_processes(self):
        self.check(devices=4, num_nodes=3)
        with self.assertRaisesRegex(FlagError, "^--batch_size 12 .* a multiple of --devices 4 x --num_nodes 2$"):
            self.check(devices=4, num_nodes=2)

    def test_a_runs_name_is_a_folder_in_the_log_directory(self):
        for name in [None, "run", "sweep/a", "a b", "..."]:
            self.check(run_name=name)
        for name in ["", ".", "..", os.path.abspath("run"), "../run", "a/../..", "a\nb", "\x1b[1m"]:
            with self.subTest(name), self.assertRaisesRegex(FlagError, "^--run_name must be "):
                self.check(run_name=name)

    def test_a_runs_name_that_a_shell_has_completed_from_the_working_directory_is_refused(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        Path("logs", "sweep", "a").mkdir(parents=True)
        for name in ["logs/sweep/a", "./logs/sweep/a/"]:
            with self.subTest(name), self.assertRaisesRegex(FlagError, "from the log directory: give sweep/a$"):
                self.check(run_name=name)
        os.chdir("logs")
        for log_dir in [".", "../logs"]:
            self.check(run_name="sweep/a", log_dir=log_dir)

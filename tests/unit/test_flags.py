"""Tests of harness/flags.py: `python -m unittest tests/unit/test_flags.py`."""

import argparse
import contextlib
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from harness import flags
from harness.errors import FlagError
from harness.flags import MAX_FLOAT, MAX_INT, MAX_THREADS, RUNTIME_FLAGS, Flag, Parser
from tests.helpers import SeededTest

FLAGS = {
    "shape": {
        "kind": Flag("round", "Kind of shape", choices=["round", "square"]),
        "sizes": Flag([3, 4], "Sizes of the parts", minimum=1),
        "number": Flag(5, "Number of parts", minimum=1),
        "threads": Flag("auto", "Threads", parse=flags.parse_threads),
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


class TestCommandLine(SeededTest):
    def test_flags_have_their_defaults_and_the_types_of_their_defaults(self):
        parser = Parser("Draws.", FLAGS)
        self.assertEqual((parser.defaults, vars(parser.parse_args([]))), (DEFAULTS, DEFAULTS))
        words = "--kind square --sizes 7 8 9 --number 2 --rate 1e-3 --side 2 --code 32 --name 1 --count -4 --shiny"
        given = dict(kind="square", sizes=[7, 8, 9], number=2, rate=0.001, side=2, code="32", name="1", count=-4)
        self.assertEqual(repr(vars(parser.parse_args(words.split()))), repr({**DEFAULTS, **given, "shiny": True}))

    def test_help_shows_the_groups_of_flags_with_their_choices_and_defaults(self):
        text = " ".join(Parser("Draws.", FLAGS).format_help().split())
        for part in [
            " shape: --kind {round,square} Kind of shape (default: round)",
            "--sizes N [N ...] Sizes of the parts (default: [3, 4])",
            " other: --rate RATE Rate of change (default: 0.5)",
            "--side {1,2} Side (default: 1)",
            "--name NAME Name, none by default",
            "--shiny Whether it shines (default: False)",
        ]:
            self.assertIn(part, text)

    def test_an_invalid_flag_ends_the_program_with_one_line(self):
        for words, part in [
            *((["--kind", "flat"], "flat"), (["--side", "3"], "--side"), (["--shiny", "yes"], "yes")),
            *((["--number", "many"], "--number"), (["--number", "2.5"], "--number")),
            *((["--sizes"], "--sizes"), (["--rate"], "--rate"), (["--unknown", "1"], "--unknown")),
        ]:
            with self.subTest(words):
                parser = Parser("Draws.", FLAGS)
                parser.prog = "program.py"
                with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as error:
                    parser.parse_args(words)
                self.assertEqual(caught.exception.code, 2)
                self.assertRegex(error.getvalue(), rf"^program.py: error: .*{part}.* \(--help lists the flags\)\n$")


class TestComplete(SeededTest):
    """Flags that come from a notebook."""

    def complete(self, **given):
        return vars(Parser("Draws.", FLAGS).complete(argparse.Namespace(**given)))

    def test_flags_that_are_not_given_get_their_defaults_and_the_namespace_is_not_changed(self):
        args = argparse.Namespace(number=7)
        self.assertEqual(vars(Parser("Draws.", FLAGS).complete(args)), {**DEFAULTS, "number": 7})
        self.assertEqual(vars(args), {"number": 7})

    def test_an_unknown_name_is_ignored_with_a_warning_but_refused_if_it_is_similar_to_a_flag(self):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            self.assertEqual(self.complete(number=7, more={1}, angle=2), {**DEFAULTS, "number": 7})
        self.assertEqual(error.getvalue(), "warning: ignored unknown flags: angle, more\n")
        for name, meant in [("numbers", "number"), ("side_", "side"), ("rates", "rate")]:
            with self.subTest(name), self.assertRaises(FlagError) as caught:
                self.complete(**{name: 1})
            self.assertEqual(str(caught.exception), f"unknown flag --{name}: did you mean --{meant}?")

    def test_valid_values_are_kept(self):
        for given in [
            dict(kind="square", side=2, sizes=[1], number=1, rate=1e-9, weight=0.0, code="x", name="b", shiny=True),
            dict(sizes=[9, MAX_INT], number=MAX_INT, rate=MAX_FLOAT, count=-5, threads=MAX_THREADS),
        ]:
            self.assertEqual(self.complete(**given), {**DEFAULTS, **given})

    def test_values_of_other_types_are_converted_to_the_type_of_the_default(self):
        for name, plain, values in [
            ("rate", 0.5, [np.float32(0.5), torch.tensor(0.5, requires_grad=True)]),
            ("rate", 3.0, [3]),
            ("number", 7, [np.int64(7), torch.tensor(7), 7.0]),
            ("side", 2, [np.uint8(2), 2.0]),
            ("code", "32", [32]),
            ("sizes", [9, 1], [(9, 1), np.array([9, 1]), torch.tensor([9.0, 1.0]), range(9, -7, -8)]),
            ("sizes", [9], [9]),
            ("shiny", True, [np.bool_(True), 1]),
            ("kind", "square", [np.str_("square")]),
            ("name", os.path.join("a", "b"), [Path("a") / "b"]),
            ("threads", 3, ["3", np.int64(3)]),
        ]:
            for value in values:
                with self.subTest(name, value=value):
                    found = self.complete(**{name: value})[name]
                    self.assertEqual((repr(found), json.dumps(found)), (repr(plain), json.dumps(plain)))

    def test_an_invalid_value_is_refused_with_a_message_that_says_what_it_must_be(self):
        for name, must_be, values in [
            ("kind", "one of round, square", ["flat", None, ["round"], {}]),
            ("side", "one of 1, 2", [3, "1", True]),
            (
                "sizes",
                f"one or more whole numbers from 1 to {MAX_INT:,}",
                [[], None, "34", [[3]], [3, 0], [MAX_INT + 1]],
            ),
            ("rate", "a finite number above 0", [0.0, -1, math.inf, math.nan, None, "0.1", torch.ones(2)]),
            ("rate", f"at most {MAX_FLOAT:,}", [2 * MAX_FLOAT, 10**39]),
            ("weight", "a finite number of at least 0", [-0.1, math.nan, math.inf, "x"]),
            ("number", "a whole number", ["3", 2.5, math.nan, math.inf, True]),
            ("number", f"at most {MAX_INT:,}", [MAX_INT + 1]),
            ("number", "at least 1", [0]),
            ("shiny", "True or False", ["no", 2, None]),
            ("name", "a string", [3, b"x", ["a"]]),
            ("name", "valid Unicode text without NUL characters", ["a\0b", "b\udcff"]),
            (
                "threads",
                f"auto, or a whole number from 1 to {MAX_THREADS:,}",
                [0, MAX_THREADS + 1, 1.5, True, "x", None],
            ),
        ]:
            for value in values:
                with self.subTest(name, value=value):
                    with self.assertRaises(FlagError) as caught:
                        self.complete(**{name: value})
                    self.assertEqual(str(caught.exception), f"--{name} must be {must_be}, got {value!r}")
        with self.assertRaisesRegex(FlagError, r"got 1000+\.\.\.0000+$"):  # a long value is shortened
            self.complete(rate=10**400)


class TestRunFlags(SeededTest):
    """The flags of every run."""

    def check(self, **given):
        """Checks the flags of a run; flags that are not given have their defaults."""
        groups = {"training": {"batch_size": Flag(12, "Images", minimum=1)}, **flags.run_flags("logs")}
        flags.check_run_flags(Parser("Trains.", groups).complete(argparse.Namespace(**given)))

    def test_flags_that_may_change_when_a_run_resumes_are_flags(self):
        names = {name for group in flags.run_flags("logs").values() for name in group}
        self.assertEqual(RUNTIME_FLAGS - names, {"data_dir", "num_workers"})  # flags of the data

    def test_the_batch_size_must_be_a_multiple_of_the_number_of_processes(self):
        self.check(devices=4, num_nodes=3)
        with self.assertRaisesRegex(FlagError, "^--batch_size 12 .* a multiple of --devices 4 x --num_nodes 2$"):
            self.check(devices=4, num_nodes=2)

    def test_the_name_of_a_run_must_be_a_folder_in_the_log_directory(self):
        for name in [None, "run", "sweep/a", "a b", "..."]:
            self.check(run_name=name)
        for name in ["", ".", "..", os.path.abspath("run"), "../run", "a/../..", "a\nb", "\x1b[1m"]:
            with self.subTest(name), self.assertRaisesRegex(FlagError, "^--run_name must be "):
                self.check(run_name=name)

    def test_a_run_name_that_a_shell_has_completed_from_the_working_directory_is_refused(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        Path("logs", "sweep", "a").mkdir(parents=True)
        for name in ["logs/sweep/a", "./logs/sweep/a/"]:
            with (
                self.subTest(name),
                self.assertRaisesRegex(FlagError, "relative to --log_dir, .*: use --run_name sweep/a$"),
            ):
                self.check(run_name=name)
        os.chdir("logs")
        for log_dir in [".", "../logs"]:
            self.check(run_name="sweep/a", log_dir=log_dir)

"""Tests of harness/errors.py: `python -m unittest tests/unit/test_errors.py`."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from unittest import mock

import torch
from pytorch_lightning.utilities import rank_zero_only

from harness import errors
from harness.errors import DataError, DiskFullError, FlagError, UserError, best_effort, exit_on_error, print_line
from harness.flags import Parser
from tests.helpers import SeededTest


class TestErrors(SeededTest):
    def setUp(self):
        super().setUp()
        self.stderr = self.enter(contextlib.redirect_stderr(io.StringIO()))
        self.enter(mock.patch("sys.argv", ["program.py"]))

    def printed(self):
        """Returns what was printed on stderr since the last call."""
        text = self.stderr.getvalue()
        self.stderr.truncate(self.stderr.seek(0))
        return text

    def end(self, error):
        """Returns the exit code and the stderr of a program whose main body raises an error."""
        try:
            with exit_on_error(Parser("Draws.")):
                raise error
        except SystemExit as caught:
            if isinstance(caught.code, str):  # Python prints the string and exits with code 1
                return 1, f"{self.printed()}{caught.code}\n"
            return caught.code, self.printed()

    def test_an_error_that_the_user_can_fix_ends_the_program_with_one_line(self):
        full = f"[Errno {errno.ENOSPC}] No space left; {errors.FREE_SPACE_HINT}"
        too_large = [MemoryError("of 9 GiB"), RuntimeError("CUDA out of memory"), RuntimeError("ALLOC_FAILED")]
        for error, code, line in [
            (FlagError("--x is bad"), 2, "error: --x is bad (--help lists the flags)"),
            *((kind("no run"), 1, "error: no run") for kind in [UserError, DataError, DiskFullError]),
            (OSError(errno.ENOSPC, "No space left"), 1, f"error: {full}"),
            *((e, 1, f"error: out of memory ({type(e).__name__}: {e})") for e in too_large),
            (KeyboardInterrupt(), 1, "interrupted"),
        ]:
            with self.subTest(repr(error)):
                self.assertEqual(self.end(error), (code, f"program.py: {line}\n"))

    def test_any_other_error_keeps_its_traceback(self):
        """An OSError may come from the user's own code, so it also keeps its traceback."""
        for error in [ValueError("a"), RuntimeError("b"), FileNotFoundError(2, "No such file", "c"), OSError(5, "d")]:
            with self.subTest(repr(error)), self.assertRaises(type(error)) as caught:
                self.end(error)
            self.assertIs(caught.exception, error)

    def test_callers_can_catch_errors_by_their_class(self):
        self.assertTrue(issubclass(FlagError, ValueError))
        for kind in [FlagError, DataError, DiskFullError]:
            self.assertTrue(issubclass(kind, UserError) and not issubclass(kind, OSError), kind)

    def test_sigterm_ends_a_program_with_exit_code_143_and_one_line(self):
        for already_reported, line in [(False, "program.py: terminated\n"), (True, "")]:
            with (
                self.subTest(already_reported=already_reported),
                self.assertRaises(SystemExit) as caught,
                exit_on_error(Parser("Draws.")),
            ):
                try:
                    signal.raise_signal(signal.SIGTERM)
                except errors.Terminated as end:
                    end.already_reported = already_reported
                    raise
            self.assertEqual((caught.exception.code, self.printed()), (128 + signal.SIGTERM, line))
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    def test_an_existing_handler_of_sigterm_is_kept(self):
        """An example is the handler of a batch job, which must not end by itself when it is preempted."""
        signals = []
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: signals.append(1)))
        with errors.sigterm_raises():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(signals, [1, 1])

    def test_outside_of_the_main_thread_signal_handlers_are_unchanged(self):
        thread = threading.Thread(target=errors.sigterm_raises()(lambda: None))
        thread.start()
        thread.join()
        self.assertEqual(self.printed(), "")  # an error in the thread would be printed

    def test_characters_that_a_terminal_lacks_are_printed_as_escapes(self):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as output:
            with exit_on_error(Parser("Draws.")):
                print_line("läuft in 実験")
            output.flush()
        self.assertEqual(output.buffer.getvalue(), b"l\\xe4uft in \\u5b9f\\u9a13" + os.linesep.encode())

    def test_a_closed_pipe_causes_one_line_on_stderr(self):
        """For example, a run still gets its results after `python train_pl.py | head -1`."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
            for line in ["one", "two"]:
                print_line(line)
        self.assertEqual(
            self.printed(), "note: the output cannot be printed any more (Broken pipe); the program continues\n"
        )

    def test_a_closed_stderr_does_not_end_the_program(self):
        with mock.patch.object(sys, "stderr", mock.Mock(write=mock.Mock(side_effect=OSError))):
            errors.warn("nobody reads it")

    def test_in_a_run_with_several_processes_only_rank_0_warns_but_each_separate_task_of_srun_warns(self):
        with mock.patch.object(rank_zero_only, "rank", 1):
            errors.warn("once", num_processes=2)
            errors.warn("in each task")
        self.assertEqual(self.printed(), "in each task\n")
        with mock.patch.object(rank_zero_only, "rank", 0):
            errors.warn("once", num_processes=2)
        self.assertEqual(self.printed(), "once\n")

    def test_best_effort_turns_an_error_into_one_line(self):
        for error, reason in [
            (ZeroDivisionError("a\nb\n\nlong"), r"ZeroDivisionError: a b, .*test_errors.py, line \d+"),
            (OSError(5, "No disk", "x.png"), r"\[Errno 5\] No disk: 'x.png', .*test_errors.py, line \d+"),
            (UserError("no font"), "no font"),
        ]:
            with self.subTest(repr(error)):
                with best_effort("the picture"):
                    raise error
                line = rf"^warning: the picture failed and is skipped \({reason}\)\n$"
                self.assertRegex(self.printed(), line)

    def test_the_location_of_an_error_is_the_users_line_even_if_a_library_raised_the_error(self):
        with best_effort("the picture"):
            line = sys._getframe().f_lineno + 1
            torch.zeros(2) @ torch.zeros(3)
        self.assertIn(f"test_errors.py, line {line})", self.printed())
        with best_effort("the picture"):
            torch.nn.Linear(2, 3)(torch.zeros(5))  # raised in torch's own files
        self.assertIn(f"test_errors.py, line {line + 3})", self.printed())

    def test_best_effort_raises_an_error_that_would_make_the_rest_fail_too(self):
        for error in [KeyboardInterrupt(), SystemExit(), OSError(errno.ENOSPC, "No space left"), DiskFullError()]:
            with self.subTest(repr(error)), self.assertRaises(type(error)), best_effort("the picture"):
                raise error

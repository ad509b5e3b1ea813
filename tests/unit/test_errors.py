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
        self.enter(mock.patch("sys.argv", ["draw.py"]))

    def printed(self):
        """What is on stderr since the last call."""
        text = self.stderr.getvalue()
        self.stderr.truncate(self.stderr.seek(0))
        return text

    def end(self, error):
        """Exit code and stderr of a program whose main body raises an error."""
        try:
            with exit_on_error(Parser("Draws.")):
                raise error
        except SystemExit as caught:
            if isinstance(caught.code, str):  # Python prints it and ends with code 1
                return 1, f"{self.printed()}{caught.code}\n"
            return caught.code, self.printed()

    def test_what_the_user_can_mend_ends_with_one_line(self):
        full = f"[Errno {errno.ENOSPC}] No space left; {errors.FREE_SPACE_HINT}"
        too_large = [MemoryError("of 9 GiB"), RuntimeError("CUDA out of memory"), RuntimeError("ALLOC_FAILED")]
        for error, code, line in [
            (FlagError("--x is bad"), 2, "error: --x is bad (--help lists the flags)"),
            *((kind("no run"), 1, "error: no run") for kind in [UserError, DataError, DiskFullError]),
            (OSError(errno.ENOSPC, "No space left"), 1, f"error: {full}"),
            *((e, 1, f"error: the memory is too small ({type(e).__name__}: {e})") for e in too_large),
            (KeyboardInterrupt(), 1, "interrupted"),
        ]:
            with self.subTest(repr(error)):
                self.assertEqual(self.end(error), (code, f"draw.py: {line}\n"))

    def test_any_other_error_keeps_its_traceback(self):
        """One of the user's own code, too, which may read and write files."""
        for error in [ValueError("a"), RuntimeError("b"), FileNotFoundError(2, "No such file", "c"), OSError(5, "d")]:
            with self.subTest(repr(error)), self.assertRaises(type(error)) as caught:
                self.end(error)
            self.assertIs(caught.exception, error)

    def test_who_calls_a_programs_functions_can_catch_its_errors_by_kind(self):
        self.assertTrue(issubclass(FlagError, ValueError))
        for kind in [FlagError, DataError, DiskFullError]:
            self.assertTrue(issubclass(kind, UserError) and not issubclass(kind, OSError), kind)

    def test_sigterm_ends_a_program_with_the_code_that_a_shell_expects_and_one_line(self):
        for already_reported, line in [(False, "draw.py: terminated\n"), (True, "")]:
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

    def test_a_handler_of_sigterm_that_is_there_is_kept(self):
        """That of a batch job, for example, which does not end by itself when it is preempted."""
        signals = []
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: signals.append(1)))
        with errors.sigterm_raises():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(signals, [1, 1])

    def test_a_thread_leaves_the_handlers_of_signals_alone(self):
        thread = threading.Thread(target=errors.sigterm_raises()(lambda: None))
        thread.start()
        thread.join()
        self.assertEqual(self.printed(), "")  # an error of a thread would be there

    def test_a_terminal_that_lacks_letters_shows_their_numbers(self):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")) as output:
            with exit_on_error(Parser("Draws.")):
                print_line("läuft in 実験")
            output.flush()
        self.assertEqual(output.buffer.getvalue(), b"l\\xe4uft in \\u5b9f\\u9a13" + os.linesep.encode())

    def test_a_closed_pipe_is_one_line_on_stderr(self):
        """After `python train_pl.py | head -1`, for example, the run still gets its results."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
            for line in ["one", "two"]:
                print_line(line)
        self.assertEqual(
            self.printed(), "note: nothing more can be printed here (Broken pipe); everything else goes on\n"
        )

    def test_a_stderr_that_is_gone_does_not_end_the_program(self):
        with mock.patch.object(sys, "stderr", mock.Mock(write=mock.Mock(side_effect=OSError))):
            errors.warn("nobody reads it")

    def test_of_the_processes_of_a_run_rank_0_alone_warns_and_separate_tasks_of_srun_all_do(self):
        with mock.patch.object(rank_zero_only, "rank", 1):
            errors.warn("once", num_processes=2)
            errors.warn("in each task")
        self.assertEqual(self.printed(), "in each task\n")
        with mock.patch.object(rank_zero_only, "rank", 0):
            errors.warn("once", num_processes=2)
        self.assertEqual(self.printed(), "once\n")

    def test_what_is_not_needed_fails_with_one_line(self):
        for error, reason in [
            (ZeroDivisionError("a\nb\n\nlong"), r"ZeroDivisionError: a b, .*test_errors.py, line \d+"),
            (OSError(5, "No disk", "x.png"), r"\[Errno 5\] No disk: 'x.png', .*test_errors.py, line \d+"),
            (UserError("no font"), "no font"),
        ]:
            with self.subTest(repr(error)):
                with best_effort("the picture"):
                    raise error
                line = rf"^warning: the picture failed, the rest goes on \({reason}\)\n$"
                self.assertRegex(self.printed(), line)

    def test_the_place_of_an_error_is_the_users_line_even_if_a_library_raised_it(self):
        with best_effort("the picture"):
            line = sys._getframe().f_lineno + 1
            torch.zeros(2) @ torch.zeros(3)
        self.assertIn(f"test_errors.py, line {line})", self.printed())
        with best_effort("the picture"):
            torch.nn.Linear(2, 3)(torch.zeros(5))  # raised in torch's own files
        self.assertIn(f"test_errors.py, line {line + 3})", self.printed())

    def test_what_would_make_the_rest_fail_too_is_raised(self):
        for error in [KeyboardInterrupt(), SystemExit(), OSError(errno.ENOSPC, "No space left"), DiskFullError()]:
            with self.subTest(repr(error)), self.assertRaises(type(error)), best_effort("the picture"):
                raise error

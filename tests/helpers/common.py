"""Helpers for all tests: the path of the repository, the folder of MNIST, seeded tests, and captured output."""

import contextlib
import io
import logging
import sys
import tempfile
import unittest
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)] * (str(REPOSITORY) not in sys.path)  # after os.chdir, '' is another folder

DATA_DIRS = [REPOSITORY.parent / "shared" / "data", REPOSITORY.parent / "data"]
MNIST_DIR = next((path for path in DATA_DIRS if (path / "MNIST").is_dir()), None)
NO_MNIST = "MNIST is not in ../shared/data or ../data"
NO_NETWORK = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")  # no server uses this port

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hides the notes of Trainers that tests create
torch.set_num_threads(1)  # a second thread saves no time with so little data, and suffers from contention


class Killed(BaseException):
    """A mock of SIGKILL: an exception that neither our code nor Lightning catches. Only their clean-up still runs."""


@contextlib.contextmanager
def printed_lines():
    """Context manager that captures stdout. Yields a list, which contains the lines after the context has ended."""
    lines = []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            yield lines
        finally:
            lines += output.getvalue().splitlines()


class SeededTest(unittest.TestCase):
    """Test case with a temporary folder and a fixed seed: its random numbers do not depend on earlier tests."""

    def run(self, result=None):
        torch.manual_seed(0)
        return super().run(result)

    def enter(self, context):
        """Enters a context until the test ends. Returns what it yields. (TestCase.enterContext needs Python 3.11.)"""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    @property
    def folder(self):
        """Path of a temporary folder, which is removed after the test."""
        if not hasattr(self, "_folder"):
            self._folder = Path(self.enter(tempfile.TemporaryDirectory()))
        return self._folder

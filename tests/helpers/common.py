"""What every test may use: the repository's path, MNIST's folder, seeded tests, and captured output."""

import contextlib
import io
import logging
import sys
import tempfile
import unittest
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)] * (str(REPOSITORY) not in sys.path)  # since '' is another folder after os.chdir

DATA_DIRS = [REPOSITORY.parent / "shared" / "data", REPOSITORY.parent / "data"]
MNIST_DIR = next((path for path in DATA_DIRS if (path / "MNIST").is_dir()), None)
NO_MNIST = "there is no MNIST in ../shared/data or ../data"
NO_NETWORK = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")  # nobody listens there

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no notes of Trainers that a test makes by itself
torch.set_num_threads(1)  # for so little data a second thread saves nothing, and it suffers from CPU contention


class Killed(BaseException):
    """A stand-in for SIGKILL. Neither our code nor Lightning's catches it; only their clean-up still runs."""


@contextlib.contextmanager
def printed_lines():
    """A context whose output is captured. It yields a list, which has the lines when the context ends."""
    lines = []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            yield lines
        finally:
            lines += output.getvalue().splitlines()


class SeededTest(unittest.TestCase):
    """A test with the same random numbers, whether it runs alone or after others, and with its own folder."""

    def run(self, result=None):
        torch.manual_seed(0)
        return super().run(result)

    def enter(self, context):
        """Enters a context that ends with the test, and returns what it yields (TestCase.enterContext is of 3.11)."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    @property
    def folder(self):
        """Path of a folder that is removed after the test."""
        if not hasattr(self, "_folder"):
            self._folder = Path(self.enter(tempfile.TemporaryDirectory()))
        return self._folder

"""Helpers that several test modules share. Import them with `from tests.helpers import NAME`."""
# ruff: noqa: F401, I001

from tests.helpers.common import MNIST_DIR, NO_MNIST, NO_NETWORK, REPOSITORY, Killed, SeededTest, printed_lines
from tests.helpers.fake_data import idx, known_files, mirror, mock_mnist_code, small_loaders, small_mnist
from tests.helpers.processes import CommandTest, Forked
from tests.helpers.runs import (
    GraphTest,
    NamedRunTest,
    TrainingTest,
    assert_left_the_same,
    few_digits,
    pause_after_epoch,
)
from tests.helpers.runs import load, metrics, results, scalars_and_images, summaries, use_few_digits

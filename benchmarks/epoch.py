"""
Measures the milliseconds of an epoch outside of its steps: pictures, checkpoints, logs, and the loops of the Trainer.

    python benchmarks/epoch.py --data_dir ../data/      # or --dataset rendered; --model CNN

Trains with large minibatches, so that an epoch has few steps. Lightning's profiler measures the time outside of the
training steps, the validation steps and the data loaders. Pictures are saved every fifth epoch, as in every run. Prints
the mean time of an epoch and the actions that take the most time.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
from pytorch_lightning.profilers import SimpleProfiler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pl
from harness import trainer
from sources import SOURCES

# The profiler's names for the steps and for the actions of the loaders.
STEPS = ("run_training_batch", "validation_step", "dataloader_next", "val_next")
# The profiler's names for the parts of the steps, and for the actions that contain the steps.
WITHIN = (*STEPS, "training_step", "optimizer_step", "backward", "zero_grad", "run_training_epoch", "evaluate")


class Epochs(pl.Callback):
    """Callback that records, at the start of each epoch, the time and the seconds of each action so far."""

    def __init__(self, profiler):
        self.profiler, self.starts = profiler, []

    def on_train_epoch_start(self, trainer, pl_module):
        seconds = Counter({action: sum(values) for action, values in self.profiler.recorded_durations.items()})
        self.starts.append((time.perf_counter(), seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../data/", help="Directory of MNIST (default: %(default)s)")
    parser.add_argument("--dataset", default="mnist", choices=SOURCES)
    parser.add_argument("--model", default="MLP", choices=train_pl.FLAGS["model"]["model"].choices)
    parser.add_argument("--batch_size", default=4096, type=int, help="Images per minibatch (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        default=22,
        type=int,
        help="Epochs to train, of which all but two are measured (default: %(default)s)",
    )
    args = parser.parse_args()
    profiler = SimpleProfiler()
    epochs = Epochs(profiler)
    with (
        tempfile.TemporaryDirectory() as log_dir,
        mock.patch.object(train_pl, "make_callbacks", lambda args: [epochs]),
        mock.patch.object(trainer, "NoProfiler", lambda: profiler),
    ):
        train_pl.train_vae(argparse.Namespace(log_dir=log_dir, **vars(args)))
    num_epochs = len(epochs.starts) - 2  # the first epoch is a warm-up, and the end of the last epoch is not recorded
    (start, before), (end, after) = epochs.starts[1], epochs.starts[-1]
    milliseconds = {action: 1e3 * (after[action] - before[action]) / num_epochs for action in after}
    total = 1e3 * (end - start) / num_epochs
    steps = sum(value for action, value in milliseconds.items() if action.endswith(STEPS))
    print(
        f"\n{total:.1f} ms per epoch, {total - steps:.1f} ms of them outside of the steps; means of {num_epochs} epochs"
    )
    outside = [action for action in milliseconds if not action.endswith(WITHIN)]
    for action in sorted(outside, key=milliseconds.get, reverse=True)[:10]:
        print(f"{milliseconds[action]:7.2f} ms {action.partition('{')[0]}")


if __name__ == "__main__":
    main()

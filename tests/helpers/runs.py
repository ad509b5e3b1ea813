"""Short training runs on a few digits, and functions that read the files of a run."""

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import sys
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

import train_pl
from harness import graphs, run
from harness.flags import RUNTIME_FLAGS
from tests.helpers.common import REPOSITORY, Killed, SeededTest, printed_lines
from tests.helpers.fake_data import small_loaders


def leave_empty_figures(run):
    """Mock of Run.make_figures that writes empty files, because figures take longer than the few epochs of a test."""
    for name in run.experiment.figures:
        open(Path(run.folder, name), "a").close()  # does not change the time of an existing file


def use_few_digits(sizes=(300, 50, 50)):
    """Makes the programs of this process train on few digits. Use it as the setup of a Forked program."""
    import evaluate

    train_pl.load_data = evaluate.load_data = functools.partial(small_loaders, sizes=sizes)


def few_digits(folder, sizes=(300, 50, 50)):
    """Writes a sitecustomize.py. Returns environment variables with which Python trains on few digits."""
    num_train, num_val, num_test = sizes
    (folder / "sitecustomize.py").write_text(  # Python runs this file when it starts
        "import sources\n"
        "rendered_mnist = sources.rendered_mnist\n"
        f"sources.rendered_mnist = lambda num_train: rendered_mnist(num_train, {num_test})\n"
        f"sources.TRAIN_SIZES, sources.NUM_VAL = [{num_train}], {num_val}\n"
        "flags = sources.DATA_FLAGS['data']\n"
        f"flags['train_size'] = sources.Flag({num_train}, 'few', [{num_train}])\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}


def pause_after_epoch(folder, epoch):
    """Makes rank 0 of a few_digits run wait after `epoch` epochs, until its working directory contains `go_on`."""
    with open(folder / "sitecustomize.py", "a") as file:
        file.write(
            "import os, time\nfrom harness import report\n"
            "begin_epoch = report.EpochReport.begin_epoch\n"
            "def begin_late(self, trainer):\n"
            f"    while trainer.is_global_zero and trainer.current_epoch == {epoch} and not os.path.exists('go_on'):\n"
            "        time.sleep(0.01)\n"
            "    begin_epoch(self, trainer)\nreport.EpochReport.begin_epoch = begin_late\n"
        )


class TrainingTest(SeededTest):
    """Test case that trains on few digits."""

    makes_figures = False  # whether each run plots its figures when it is finished

    def setUp(self):
        self.enter(mock.patch.object(train_pl, "load_data", small_loaders))
        # TensorBoard's version, in Python, is slow
        self.enter(mock.patch.object(pywrap_tensorflow, "crc32c", zlib.crc32))
        if not self.makes_figures:
            self.enter(mock.patch.object(run.Run, "make_figures", leave_empty_figures))

    def namespace(self, **flags):
        """Returns the flags of the assignment's template, and other flags only if they are given."""
        template = dict(model="MLP", z_dim=2, hidden_dims=[16], num_filters=4, lr=1e-3, batch_size=128, epochs=6)
        template.update(seed=42, num_workers=0, log_dir=str(self.folder), progress_bar=False)
        return argparse.Namespace(**{**template, **flags})

    def train(self, **flags):
        """Trains on the CPU, whose results are reproducible bit for bit. Returns the run's folder and its output."""
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            train_pl.train_vae(self.namespace(**{"accelerator": "cpu", **flags}))
        return self.run_folder(), output.getvalue()

    def run_folder(self):
        """Returns the folder of the newest numbered run."""
        return max((self.folder / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))

    def main(self, *flags):
        """Returns the exit code and the error message of `python train_pl.py FLAGS`."""
        argv, error = mock.patch.object(sys, "argv", ["train_pl.py", *flags]), io.StringIO()
        with argv, contextlib.redirect_stderr(error), printed_lines(), self.assertRaises(SystemExit) as caught:
            train_pl.main()
        code = caught.exception.code
        return (1, code) if isinstance(code, str) else (code, error.getvalue())


class GraphTest(TrainingTest):
    """Test case that trains on a CPU with a mock of CUDA graphs, in blocks of at most 2 minibatches."""

    def setUp(self):
        super().setUp()
        self.captures, self.replays = [], []  # the number of images of each minibatch
        mocks = dict(has_graphs=lambda device: True, side_stream=lambda device: contextlib.nullcontext())
        mocks.update(MINIBATCHES_PER_BLOCK=2, capture=self.capture, gc=mock.Mock())
        self.enter(mock.patch.multiple(graphs, **mocks))

    def capture(self, function, previous):
        """
        Mock of graphs.capture. Runs a step, then undoes its changes to tensors and random numbers, because a capture
        executes nothing. Returns a mock graph, whose replay runs the step again.
        """
        steps = function.__self__
        model, optimizer = steps.model, steps.trainer.optimizers[0]
        tensors = [*model.parameters(), *model.buffers(), model.train_means.sums]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        kept = [(tensor.data, tensor.detach().clone()) for tensor in tensors if tensor is not None]
        with torch.random.fork_rng(devices=[]):
            try:
                function()
            finally:
                for data, value in kept:
                    data.copy_(value)
        self.captures.append(len(steps.indices))
        return argparse.Namespace(replay=lambda: [self.replays.append(len(steps.indices)), function()])


class NamedRunTest(TrainingTest):
    """Test case with one run, named `run`, which can be stopped and resumed."""

    def namespace(self, **flags):
        # Only 2 latents have a manifold, which is slow
        return super().namespace(**{"run_name": "run", "z_dim": 3, **flags})

    def run_folder(self):
        return self.folder / "run"

    def stop_at(self, owner, name, epoch, **flags):
        """Trains, and kills the run when owner.name is called in the epoch with the index `epoch`."""
        original, make_trainer, trainers = getattr(owner, name), run.make_trainer, []

        def method(*args, **kwargs):
            if trainers[0].current_epoch == epoch:
                raise Killed
            return original(*args, **kwargs)

        def remember(*args):
            trainers.append(make_trainer(*args))
            return trainers[0]

        with mock.patch.object(owner, name, method), mock.patch.object(run, "make_trainer", remember):
            self.assertRaises(Killed, self.train, **flags)

    def contents(self):
        """Returns the contents and times of the run's files, except the lock file, which every process may change."""
        return {
            path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
            for path in [self.run_folder(), *self.run_folder().rglob("*")]
            if path.name != ".lock"
        }


def metrics(folder):
    """Returns the rows of a run's metrics.csv, without the column of seconds."""
    with open(folder / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def results(folder):
    """Returns the content of a run's results.json."""
    return json.loads((folder / "results.json").read_text())


def load(folder, name):
    """Returns the content of a run's checkpoint `best`, `last` or `previous`."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def summaries(folder):
    """
    Returns the list of (step, summary) that TensorBoard shows of a run. If a killed process has logged epochs that were
    trained again, TensorBoard shows only the second training.
    """
    shown = []
    for path in sorted(folder.glob("events.out*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START:
                shown = [(step, summary) for step, summary in shown if step < event.step]
            shown += [(event.step, summary) for summary in event.summary.value]
    return shown


def scalars_and_images(folder):
    """
    Returns how often TensorBoard shows each (tag, step, value) of a run. The test result counts once: if a process is
    killed between its test and its results.json, the next process logs the same point again.
    """
    shown = Counter(
        (summary.tag, step, summary.tensor.SerializeToString())
        for step, summary in summaries(folder)
        if summary.metadata.plugin_data.plugin_name in ("scalars", "images")
    )
    return {point: 1 if point[0].startswith("test_") else number for point, number in shown.items()}


def what_a_run_left(folder):
    """Returns a dict of everything in a run's folder that must not depend on whether the run was interrupted."""
    left = {
        "metrics.csv": metrics(folder),
        "TensorBoard": scalars_and_images(folder),
        "results.json": {name: value for name, value in results(folder).items() if "seconds" not in name},
        "files": sorted(path.name for path in folder.rglob("*") if "tfevents" not in path.name),
    }
    for name in RUNTIME_FLAGS:
        left["results.json"]["hyperparameters"].pop(name, None)
    for name in ["best", "last"]:
        checkpoint = load(folder, name)
        adam = [list(state.values()) for state in checkpoint["optimizer_states"][0]["state"].values()]
        counts = [checkpoint["epoch"], checkpoint["global_step"]]
        left[name] = {**checkpoint["state_dict"], "counts": counts, "adam": adam}
    for path in folder.glob("epoch_*.png"):
        left[path.name] = path.read_bytes()
    return left


def assert_left_the_same(test, folder, other):
    """Asserts that two runs left bit-identical results."""
    left, other_left = map(what_a_run_left, [folder, other])
    test.assertEqual(left.keys(), other_left.keys())
    for name in left:
        if name in ["best", "last"]:
            torch.testing.assert_close(left[name], other_left[name], rtol=0, atol=0)
        else:
            test.assertEqual(left[name], other_left[name], name)

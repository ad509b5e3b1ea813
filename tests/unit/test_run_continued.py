"""
Tests of runs that stop somewhere and are given again: `python -m unittest tests/unit/test_run_continued.py`.

Each leaves the same, to the bit, as a run that never stopped.
"""

import math
import os
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

import bmnist
from harness import checkpoints, report, run
from harness.flags import RUNTIME_FLAGS
from tests.helpers import Killed, NamedRunTest, assert_left_the_same, load, scalars_and_images
from train_pl import VAE


def setUpModule():
    global UNDISTURBED
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    UNDISTURBED = Path(folder.name)  # of the runs that never stop, one for all tests with the same flags


class ContinuedRunTest(NamedRunTest):
    def undisturbed(self, **flags):
        """Folder of a run that never stopped."""
        flags = {name: value for name, value in flags.items() if name not in RUNTIME_FLAGS}
        name = "-".join(["run", *(f"{name}={value}" for name, value in sorted(flags.items()))])
        if not (UNDISTURBED / name).exists():
            self.train(**flags, log_dir=str(UNDISTURBED), run_name=name)
        return UNDISTURBED / name

    def check(self, **flags):
        """Continues the run that was stopped and compares it with one that never was. Returns what was printed."""
        _, output = self.train(**flags)
        assert_left_the_same(self, self.run_folder(), self.undisturbed(**flags))
        return output


class TestStopped(ContinuedRunTest):
    """Stopped at a certain moment."""

    def test_at_the_start_of_an_epoch(self):
        """The last time after an epoch with pictures, and with files that were being written."""
        for epoch in [0, 3, 5]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, z_dim=2)
        folder = self.run_folder()
        for path in [*folder.glob("events.out.tfevents.*"), folder / "checkpoints" / "best.ckpt"]:
            path.with_name(f"{path.name}.unfinished").write_bytes(path.read_bytes())
        output = self.check(z_dim=2)
        self.assertIn(f"in {folder}, continued after epoch 5\nepoch   6/6", output)

    def test_between_two_checkpoints(self):
        """After best.ckpt and before last.ckpt: of the first epoch, of one in the middle, and of the last one."""
        copy = checkpoints.CheckpointFiles.copy

        def copy_or_die(files, source, path):
            files.jobs[source].result()
            if load(self.run_folder(), "best")["epoch"] in [0, 2, 5]:
                raise Killed
            copy(files, source, path)

        for _ in range(3):
            with mock.patch.object(checkpoints.CheckpointFiles, "copy", copy_or_die), self.assertRaises(Killed):
                self.train()
        self.assertIn("continued after epoch 6\ntest bpd", self.check())

    def test_while_it_logs(self):
        """Before the checkpoint of an epoch, and after it, before the means of training are in TensorBoard."""
        log_metrics = report.EpochLogger.log_metrics
        for killing in ["val_bpd", "train_bpd"]:

            def log_or_die(logger, metrics, step=None, killing=killing):
                # A continued run logs epoch 2 again before it trains: that is when `epoch` is not yet 3.
                if logger.epoch == 3 and killing in metrics:
                    raise Killed
                log_metrics(logger, metrics, step)

            with mock.patch.object(report.EpochLogger, "log_metrics", log_or_die), self.assertRaises(Killed):
                self.train()
        self.assertEqual(load(self.run_folder(), "last")["epoch"] + 1, 3)
        self.check()

    def test_while_it_tests_and_draws(self):
        for owner, name in [(VAE, "test_step"), (run, "write_text"), (run.Run, "draw_figures")]:
            self.stop_at(owner, name, 6)
        self.check()

    def test_pictures_are_on_disk_before_their_checkpoint(self):
        pictures, flushing = {}, threading.Event()
        write, flush = RecordWriter.write, EventFileWriter.flush

        def write_late(writer, data):  # TensorBoard's thread, which is as late as it may be
            if b"Manifold" in data:
                flushing.wait(timeout=60)
            write(writer, data)

        def flush_all(writer):
            flushing.set()
            flush(writer)
            flushing.clear()

        save = checkpoints.CheckpointFiles.save_checkpoint

        def save_checkpoint(files, checkpoint, path, storage_options=None):
            pictures[checkpoint["epoch"] + 1] = {
                (tag, step) for tag, step, _ in scalars_and_images(self.run_folder()) if tag[0].isupper()
            }
            save(files, checkpoint, path)

        with (
            mock.patch.object(checkpoints.CheckpointFiles, "save_checkpoint", save_checkpoint),
            mock.patch.object(RecordWriter, "write", write_late),
            mock.patch.object(EventFileWriter, "flush", flush_all),
        ):
            self.train(epochs=5, z_dim=2)
        tags = ["Samples", "Means", "Reconstructions", "Manifold"]
        self.assertEqual(pictures[5] - pictures[4], {(tag, 5) for tag in tags})


class TestFlags(ContinuedRunTest):
    """Runs of several kinds."""

    def test_other_models_and_paths(self):
        """A CNN, that goes on with worker processes."""
        flags = dict(model="CNN", num_filters=2)
        for epoch in [2, 4]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, **flags)
        self.check(**flags, num_workers=1)

    def test_drawn_images_and_learning_rate(self):
        """Of each epoch, whenever the run stops, with worker processes, too."""
        flags = dict(binarization="stochastic", lr_schedule="cosine", lr=0.01)
        for epoch in [2, 4]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, **flags)
        self.check(**flags, num_workers=1)

    def test_each_epoch_has_its_images_and_learning_rate(self):
        lrs, seeds = [], []

        def note_lr(model):
            lrs.append(model.optimizers().param_groups[0]["lr"])

        with (
            mock.patch.object(bmnist.SampledImages, "redraw", lambda images, seed: seeds.append(seed)),
            mock.patch.object(VAE, "on_train_epoch_end", note_lr),
        ):
            self.train(binarization="stochastic", lr_schedule="cosine", lr=0.01)
        torch.testing.assert_close(lrs, [0.005 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)])
        self.assertEqual(seeds[:3], [0, 0, 0])  # the three sets
        self.assertEqual((len(seeds[3:]), len(set(seeds[3:]))), (6, 6))  # the epochs


class TestCheckpoints(ContinuedRunTest):
    """What became of the checkpoints before the run was given again."""

    def test_a_folder_that_was_moved(self):
        """The score of the best checkpoint is kept, although it is another file now."""

        def log_best_first(model):
            model.log("val_bpd", float(model.current_epoch))

        with mock.patch.object(VAE, "on_validation_epoch_end", log_best_first):
            self.stop_at(VAE, "on_train_epoch_start", 3)
            moved = self.folder / "logs" / "run"
            moved.parent.mkdir()
            os.rename(self.run_folder(), moved)
            self.train(log_dir=str(moved.parent))
        self.assertEqual((load(moved, "best")["epoch"], load(moved, "last")["epoch"]), (0, 5))
        self.assertEqual(set(os.listdir(moved / "checkpoints")), {"best.ckpt", "last.ckpt", "previous.ckpt"})

    def test_damaged_checkpoints(self):
        self.stop_at(VAE, "on_train_epoch_start", 4)
        for name in ["best", "last"]:  # of the same epoch
            path = self.run_folder() / "checkpoints" / f"{name}.ckpt"
            path.write_bytes(path.read_bytes()[:-100])
        output = self.check()
        self.assertRegex(output, rf"{path} is no checkpoint, .* \(.*\); continuing from previous.ckpt, epoch 3\n")
        self.assertIn("continued after epoch 3\n", output)

    def test_the_best_one_is_gone(self):
        """Without another one of its epoch, the run would train to its end and have no results."""
        bpds = iter([0.6, 0.5, 0.4, 0.3, 0.35, 0.45])

        def log_bpd(model):
            model.log("val_bpd", next(bpds))

        with mock.patch.object(VAE, "on_validation_epoch_end", log_bpd):
            self.stop_at(VAE, "on_train_epoch_start", 3)
            best = self.run_folder() / "checkpoints" / "best.ckpt"
            best.unlink()
            self.stop_at(VAE, "on_train_epoch_start", 4)
            self.assertEqual(load(self.run_folder(), "best")["epoch"] + 1, 3)
            self.stop_at(VAE, "on_train_epoch_start", 5)
            best.unlink()
            before = self.contents()
            with self.assertRaisesRegex(checkpoints.CheckpointError, f"{best}, of epoch 3, is .*: delete .*--run_name"):
                self.train()
            self.assertEqual(self.contents(), before)

    def test_a_run_of_the_old_version(self):
        """Its checkpoints kept the run's history as the state of a callback."""
        self.stop_at(VAE, "on_train_epoch_start", 4)
        for name in ["last", "best", "previous"]:
            checkpoint = load(self.run_folder(), name)
            checkpoint["callbacks"]["EpochReport"] = checkpoint.pop("run")
            torch.save(checkpoint, self.run_folder() / "checkpoints" / f"{name}.ckpt")
        self.assertIn("continued after epoch 4\n", self.check())


if __name__ == "__main__":
    unittest.main()

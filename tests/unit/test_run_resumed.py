"""Tests of runs that are killed and resume: `python -m unittest tests/unit/test_run_resumed.py`."""

import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from harness import checkpoints, run, tensorboard
from harness.flags import RUNTIME_FLAGS
from tests.helpers import Killed, NamedRunTest, assert_left_the_same, load, metrics, results
from train_pl import VAE


def setUpModule():
    global UNINTERRUPTED
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    UNINTERRUPTED = Path(folder.name)  # folder of uninterrupted runs; tests with the same flags share a run


class ResumedRunTest(NamedRunTest):
    def namespace(self, **flags):
        return super().namespace(**{"epochs": 3, **flags})

    def assert_resumes(self, after, **flags):
        """Asserts that the killed run resumes after an epoch, and is bit-identical to an uninterrupted run."""
        _, output = self.train(**flags)
        self.assertIn(f"in {self.run_folder()}, resumed after epoch {after}\n", output)
        flags = {name: value for name, value in flags.items() if name not in RUNTIME_FLAGS}
        name = "-".join(["run", *(f"{name}={value}" for name, value in sorted(flags.items()))])
        if not (UNINTERRUPTED / name).exists():
            self.train(**flags, log_dir=str(UNINTERRUPTED), run_name=name)
        assert_left_the_same(self, self.run_folder(), UNINTERRUPTED / name)
        return output


class TestKilled(ResumedRunTest):
    def test_a_run_killed_at_the_start_of_an_epoch_resumes(self):
        """The last kill is after an epoch with pictures, and leaves unfinished files."""
        flags = dict(epochs=6, z_dim=2)
        for epoch in [0, 2, 5]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, **flags)
        for path in [*self.run_folder().glob("events.out.tfevents.*"), self.run_folder() / "checkpoints" / "best.ckpt"]:
            path.with_name(f"{path.name}.unfinished").write_bytes(path.read_bytes())
        self.assert_resumes(after=5, **flags)

    def test_a_run_killed_between_the_two_checkpoints_of_an_epoch_resumes(self):
        """The kills are between best.ckpt and last.ckpt of the first and of the last epoch."""
        copy = checkpoints.BackgroundCheckpointIO.copy

        def copy_or_die(files, source, path):
            files.jobs[source].result()
            if load(self.run_folder(), "best")["epoch"] != 1:
                raise Killed
            copy(files, source, path)

        for epoch in [0, 2]:
            with self.subTest(epoch=epoch), mock.patch.object(checkpoints.BackgroundCheckpointIO, "copy", copy_or_die):
                self.assertRaises(Killed, self.train)
        self.assert_resumes(after=3)

    def test_a_run_killed_while_it_logs_the_metrics_of_an_epoch_resumes(self):
        log_metrics = tensorboard.EpochLogger.log_metrics
        for name in ["val_bpd", "train_bpd"]:

            def log_or_die(logger, metrics, step=None, name=name):
                if logger.epoch == 2 and name in metrics:
                    raise Killed
                log_metrics(logger, metrics, step)

            with self.subTest(name), mock.patch.object(tensorboard.EpochLogger, "log_metrics", log_or_die):
                self.assertRaises(Killed, self.train)
        self.assert_resumes(after=load(self.run_folder(), "last")["epoch"] + 1)

    def test_a_run_killed_during_its_test_its_results_or_its_figures_resumes(self):
        for owner, name in [(VAE, "test_step"), (run, "write_text")]:
            self.stop_at(owner, name, 3)
        self.assert_resumes(after=3)
        self.stop_at(run.Run, "make_figures", 0)
        self.assertIn("is finished", self.train()[1])

    def test_a_killed_run_with_sampled_images_a_cosine_learning_rate_and_workers_resumes(self):
        flags = dict(model="CNN", num_filters=2, binarization="stochastic", lr_schedule="cosine", lr=0.01, epochs=4)
        for epoch in [1, 3]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, **flags)
        self.assert_resumes(after=3, **flags, num_workers=1)

    def test_a_killed_run_with_early_stopping_resumes(self):
        """It is killed before the epoch after which it stops, then between its last checkpoint and its results."""
        values = [0.5, 0.3, 0.4, 0.4, 0.2]
        flags = dict(epochs=5, patience=2)

        def log_val_bpd(model):
            model.log("val_bpd", values[model.current_epoch])

        with mock.patch.object(VAE, "on_validation_epoch_end", log_val_bpd):
            self.stop_at(VAE, "on_train_epoch_start", 3, **flags)
            self.stop_at(VAE, "test_step", 4, **flags)
            output = self.assert_resumes(after=4, **flags)
            self.assertIn("note: stopped early after 4 of 5 epochs\n", output)
            found = results(self.run_folder())
            self.assertEqual((found["epochs"], found["best_epoch"], len(metrics(self.run_folder()))), (4, 2, 5))
            self.assertIn("is finished", self.train(**flags)[1])
            self.train(**{**flags, "epochs": 6})  # stops after the same epoch
        found = results(self.run_folder())
        self.assertEqual((found["epochs"], found["hyperparameters"]["epochs"]), (4, 6))


class TestCheckpoints(ResumedRunTest):
    """Runs whose checkpoints were moved, damaged, or written by an older version."""

    def test_a_run_in_another_folder_keeps_its_best_epoch_and_reads_each_checkpoint_once(self):
        """Only the best checkpoint is read once more at the end, for the test."""

        def log_val_bpd(model):
            model.log("val_bpd", [0.5, 0.3, 0.4, 0.4][model.current_epoch])

        with mock.patch.object(VAE, "on_validation_epoch_end", log_val_bpd):
            self.stop_at(VAE, "on_train_epoch_start", 3, epochs=4)
            moved = self.folder / "logs" / "run"
            moved.parent.mkdir()
            os.rename(self.run_folder(), moved)
            read_checkpoint = mock.Mock(wraps=checkpoints.read_checkpoint)
            with mock.patch.object(checkpoints, "read_checkpoint", read_checkpoint):
                self.train(log_dir=str(moved.parent), epochs=4)
        self.assertEqual((load(moved, "best")["epoch"], load(moved, "last")["epoch"]), (1, 3))
        self.assertEqual(set(os.listdir(moved / "checkpoints")), {"best.ckpt", "last.ckpt", "previous.ckpt"})
        read = [Path(call.args[0]).name for call in read_checkpoint.call_args_list]
        self.assertEqual(read, [checkpoints.LAST, checkpoints.BEST, checkpoints.BEST])

    def test_a_run_whose_checkpoints_are_damaged_resumes_from_the_previous_one(self):
        self.stop_at(VAE, "on_train_epoch_start", 2)
        for name in ["best", "last"]:  # of the same epoch
            path = self.run_folder() / "checkpoints" / f"{name}.ckpt"
            path.write_bytes(path.read_bytes()[:-100])
        output = self.assert_resumes(after=1)
        self.assertRegex(
            output, rf"warning: {path} is not a checkpoint, .* \(.*\); resuming from previous.ckpt, epoch 1\n"
        )

    def test_a_run_of_an_older_version_resumes(self):
        """In its checkpoints, the run and two ModelCheckpoints are states of callbacks."""
        self.stop_at(VAE, "on_train_epoch_start", 2)
        for name in ["last", "best", "previous"]:
            checkpoint = load(self.run_folder(), name)
            del checkpoint["run"]["should_stop"]
            checkpoint["callbacks"].update(
                {"EpochReport": checkpoint.pop("run")},
                **{
                    f"ModelCheckpoint{number}": {"best_model_path": path}
                    for number, path in enumerate(["", "best.ckpt"])
                },
            )
            torch.save(checkpoint, self.run_folder() / "checkpoints" / f"{name}.ckpt")
        output = self.assert_resumes(after=2)
        self.assertNotIn("ModelCheckpoint", output)

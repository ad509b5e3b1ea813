"""Tests of harness/report.py, of what a run reports: `python -m unittest tests/unit/test_report.py`."""

import contextlib
import csv
import os
import time
import unittest
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pictures import figures, report
from tests.helpers import Killed, NamedRunTest, SeededTest, assert_left_the_same, metrics, scalars_and_images, summaries
from train_pl import TITLES, VAE, GenerateCallback

COLUMNS = [f"{stage}_{name}" for stage in ["train", "val"] for name in TITLES]


class TestMetrics(SeededTest):
    def rows(self):
        """The header and the rows of metrics.csv."""
        with open(self.folder / "metrics.csv", newline="") as file:
            return list(csv.reader(file))

    def test_metric_names(self):
        names = ["epoch", "train_bpd", "val_bpd", "test_bpd", "valid", "trained", "lr", "seconds", "val_"]
        self.assertEqual(report.metric_names(names), ["train_bpd", "val_bpd", "val_"])

    def test_columns(self):
        """The quantities in their order, further metrics by name wherever they first appear, the seconds."""
        history = [
            {"epoch": 0, "val_b": 1.5, "val_a": 2.5, "val_z": 8.0, "seconds": 0.5},
            {"epoch": 1, "train_b": 3.5, "train_a": 4.5, "val_b": 5.5, "val_a": 6.5, "train_k": 7.0, "seconds": 0.25},
        ]
        report.write_metrics(self.folder, history, ["b", "a"])
        self.assertEqual(
            self.rows(),
            [
                ["epoch", "train_b", "train_a", "val_b", "val_a", "train_k", "val_z", "seconds"],
                ["0", "", "", "1.5", "2.5", "", "8.0", "0.5"],
                ["1", "3.5", "4.5", "5.5", "6.5", "7.0", "", "0.25"],
            ],
        )
        self.assertEqual(os.listdir(self.folder), ["metrics.csv"])
        report.write_metrics(self.folder, [], ["a"])
        self.assertEqual(self.rows(), [["epoch", "train_a", "val_a", "seconds"]])

    def write_events(self):
        """Scalars and pictures of the epochs 0 to 3."""
        with contextlib.closing(SummaryWriter(str(self.folder))) as writer:
            for epoch in range(4):
                writer.add_scalar("val_bpd", epoch / 2, epoch)
                writer.add_image("Samples", torch.zeros(1, 2, 2), epoch)

    def test_return_to_epoch(self):
        """Of the last epoch the pictures stay, of those before all; half a file goes, and nothing else."""
        self.write_events()
        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir()
        for name in ["last.ckpt", "last.ckpt.unfinished"]:
            (checkpoints / name).touch()
        history = [{"epoch": epoch, "val_bpd": epoch / 2, "seconds": 1.0} for epoch in range(3)]
        report.return_to_epoch(self.folder, history, ["bpd"])
        points = {(tag, step) for tag, step, _ in scalars_and_images(self.folder)}
        self.assertEqual(points, {("val_bpd", 0), ("val_bpd", 1), *(("Samples", epoch) for epoch in range(3))})
        self.assertEqual(sum(scalars_and_images(self.folder).values()), 5)
        self.assertEqual([row[0] for row in self.rows()], ["epoch", "0", "1", "2"])
        self.assertEqual(os.listdir(checkpoints), ["last.ckpt"])

    def test_return_to_the_start(self):
        """Without a checkpoint there is nothing to keep."""
        self.write_events()
        report.return_to_epoch(self.folder, [], ["bpd"])
        self.assertEqual(summaries(self.folder), [])
        self.assertEqual(len(self.rows()), 1)

    def test_files_of_others_stay(self):
        names = ["notes.tmp", "table.csv.tmp", "sub/metrics.csv.tmp", "events.log"]
        (self.folder / "sub").mkdir()
        for name in [*names, "metrics.csv.unfinished"]:
            (self.folder / name).touch()
        report.return_to_epoch(self.folder, [], ["bpd"])
        left = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        self.assertEqual(left, {*names, "metrics.csv"})

    def test_a_tensorboard_that_watches(self):
        """It has no point twice and lacks none, however often the run is continued."""
        history = [{"epoch": epoch, "val_bpd": epoch / 2, "seconds": 1.0} for epoch in range(4)]
        self.write_events()
        watching = EventAccumulator(str(self.folder)).Reload()
        for life in range(3):
            with mock.patch("time.time", return_value=time.time() + 10 + 2 * life):
                report.return_to_epoch(self.folder, history[: life + 2], ["bpd"])
            with self.assertLogs("tensorboard", "WARNING"):  # that it forgets what it had
                watching.Reload()
            with (
                mock.patch("time.time", return_value=time.time() + 11 + 2 * life),
                contextlib.closing(SummaryWriter(str(self.folder))) as writer,
            ):
                for epoch in range(life + 1, 4):  # the last one again, see on_fit_start
                    writer.add_scalar("val_bpd", epoch / 2, epoch)
            watching.Reload()
            for accumulator in [watching, EventAccumulator(str(self.folder)).Reload()]:
                self.assertEqual([event.step for event in accumulator.Scalars("val_bpd")], [0, 1, 2, 3])

    def test_killed_as_it_copied_the_events(self):
        """Then both files are there: the old one, and the copy after it."""
        self.write_events()
        history = [{"epoch": epoch, "val_bpd": epoch / 2, "seconds": 1.0} for epoch in range(3)]
        with (
            mock.patch("time.time", return_value=time.time() + 10),
            mock.patch.object(report, "write_events", self.write_and_die),
            self.assertRaises(Killed),
        ):
            report.return_to_epoch(self.folder, history, ["bpd"])
        self.assertEqual(max(scalars_and_images(self.folder).values()), 2)
        with mock.patch("time.time", return_value=time.time() + 20):
            report.return_to_epoch(self.folder, history, ["bpd"])
        self.assertEqual(max(scalars_and_images(self.folder).values()), 1)
        self.assertEqual(sum(scalars_and_images(self.folder).values()), 5)

    def write_and_die(self, path, events, write_events=report.write_events):
        """In the place of write_events: of the copy it comes back, and then no more."""
        if len(events) == 1:
            raise Killed
        write_events(path, events)

    def test_a_folder_with_special_characters(self):
        """Its name is no pattern of other names."""
        self._folder = self.folder / "run [1]"
        self._folder.mkdir()
        self.write_events()
        report.return_to_epoch(self.folder, [], ["bpd"])
        self.assertEqual(summaries(self.folder), [])


class TestFigures(SeededTest):
    def draw(self, epochs, first_step_bpd=1.25):
        """What the figures are drawn from, for a run that has samples of these epochs."""
        for epoch in epochs:
            for name in ["samples", "means"]:
                (self.folder / f"epoch_{epoch}_{name}.png").touch()
        (self.folder / "epoch_x_samples.png").touch()
        flags = {"model": "MLP", "z_dim": 20, "dataset": "mnist"}
        epoch_report = report.EpochReport(flags, list(TITLES))
        epoch_report.first_step_bpd = first_step_bpd
        epoch_report.history = [
            {"epoch": 0, "val_bpd": 1.0, "seconds": 1.0},
            {"epoch": 1, "train_bpd": 0.5, "val_bpd": 0.75, "seconds": 1.0},
        ]
        with mock.patch.multiple(figures, bpd_curves=mock.DEFAULT, side_by_side=mock.DEFAULT) as drawn:
            epoch_report.draw_curves(0.625, str(self.folder / "bpd_curves.png"))
            epoch_report.draw_samples(str(self.folder / "samples_over_training.png"))
        return drawn["bpd_curves"].call_args.args, drawn["side_by_side"].call_args.args

    def test_curves(self):
        """That of training begins with the first step, before any update."""
        path = str(self.folder / "bpd_curves.png")
        title = "MLP, 20 latents, mnist"
        curves, _ = self.draw([0])
        self.assertEqual(curves, (path, {0: 1.25, 1: 0.5}, {0: 1.0, 1: 0.75}, 0.625, title))
        curves, _ = self.draw([0], first_step_bpd=None)
        self.assertEqual(curves[1], {1: 0.5})

    def test_samples(self):
        """Before training, the last ones up to epoch 10, and the last ones of all."""
        for new, expected in [([0], [0]), ([5], [0, 5]), ([10], [0, 10]), ([15, 80], [0, 10, 80])]:
            _, (path, pictures) = self.draw(new)
            self.assertEqual(path, str(self.folder / "samples_over_training.png"))
            names = [f"epoch {epoch}" if epoch else "before training" for epoch in expected]
            files = [str(self.folder / f"epoch_{epoch}_samples.png") for epoch in expected]
            self.assertEqual(list(pictures.items()), list(zip(names, files)))


class TestFurtherMetrics(NamedRunTest):
    """What else is logged under train_... and val_..., by self.log in whatever hook."""

    def compare_with_a_run_that_stopped(self, hooks):
        """A run with changed hooks, and one that was stopped: they leave the same. Returns the rows of metrics.csv."""
        with contextlib.ExitStack() as stack:
            for (owner, name), hook in hooks.items():
                stack.enter_context(mock.patch.object(owner, name, hook))
            for epoch in [2, 3]:
                self.stop_at(report.EpochReport, "on_train_epoch_start", epoch)
            folder, _ = self.train()
            self.train(run_name="undisturbed")
        assert_left_the_same(self, folder, self.folder / "undisturbed")
        with open(folder / "metrics.csv") as file:
            self.assertTrue(file.readline().endswith(",seconds\n"))
        return metrics(folder)

    def steps(self, name):
        """The epochs of which TensorBoard has a metric."""
        return sorted(step for tag, step, _ in scalars_and_images(self.run_folder()).elements() if tag == name)

    def test_every_hook(self):
        training_step, log_means, log_train = VAE.training_step, VAE.on_validation_epoch_end, VAE.on_train_epoch_end

        def log_in_step(model, batch, batch_idx):
            value = len(batch[0]) + 1000.0 * model.current_epoch
            model.log("train_a_mean", value, on_step=False, on_epoch=True)
            model.log("train_b_last", value)
            return training_step(model, batch, batch_idx)

        def log_in_validation(model):
            model.log("val_e_validation", model.current_epoch + 0.5)
            log_means(model)

        def log_at_the_end(model):
            model.log("train_c_end", model.current_epoch / 4)
            log_train(model)

        hooks = {
            (VAE, "training_step"): log_in_step,
            (VAE, "on_train_epoch_end"): log_at_the_end,
            (VAE, "on_validation_epoch_end"): log_in_validation,
            (GenerateCallback, "on_train_epoch_end"): lambda callback, trainer, model: model.log("train_d_callback", 7),
        }
        rows = self.compare_with_a_run_that_stopped(hooks)
        further = ["train_a_mean", "train_b_last", "train_c_end", "train_d_callback", "val_e_validation"]
        self.assertEqual(list(rows[0]), ["epoch", *COLUMNS, *further])
        self.assertEqual([rows[0][name] for name in further], ["", "", "", "", "0.5"])
        for epoch, row in enumerate(rows[1:]):
            mean, *others = [float(row[name]) for name in further]
            self.assertAlmostEqual(mean, (2 * 128**2 + 44**2) / 300 + 1000 * epoch, places=3)
            self.assertEqual(others, [44 + 1000 * epoch, epoch / 4, 7, epoch + 0.5])
        for name in further[:4]:
            self.assertEqual(self.steps(name), [1, 2, 3, 4, 5, 6])
        self.assertEqual(self.steps("val_e_validation"), [0, 1, 2, 3, 4, 5, 6])

    def test_not_in_every_epoch(self):
        """An epoch that did not log a metric has none, not that of an epoch before."""
        log_means, log_train = VAE.on_validation_epoch_end, VAE.on_train_epoch_end

        def log_in_validation(model):
            if model.current_epoch in [1, 4]:
                model.log("val_slow", model.current_epoch + 0.5)
            log_means(model)

        def log_at_the_end(model):
            if model.current_epoch in [0, 3]:
                model.log("train_slow", model.current_epoch + 0.25)
            log_train(model)

        hooks = {(VAE, "on_validation_epoch_end"): log_in_validation, (VAE, "on_train_epoch_end"): log_at_the_end}
        rows = self.compare_with_a_run_that_stopped(hooks)
        self.assertEqual([row["val_slow"] for row in rows], ["", "", "1.5", "", "", "4.5", ""])
        self.assertEqual([row["train_slow"] for row in rows], ["", "0.25", "", "", "3.25", "", ""])
        self.assertEqual((self.steps("val_slow"), self.steps("train_slow")), ([2, 5], [1, 4]))


if __name__ == "__main__":
    unittest.main()

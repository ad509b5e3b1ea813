"""Tests of harness/report.py: `python -m unittest tests/unit/test_report.py`."""

import contextlib
import csv
from types import SimpleNamespace
from unittest import mock

import pytorch_lightning as pl

from harness import report
from harness.run import Run
from tests.helpers import NamedRunTest, SeededTest, assert_left_the_same, metrics, scalars_and_images
from train_pl import TITLES, VAE, GenerateCallback


class TestMetricsFile(SeededTest):
    def test_columns_are_the_quantities_then_other_metrics_by_name_then_the_seconds(self):
        history = [
            {"epoch": 0, "val_b": 1.5, "val_a": 2.5, "val_z": 8.0, "seconds": 0.5},
            {"epoch": 1, "train_b": 3.5, "train_a": 4.5, "val_b": 5.5, "val_a": 6.5, "train_k": 7.0, "seconds": 0.25},
        ]
        both = [
            ["epoch", "train_b", "train_a", "val_b", "val_a", "train_k", "val_z", "seconds"],
            ["0", "", "", "1.5", "2.5", "", "8.0", "0.5"],
            ["1", "3.5", "4.5", "5.5", "6.5", "7.0", "", "0.25"],
        ]
        for rows, expected in [(history, both), ([], [["epoch", "train_b", "train_a", "val_b", "val_a", "seconds"]])]:
            report.write_metrics(self.folder, rows, ["b", "a"])
            with open(self.folder / "metrics.csv", newline="") as file:
                self.assertEqual(list(csv.reader(file)), expected)


class TestLoggedMetrics(NamedRunTest):
    """What a module logs under train_... and val_..., by self.log in any hook."""

    def setUp(self):
        super().setUp()
        training_step, log_val, log_train = VAE.training_step, VAE.on_validation_epoch_end, VAE.on_train_epoch_end

        def log_in_step(model, batch, batch_idx):
            value = len(batch[0]) + 1000.0 * model.current_epoch
            model.log("train_a_mean", value, on_step=False, on_epoch=True)
            model.log("train_b_last", value)
            return training_step(model, batch, batch_idx)

        def log_in_validation(model):
            model.log("val_e_validation", model.current_epoch + 0.5)
            if model.current_epoch in [1, 3]:
                model.log("val_f_odd", model.current_epoch + 0.5)
            log_val(model)

        def log_at_the_end(model):
            model.log("train_c_end", model.current_epoch / 4)
            model.log("other", 1.0)
            if model.current_epoch in [0, 2]:
                model.log("train_f_even", model.current_epoch + 0.25)
            log_train(model)

        for owner, name, hook in [
            (VAE, "training_step", log_in_step),
            (VAE, "on_validation_epoch_end", log_in_validation),
            (VAE, "on_train_epoch_end", log_at_the_end),
            (GenerateCallback, "on_train_epoch_end", lambda self, trainer, model: model.log("train_d_callback", 7)),
        ]:
            self.enter(mock.patch.object(owner, name, hook))

    def shown(self):
        """The epochs that TensorBoard shows of each metric and picture, by name; each one is there once."""
        shown = {}
        for (tag, step, _), number in scalars_and_images(self.run_folder()).items():
            self.assertEqual(number, 1)
            shown[tag] = sorted([*shown.get(tag, []), step])
        return shown

    def test_metrics_of_any_hook_are_reported_for_the_epochs_that_logged_them_and_in_a_run_that_resumes(self):
        for epoch in [1, 3]:
            self.stop_at(report.EpochReport, "on_train_epoch_start", epoch, epochs=4)
        folder, _ = self.train(epochs=4)
        self.train(epochs=4, run_name="undisturbed")
        assert_left_the_same(self, folder, self.folder / "undisturbed")

        rows, shown = metrics(folder), self.shown()
        every_epoch = ["train_a_mean", "train_b_last", "train_c_end", "train_d_callback"]
        names = [*every_epoch, "train_f_even", "val_e_validation", "val_f_odd"]
        quantities = [f"{stage}_{name}" for stage in ["train", "val"] for name in TITLES]
        self.assertEqual(list(rows[0]), ["epoch", *quantities, *names])
        for epoch, row in enumerate(rows[1:]):
            self.assertAlmostEqual(float(row["train_a_mean"]), (2 * 128**2 + 44**2) / 300 + 1000 * epoch, places=3)
            values = [float(row[name]) for name in every_epoch[1:]]
            self.assertEqual(values, [44 + 1000 * epoch, epoch / 4, 7])
        for name, values in [
            ("train_f_even", ["", "0.25", "", "2.25", ""]),
            ("val_e_validation", ["0.5", "0.5", "1.5", "2.5", "3.5"]),
            ("val_f_odd", ["", "", "1.5", "", "3.5"]),
        ]:
            self.assertEqual([row[name] for row in rows], values)
        for name in names:
            self.assertEqual(shown[name], [epoch for epoch, row in enumerate(rows) if row[name]], name)
        self.assertEqual(shown["other"], [1, 2, 3, 4])

    def test_what_was_logged_of_an_epoch_is_on_the_disk_before_its_checkpoint(self):
        save_checkpoint, seen = pl.Trainer.save_checkpoint, []

        def look_and_save(trainer, *args):
            seen.append((self.shown()["val_bpd"], len(metrics(self.run_folder()))))
            save_checkpoint(trainer, *args)

        with mock.patch.object(pl.Trainer, "save_checkpoint", look_and_save):
            self.train(epochs=2)
        self.assertEqual(seen, [([0, 1], 2), ([0, 1, 2], 3)])


class TestContention(NamedRunTest):
    """The note that other processes seem to use the CPU."""

    def notes(self, wall=2.0, shares=(0.5, 0.5), pictures=0.0, threads=2, device="cpu, 2 threads"):
        """
        The notes of a run of two epochs. Its training step takes so many seconds, and has a CPU for a share of them in
        each epoch; its pictures take so many seconds more.
        """
        clock, training_step = SimpleNamespace(wall=0.0, cpu=0.0), VAE.training_step
        clock.perf_counter, clock.thread_time = lambda: clock.wall, lambda: clock.cpu

        def slow_step(model, *args):
            clock.wall += wall
            clock.cpu += wall * shares[model.current_epoch]
            return training_step(model, *args)

        def slow_pictures(callback, trainer, model):
            clock.wall += pictures

        with (
            mock.patch.object(report, "time", clock),
            mock.patch.object(Run, "device_name", device),
            mock.patch.object(VAE, "training_step", slow_step),
            mock.patch.object(GenerateCallback, "on_train_epoch_end", slow_pictures),
        ):
            _, output = self.train(epochs=2, batch_size=300, threads=threads, run_name=f"run {self.run_number}")
        self.run_number += 1
        return [line for line in output.splitlines() if line.startswith("note:")]

    def test_a_note_says_once_that_the_training_thread_had_no_cpu_for_a_part_of_the_first_epoch(self):
        (note,) = self.notes()
        self.assertIn("training had a CPU for 50% of this epoch", note)
        self.assertIn("2 threads wait for each other: --threads 1 may be faster", note)

    def test_there_is_no_note_without_contention_or_if_one_thread_would_not_help(self):
        for case, options in [
            ("just enough of a CPU", dict(shares=[report.CONTENTION + 0.01] * 2)),
            ("slow pictures", dict(shares=[1, 1], pictures=100.0)),
            ("a later epoch", dict(shares=[1, 0.5])),
            ("a short epoch", dict(wall=0.5)),
            ("one thread", dict(threads=1, device="cpu, 1 threads")),
            ("a GPU", dict(device="NVIDIA H200")),
        ]:
            with self.subTest(case):
                self.assertEqual(self.notes(**options), [])

    run_number = 0

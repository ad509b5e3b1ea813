"""Tests of harness/report.py: `python -m unittest tests/unit/test_report.py`."""

import time
from types import SimpleNamespace
from unittest import mock

import pytorch_lightning as pl
from tensorboard.summary.writer.record_writer import RecordWriter

from harness import report
from harness.run import Run
from tests.helpers import NamedRunTest, SeededTest, TrainingTest, assert_left_the_same, metrics, scalars_and_images
from train_pl import CHART_TITLES, VAE, GenerateCallback


class TestMetricsFile(SeededTest):
    def test_columns_are_the_quantities_then_other_metrics_by_name_then_the_seconds(self):
        history = [
            {"epoch": 0, "val_b": 1.5, "val_a": 2.5, "val_z": 8.0, "seconds": 0.5},
            {"epoch": 1, "train_b": 3.5, "train_a": 4.5, "val_b": 5.5, "val_a": 6.5, "train_k": 7.0, "seconds": 0.25},
        ]
        columns = "epoch,train_b,train_a,val_b,val_a,train_k,val_z,seconds"
        table = [columns, "0,,,1.5,2.5,,8.0,0.5", "1,3.5,4.5,5.5,6.5,7.0,,0.25"]
        for rows, expected in [(history, table), ([], [columns.replace(",train_k,val_z", "")])]:
            report.write_metrics(self.folder, rows, ["b", "a"])
            self.assertEqual((self.folder / "metrics.csv").read_text().splitlines(), expected)


class TestLoggedMetrics(NamedRunTest):
    """Metrics that a run logs as train_... and val_..., with self.log in any hook."""

    def shown(self):
        """Returns a dict from each name to the epochs that TensorBoard shows. Asserts that no epoch is shown twice."""
        shown = {}
        for (tag, step, _), number in scalars_and_images(self.run_folder()).items():
            self.assertEqual(number, 1)
            shown[tag] = sorted([*shown.get(tag, []), step])
        return shown

    def test_metrics_of_any_hook_are_reported_for_their_epochs_even_if_the_run_was_killed(self):
        training_step, log_val, log_train = VAE.training_step, VAE.on_validation_epoch_end, VAE.on_train_epoch_end

        def log_in_step(model, batch, batch_idx):
            value = len(batch[0]) + 1000.0 * model.current_epoch
            model.log("train_a_mean", value, on_step=False, on_epoch=True)
            model.log("train_b_last", value)
            return training_step(model, batch, batch_idx)

        def log_even(name, hook, model):
            if model.current_epoch % 2 == 0:
                model.log(name, model.current_epoch + 0.5)
            hook(model)

        for owner, name, hook in [
            (VAE, "training_step", log_in_step),
            (VAE, "on_train_epoch_end", lambda model: log_even("train_d_even", log_train, model)),
            (VAE, "on_validation_epoch_end", lambda model: log_even("val_e_even", log_val, model)),
            (GenerateCallback, "on_train_epoch_end", lambda self, trainer, model: model.log("train_c_callback", 7)),
        ]:
            self.enter(mock.patch.object(owner, name, hook))
        for epoch in [0, 1, 3]:
            self.stop_at(report.EpochReport, "on_train_epoch_start", epoch, epochs=4)
        folder, _ = self.train(epochs=4)
        self.train(epochs=4, run_name="uninterrupted")
        assert_left_the_same(self, folder, self.folder / "uninterrupted")

        rows, shown = metrics(folder), self.shown()
        mean = (2 * 128**2 + 44**2) / 300  # mean size of the minibatches, over the images
        expected = {
            "train_a_mean": [None, *(round(mean + 1000 * epoch, 3) for epoch in range(4))],
            "train_b_last": [None, 44, 1044, 2044, 3044],
            "train_c_callback": [None, 7, 7, 7, 7],
            "train_d_even": [None, 0.5, None, 2.5, None],
            "val_e_even": [0.5, 0.5, None, 2.5, None],  # the untrained model first
        }
        quantities = [f"{stage}_{name}" for stage in ["train", "val"] for name in CHART_TITLES]
        self.assertEqual(list(rows[0]), ["epoch", *quantities, *expected])
        for name, values in expected.items():
            with self.subTest(name):
                self.assertEqual([round(float(row[name]), 3) if row[name] else None for row in rows], values)
                self.assertEqual(shown[name], [epoch for epoch, value in enumerate(values) if value is not None])

    def test_the_metrics_of_an_epoch_are_on_the_disk_before_its_checkpoint(self):
        save_checkpoint, write, seen = pl.Trainer.save_checkpoint, RecordWriter.write, []

        def write_slowly(writer, data):
            time.sleep(0.01)
            write(writer, data)

        def look_and_save(trainer, *args):
            seen.append((self.shown()["train_bpd"], len(metrics(self.run_folder()))))
            save_checkpoint(trainer, *args)

        slow = mock.patch.object(RecordWriter, "write", write_slowly)
        with slow, mock.patch.object(pl.Trainer, "save_checkpoint", look_and_save):
            self.train(epochs=2)
        self.assertEqual(seen, [([1], 2), ([1, 2], 3)])


class TestContention(TrainingTest):
    """The warning that other processes perhaps use the CPU."""

    def warnings(self, wall=2.0, shares=(0.5,), pictures=0.0, threads=2, device="cpu, 2 threads"):
        """
        Returns the warnings of a run. Each training step takes `wall` seconds, and has a CPU for a share of them;
        `shares` has a share for each epoch. The pictures take `pictures` seconds more.
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
            mock.patch.multiple(report, time=clock, torch=SimpleNamespace(get_num_threads=lambda: threads)),
            mock.patch.object(Run, "device_name", device),
            mock.patch.object(VAE, "training_step", slow_step),
            mock.patch.multiple(GenerateCallback, on_train_epoch_end=slow_pictures, sample_and_save=mock.Mock()),
        ):
            _, output = self.train(epochs=len(shares), batch_size=300)
        return [line for line in output.splitlines() if line.startswith("warning:")]

    def test_a_warning_appears_once_if_the_training_thread_waited_for_a_cpu_in_the_first_epoch(self):
        (warning,) = self.warnings(shares=[0.5, 0.5])
        self.assertIn("the training thread had a CPU for only 50% of epoch 1, perhaps because other processes", warning)
        self.assertIn("stop the run and resume it with --threads 1", warning)

    def test_there_is_no_warning_without_contention_or_if_one_thread_would_not_help(self):
        for case, options in [
            ("enough of a CPU", dict(shares=[report.CONTENTION + 0.01])),
            ("slow pictures", dict(shares=[1], pictures=100.0)),
            ("a later epoch", dict(shares=[1, 0.5])),
            ("a short epoch", dict(wall=0.5)),
            ("one thread", dict(threads=1)),
            ("a GPU", dict(device="NVIDIA H200")),
        ]:
            with self.subTest(case):
                self.assertEqual(self.warnings(**options), [])

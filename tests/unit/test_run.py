"""Tests of harness/run.py, of a run's start and end: `python -m unittest tests/unit/test_run.py`."""

import copy
import math
import os
import re
import shutil
import signal
import unittest
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train_pl
from harness import checkpoints, report, run
from harness.errors import DiskFullError
from harness.flags import RUNTIME_FLAGS
from harness.folder import RunError
from tests.helpers import NamedRunTest, TrainingTest, load, metrics, printed_lines, results, summaries
from train_pl import TITLES, VAE, complete_flags, train_vae


class TestWholeRun(TrainingTest):
    draws_figures = True

    def test_a_run_from_a_notebook(self):
        args = self.namespace()
        before = copy.deepcopy(args)
        with printed_lines() as lines:
            result = train_vae(args)
        self.assertEqual(args, before)
        self.assertEqual([list(tested) for tested in result], [["test_bpd"]])
        folder = self.run_folder()
        self.check_files(folder)

        flags = {**train_pl.make_parser().defaults, **vars(args)}
        self.assertEqual(yaml.safe_load((folder / "hparams.yaml").read_text()), flags)
        rows = metrics(folder)
        self.assertEqual([int(row["epoch"]) for row in rows], list(range(7)))
        self.assertEqual((rows[0]["train_bpd"], float(rows[6]["train_ELBO"]) > 0), ("", True))

        left = results(folder)
        self.assertEqual(left["test_bpd"], result[0]["test_bpd"])
        val_bpds = [float(row["val_bpd"]) for row in rows[1:]]
        best = min(val_bpds), 1 + val_bpds.index(min(val_bpds))
        self.assertEqual((left["best_val_bpd"], left["best_epoch"]), best)
        self.assertEqual(left["final_train_bpd"], float(rows[6]["train_bpd"]))
        self.assertEqual((left["dataset"], left["seed"]), ("mnist", 42))
        self.assertEqual(left["hyperparameters"], flags)
        self.assertEqual(left["versions"]["torch"], torch.__version__)
        self.assertEqual(left["versions"]["pytorch_lightning"], pl.__version__)
        self.assertTrue(1.0 < left["first_step_bpd"] < 1.1 and left["device"])
        self.assertTrue(0 <= left["fit_seconds"] <= left["seconds"])

        self.assertRegex(lines[0], rf"^MLP on mnist, 300 training images, on \w+(:0)?, in {folder}$")
        self.assertEqual([line[:11] for line in lines[1:8]], [f"epoch   {epoch}/6" for epoch in range(7)])
        self.assertRegex(lines[2], r"^epoch   1/6  train bpd \d\.\d{4}  val bpd \d\.\d{4}  \d+\.\d s$")
        hint = f"curves and pictures: tensorboard --logdir {self.folder} --samples_per_plugin images=1000"
        self.assertEqual(lines[8:], [f"test bpd {left['test_bpd']:.4f}", hint, f"run folder {folder}"])
        self.check_curves_and_pictures(folder, rows, left)
        self.check_dashboard(folder, left)

    def check_files(self, folder):
        names = {path.name for path in folder.iterdir()}
        events = {name for name in names if name.startswith("events.out.tfevents")}
        self.assertTrue(events)
        pictures = {f"epoch_{epoch}_{name}.png" for epoch in [0, 5] for name in ["samples", "means", "reconstructions"]}
        pictures |= {"bpd_curves.png", "vae_manifold.png", "samples_over_training.png"}
        others = {".lock", "hparams.yaml", "metrics.csv", "results.json", "checkpoints"}
        self.assertEqual(names - events, pictures | others)
        self.assertEqual(set(os.listdir(folder / "checkpoints")), {"best.ckpt", "last.ckpt", "previous.ckpt"})
        for path in folder.glob("*.png"):
            self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def check_curves_and_pictures(self, folder, rows, left):
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        self.assertEqual(len(scalars), 9)
        for name in TITLES:
            self.assertEqual(sorted(scalars[f"train_{name}"]), list(range(1, 7)))
            self.assertEqual(sorted(scalars[f"val_{name}"]), list(range(7)))  # begins with the untrained model
        for row in rows[1:]:
            epoch, elbo = int(row["epoch"]), float(row["train_ELBO"])
            parts = float(row["train_reconstruction_loss"]) + float(row["train_regularization_loss"])
            self.assertAlmostEqual(scalars["train_ELBO"][epoch], elbo, places=3)
            self.assertAlmostEqual(parts, elbo, places=2)
            self.assertAlmostEqual(scalars["train_bpd"][epoch], elbo / math.log(2) / 784, places=5)
        self.assertEqual(list(scalars["test_bpd"]), [6])
        self.assertAlmostEqual(scalars["test_bpd"][6], left["test_bpd"], places=6)
        drawn = {tag: sorted(event.step for event in events.Images(tag)) for tag in events.Tags()["images"]}
        self.assertEqual(drawn, dict.fromkeys(["Samples", "Means", "Reconstructions", "Manifold"], [0, 5]))
        for picture in events.Images("Samples"):  # encoded once
            file = folder / f"epoch_{picture.step}_samples.png"
            self.assertEqual(picture.encoded_image_string, file.read_bytes())

    def check_dashboard(self, folder, left):
        """TensorBoard's tabs Custom Scalars and HParams."""
        by_tag = {summary.tag: summary for _, summary in summaries(folder)}
        layout = Layout.FromString(by_tag["custom_scalars__config__"].tensor.string_val[0])
        charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
        self.assertEqual(charts[0], ["train_bpd", "val_bpd"])
        self.assertCountEqual(charts, [[f"train_{name}", f"val_{name}"] for name in TITLES])
        experiment, session = (
            HParamsPluginData.FromString(by_tag[f"_hparams_/{tag}"].metadata.plugin_data.content)
            for tag in ["experiment", "session_start_info"]
        )
        self.assertEqual([metric.name.tag for metric in experiment.experiment.metric_infos], ["test_bpd"])
        first = {info.name for info in experiment.experiment.hparam_infos if info.differs}
        self.assertEqual(first, {"model", "z_dim", "hidden_dims", "lr", "seed"})
        flags = session.session_start_info.hparams
        self.assertEqual(set(flags), set(left["hyperparameters"]) - RUNTIME_FLAGS)
        self.assertEqual((flags["z_dim"].number_value, flags["hidden_dims"].string_value), (2, "[16]"))


class TestInterrupt(TrainingTest):
    def test_interrupt(self):
        def on_train_epoch_start(model):
            if model.current_epoch == 2:
                raise KeyboardInterrupt

        self.addCleanup(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        with (
            mock.patch.object(VAE, "on_train_epoch_start", on_train_epoch_start),
            printed_lines() as lines,
            self.assertRaises(SystemExit) as caught,
        ):
            train_vae(self.namespace(z_dim=3, epochs=4))
        self.assertEqual(caught.exception.code, 1)
        self.assertTrue(lines[-1].startswith(f"Interrupted in epoch 3. {self.run_folder()} stays usable"), lines)
        self.assertIn("The same command and --run_name lightning_logs/version_0 continues it", lines[-1])
        VAE.load_from_checkpoint(self.run_folder() / "checkpoints" / "last.ckpt")
        with printed_lines() as lines:
            train_vae(self.namespace(z_dim=3, epochs=4, run_name="lightning_logs/version_0"))
        self.assertTrue(lines[0].endswith("version_0, continued after epoch 2"), lines)


class TestProcesses(TrainingTest):
    def test_one_that_fails_ends_the_others(self):
        """And says why: Lightning's watch over them, which would kill it as well, finds none to watch any more."""
        a_run = run.Run(complete_flags(self.namespace()), {}, TITLES, [])
        a_run.trainer.strategy._launcher = launcher = mock.Mock(procs=[other := mock.Mock()])
        other.kill.side_effect = lambda: self.assertEqual(launcher.procs, [])
        with self.assertRaises(ValueError), a_run:
            raise ValueError
        other.kill.assert_called_once_with()


class TestSigterm(NamedRunTest):
    def terminate(self, hook):
        """Exit code, and what is printed, of a run that is terminated in a hook of epoch 2."""

        def terminated(model, *args):
            if model.current_epoch == 1:
                signal.raise_signal(signal.SIGTERM)

        with mock.patch.object(VAE, hook, terminated), printed_lines() as lines, self.assertRaises(SystemExit) as end:
            train_vae(self.namespace(accelerator="cpu"))
        return end.exception.code, lines

    def test_in_a_run(self):
        """Called from a script, too: the same words as for Ctrl-C, and the exit code that a shell expects."""
        for hook in ["on_train_epoch_start", "on_validation_epoch_start", "on_train_epoch_end"]:
            code, lines = self.terminate(hook)
            self.assertEqual(code, 143)
            self.assertRegex(lines[-1], rf"^Interrupted in epoch 2. {self.run_folder()} stays usable.* continues it$")
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        _, output = self.train()
        self.assertIn("continued after epoch 1", output)

    def test_in_a_run_that_is_refused(self):
        self.stop_at(VAE, "on_train_epoch_start", 0)
        try:
            self.train(z_dim=4)
        except RunError:  # whose frames are still there
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        else:
            self.fail("it was not refused")

    def test_a_handler_of_the_users(self):
        calls = []
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: calls.append(1)))
        with mock.patch.object(VAE, "on_train_epoch_end", lambda model: signal.raise_signal(signal.SIGTERM)):
            self.train(epochs=2)
        self.assertEqual(calls, [1, 1])
        self.assertTrue(results(self.run_folder()))

    def test_a_training_that_stopped_is_not_finished(self):
        with mock.patch.object(run.pl.Trainer, "interrupted", True), self.assertRaisesRegex(RunError, "interrupted"):
            self.train(epochs=1)
        self.assertFalse((self.run_folder() / "results.json").exists())


class TestNothingLost(NamedRunTest):
    """What fails after the training, or beside it, costs the run no results."""

    draws_figures = True

    def test_variables_that_change_a_trainer(self):
        variables = dict(PL_TRAINER_MAX_EPOCHS="1", PL_TRAINER_LIMIT_TRAIN_BATCHES="1", PL_TRAINER_PRECISION="64")
        with mock.patch.dict(os.environ, variables), mock.patch.object(run.Run, "draw_figures"):
            folder, output = self.train(epochs=2)
            self.assertLessEqual(variables.items(), os.environ.items())
        self.assertEqual((load(folder, "last")["global_step"], len(metrics(folder))), (6, 3))
        self.assertEqual(output.count("without effect"), 1)
        self.assertEqual(load(folder, "last")["state_dict"]["encoder.net.0.weight"].dtype, torch.float32)

    def test_figures_that_fail(self):
        """Each is a line; the same command draws them once they can be drawn."""
        broken = mock.Mock(side_effect=ZeroDivisionError("a font\nand more"))
        with (
            mock.patch.multiple(report.EpochReport, draw_curves=broken, draw_samples=broken),
            mock.patch.object(train_pl, "visualize_manifold", broken),
        ):
            folder, output = self.train(epochs=1, z_dim=2)
        for name in ["bpd_curves.png", "samples_over_training.png", "vae_manifold.png"]:
            line = f"drawing {folder / name} failed, the rest goes on (ZeroDivisionError: a font and more)\n"
            self.assertEqual((output.count(line), (folder / name).exists()), (1, False))
        self.assertIn("drawing the pictures failed", output)
        self.assertGreater(results(folder)["test_bpd"], 0)
        _, output = self.train(epochs=1, z_dim=2)
        self.assertRegex(output, "^.* is finished: .*\n$")
        for name in ["bpd_curves.png", "samples_over_training.png", "vae_manifold.png"]:
            self.assertEqual((folder / name).read_bytes()[:4], b"\x89PNG")

    def test_results_come_first(self):
        seen = []
        with mock.patch.object(run.Run, "draw", lambda self, name, function: seen.append(results(Path(self.folder)))):
            self.train(epochs=1)
        self.assertEqual(len(seen), 2)

    def test_logging_that_fails(self):
        """As on a file system that is gone for a while: the curves in TensorBoard are lost, and nothing else."""
        with mock.patch.object(report.TensorBoardLogger, "log_metrics", side_effect=OSError(5, "Input/output error")):
            folder, output = self.train(epochs=2)
        self.assertEqual(output.count("logging to TensorBoard's files"), 1)
        self.assertEqual(len(metrics(folder)), 3)
        self.assertGreater(results(folder)["test_bpd"], 0)

    def test_workers_that_fail(self):
        for message in [
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ... shared memory",
            "Too many open files. Communication with the workers is no longer possible.",
            OSError(24, "Too many open files"),
        ]:
            error = message if isinstance(message, OSError) else RuntimeError(message)
            message = str(error)

            def training_step(model, batch, batch_idx, error=error):
                raise error

            with mock.patch.object(VAE, "training_step", training_step):
                with self.assertRaisesRegex(RunError, re.escape(message) + ".*--num_workers 0"):
                    self.train(epochs=1, num_workers=1)
                with self.assertRaisesRegex(type(error), re.escape(message) + "$"):
                    self.train(epochs=1)

    def test_too_little_memory(self):
        most = 2**32 - 1
        for flags in [dict(hidden_dims=[most]), dict(z_dim=most), dict(model="CNN", num_filters=most)]:
            with self.assertRaisesRegex(RunError, "memory is too small for this model and --batch_size 128 .*smaller"):
                self.train(epochs=1, **flags)
            shutil.rmtree(self.run_folder())
        for flags in [dict(train_samples=most), dict(train_samples=most, objective="iwae")]:
            with self.assertRaisesRegex(RunError, f"and --batch_size 128 and --train_samples {most} .*smaller"):
                self.train(epochs=1, **flags)
            shutil.rmtree(self.run_folder())

    def test_too_little_shared_memory(self):
        full = RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")
        with (
            mock.patch.object(torch.Tensor, "share_memory_", side_effect=full),
            self.assertRaisesRegex(RunError, "too small for --num_workers 2 .*: give --num_workers 0"),
        ):
            self.train(epochs=1, num_workers=2)
        self.assertFalse(self.run_folder().exists())

    def test_a_full_disk(self):
        """It ends the run, in one line, and with room again it goes on."""
        full = OSError(28, "No space left on device")
        for owner, name in [
            (train_pl, "log_picture"),
            (report.TensorBoardLogger, "log_metrics"),
            (checkpoints.torch, "save"),
            (report.csv, "DictWriter"),
        ]:
            with (
                mock.patch.object(owner, name, side_effect=full),
                self.assertRaisesRegex(DiskFullError, f"^cannot write .*{self.folder}.* make room"),
            ):
                self.train(epochs=1)
            self.assertEqual(list(self.run_folder().rglob("*.unfinished")), [])
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        self.train(epochs=1)
        self.assertGreater(results(self.run_folder())["test_bpd"], 0)

    def test_where_the_data_is(self):
        """Kept in a way that holds from other working directories, and where data and runs are moved together."""
        folder, _ = self.train(epochs=1, data_dir=os.path.relpath(self.folder / "data"))
        kept = load(folder, "best")["run"]
        data = os.path.realpath(self.folder / "data")
        self.assertEqual((kept["data_dir"], kept["data_dir_from_run"]), (data, os.path.join("..", "data")))

    def test_other_threads(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2, threads=1)
        _, output = self.train(epochs=2, threads=2)
        self.assertIn("trained on cpu, 1 threads, the next ones are on cpu, 2 threads: from here on", output)
        self.assertEqual(results(self.run_folder())["device"], "cpu, 2 threads")


if __name__ == "__main__":
    unittest.main()

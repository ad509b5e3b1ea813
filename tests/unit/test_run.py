"""Tests of a run from start to end, of interruptions and of errors: `python -m unittest tests/unit/test_run.py`."""

import copy
import itertools
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train_pl
import utils
from harness import checkpoints, report, run, trainer
from harness.errors import DiskFullError
from harness.flags import RUNTIME_FLAGS
from harness.folder import RunError
from tests.helpers import NamedRunTest, TrainingTest, load, metrics, printed_lines, results, summaries
from train_pl import CHART_TITLES, VAE, train_vae

PICTURES = ["Samples", "Means", "Reconstructions"]
FIGURES = ["bpd_curves.png", "samples_over_training.png", "vae_manifold.png"]


class TestWholeRun(TrainingTest):
    makes_figures = True

    def test_a_run_from_a_notebook_leaves_results_curves_and_pictures(self):
        args = self.namespace(epochs=5, data_dir=os.path.relpath(self.folder / "data"))
        before = copy.deepcopy(args)
        with printed_lines() as lines:
            result = train_vae(args)
        self.assertEqual(args, before)
        folder = self.run_folder()
        flags, rows, left = {**train_pl.make_parser().defaults, **vars(args)}, metrics(folder), results(folder)
        with self.subTest("files"):
            names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents")}
            pictures = {f"epoch_{epoch}_{name.lower()}.png" for epoch in [0, 5] for name in PICTURES}
            others = {".lock", "hparams.yaml", "metrics.csv", "results.json", "checkpoints"}
            self.assertEqual(names, {*pictures, *others, *FIGURES})
            self.assertEqual(set(os.listdir(folder / "checkpoints")), {"best.ckpt", "last.ckpt", "previous.ckpt"})
        with self.subTest("results"):
            self.assertEqual(result, [{"test_bpd": left["test_bpd"]}])
            self.assertEqual(yaml.safe_load((folder / "hparams.yaml").read_text()), flags)
            self.check_results(left, rows, flags)
        with self.subTest("output"):
            self.assertRegex(lines[0], rf"^MLP on mnist, 300 training images, on \w+(:0)?, in {folder}$")
            self.assertEqual([line[:11] for line in lines[1:7]], [f"epoch   {epoch}/5" for epoch in range(6)])
            self.assertRegex(lines[2], r"^epoch   1/5  train bpd \d\.\d{4}  val bpd \d\.\d{4}  \d+\.\d s$")
            hint = f"curves and pictures: tensorboard --logdir {self.folder} --samples_per_plugin images=1000"
            self.assertEqual(lines[7:], [f"test bpd {left['test_bpd']:.4f}", hint, f"run folder {folder}"])
        with self.subTest("TensorBoard's curves and pictures"):
            self.check_curves_and_pictures(folder, rows, left)
        with self.subTest("TensorBoard's dashboard"):
            self.check_dashboard(folder, flags)
        with self.subTest("where the data is, if data and runs are moved together"):
            kept, data = load(folder, "best")["run"], Path(os.path.realpath(self.folder / "data"))
            self.assertEqual((kept["data_dir"], kept["data_dir_from_run"]), (str(data), os.path.relpath(data, folder)))

    def check_results(self, left, rows, flags):
        self.assertEqual([int(row["epoch"]) for row in rows], list(range(6)))
        val_bpds = [float(row["val_bpd"]) for row in rows[1:]]
        best = min(val_bpds), 1 + val_bpds.index(min(val_bpds))
        self.assertEqual((left["best_val_bpd"], left["best_epoch"]), best)
        self.assertEqual(left["final_train_bpd"], float(rows[5]["train_bpd"]))
        self.assertEqual((left["dataset"], left["seed"], left["hyperparameters"]), ("mnist", flags["seed"], flags))
        versions = left["versions"]
        self.assertEqual((versions["torch"], versions["pytorch_lightning"]), (torch.__version__, pl.__version__))
        self.assertTrue(1.0 < left["first_step_bpd"] < 1.1 and left["device"])
        self.assertTrue(0 <= left["fit_seconds"] <= left["seconds"])

    def check_curves_and_pictures(self, folder, rows, left):
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        tags = {f"{stage}_{name}" for stage in ["train", "val"] for name in CHART_TITLES} | {"test_bpd"}
        self.assertEqual(scalars.keys(), tags)
        for name in CHART_TITLES:
            self.assertEqual(sorted(scalars[f"train_{name}"]), list(range(1, 6)))
            self.assertEqual(sorted(scalars[f"val_{name}"]), list(range(6)))  # begins with the untrained model
        for row, name in itertools.product(rows[1:], CHART_TITLES):
            found, expected = scalars[f"train_{name}"][int(row["epoch"])], float(row[f"train_{name}"])
            self.assertAlmostEqual(found, expected, places=3)
        self.assertEqual(list(scalars["test_bpd"]), [5])
        self.assertAlmostEqual(scalars["test_bpd"][5], left["test_bpd"], places=6)
        pictures = {tag: sorted(event.step for event in events.Images(tag)) for tag in events.Tags()["images"]}
        self.assertEqual(pictures, dict.fromkeys([*PICTURES, "Manifold"], [0, 5]))

    def check_dashboard(self, folder, flags):
        by_tag = {summary.tag: summary for _, summary in summaries(folder)}
        layout = Layout.FromString(by_tag["custom_scalars__config__"].tensor.string_val[0])
        charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
        self.assertCountEqual(charts, [[f"train_{name}", f"val_{name}"] for name in CHART_TITLES])
        experiment, session = (
            HParamsPluginData.FromString(by_tag[f"_hparams_/{tag}"].metadata.plugin_data.content)
            for tag in ["experiment", "session_start_info"]
        )
        self.assertEqual([metric.name.tag for metric in experiment.experiment.metric_infos], ["test_bpd"])
        shown = session.session_start_info.hparams
        self.assertEqual(set(shown), flags.keys() - RUNTIME_FLAGS)
        self.assertEqual((shown["z_dim"].number_value, shown["hidden_dims"].string_value), (2, "[16]"))


class TestStopped(NamedRunTest):
    def test_after_ctrl_c_or_sigterm_at_any_moment_a_run_prints_a_message_and_can_resume(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
        self.addCleanup(signal.signal, signal.SIGINT, before)
        for hook, number, code in [
            ("on_train_epoch_start", signal.SIGINT, 1),
            ("on_train_epoch_start", signal.SIGTERM, 143),
            ("on_validation_epoch_start", signal.SIGTERM, 143),
            ("on_train_epoch_end", signal.SIGTERM, 143),
        ]:

            def stop_in_epoch_2(model, number=number):
                if model.current_epoch == 1:
                    signal.raise_signal(number)

            stopped = mock.patch.object(VAE, hook, stop_in_epoch_2)
            with self.subTest(hook, code=code), stopped, printed_lines() as lines, self.assertRaises(SystemExit) as end:
                train_vae(self.namespace(accelerator="cpu", epochs=2))
            self.assertEqual(end.exception.code, code)
            self.assertRegex(
                lines[-1], rf"^note: interrupted in epoch 2. {self.run_folder()} contains .* give the same command$"
            )
            VAE.load_from_checkpoint(self.run_folder() / "checkpoints" / "last.ckpt")
        _, output = self.train(epochs=2)
        self.assertIn("resumed after epoch 1\n", output)

    def test_if_the_user_has_a_handler_of_sigterm_it_is_called_instead(self):
        calls = []
        self.addCleanup(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: calls.append(1)))
        with mock.patch.object(VAE, "on_train_epoch_end", lambda model: signal.raise_signal(signal.SIGTERM)):
            self.train(epochs=2)
        self.assertEqual((calls, results(self.run_folder())["best_epoch"]), ([1, 1], 2))

    def test_a_run_that_lightning_interrupted_is_not_finished(self):
        with mock.patch.object(pl.Trainer, "interrupted", True), self.assertRaisesRegex(RunError, "interrupted"):
            self.train(epochs=1)
        self.assertFalse((self.run_folder() / "results.json").exists())

    def test_a_process_that_fails_ends_the_others_and_reports_its_own_error(self):
        """Lightning would kill this process as well, so it no longer has other processes to watch."""
        args = train_pl.complete_flags(self.namespace())
        launcher = mock.Mock(procs=[other := mock.Mock()])
        other.kill.side_effect = lambda: self.assertEqual(launcher.procs, [])
        with self.assertRaises(ValueError), run.Run(args, {}, train_pl.make_experiment(args), []) as a_run:
            a_run.trainer.strategy._launcher = launcher
            raise ValueError
        other.kill.assert_called_once_with()


class TestErrors(NamedRunTest):
    makes_figures = True

    def test_environment_variables_for_arguments_of_lightnings_trainer_are_ignored(self):
        variables = dict(PL_TRAINER_MAX_EPOCHS="1", PL_TRAINER_LIMIT_TRAIN_BATCHES="1", PL_TRAINER_PRECISION="64")
        with mock.patch.dict(os.environ, variables), mock.patch.object(run.Run, "make_figures"):
            folder, output = self.train(epochs=2)
            self.assertLessEqual(variables.items(), os.environ.items())
        self.assertEqual((load(folder, "last")["global_step"], len(metrics(folder))), (6, 3))
        self.assertEqual(output.count("ignored environment variables: PL_TRAINER_"), 1)
        self.assertEqual(load(folder, "last")["state_dict"]["encoder.net.0.weight"].dtype, torch.float32)

    def test_figures_are_made_after_the_results_and_again_if_they_failed_or_show_fewer_epochs(self):
        seen = []

        def fail(*args):
            seen.append(results(self.run_folder()) if (self.run_folder() / "results.json").exists() else None)
            raise ZeroDivisionError("a font\nand more")

        failing = mock.patch.multiple(train_pl.figures, bpd_curves=fail, samples_over_training=fail)
        with failing, mock.patch.object(utils, "visualize_manifold", fail):
            folder, output = self.train(epochs=1, z_dim=2)
        for name in FIGURES:
            line = f"saving {folder / name} failed and is skipped (ZeroDivisionError: a font and more, "
            self.assertEqual((output.count(line), (folder / name).exists()), (1, False))
        self.assertEqual(seen, [None, *[results(folder)] * len(FIGURES)])  # the first call is for the pictures
        _, output = self.train(epochs=1, z_dim=2)
        self.assertRegex(output, "^.* is finished: .*\n$")
        before = [(folder / name).read_bytes() for name in FIGURES]
        self.assertEqual([content[:4] for content in before], [b"\x89PNG"] * len(FIGURES))
        self.train(epochs=5, z_dim=2)
        for name, of_fewer_epochs in zip(FIGURES, before):
            self.assertNotEqual((folder / name).read_bytes(), of_fewer_epochs, name)

    def test_if_worker_processes_fail_the_message_says_to_train_without_them(self):
        for num_workers in [1, 0]:
            args = train_pl.complete_flags(self.namespace(num_workers=num_workers))
            a_run = run.Run(args, {}, train_pl.make_experiment(args), [])
            for error in [
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ... shared memory"),
                RuntimeError("Too many open files. Communication with the workers is no longer possible."),
                OSError(24, "Too many open files"),
            ]:
                with self.subTest(error=error, num_workers=num_workers):
                    message = str(a_run.explain_error(error))
                    self.assertEqual(str(error) in message and "--num_workers 0" in message, num_workers == 1)

    def test_an_error_in_the_users_own_code_is_raised_unchanged(self):
        """It may come from the user's data set in a worker process. If a disk is full, the message names the path."""
        args = train_pl.complete_flags(self.namespace(num_workers=1))
        a_run = run.Run(args, {}, train_pl.make_experiment(args), [])
        for error in [
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call"),
            *(FileNotFoundError(2, "No such file", "/data/shm"), ValueError("x"), RuntimeError("bad hashmap entry")),
        ]:
            with self.subTest(error=error):
                self.assertIsNone(a_run.explain_error(error))
        self.assertIn("write to /mnt/x (No space", str(a_run.explain_error(OSError(28, "No space left", "/mnt/x"))))
        for patched in ["__init__", "training_step", "test_step", "on_validation_epoch_end"]:
            fail = mock.patch.object(VAE, patched, lambda *args, **options: Path("missing.txt").read_text())
            with self.subTest(patched), fail, self.assertRaisesRegex(FileNotFoundError, "missing.txt"):
                self.train(epochs=1, run_name=patched)

    def test_if_a_model_is_too_large_the_message_says_what_to_make_smaller(self):
        most = 2**32 - 1
        for flags, message in [
            *((dict(hidden_dims=[most]), ""), (dict(z_dim=most), ""), (dict(model="CNN", num_filters=most), "")),
            (dict(train_samples=most), f"and --train_samples {most} "),
            (dict(train_samples=most, objective="iwae"), f"and --train_samples {most} "),
        ]:
            message = rf"out of memory for this model and --batch_size 128 {message}\(.*\): make one of them smaller"
            with self.subTest(**flags), self.assertRaisesRegex(RunError, message):
                self.train(epochs=1, **flags)
            shutil.rmtree(self.run_folder())

    def test_too_little_shared_memory_for_the_workers_is_reported_before_the_run_has_a_folder(self):
        full = RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")
        refused = self.assertRaisesRegex(RunError, "out of shared memory for --num_workers 2 .*: give --num_workers 0")
        with mock.patch.object(torch.Tensor, "share_memory_", side_effect=full), refused:
            self.train(epochs=1, num_workers=2)
        self.assertFalse(self.run_folder().exists())

    def test_each_process_needs_a_validation_image(self):
        trainer.check_validation_size(4, 4)
        with self.assertRaisesRegex(RunError, "3 validation images are too few for 4 processes: lower --devices"):
            trainer.check_validation_size(3, 4)

    def test_a_full_disk_ends_a_run_which_resumes_once_there_is_free_space(self):
        full = OSError(28, "No space left on device")
        for owner, name in [
            (train_pl, "save_picture"),
            (TensorBoardLogger, "log_metrics"),
            (checkpoints.torch, "save"),
            (report.csv, "DictWriter"),
        ]:
            error = self.assertRaisesRegex(DiskFullError, f"^cannot write .*{self.folder}.* free disk space")
            with self.subTest(name), mock.patch.object(owner, name, side_effect=full), error:
                self.train(epochs=1)
            self.assertEqual(list(self.run_folder().rglob("*.unfinished")), [])
        with mock.patch.object(run.Run, "make_figures"):
            self.train(epochs=1)
        self.assertGreater(results(self.run_folder())["test_bpd"], 0)

    def test_a_run_that_resumes_with_another_number_of_threads_says_that_rounding_may_differ(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2, threads=1)
        with mock.patch.object(run.Run, "make_figures"):
            _, output = self.train(epochs=2, threads=2)
        self.assertIn("trained on cpu, 1 threads, the next ones on cpu, 2 threads: from here on", output)
        self.assertEqual(results(self.run_folder())["device"], "cpu, 2 threads")
        self.assertEqual(torch.get_num_threads(), 1)

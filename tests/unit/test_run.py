"""Tests of harness/run.py, of a run's start and end: `python -m unittest tests/unit/test_run.py`."""

import contextlib
import copy
import io
import math
import os
import signal
import unittest
from unittest import mock

import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train_pl
from harness import run
from harness.checkpoints import CheckpointError
from harness.run import RunError
from tests.helpers import NamedRunTest, TrainingTest, load, metrics, results, summaries
from train_pl import QUANTITIES, VAE, train_vae


@contextlib.contextmanager
def printed_lines():
    """A context whose output is caught; what it yields is the list of the lines at its end."""
    lines = []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        yield lines
    lines += output.getvalue().splitlines()


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
        self.assertTrue(0 < left["fit_seconds"] <= left["seconds"])

        self.assertRegex(lines[0], rf"^MLP on mnist, 300 training images, on \w+(:0)?, in {folder}$")
        self.assertEqual([line[:11] for line in lines[1:8]], [f"epoch   {epoch}/6" for epoch in range(7)])
        self.assertRegex(lines[2], r"^epoch   1/6  train bpd \d\.\d{4}  val bpd \d\.\d{4}  \d+\.\d s$")
        self.assertEqual(lines[8:], [f"test bpd {left['test_bpd']:.4f}", f"run folder {folder}"])
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
        for name in QUANTITIES:
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

    def check_dashboard(self, folder, left):
        """TensorBoard's tabs Custom Scalars and HParams."""
        by_tag = {summary.tag: summary for _, summary in summaries(folder)}
        layout = Layout.FromString(by_tag["custom_scalars__config__"].tensor.string_val[0])
        charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
        self.assertEqual(charts[0], ["train_bpd", "val_bpd"])
        self.assertCountEqual(charts, [[f"train_{name}", f"val_{name}"] for name in QUANTITIES])
        experiment, session = (
            HParamsPluginData.FromString(by_tag[f"_hparams_/{tag}"].metadata.plugin_data.content)
            for tag in ["experiment", "session_start_info"]
        )
        self.assertEqual([metric.name.tag for metric in experiment.experiment.metric_infos], ["test_bpd"])
        flags = session.session_start_info.hparams
        self.assertEqual(set(flags), set(left["hyperparameters"]))
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


class TestFolder(NamedRunTest):
    """Which folder a run has, and when it is refused."""

    def open_folder(self, name="run", **flags):
        """The context of a run's folder."""
        flags = {**train_pl.make_parser().defaults, **vars(self.namespace(**flags))}
        return run.open_folder(str(self.folder), name, flags, train_pl.make_parser().defaults, QUANTITIES)

    def test_runs_are_numbered(self):
        folders = []
        for version in [None, None, 0]:  # the last one has lost a race for the number
            lost = mock.patch.object(run.TensorBoardLogger, "_get_next_version", lambda self: 0)
            with lost if version == 0 else contextlib.nullcontext(), self.open_folder(name=None) as place:
                folders.append(os.path.relpath(place.folder, self.folder))
        self.assertEqual(folders, [f"lightning_logs/version_{number}" for number in range(3)])

    def test_run_names(self):
        logs = self.folder / "logs"
        for name in ["", ".", "..", os.path.abspath("run"), "../run", "a/../.."]:
            with self.assertRaisesRegex(ValueError, "--run_name"):
                self.train(run_name=name, log_dir=str(logs))
        self.assertEqual(os.listdir(self.folder), [])
        self.train(run_name="sweep/a", log_dir=str(logs), epochs=1)
        self.assertTrue((logs / "sweep" / "a" / "results.json").exists())

    def test_one_process_at_a_time(self):
        with (
            mock.patch.object(run, "LOCK_TIMEOUT", 0.1),
            self.open_folder(epochs=1),
            self.assertRaisesRegex(RunError, "in use by another process"),
        ):
            self.train(epochs=1)
        self.train(epochs=1)
        with self.assertRaisesRegex(RunError, "finished by another process just now"), self.open_folder(epochs=1):
            pass

    def test_the_folder_is_the_runs_as_long_as_it_trains(self):
        refused = []

        def on_train_epoch_start(model):
            with self.assertRaisesRegex(RunError, "in use by another process"), self.open_folder(epochs=1):
                pass
            refused.append(model.current_epoch)

        with (
            mock.patch.object(run, "LOCK_TIMEOUT", 0.1),
            mock.patch.object(VAE, "on_train_epoch_start", on_train_epoch_start),
        ):
            self.train(epochs=1)
        self.assertEqual(refused, [0])

    def test_a_finished_run_is_left_alone(self):
        self.train(epochs=1)
        before, result = self.contents(), [{"test_bpd": results(self.run_folder())["test_bpd"]}]
        with mock.patch.object(train_pl, "load_data", mock.Mock(side_effect=AssertionError)), printed_lines() as lines:
            again = train_vae(self.namespace(epochs=1, accelerator="cpu", num_workers=1))
        line = f"{self.run_folder()} is finished: test bpd {result[0]['test_bpd']:.4f}"
        self.assertEqual((again, lines), (result, [line]))
        self.assertEqual(self.contents(), before)

    def test_other_hyperparameters(self):
        for epoch in [0, 1]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, epochs=2)
            before = self.contents()
            with self.assertRaises(RunError) as caught:
                self.train(hidden_dims=[8, 4], seed=1, num_workers=1, epochs=2)
            self.assertIn("(--hidden_dims was [16], is [8, 4]; --seed was 42, is 1)", str(caught.exception))
            self.assertEqual(self.contents(), before)
        hparams = self.run_folder() / "hparams.yaml"
        hparams.write_text(hparams.read_text().replace("binarization: threshold\n", ""))  # as of an older version
        with self.assertRaisesRegex(RunError, "binarization was threshold, is stochastic"):
            self.train(binarization="stochastic", epochs=2)
        self.assertIn("continued", self.train(hidden_dims=(16,), epochs=2)[1])

    def test_a_folder_that_is_no_run(self):
        self.run_folder().mkdir(parents=True)
        (self.run_folder() / "thesis.tex").touch()
        with self.assertRaisesRegex(RunError, "holds no run: choose another --run_name"):
            self.train()
        self.assertEqual(os.listdir(self.run_folder()), ["thesis.tex"])

    def test_killed_while_its_folder_was_made(self):
        """The folder and its lock may be there already, and flags that are not written whole."""
        self.run_folder().mkdir(parents=True)
        for name in [".lock", "hparams.yaml.tmp"]:
            (self.run_folder() / name).touch()
        self.train(epochs=1)
        self.assertNotIn("hparams.yaml.tmp", os.listdir(self.run_folder()))

    def test_a_checkpoint_without_the_runs_history(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2)
        for name in ["best", "last"]:
            checkpoint = load(self.run_folder(), name)
            del checkpoint["run"]
            torch.save(checkpoint, self.run_folder() / "checkpoints" / f"{name}.ckpt")
        with self.assertRaisesRegex(RunError, "last.ckpt is of an older version, .* choose another --run_name"):
            self.train(epochs=2)

    def test_all_checkpoints_damaged(self):
        self.stop_at(VAE, "on_train_epoch_start", 2)
        for path in (self.run_folder() / "checkpoints").iterdir():
            path.write_bytes(b"nonsense")
        before = self.contents()
        with self.assertRaisesRegex(CheckpointError, "last.ckpt is no .*previous.*delete.*--run_name"):
            self.train()
        self.assertEqual(self.contents(), before)


if __name__ == "__main__":
    unittest.main()

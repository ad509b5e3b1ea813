"""Tests of harness/folder.py: `python -m unittest tests/unit/test_folder.py`."""

import contextlib
import io
import json
import os
import shutil
import unittest
from unittest import mock

import torch

import train_pl
from harness import files, folder
from harness.checkpoints import CheckpointError
from harness.errors import UserError
from harness.folder import RunError
from tests.helpers import NamedRunTest, assert_left_the_same, load, metrics, printed_lines, results
from train_pl import TITLES, VAE, train_vae


class TestFolder(NamedRunTest):
    """Which folder a run has, and when it is refused."""

    def open_folder(self, name="run", **flags):
        """The context of a run's folder."""
        flags = {**train_pl.make_parser().defaults, **vars(self.namespace(**flags))}
        return folder.open_folder(str(self.folder), name, flags, train_pl.make_parser().defaults, TITLES)

    def test_runs_are_numbered(self):
        folders = []
        for version in [None, None, 0]:  # the last one has lost a race for the number
            lost = mock.patch.object(folder.TensorBoardLogger, "_get_next_version", lambda self: 0)
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
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        for name in ["logs/sweep/a", "./logs/sweep/a/"]:  # as a shell completes them
            with self.assertRaisesRegex(ValueError, "not found from the log directory: give sweep/a$"):
                self.train(run_name=name, log_dir="logs", epochs=1)
        self.assertEqual([os.listdir(folder) for folder in [".", "logs"]], [["logs"], ["sweep"]])
        os.chdir(logs)
        for log_dir in [".", "../logs"]:
            _, output = self.train(run_name="sweep/a", log_dir=log_dir, epochs=1)
            self.assertIn("is finished", output)

    def test_one_process_at_a_time(self):
        with (
            mock.patch.object(folder, "LOCK_TIMEOUT", 0.1),
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
            mock.patch.object(folder, "LOCK_TIMEOUT", 0.1),
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

    def test_folders_of_others(self):
        """A text of somebody's, or a run of the assignment's template: nothing is touched."""
        template = {"hparams.yaml": "model_name: MLP\nz_dim: 20\nlr: 0.001\n", "events.out.tfevents.1.host": "curves"}
        for contents, message in [
            ({"thesis.tex": ""}, "holds no run: choose another --run_name"),
            ({"table.csv.tmp": ""}, "holds no run: choose another --run_name"),
            ({"sub/data.csv": ""}, "holds no run: choose another --run_name"),
            ({"epoch_0_samples.png": ""}, "holds no run: choose another --run_name"),
            (template, "holds a run of another program: choose another --run_name"),
            ({**template, "checkpoints/epoch=3.ckpt": "weights"}, "holds a run of another program"),
            ({"hparams.yaml": "- 1\n"}, "hparams.yaml is damaged, and no checkpoint says what the run is"),
            ({"hparams.yaml": "{}\n", "sub/x.txt": ""}, "holds a run of another program"),
        ]:
            for name, text in contents.items():
                (self.run_folder() / name).parent.mkdir(parents=True, exist_ok=True)
                (self.run_folder() / name).write_text(text)
            before = self.contents()
            with self.assertRaisesRegex(RunError, message):
                self.train()
            self.assertEqual(self.contents(), before)
            shutil.rmtree(self.run_folder())

    def test_folders_that_can_be_used(self):
        """They hold what a shell or an editor puts there ahead of the run."""
        (self.run_folder() / "empty" / "nothing").mkdir(parents=True)
        (self.run_folder() / "empty" / "nothing").rmdir()
        for name in ["train.log", "slurm-7.out", "nohup.out", "log.txt", ".gitkeep", ".DS_Store"]:
            (self.run_folder() / name).write_text("mine")
        self.train(epochs=1)
        self.assertEqual((self.run_folder() / "train.log").read_text(), "mine")
        self.assertTrue((self.run_folder() / "empty").is_dir())

    def test_damaged_results(self):
        """They are made anew from the checkpoints."""
        self.train(epochs=1)
        path = self.run_folder() / "results.json"
        good, lines = results(self.run_folder()), []
        line = f"{path} is damaged; it is made anew from the run's checkpoints"
        flags = {**train_pl.make_parser().defaults, **vars(self.namespace(epochs=1))}
        others = (json.dumps({**good, "test_bpd": bpd}) for bpd in [None, "0.3", float("nan")])
        for bad in [path.read_text()[:40], "[]", "{}", "[" * 100_000, *others, ""]:
            path.write_text(bad)
            self.assertIsNone(folder.finished_results(self.run_folder(), flags, {}, lines.append))
            self.assertEqual(lines.pop(), line, bad)
        _, output = self.train(epochs=1)
        self.assertEqual(output.count(line), 1)
        self.assertEqual(results(self.run_folder())["test_bpd"], good["test_bpd"])
        self.assertEqual(len(metrics(self.run_folder())), 2)

    def test_damaged_flags(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2)
        path = self.run_folder() / "hparams.yaml"
        good = path.read_text()
        for bad in [b"", good.encode()[:20] + b"\xff", b"model: [", b"3", good.encode()[:50]]:
            path.write_bytes(bad)
            with self.assertRaisesRegex(RunError, "--hidden_dims was"):
                self.train(epochs=2, hidden_dims=[7])
            self.assertEqual(path.read_bytes(), bad)
        path.unlink()
        _, output = self.train(epochs=2)
        self.assertIn(f"{path} is damaged or gone; it is made anew from the run's checkpoints\n", output)
        self.assertIn("continued after epoch 1", output)
        self.assertEqual(path.read_text(), good)

    def test_damaged_flags_without_a_checkpoint(self):
        self.stop_at(VAE, "on_train_epoch_start", 0)
        path = self.run_folder() / "hparams.yaml"
        path.write_text("")
        with self.assertRaisesRegex(RunError, f"{path} is damaged, and no checkpoint .*: delete {self.run_folder()}"):
            self.train()

    def test_what_decides_about_a_run_is_synced(self):
        synced = []
        fsync = os.fsync

        def remember(number):
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
            fsync(number)

        with mock.patch.object(os, "fsync", remember):
            self.train(epochs=1)
        names = ["hparams.yaml.unfinished", "best.ckpt.unfinished", "last.ckpt.unfinished", "results.json.unfinished"]
        self.assertEqual(synced, names)

    def test_killed_while_its_folder_was_made(self):
        """The folder and its lock may be there already, and flags that are not written whole."""
        self.run_folder().mkdir(parents=True)
        for name in [".lock", "hparams.yaml.unfinished"]:
            (self.run_folder() / name).touch()
        self.train(epochs=1)
        self.assertNotIn("hparams.yaml.unfinished", os.listdir(self.run_folder()))

    def test_checkpoints_of_others(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2)
        for name in ["best", "last"]:
            checkpoint = load(self.run_folder(), name)
            del checkpoint["run"]
            torch.save(checkpoint, self.run_folder() / "checkpoints" / f"{name}.ckpt")
        with self.assertRaisesRegex(CheckpointError, "is no checkpoint to continue a run from: .* another --run_name"):
            self.train(epochs=2)

    def test_all_checkpoints_damaged(self):
        self.stop_at(VAE, "on_train_epoch_start", 2)
        for path in (self.run_folder() / "checkpoints").iterdir():
            path.write_bytes(b"nonsense")
        before = self.contents()
        with self.assertRaisesRegex(CheckpointError, "last.ckpt is no .*previous.*delete.*--run_name"):
            self.train()
        self.assertEqual(self.contents(), before)


class TestMoreEpochs(NamedRunTest):
    def test_a_finished_run_goes_on(self):
        """It equals one that was asked for more epochs from the start."""
        self.train(epochs=6, run_name="long")
        self.train(epochs=3)
        self.stop_at(VAE, "on_train_epoch_start", 4, epochs=6)
        self.assertEqual({path.name for path in self.run_folder().glob("results*")}, {"results_3.json"})
        with self.assertRaisesRegex(RunError, "has trained 4 epochs"):
            self.train(epochs=3)
        _, output = self.train(epochs=6)
        self.assertIn("continued after epoch 4\nepoch   5/6", output)
        assert_left_the_same(self, self.run_folder(), self.folder / "long")

    def test_an_unfinished_run_gets_other_epochs(self):
        self.stop_at(VAE, "on_train_epoch_start", 2)
        self.train(epochs=3)
        self.train(epochs=3, run_name="short")
        assert_left_the_same(self, self.run_folder(), self.folder / "short")

    def test_results_whose_checkpoints_are_gone(self):
        """Deleted to save space: another number of epochs does not replace what is left."""
        self.train(epochs=2)
        shutil.rmtree(self.run_folder() / "checkpoints")
        before = self.contents()
        for epochs in [1, 3]:
            with self.assertRaisesRegex(RunError, "holds the results of 2 epochs, but no checkpoint of them"):
                self.train(epochs=epochs)
            self.assertEqual(self.contents(), before)

    def test_refused(self):
        self.train(epochs=3)
        before = self.contents()
        with self.assertRaisesRegex(RunError, "has trained 3 epochs, more than --epochs 2: give --epochs 3 or more"):
            self.train(epochs=2)
        with self.assertRaisesRegex(RunError, "--lr_schedule was constant, is cosine"):
            self.train(epochs=4, lr_schedule="cosine")
        self.assertEqual(self.contents(), before)
        self.train(epochs=1, lr_schedule="cosine", run_name="cosine")
        with self.assertRaisesRegex(RunError, "with --epochs 1, over which its learning rate falls: .* --epochs 2"):
            self.train(epochs=2, lr_schedule="cosine", run_name="cosine")


class TestDisksWithoutLocks(NamedRunTest):
    def test_a_file_keeps_the_folder_instead(self):
        """As on NFS without its lock service (37), Lustre without flock (38, 524), and others (95)."""
        for number in [37, 38, 95, 524]:
            place = self.folder / str(number)
            place.mkdir()
            with (
                mock.patch("fcntl.flock", side_effect=OSError(number, "No locks")),
                contextlib.redirect_stderr(io.StringIO()) as output,
            ):
                with files.folder_lock(place, 1):
                    soft = place / ".lock.soft"
                    self.assertIn(str(os.getpid()), soft.read_text())
                    with (
                        self.assertRaisesRegex(UserError, f"in use by another process: .* delete {soft} if"),
                        files.folder_lock(place, 0.01),
                    ):
                        pass
                self.assertFalse(soft.exists())
                with files.folder_lock(place, 1):
                    pass
            line = f"{place} is on a file system without locks: {soft} keeps it to this process instead"
            self.assertEqual(output.getvalue().splitlines(), [line] * 3)

    def test_a_run_trains(self):
        with mock.patch("fcntl.flock", side_effect=OSError(37, "No locks")):
            _, output = self.train(epochs=1)
        self.assertEqual(output.count("is on a file system without locks"), 1)
        self.assertTrue(results(self.run_folder()))

    def test_other_errors_are_none_of_locks(self):
        with (
            mock.patch("fcntl.flock", side_effect=OSError(5, "Input/output error")),
            self.assertRaisesRegex(RunError, "cannot write to .*run .Input/output error.; choose another --log_dir"),
        ):
            self.train()


if __name__ == "__main__":
    unittest.main()

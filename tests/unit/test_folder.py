"""Tests of harness/folder.py: `python -m unittest tests/unit/test_folder.py`."""

import argparse
import contextlib
import errno
import os
import shutil
from unittest import mock

import torch
from torch.utils.tensorboard import SummaryWriter

import train_pl
from harness import files, folder
from harness.checkpoints import BEST, LAST, PREVIOUS, CheckpointError
from harness.errors import UserError
from harness.folder import RunError
from tests.helpers import NamedRunTest, assert_left_the_same, load, metrics, printed_lines, results
from train_pl import VAE, complete_flags, make_experiment, make_parser, train_vae

HPARAMS = "hparams.yaml"
NO_RUN, OTHER_PROGRAM = (
    "contains no run: choose another --run_name",
    "contains a run of another program: choose another",
)


class TestFolder(NamedRunTest):
    """The folder that a run gets, and the folders that are refused."""

    def open_folder(self, name="run", **flags):
        """Returns the context manager of a run's folder."""
        args = complete_flags(self.namespace(**flags))
        return folder.open_folder(str(self.folder), name, vars(args), make_parser().defaults, make_experiment(args))

    def assert_refused(self, message, error=RunError, **flags):
        """Asserts that training fails with a message and leaves the run's folder unchanged. Returns the message."""
        before = self.contents()
        with self.assertRaisesRegex(error, message) as caught:
            self.train(**flags)
        self.assertEqual(self.contents(), before)
        return str(caught.exception)

    def test_runs_without_a_name_get_different_numbers_even_if_two_processes_start_at_once(self):
        stale = mock.patch.object(folder, "TensorBoardLogger", lambda log_dir: argparse.Namespace(version=0))
        for number, version in enumerate([contextlib.nullcontext(), contextlib.nullcontext(), stale]):
            with version, self.open_folder(name=None) as (state, checkpoint):
                self.assertEqual(state.folder, str(self.folder / "lightning_logs" / f"version_{number}"))
                self.assertEqual((state.checkpoint, state.epoch, checkpoint), (None, 0, None))

    def test_a_folder_may_contain_files_of_a_shell_an_editor_or_a_killed_process(self):
        (self.run_folder() / "empty").mkdir(parents=True)
        unfinished = f"figure.png{files.UNFINISHED}"
        logs = ["train.log", "slurm-7.out", "nohup.out", "log.txt", ".gitkeep", ".DS_Store"]
        for name in [*logs, files.LOCK, unfinished]:
            (self.run_folder() / name).write_text("mine")
        self.train(epochs=1)
        for name in logs:
            self.assertEqual((self.run_folder() / name).read_text(), "mine")
        self.assertTrue((self.run_folder() / "empty").is_dir())
        self.assertFalse((self.run_folder() / unfinished).exists())

    def test_a_folder_of_another_program_is_refused_and_not_changed(self):
        """It contains other files, or a run of the course's template."""
        template = {HPARAMS: "model_name: MLP\nz_dim: 20\nlr: 0.001\n", "events.out.tfevents.1.host": "curves"}
        for contents, message in [
            *(({name: ""}, NO_RUN) for name in ["thesis.tex", "table.csv.tmp", "sub/data.csv", "epoch_0_samples.png"]),
            (template, OTHER_PROGRAM),
            ({**template, "checkpoints/epoch=3.ckpt": "weights"}, OTHER_PROGRAM),
            ({HPARAMS: "{}\n", "sub/x.txt": ""}, OTHER_PROGRAM),
            ({HPARAMS: "- 1\n"}, f"{HPARAMS} is damaged, and no checkpoint contains .*: delete {self.run_folder()} to"),
        ]:
            with self.subTest(list(contents)):
                for name, text in contents.items():
                    (self.run_folder() / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.run_folder() / name).write_text(text)
                self.assert_refused(message)
                shutil.rmtree(self.run_folder())

    def test_no_other_process_can_use_the_folder_while_the_run_trains(self):
        refused = []

        def open_it_too(model):
            with self.assertRaisesRegex(UserError, "is in use by another process"), self.open_folder(epochs=1):
                self.fail("both have it")
            refused.append(model.current_epoch)

        patch_timeout = mock.patch.object(folder, "LOCK_TIMEOUT", 0.1)
        with patch_timeout, mock.patch.object(VAE, "on_train_epoch_start", open_it_too):
            self.train(epochs=1)
        self.assertEqual(refused, [0])
        with self.assertRaisesRegex(RunError, "was just finished by another process"), self.open_folder(epochs=1):
            self.fail("it is finished")

    def test_a_run_trains_on_a_file_system_without_locks_but_not_in_a_folder_that_cannot_be_written(self):
        with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks")):
            _, output = self.train(epochs=1)
        self.assertEqual(output.count("is on a file system without locks"), 1)
        self.assertTrue(results(self.run_folder()))
        message = "^cannot write to .*run .{}.; choose another --log_dir or --run_name$"
        with mock.patch("fcntl.flock", side_effect=OSError(errno.EIO, "Input/output error")):
            self.assert_refused(message.format("Input/output error"), epochs=2)
        (self.run_folder() / HPARAMS).unlink()
        (self.run_folder() / HPARAMS).mkdir()
        self.assert_refused(message.format("Is a directory"), epochs=2)

    def test_a_finished_run_is_not_changed_and_its_data_are_not_loaded(self):
        self.train(epochs=1)
        before, result = self.contents(), [{"test_bpd": results(self.run_folder())["test_bpd"]}]
        with mock.patch.object(train_pl, "load_data", mock.Mock(side_effect=AssertionError)), printed_lines() as lines:
            again = train_vae(self.namespace(epochs=1, accelerator="cpu", num_workers=1))
        line = f"{self.run_folder()} is finished: test bpd {result[0]['test_bpd']:.4f}"
        self.assertEqual((again, lines), (result, [line]))
        self.assertEqual(self.contents(), before)

    def test_damaged_results_are_regenerated_from_the_checkpoints(self):
        self.train(epochs=1)
        path, good = self.run_folder() / "results.json", results(self.run_folder())
        for bad in [path.read_text()[:40], ""]:
            path.write_text(bad)
            _, output = self.train(epochs=1)
            self.assertEqual(output.count(f"{path} is damaged and is regenerated from the run's checkpoints\n"), 1)
            self.assertEqual(results(self.run_folder())["test_bpd"], good["test_bpd"])
        self.assertEqual(len(metrics(self.run_folder())), 2)

    def test_flags_checkpoints_and_results_are_synced_to_the_disk(self):
        synced, fsync = [], os.fsync

        def remember_and_sync(number):
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")).removesuffix(files.UNFINISHED))
            fsync(number)

        with mock.patch.object(os, "fsync", remember_and_sync):
            self.train(epochs=1)
        self.assertEqual(synced, [HPARAMS, BEST, LAST, "results.json"])

    def test_a_run_with_other_hyperparameters_is_refused_with_their_values(self):
        for epoch in [0, 1]:
            self.stop_at(VAE, "on_train_epoch_start", epoch, epochs=2)
            message = self.assert_refused("other", hidden_dims=[8, 4], seed=1, num_workers=1, epochs=2)
            self.assertIn("(--hidden_dims was [16], is [8, 4]; --seed was 42, is 1)", message)
        hparams = self.run_folder() / HPARAMS
        hparams.write_text(hparams.read_text().replace("binarization: threshold\n", ""))  # as an older version wrote it
        self.assert_refused("binarization was threshold, is stochastic", binarization="stochastic", epochs=2)
        self.assertIn("resumed", self.train(hidden_dims=(16,), epochs=2)[1])

    def test_damaged_flags_are_read_from_the_checkpoints(self):
        self.stop_at(VAE, "on_train_epoch_start", 1, epochs=2)
        path = self.run_folder() / HPARAMS
        good = path.read_text()
        for bad in [b"", good.encode()[:20] + b"\xff", b"model: [", b"3", good.encode()[:50]]:
            with self.subTest(bad):
                path.write_bytes(bad)
                self.assert_refused("--hidden_dims was", epochs=2, hidden_dims=[7])
        path.unlink()
        _, output = self.train(epochs=2)
        self.assertIn(f"{path} is damaged or missing and is regenerated from the run's checkpoints\n", output)
        self.assertIn("resumed after epoch 1", output)
        self.assertEqual(path.read_text(), good)

    def test_if_a_run_cannot_resume_from_its_checkpoints_the_message_says_what_to_do(self):
        self.stop_at(VAE, "on_train_epoch_start", 2, epochs=3)
        paths = {name: self.run_folder() / "checkpoints" / name for name in [BEST, LAST, PREVIOUS]}
        for name, path in paths.items():
            checkpoint = load(self.run_folder(), name.removesuffix(".ckpt"))
            del checkpoint["run"]
            torch.save(checkpoint, path)
        of_others = "is not a checkpoint that a run can resume from: it lacks run .* another --run_name"
        self.assert_refused(of_others, CheckpointError, epochs=3)
        for path in paths.values():
            path.write_bytes(b"nonsense")
        self.assert_refused(f"{LAST} is not a .*{PREVIOUS} is not a .*delete .*--run_name", CheckpointError, epochs=3)

    def test_a_finished_run_with_more_epochs_later_equals_a_run_with_all_epochs_from_the_start(self):
        self.train(epochs=6, run_name="long")
        self.train(epochs=3)
        first_result = results(self.run_folder())["test_bpd"]
        self.stop_at(VAE, "on_train_epoch_start", 4, epochs=6)
        self.assertEqual({path.name for path in self.run_folder().glob("results*")}, {"results_3.json"})
        self.assert_refused("has trained 4 epochs, more than --epochs 3: give --epochs 4 or more", epochs=3)
        _, output = self.train(epochs=6)
        self.assertIn("resumed after epoch 4\nepoch   5/6", output)
        with contextlib.closing(SummaryWriter(str(self.folder / "long"))) as writer:
            writer.add_scalar("test_bpd", first_result, 3)  # TensorBoard still shows the result of 3 epochs
        assert_left_the_same(self, self.run_folder(), self.folder / "long")

    def test_an_unfinished_run_can_resume_with_fewer_epochs_than_before(self):
        self.stop_at(VAE, "on_train_epoch_start", 2)
        self.train(epochs=3)
        self.train(epochs=3, run_name="short")
        assert_left_the_same(self, self.run_folder(), self.folder / "short")

    def test_fewer_epochs_are_refused_and_with_a_cosine_learning_rate_also_more_epochs(self):
        self.train(epochs=2)
        self.assert_refused("has trained 2 epochs, more than --epochs 1: give --epochs 2 or more", epochs=1)
        self.train(epochs=1, lr_schedule="cosine", run_name="cosine")
        message = "cannot be resumed with --epochs 2, because its learning rate .*: give --epochs 1, or"
        self.assert_refused(message, epochs=2, lr_schedule="cosine", run_name="cosine")

    def test_results_whose_checkpoints_are_missing_are_not_replaced(self):
        """A user may have deleted the checkpoints to save space."""
        self.train(epochs=2)
        shutil.rmtree(self.run_folder() / "checkpoints")
        for epochs in [1, 3]:
            self.assert_refused("contains the results of 2 epochs, but no checkpoint of them", epochs=epochs)

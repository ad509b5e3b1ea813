"""Tests of the checkpoints in a run's folder: `python -m unittest tests/unit/test_checkpoints.py`."""

import contextlib
import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from harness import checkpoints
from tests.helpers import SeededTest

# A checkpoint with everything that a run needs to resume, except for a model.
EMPTY = {"epoch": 0, "state_dict": {}, "callbacks": {}, "loops": {}, "optimizer_states": [], "run": {"history": []}}


class FilesTest(SeededTest):
    """A test with checkpoints in the folder of a run; they contain no model."""

    def setUp(self):
        self.checkpoints = self.folder / "run" / "checkpoints"
        self.last, self.previous, self.best = (
            self.checkpoints / name for name in [checkpoints.LAST, checkpoints.PREVIOUS, checkpoints.BEST]
        )

    def write(self, path, epoch, val_bpds=()):
        """Writes the checkpoint of an epoch. val_bpds are the values of the untrained model and of each epoch."""
        run = {"history": [{"epoch": epoch, "val_bpd": value} for epoch, value in enumerate(val_bpds)]}
        checkpoint = {**EMPTY, "epoch": epoch - 1, "run": run, "state_dict": {"x": torch.rand(5_000)}}
        checkpoints.write_checkpoint(checkpoint, str(path))

    def epochs(self):
        """Reads all checkpoints, and returns the number of epochs of each."""
        return {path.name: checkpoints.read_checkpoint(path)["epoch"] + 1 for path in self.checkpoints.glob("*.ckpt")}


class TestWriting(FilesTest):
    def test_a_checkpoint_is_on_the_disk_before_it_is_renamed(self):
        with mock.patch.object(os, "fsync", side_effect=lambda file: self.assertFalse(self.last.exists())) as fsync:
            self.write(self.last, 1)
        fsync.assert_called_once()

    def test_best_ckpt_is_the_checkpoint_of_the_first_epoch_with_the_lowest_metric(self):
        history = [{"epoch": 0, "val_bpd": 0.1}]  # of the untrained model, which has no checkpoint
        epoch_report = SimpleNamespace(metric="bpd", history=history)
        files = checkpoints.BackgroundCheckpointIO()

        def save(path):
            files.save_checkpoint({**EMPTY, "epoch": len(history) - 2}, path)

        strategy = SimpleNamespace(checkpoint_io=files)
        logger = SimpleNamespace(log_dir=str(self.folder / "run"))
        trainer = SimpleNamespace(logger=logger, save_checkpoint=save, strategy=strategy, is_global_zero=True)
        for value, best in [(0.5, 1), (0.6, 1), (0.4, 3), (0.4, 3), (0.3, 5)]:
            history.append({"epoch": len(history), "val_bpd": value})
            checkpoints.BestAndLastCheckpoint(epoch_report).on_train_epoch_end(trainer, None)
            files.teardown()
            with self.subTest(value=value):
                epochs = self.epochs()
                self.assertEqual((epochs["best.ckpt"], epochs["last.ckpt"]), (best, len(history) - 1))


class TestNewest(FilesTest):
    """The checkpoint from which a run resumes."""

    def newest(self):
        """Returns the path and the number of epochs of the newest checkpoint, and the text on stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as error:
            path, checkpoint = checkpoints.newest_checkpoint(str(self.checkpoints), "bpd")
        return path, checkpoint and checkpoint["epoch"] + 1, error.getvalue()

    def test_a_run_resumes_from_the_latest_epoch_which_becomes_last_ckpt(self):
        self.assertEqual(self.newest(), (None, None, ""))
        for epoch in [1, 2]:
            self.write(self.best, epoch)
            self.write(self.last, epoch)
        self.assertEqual(self.newest(), (str(self.last), 2, ""))
        self.write(self.best, 3)  # written by a process that was killed before it wrote last.ckpt
        self.assertEqual(self.newest(), (str(self.last), 3, ""))
        self.assertEqual(self.epochs(), {"last.ckpt": 3, "previous.ckpt": 1, "best.ckpt": 3})
        os.remove(self.best)
        os.replace(self.last, self.previous)  # left by a process that was killed between two renamings
        self.assertEqual(self.newest(), (str(self.last), 3, ""))
        self.assertEqual(self.epochs(), {"last.ckpt": 3, "previous.ckpt": 3})

    def test_damaged_checkpoints_are_reported_and_replaced_by_the_previous_one(self):
        for epoch in [3, 4]:
            self.write(self.last, epoch)
        good = self.last.read_bytes()
        middle = len(good) // 2  # within the tensor
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for name, bad in dict(cut=good[:-100], short=good[:500], empty=b"", other=b"nonsense", flipped=flipped).items():
            with self.subTest(name):
                self.best.write_bytes(bad)  # of the same epoch
                self.last.write_bytes(bad)
                path, epoch, error = self.newest()
                self.assertEqual((path, epoch), (str(self.last), 3))
                damage = r"is not a checkpoint, .* \(.*\); resuming from previous.ckpt, epoch 3\n"
                self.assertRegex(error, f"^warning: {self.last} {damage}warning: {self.best} {damage}$")
                self.assertEqual(self.last.read_bytes(), self.previous.read_bytes())

    def test_a_checkpoint_with_a_damaged_index_is_used_or_replaced_by_the_previous_one(self):
        """No flipped byte in the index of the archive causes another error."""
        for epoch in [3, 4]:
            self.write(self.last, epoch)
        good = self.last.read_bytes()
        seen = set()
        for place in range(-50, 0):
            bad = bytearray(good)
            bad[place] ^= 255
            self.last.write_bytes(bad)
            seen.add(self.newest()[1])
        self.assertEqual(seen, {3, 4})

    def test_if_no_checkpoint_is_usable_all_are_kept_and_the_message_says_what_to_do(self):
        for epoch in [1, 2]:
            self.write(self.last, epoch)
        for path in [self.last, self.previous]:
            path.write_bytes(b"nonsense")
        message = (
            f"^{self.last} is not a .*; {self.previous} is not a .*: delete {self.folder / 'run'} to .*--run_name$"
        )
        with self.assertRaisesRegex(checkpoints.CheckpointError, message):
            self.newest()
        self.assertEqual({path.read_bytes() for path in [self.last, self.previous]}, {b"nonsense"})
        self.assertFalse(self.best.exists())

    def test_a_missing_best_checkpoint_is_replaced_by_a_copy_or_the_run_is_refused(self):
        """Without best.ckpt, the run would train to its end and have no results."""
        self.write(self.last, 1, [0.9, 0.5])
        self.write(self.last, 2, [0.9, 0.5, 0.6])  # now previous.ckpt has the best epoch
        self.assertEqual(self.newest()[1], 2)
        self.assertEqual(self.epochs(), {"last.ckpt": 2, "previous.ckpt": 1, "best.ckpt": 1})
        self.write(self.last, 3, [0.9, 0.5, 0.6, 0.7])
        os.remove(self.best)
        before = self.epochs()
        message = f"{self.best}, of epoch 1, is damaged or missing, .*: delete .*--run_name"
        with self.assertRaisesRegex(checkpoints.CheckpointError, message):
            self.newest()
        self.assertEqual(self.epochs(), before)

    def test_a_run_resumes_only_from_its_own_checkpoints(self):
        """A later checkpoint of another program in its folder is ignored."""
        self.write(self.last, 3)
        for part in checkpoints.REQUIRED_PARTS.keys() - {"epoch"}:
            with self.subTest(part):
                torch.save({name: value for name, value in {**EMPTY, "epoch": 7}.items() if name != part}, self.best)
                before = self.best.read_bytes()
                path, epoch, error = self.newest()
                self.assertEqual((path, epoch), (str(self.last), 3))
                self.assertIn(f"best.ckpt is not a checkpoint that a run can resume from: it lacks {part} (", error)
                self.assertEqual(self.best.read_bytes(), before)

    def test_checkpoints_of_older_versions_can_be_loaded(self):
        """They have the run as the state of a callback, and states of ModelCheckpoints, which are dropped."""
        users = {"best_model_path": "/there/epoch=3.ckpt"}
        callbacks = {"A": {"best_model_path": "/there/best.ckpt"}, "B": {"best_model_path": ""}, "C": users}
        old = {**EMPTY, "callbacks": {**callbacks, "D": {"x": 1}, "EpochReport": {"flags": {}, "history": []}}}
        del old["run"]
        self.checkpoints.mkdir(parents=True)
        torch.save(old, self.last)
        self.assertEqual(self.newest()[1], 1)
        loaded = checkpoints.BackgroundCheckpointIO().load_checkpoint(str(self.last))
        self.assertEqual(loaded["run"], {"flags": {}, "history": []})
        self.assertEqual(loaded["callbacks"], {"C": users, "D": {"x": 1}})
        self.assertEqual(checkpoints.flags_in_checkpoints(self.checkpoints), {})


class TestBackground(SeededTest):
    """Checkpoints are written while training continues."""

    def setUp(self):
        self.best, self.last = str(self.folder / "best.ckpt"), str(self.folder / "last.ckpt")
        self.files, self.go_on = checkpoints.BackgroundCheckpointIO(), threading.Event()
        self.addCleanup(self.go_on.set)
        write = checkpoints.write_checkpoint

        def write_late(checkpoint, path):
            self.go_on.wait(60)
            write(checkpoint, path)

        self.enter(mock.patch.object(checkpoints, "write_checkpoint", write_late))

    def test_a_checkpoint_contains_the_weights_at_the_time_of_the_call(self):
        weight = torch.ones(2)
        checkpoint = {**EMPTY, "state_dict": {"weight": weight}}
        self.files.save_checkpoint(checkpoint, self.best)
        self.files.copy(self.best, self.last)
        weight.zero_()
        self.assertEqual(os.listdir(self.folder), [])  # the call did not wait
        self.go_on.set()
        self.assertEqual(self.files.load_checkpoint(self.best)["state_dict"]["weight"].tolist(), [1, 1])
        self.files.teardown()
        self.assertEqual(Path(self.best).read_bytes(), Path(self.last).read_bytes())
        self.assertFalse(os.path.samefile(self.best, self.last))  # damage to one does not affect the other
        self.files.save_checkpoint({**checkpoint, "epoch": 1}, self.last)  # after teardown, as in the next fit
        self.files.teardown()
        self.assertEqual(checkpoints.read_checkpoint(self.last)["epoch"], 1)
        self.assertEqual(set(os.listdir(self.folder)), {"best.ckpt", "last.ckpt", "previous.ckpt"})

    def test_an_error_in_the_background_is_raised_and_no_older_checkpoint_is_copied_instead(self):
        self.go_on.set()
        Path(self.best).write_bytes(b"of an epoch before")
        with mock.patch.object(torch, "save", side_effect=ZeroDivisionError):
            self.files.save_checkpoint(EMPTY, self.best)
            self.files.jobs[self.best].exception(60)
            with self.assertRaises(ZeroDivisionError):
                checkpoints.copy_checkpoint(self.best, self.last, self.files.jobs[self.best])
            with self.assertRaises(ZeroDivisionError):
                self.files.teardown()
        self.assertEqual(os.listdir(self.folder), ["best.ckpt"])

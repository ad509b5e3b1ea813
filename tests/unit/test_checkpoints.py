"""Tests of harness/checkpoints.py: `python -m unittest tests/unit/test_checkpoints.py`."""

import argparse
import contextlib
import functools
import io
import os
import pathlib
import pickle
import shutil
import tempfile
import threading
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import train_pl
from harness import checkpoints, run
from harness.errors import UserError
from tests.helpers import Killed, SeededTest, small_loaders
from train_pl import VAE

# A checkpoint from which a run could go on, were there a model in it.
EMPTY = {"epoch": 0, "state_dict": {}, "callbacks": {}, "loops": {}, "optimizer_states": [], "run": {}}


class Exploit:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Call:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.call


class TestReading(SeededTest):
    """What is loaded as a checkpoint: tensors and plain values, or nothing."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        args = dict(hidden_dims=[16], z_dim=2, epochs=1, log_dir=folder.name, run_name="run", accelerator="cpu")
        with (
            mock.patch.object(train_pl, "load_data", small_loaders),
            mock.patch.object(run.Run, "draw_figures"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train_pl.train_vae(argparse.Namespace(**args))
        cls.trained = Path(folder.name) / "run" / "checkpoints"
        cls.good = torch.load(cls.trained / "best.ckpt", weights_only=True)

    def setUp(self):
        self.path = str(self.folder / "some.ckpt")

    def assert_refused(self, *parts, **options):
        with self.assertRaises(checkpoints.CheckpointError) as caught:
            VAE.load_from_checkpoint(self.path, **options)
        for part in parts or [self.path]:
            self.assertIn(part, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_what_train_pl_wrote(self):
        torch.save(self.good, self.path)
        model = VAE.load_from_checkpoint(self.path)
        torch.testing.assert_close(dict(model.state_dict()), dict(self.good["state_dict"]), rtol=0, atol=0)
        self.assertEqual((model.hparams.z_dim, model.hparams.lr), (2, 1e-3))
        self.assertEqual(VAE.load_from_checkpoint(self.path, map_location="cpu", lr=0.5).hparams.lr, 0.5)
        run = checkpoints.read_checkpoint(self.path)["run"]
        self.assertEqual(run["flags"]["hidden_dims"], [16])
        self.assertEqual([row["epoch"] for row in run["history"]], [0, 1])

    def test_older_versions(self):
        """They kept what is now under "run" as the state of a callback; Lightning must not look for that one."""
        old = {name: value for name, value in self.good.items() if name != "run"}
        old["callbacks"] = {**self.good["callbacks"], "EpochReport": self.good["run"]}
        torch.save(old, self.folder / "last.ckpt")
        for checkpoint in [
            checkpoints.read_checkpoint(self.folder / "last.ckpt"),
            checkpoints.CheckpointFiles().load_checkpoint(self.folder / "last.ckpt"),
            checkpoints.newest_checkpoint(self.folder)[1],
        ]:
            self.assertEqual(checkpoint["run"], self.good["run"])
            self.assertEqual(checkpoint["callbacks"].keys(), self.good["callbacks"].keys())

    def test_malicious_pickles(self):
        made = self.folder / "made by the exploit"
        exploit = Exploit(made)
        shutil.copytree(self.trained, self.folder / "checkpoints")
        last = self.folder / "checkpoints" / "last.ckpt"

        def save_pickle(content, path):
            Path(path).write_bytes(pickle.dumps(content))

        scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
        for content in [
            exploit,
            {**self.good, "x": exploit},
            {**self.good, "state_dict": exploit},
            {**self.good, "hyper_parameters": {"model_name": exploit}},
            # By the names that are allowed for numbers, paths and namespaces.
            {**self.good, "x": Call(scalar, np.dtype("O"), exploit)},
            {**self.good, "x": np.array([exploit])},
            {**self.good, "x": argparse.Namespace(x=exploit)},
            {**self.good, "x": Call(pathlib.PurePosixPath, exploit)},
        ]:
            for save in [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), save_pickle]:
                save(content, self.path)
                self.assert_refused("refused" if zipfile.is_zipfile(self.path) else "no checkpoint")
                with self.assertRaises(checkpoints.CheckpointError):
                    checkpoints.CheckpointFiles().load_checkpoint(self.path)
                shutil.copy(self.path, last)
                with contextlib.redirect_stderr(io.StringIO()) as error:
                    checkpoints.newest_checkpoint(last.parent)
                self.assertIn("continuing from best.ckpt", error.getvalue())
                self.assertFalse(made.exists())
        torch.save(exploit, self.path)
        torch.load(self.path, weights_only=False)
        self.assertTrue(made.exists(), "the exploit is none")

    def test_what_the_allowed_names_are_not_for(self):
        """NumPy's types that a pickle makes up, whose values would be addresses, and calls in other files."""
        scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
        fields = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
        for content, *parts in [
            (np.zeros(1, [("a", "f8")]), "refused", "neither numbers nor text"),
            (np.datetime64("2020-01-01"), "refused", "neither numbers nor text"),
            (Call(scalar, Call(np.dtype, "V8", state=fields), b"12345678"), "refused"),
            (Call(scalar, np.dtype("f8"), b"1234"), "damaged"),
            (Call(scalar, Call(np.dtype, "f8", state=(3, "<x", None, None, None, 8, 1, 0)), b"12345678"), "refused"),
            (Call(np.ndarray, 3, state=(1, (2,), np.dtype("f8"), False, b"1234")), "damaged"),
            (Call(np.frombuffer, b"1234", np.dtype("f8")), "refused", "GLOBAL"),
            (types.SimpleNamespace(x=nn.Linear(2, 2)), "refused", "GLOBAL"),
        ]:
            torch.save({**self.good, "x": content}, self.path)
            self.assert_refused(*parts)
        made = self.folder / "made"
        hidden = {"_instantiator": "os.mkdir", "_class_path": str(made), **self.good["hyper_parameters"]}
        torch.save({**self.good, "hyper_parameters": hidden, "hparams_type": "os.mkdir"}, self.path)
        VAE.load_from_checkpoint(self.path)
        file = self.folder / "hparams.yaml"
        file.write_text(f"model_name: !!python/object/apply:os.mkdir ['{made}']")
        self.assert_refused("hparams.yaml holds no hyperparameters", hparams_file=file)
        self.assertFalse(made.exists())

    def test_no_checkpoints(self):
        for content in [b"", b"nonsense", Path(__file__).read_bytes()]:
            Path(self.path).write_bytes(content)
            self.assert_refused("no checkpoint, or a damaged one (File is not a zip file)")
        for names in [[], ["notes.txt"], ["archive/data.pkl", "archive/version"]]:
            with zipfile.ZipFile(self.path, "w") as archive:
                for name in names:
                    archive.writestr(name, "text")
            self.assert_refused()
        with zipfile.ZipFile(self.trained / "best.ckpt") as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        for pickled in [
            b"",
            b".",
            b"\x80\x02h\x05.",
            b"\x80\x02X\x01\0\0\0\xff.",
            b"\x80\x02K\x01Q.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        ]:
            with zipfile.ZipFile(self.path, "w") as archive:
                for name, part in parts.items():
                    archive.writestr(name, pickled if name.endswith("data.pkl") else part)
            self.assert_refused()
        for path, error in [(self.folder, UserError), (f"{self.path}.not", FileNotFoundError)]:
            with self.assertRaises(error):
                VAE.load_from_checkpoint(path)

    def test_other_programs(self):
        for content in [
            torch.zeros(3),
            [1, 2],
            {},
            {"epoch": 3, "model_state_dict": nn.Linear(2, 3).state_dict()},
            {**self.good, "state_dict": [torch.zeros(3)]},
            {**self.good, "hyper_parameters": None},
        ]:
            torch.save(content, self.path)
            self.assert_refused("of another program")

    def test_shapes_that_do_not_fit(self):
        parameters, weights = self.good["hyper_parameters"], self.good["state_dict"]
        for change, part in [
            ({"hyper_parameters": {**parameters, "z_dim": 5}}, "size mismatch for encoder.net.2"),
            ({"hyper_parameters": {**parameters, "hidden_dims": [16, 16]}}, "does not fit"),
            ({"hyper_parameters": {**parameters, "hidden_dims": "wide"}}, "does not fit"),
            ({"hyper_parameters": {**parameters, "z_dim": -1}}, "does not fit"),
            ({"hyper_parameters": {**parameters, "model_name": "GAN"}}, "model_name must be"),
            ({"state_dict": {}}, 'Missing key(s) in state_dict: "encoder.net.0.weight"'),
            ({"state_dict": {**weights, "encoder.net.0.weight": "x"}}, "does not fit"),
        ]:
            torch.save({**self.good, **change}, self.path)
            self.assert_refused(part)


class TestFiles(SeededTest):
    """The checkpoints in a run's folder, here of no model."""

    def setUp(self):
        self.checkpoints = self.folder / "run" / "checkpoints"
        self.last, self.previous, self.best = (
            self.checkpoints / name for name in [checkpoints.LAST, checkpoints.PREVIOUS, checkpoints.BEST]
        )

    def write(self, path, epoch):
        """A checkpoint as it is after `epoch` epochs."""
        checkpoint = {**EMPTY, "epoch": epoch - 1, "state_dict": {"x": torch.rand(5_000)}}
        checkpoints.write_checkpoint(checkpoint, str(path))

    def epochs(self):
        """The number of epochs of each checkpoint that is there; all of them are whole."""
        return {path.name: checkpoints.read_checkpoint(path)["epoch"] + 1 for path in self.checkpoints.glob("*.ckpt")}

    def newest(self):
        """What newest_checkpoint returns, the checkpoint's number of epochs, and what is on stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as error:
            path, checkpoint = checkpoints.newest_checkpoint(str(self.checkpoints))
        return path, checkpoint and checkpoint["epoch"] + 1, error.getvalue()

    def test_whole_or_not_there(self):
        for epoch in [1, 2, 3]:
            self.write(self.last, epoch)

        def half(checkpoint, path):
            Path(path).write_bytes(b"half")
            raise Killed

        with mock.patch.object(torch, "save", half), self.assertRaises(Killed):
            self.write(self.last, 4)
        self.assertEqual(self.epochs(), {"last.ckpt": 3, "previous.ckpt": 2})

    def test_errors_are_of_the_world_outside(self):
        """harness.errors.exit_on_error ends a program on them in one line."""
        self.assertTrue(issubclass(checkpoints.CheckpointError, OSError))

    def test_on_the_disk_before_it_has_its_name(self):
        with mock.patch.object(os, "fsync") as fsync:
            self.write(self.last, 1)
        fsync.assert_called_once()

    def test_only_of_the_last_one_the_one_before_is_kept(self):
        for epoch in [1, 2]:
            self.write(self.best, epoch)
        self.assertEqual(self.epochs(), {"best.ckpt": 2})

    def test_newest(self):
        self.assertEqual(self.newest(), (None, None, ""))
        for epoch in [1, 2]:
            self.write(self.best, epoch)
            self.write(self.last, epoch)
        self.assertEqual(self.newest(), (str(self.last), 2, ""))
        self.write(self.best, 3)  # and killed before last.ckpt
        self.assertEqual(self.newest(), (str(self.last), 3, ""))
        self.assertEqual(self.epochs(), {"last.ckpt": 3, "previous.ckpt": 1, "best.ckpt": 3})

    def test_killed_between_the_names_of_two(self):
        self.write(self.last, 1)
        os.rename(self.last, self.previous)
        self.assertEqual(self.newest(), (str(self.last), 1, ""))
        self.assertEqual(self.epochs(), {"last.ckpt": 1, "previous.ckpt": 1})

    def test_damaged(self):
        for epoch in [3, 4]:
            self.write(self.last, epoch)
        good = self.last.read_bytes()
        middle = len(good) // 2  # of the tensor
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for bad in [good[:-100], good[:500], b"", b"nonsense", flipped]:
            self.best.write_bytes(bad)  # which is of the same epoch
            self.last.write_bytes(bad)
            path, epoch, error = self.newest()
            self.assertEqual((path, epoch), (str(self.last), 3))
            damage = r"is no checkpoint, .* \(.*\); continuing from previous.ckpt, epoch 3\n"
            self.assertRegex(error, f"^{self.last} {damage}{self.best} {damage}$")
            self.assertEqual(self.last.read_bytes(), self.previous.read_bytes())

    def test_damaged_at_its_end(self):
        """Where the archive says what is where in it: it is used all the same, or the one before."""
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

    def test_all_damaged(self):
        for epoch in [1, 2]:
            self.write(self.last, epoch)
        for path in [self.last, self.previous]:
            path.write_bytes(b"nonsense")
        with self.assertRaisesRegex(
            checkpoints.CheckpointError,
            f"^{self.last} is no .*; {self.previous} is no .*: delete {self.folder / 'run'} to .*--run_name$",
        ):
            self.newest()
        self.assertEqual({path.read_bytes() for path in [self.last, self.previous]}, {b"nonsense"})
        self.assertFalse(self.best.exists())

    def test_a_folder_in_its_place(self):
        """Somebody's, which nobody may write over."""
        self.write(self.previous, 1)
        self.last.mkdir()
        with self.assertRaisesRegex(UserError, f"^{self.last} is a folder, no checkpoint; that of a run is RUN/"):
            self.newest()

    def test_of_other_programs(self):
        """A run continues from its own checkpoints alone, even where a later one was put beside them."""
        self.write(self.last, 3)
        for part in ["run", "loops", "callbacks", "optimizer_states"]:
            checkpoint = {**EMPTY, "epoch": 7}
            del checkpoint[part]
            torch.save(checkpoint, self.best)
            path, epoch, error = self.newest()
            self.assertEqual((path, epoch), (str(self.last), 3))
            self.assertIn(f"best.ckpt is no checkpoint to continue a run from: it lacks {part} (", error)
            self.assertEqual(checkpoints.read_checkpoint(self.best)["epoch"], 7)

    def test_folder_that_was_moved(self):
        """Where the best checkpoint is, is told anew; its score is kept."""
        state = {"dirpath": "/there", "best_model_path": "/there/best.ckpt", "kth_best_model_path": ""}
        state.update(best_k_models={"/there/best.ckpt": torch.tensor(0.5)}, best_model_score=torch.tensor(0.5))
        content = {**EMPTY, "callbacks": {"A": state, "B": {"x": "/there"}}}
        files = checkpoints.CheckpointFiles()
        files.save_checkpoint(content, str(self.last))
        files.teardown()
        loaded = checkpoints.CheckpointFiles().load_checkpoint(str(self.last))["callbacks"]
        best = str(self.best)
        expected = {**state, "dirpath": str(self.checkpoints), "best_model_path": best}
        self.assertEqual(loaded, {"A": {**expected, "best_k_models": {best: 0.5}}, "B": {"x": "/there"}})


class TestBackground(SeededTest):
    def setUp(self):
        self.best, self.last = str(self.folder / "best.ckpt"), str(self.folder / "last.ckpt")
        self.files, self.go_on = checkpoints.CheckpointFiles(), threading.Event()
        self.addCleanup(self.go_on.set)
        write = checkpoints.write_checkpoint

        def write_late(checkpoint, path):
            self.go_on.wait(60)
            write(checkpoint, path)

        patch = mock.patch.object(checkpoints, "write_checkpoint", write_late)
        patch.start()
        self.addCleanup(patch.stop)

    def test_writing_waits_for_nobody(self):
        """The weights are those of the call, on the CPU; a copy follows its original; all is there at the end."""
        weight = torch.ones(2)
        checkpoint = {**EMPTY, "callbacks": {"A": {"monitor": "x"}}, "state_dict": {"weight": weight}}
        self.files.save_checkpoint(checkpoint, self.best)
        self.files.copy(self.best, self.last)
        weight.zero_()
        self.assertEqual(os.listdir(self.folder), [])
        self.go_on.set()
        self.assertEqual(self.files.load_checkpoint(self.best)["state_dict"]["weight"].tolist(), [1, 1])
        self.files.teardown()
        self.assertEqual(Path(self.best).read_bytes(), Path(self.last).read_bytes())
        self.assertFalse(os.path.samefile(self.best, self.last))
        self.files.save_checkpoint({**checkpoint, "epoch": 1}, self.last)  # after the end, as in the next fit
        self.files.teardown()
        self.assertEqual(checkpoints.read_checkpoint(self.last)["epoch"], 1)
        self.assertEqual(set(os.listdir(self.folder)), {"best.ckpt", "last.ckpt", "previous.ckpt"})

    def test_an_error_is_raised_at_the_end(self):
        """And nothing older is copied in its place."""
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

"""Tests of harness/checkpoints.py's load_model: `python -m unittest tests/unit/test_checkpoints_loading.py`."""

import argparse
import io
import os
import pathlib
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from harness import checkpoints
from tests.helpers import SeededTest
from train_pl import VAE

ASSIGNMENTS = ["model_name", "hidden_dims", "num_filters", "z_dim", "lr"]  # the hyperparameters of its VAE


class TestLoading(SeededTest):
    """VAE.load_from_checkpoint takes what Lightning's takes."""

    def setUp(self):
        self.path = str(self.folder / "some.ckpt")
        model = VAE("MLP", [16], 4, 2, 1e-3)
        self.good = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}

    def assert_refused(self, part, **options):
        with self.assertRaises(checkpoints.CheckpointError) as caught:
            VAE.load_from_checkpoint(self.path, **options)
        self.assertIn(part, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def save(self, **parts):
        """Saves the checkpoint with other parts."""
        torch.save({**self.good, **parts}, self.path)

    def assert_loads(self, path=None, **options):
        """Loads the weights of the checkpoint, and returns the hyperparameters."""
        model = VAE.load_from_checkpoint(path or self.path, **options)
        torch.testing.assert_close(dict(model.state_dict()), dict(self.good["state_dict"]), rtol=0, atol=0)
        return model.hparams

    def test_of_other_trainers(self):
        """What ModelCheckpoint(save_weights_only=True) of newer and older Lightnings leaves."""
        for parts in [{}, {"epoch": 3, "global_step": 4, "loops": {}}, {"pytorch-lightning_version": "1.9.0"}]:
            self.save(**parts)
            self.assertEqual(self.assert_loads().z_dim, 2)

    def test_what_a_users_trainer_wrote(self):
        parameters = dict(model_name=np.str_("MLP"), hidden_dims=np.array([16]), num_filters=np.int64(4))
        model = VAE(**parameters, z_dim=torch.tensor(2), lr=np.float64(1e-3))
        model.load_state_dict(self.good["state_dict"])
        model.hparams["others"] = argparse.Namespace(a=Path("x"), b=types.SimpleNamespace(c=(np.float32(0.5), True)))
        trainer = pl.Trainer(accelerator="cpu", logger=False, max_epochs=0, enable_progress_bar=False)
        trainer.strategy.connect(model)
        for weights_only in [True, False]:
            trainer.save_checkpoint(self.path, weights_only)
            hparams = self.assert_loads()
            self.assertEqual(
                {name: hparams[name] for name in ASSIGNMENTS},
                {**parameters, "hidden_dims": [16], "z_dim": 2, "lr": 1e-3},
            )
            others = checkpoints.read_checkpoint(self.path)["hyper_parameters"]["others"]
            self.assertEqual(others, argparse.Namespace(a=pathlib.PurePosixPath("x"), b=others.b))
            self.assertEqual(others.b.c, (0.5, True))

    def test_user_who_allows_numpy(self):
        """As torch's own message advises, which must not mix with what stands in for NumPy."""
        self.save(hyper_parameters={**self.good["hyper_parameters"], "lr": np.float64(0.5)})
        before = set(torch.serialization.get_safe_globals())
        allowed = [np.dtype, np.ndarray, np.float64(1).__reduce__()[0], Path]
        with torch.serialization.safe_globals(allowed):
            self.assertEqual(self.assert_loads().lr, 0.5)
            self.assertLessEqual(set(allowed), set(torch.serialization.get_safe_globals()))
        self.assertEqual(set(torch.serialization.get_safe_globals()), before)

    def test_where_from(self):
        self.save()
        self.assert_loads(Path(self.path))
        with open(self.path, "rb") as file:
            self.assert_loads(file)
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            self.assert_loads("~/some.ckpt")
        with self.assertRaisesRegex(checkpoints.CheckpointError, "the open file is no checkpoint"):
            VAE.load_from_checkpoint(io.BytesIO(b"nonsense"))

    def test_where_to(self):
        self.save()
        seen = []

        def remember(storage, location):
            seen.append(location)
            return storage

        for place in ["cpu", torch.device("cpu"), {"cuda:0": "cpu"}, remember]:
            self.assert_loads(map_location=place)
        self.assertEqual(set(seen), {"cpu"})
        with self.assertRaisesRegex(RuntimeError, "nowhere"):  # which is no damage
            VAE.load_from_checkpoint(self.path, "nowhere")

    def test_other_hyperparameters(self):
        self.save(hyper_parameters={"model_name": "MLP", "hidden_dims": [16], "num_filters": 4, "depth": 3})
        self.assert_refused("some.ckpt holds weights without the hyperparameters z_dim, lr: give them to VAE.load_")
        self.assertEqual(self.assert_loads(z_dim=2, lr=0.5).lr, 0.5)
        for name, text in [
            ("a.yaml", "z_dim: 2\nlr: 0.25\nhidden_dims: !!python/tuple [16]\n"),
            ("a.csv", "key,value\nz_dim,2\nlr,0.25\nhidden_dims,[16]\n"),
        ]:
            (self.folder / name).write_text(text)
            self.assertEqual(self.assert_loads(hparams_file=str(self.folder / name)).lr, 0.25)
            self.assertEqual(self.assert_loads(hparams_file=self.folder / name, lr=2).lr, 2)
        for text in ["", "a", "- 1", "a: [", "\0"]:
            (self.folder / "a.yaml").write_text(text)
            self.assert_refused("a.yaml holds no hyperparameters", hparams_file=self.folder / "a.yaml")
        with self.assertRaises(FileNotFoundError):
            VAE.load_from_checkpoint(self.path, hparams_file=self.folder / "b.yaml")

    def test_state_dict_alone(self):
        torch.save(self.good["state_dict"], self.path)
        self.assert_refused("is a bare state_dict without the hyperparameters model_name, hidden_dims, num_filters")
        self.assertEqual(self.assert_loads(**self.good["hyper_parameters"]).z_dim, 2)

    def test_strict(self):
        weights = {**self.good["state_dict"], "more": torch.zeros(1)}
        del weights["encoder.net.0.bias"]
        self.save(state_dict=weights)
        self.assert_refused("does not fit")
        with warnings.catch_warnings(record=True) as caught:
            VAE.load_from_checkpoint(self.path, strict=False)
        told = "".join(str(warning.message) for warning in caught)
        self.assertRegex(told, "some.ckpt lacks: encoder.net.0.bias.*some.ckpt has too many: more$")

    def test_weights_only_changes_nothing(self):
        self.save()
        self.assert_loads(weights_only=False)
        self.save(x=nn.Linear(2, 2))
        self.assert_refused("refused", weights_only=False)

    def test_subclass(self):
        class Other(VAE):
            def __init__(self, beta, **others):
                super().__init__(**others)
                self.beta = beta

        assignments = {name: self.good["hyper_parameters"][name] for name in ASSIGNMENTS}
        model = Other(beta=4, **assignments)  # which has the name of one of ours
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, self.path)
        self.assertEqual(Other.load_from_checkpoint(self.path).beta, 4)

    def test_no_memory_is_no_damage(self):
        self.save()
        for error in [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]:
            with mock.patch.object(torch, "load", side_effect=error), self.assertRaises(type(error)) as caught:
                VAE.load_from_checkpoint(self.path)
            self.assertIs(caught.exception, error)

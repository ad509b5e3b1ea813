"""Tests of reading checkpoints and building models: `python -m unittest tests/unit/test_checkpoints_loading.py`."""

import argparse
import copy
import functools
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from harness import checkpoints
from harness.errors import UserError
from tests.helpers import SeededTest
from train_pl import VAE

# Hyperparameters of the assignment's VAE
HPARAMS = dict(model_name="MLP", hidden_dims=[16], num_filters=4, z_dim=2, lr=1e-3)
SCALAR = np.float64(1).__reduce__()[0]  # NumPy's function that creates a scalar; its module depends on the version


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.call


class LoadingTest(SeededTest):
    """A test with a checkpoint of a small VAE at `path`."""

    def setUp(self):
        self.path = str(self.folder / "some.ckpt")
        model = VAE(**HPARAMS)
        self.good = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        self.save()

    def save(self, **parts):
        """Saves the checkpoint with some parts added or replaced."""
        torch.save({**self.good, **parts}, self.path)

    def assert_refused(self, *parts, **options):
        """Asserts that the file is refused, with a one-line message that contains the parts."""
        with self.assertRaises(checkpoints.CheckpointError) as caught:
            VAE.load_from_checkpoint(self.path, **options)
        for part in parts or [self.path]:
            self.assertIn(part, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def assert_loads(self, path=None, **options):
        """Asserts that the weights of the checkpoint are loaded. Returns the hyperparameters."""
        model = VAE.load_from_checkpoint(path or self.path, **options)
        torch.testing.assert_close(dict(model.state_dict()), dict(self.good["state_dict"]), rtol=0, atol=0)
        return model.hparams


class TestRefused(LoadingTest):
    """A file that contains more than tensors and plain values, or no checkpoint, is refused."""

    def test_code_in_a_checkpoint_is_never_run(self):
        made = self.folder / "made by the exploit"
        exploit = Call(os.mkdir, str(made))

        def save_pickle(content, path):
            Path(path).write_bytes(pickle.dumps(content))

        for content in [
            exploit,
            {**self.good, "x": exploit},
            {**self.good, "state_dict": exploit},
            {**self.good, "hyper_parameters": {"model_name": exploit}},
        ]:
            for save in [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), save_pickle]:
                with self.subTest(content=content, save=save):
                    save(content, self.path)
                    self.assert_refused("refused" if zipfile.is_zipfile(self.path) else "not a checkpoint")
                    with self.assertRaises(checkpoints.CheckpointError):
                        checkpoints.BackgroundCheckpointIO().load_checkpoint(self.path)
                    self.assertFalse(made.exists())
        torch.save(exploit, self.path)
        torch.load(self.path, weights_only=False)
        self.assertTrue(made.exists(), "the exploit does not work")

    def test_class_paths_in_checkpoints_and_tags_in_yaml_files_run_no_code(self):
        made = self.folder / "made"
        hidden = {"_instantiator": "os.mkdir", "_class_path": str(made), **self.good["hyper_parameters"]}
        self.save(hyper_parameters=hidden, hparams_type="os.mkdir")
        self.assert_loads()
        file = self.folder / "hparams.yaml"
        file.write_text(f"model_name: !!python/object/apply:os.mkdir ['{made}']")
        with self.assertRaisesRegex(
            checkpoints.CheckpointError, "hparams.yaml cannot be read or contains no hyperparameters"
        ):
            VAE.load_from_checkpoint(self.path, hparams_file=file)
        self.assertFalse(made.exists())

    def test_other_objects_are_refused_unless_they_are_among_torchs_safe_globals(self):
        for content in [np.zeros(1), np.float64(1), Path("x"), argparse.Namespace(a=1), nn.Linear(2, 2)]:
            for weights_only in [None, False]:
                with self.subTest(content=content, weights_only=weights_only):
                    self.save(x=content)
                    self.assert_refused("refused", "GLOBAL", weights_only=weights_only)
        self.save(x=argparse.Namespace(a=1))
        with torch.serialization.safe_globals([argparse.Namespace]):
            self.assertEqual(checkpoints.read_checkpoint(self.path)["x"], argparse.Namespace(a=1))

    def test_a_damaged_checkpoint_or_another_kind_of_file_is_refused(self):
        with zipfile.ZipFile(self.path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        for content in [b"", b"nonsense", Path(__file__).read_bytes()]:
            with self.subTest(content[:10]):
                Path(self.path).write_bytes(content)
                self.assert_refused("not a checkpoint, or is damaged (File is not a zip file)")
        pickles = b"", b".", b"\x80\x02h\x05.", b"\x80\x02X\x01\0\0\0\xff.", b"\x80\x02K\x01Q."
        pickles += (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",)
        archives = [{**parts, "some/data.pkl": pickled} for pickled in pickles]
        for content in [{}, {"notes.txt": b"text"}, {"archive/data.pkl": b"text", "archive/version": b"3"}, *archives]:
            with self.subTest(content=content):
                with zipfile.ZipFile(self.path, "w") as archive:
                    for name, part in content.items():
                        archive.writestr(name, part)
                self.assert_refused()
        with self.assertRaisesRegex(checkpoints.CheckpointError, "the open file is not a checkpoint"):
            VAE.load_from_checkpoint(io.BytesIO(b"nonsense"))

    def test_a_path_that_cannot_be_read_raises_a_user_error(self):
        for path, message in [
            (self.folder, "is a folder, not a checkpoint; the checkpoint of a run is RUN/checkpoints/"),
            (f"{self.path}.not", r"some.ckpt.not cannot be read \(No such file or directory\)"),
            (f"{self.path}/x", r"cannot be read \(Not a directory\)"),
        ]:
            with self.subTest(path), self.assertRaisesRegex(UserError, message):
                VAE.load_from_checkpoint(path)

    def test_files_of_other_programs_and_weights_that_do_not_fit_are_refused(self):
        parameters, weights = self.good["hyper_parameters"], self.good["state_dict"]
        for content, part in [
            (torch.zeros(3), "of another program"),
            ([1, 2], "of another program"),
            ({}, "of another program"),
            ({"epoch": 3, "weights": [1]}, "of another program, with the keys epoch, weights: save"),
            ({"ours": weights, "ema": weights}, "of another program, with the keys ours, ema: save"),
            ({**self.good, "state_dict": [torch.zeros(3)]}, "of another program"),
            ({**self.good, "hyper_parameters": None}, "of another program"),
            ({**self.good, "hyper_parameters": {**parameters, "z_dim": 5}}, "size mismatch for encoder.net.2"),
            ({**self.good, "hyper_parameters": {**parameters, "hidden_dims": [16, 16]}}, "cannot be loaded into"),
            ({**self.good, "hyper_parameters": {**parameters, "hidden_dims": "wide"}}, "cannot be loaded into"),
            ({**self.good, "hyper_parameters": {**parameters, "z_dim": -1}}, "cannot be loaded into"),
            ({**self.good, "hyper_parameters": {**parameters, "model_name": "GAN"}}, "model_name must be"),
            ({**self.good, "state_dict": {}}, 'Missing key(s) in state_dict: "encoder.net.0.weight"'),
            ({**self.good, "state_dict": {**weights, "encoder.net.0.weight": "x"}}, "cannot be loaded into"),
        ]:
            with self.subTest(part, content=content):
                torch.save(content, self.path)
                self.assert_refused(part)

    def test_an_error_in_the_code_of_the_class_names_its_file_and_line(self):
        def init(self, **hyperparameters):
            raise AttributeError("no attribute widht")

        with mock.patch.object(VAE, "__init__", init):
            self.assert_refused("cannot be loaded into VAE (no attribute widht, ", f"{__file__}, line ")
        self.save(state_dict={})
        with self.assertRaisesRegex(checkpoints.CheckpointError, r"^((?!, line).)*$"):
            VAE.load_from_checkpoint(self.path)

    def test_out_of_memory_is_not_reported_as_damage(self):
        for error in [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]:
            with (
                self.subTest(error),
                mock.patch.object(torch, "load", side_effect=error),
                self.assertRaises(type(error)) as caught,
            ):
                VAE.load_from_checkpoint(self.path)
            self.assertIs(caught.exception, error)


class TestLoading(LoadingTest):
    """VAE.load_from_checkpoint accepts the same arguments as Lightning's."""

    def test_checkpoints_of_several_versions_of_lightning_are_loaded(self):
        for parts in [{}, {"epoch": 3, "global_step": 4, "loops": {}}, {"pytorch-lightning_version": "1.9.0"}]:
            with self.subTest(parts):
                self.save(**parts)
                self.assertEqual(self.assert_loads(), self.good["hyper_parameters"])

    def test_a_checkpoint_is_a_path_or_an_open_file(self):
        self.assert_loads(Path(self.path))
        with open(self.path, "rb") as file:
            self.assert_loads(file)
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            self.assert_loads("~/some.ckpt")

    def test_map_location_selects_the_device_of_the_tensors(self):
        locations = []

        def remember(storage, location):
            locations.append(location)
            return storage

        for place in ["cpu", torch.device("cpu"), {"cuda:0": "cpu"}, remember]:
            with self.subTest(place):
                self.assert_loads(map_location=place)
        self.assertEqual(set(locations), {"cpu"})
        with self.assertRaisesRegex(RuntimeError, "nowhere"):  # not reported as damage
            VAE.load_from_checkpoint(self.path, "nowhere")

    def test_given_hyperparameters_replace_those_of_a_file_and_of_the_checkpoint(self):
        self.save(hyper_parameters={"model_name": "MLP", "hidden_dims": [16], "num_filters": 4, "lr": 1.0, "depth": 3})
        self.assert_refused("some.ckpt contains weights without the hyperparameters z_dim: pass them to VAE.load_")
        self.assertEqual(self.assert_loads(z_dim=2).lr, 1)
        file = self.folder / "hparams.yaml"
        file.write_text("z_dim: 2\nlr: 0.25\n")
        for path in [file, str(file)]:
            self.assertEqual(self.assert_loads(hparams_file=path).lr, 0.25)
        self.assertEqual(self.assert_loads(hparams_file=file, lr=2).lr, 2)

    def test_a_bare_state_dict_needs_the_hyperparameters(self):
        torch.save(self.good["state_dict"], self.path)
        self.assert_refused("is a bare state_dict without the hyperparameters model_name, hidden_dims, num_filters")
        self.assertEqual(self.assert_loads(**self.good["hyper_parameters"]).z_dim, 2)

    def test_weights_are_found_under_the_names_that_other_programs_give_them(self):
        """Examples are the names of torch.compile, of DataParallel, or of a module that the model is a part of."""
        model, weights = VAE(**HPARAMS), self.good["state_dict"]
        model.load_state_dict(weights)
        whole = nn.ModuleDict({"vae": model, "critic": nn.Linear(2, 1)})
        partly, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters()).state_dict()
        partly.encoder = torch.compile(partly.encoder)
        for saved in [
            torch.compile(model).state_dict(),
            partly.state_dict(),
            nn.DataParallel(torch.compile(model)).state_dict(),
            torch.optim.swa_utils.AveragedModel(model).state_dict(),
            whole.state_dict(),
            {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": optimizer},
            {"model": torch.compile(whole).state_dict()},
            {"epoch": 3, "state_dict": nn.DataParallel(model).state_dict(), "arch": "vae"},
        ]:
            with self.subTest([*saved][:2]):
                torch.save(saved, self.path)
                self.assert_loads(**self.good["hyper_parameters"])
        noise = {f"ema.{name}": torch.rand_like(value) for name, value in weights.items()}
        torch.save({**noise, **weights}, self.path)  # ambiguous: the file contains two models
        self.assert_refused('Unexpected key(s) in state_dict: "ema.', **self.good["hyper_parameters"])
        torch.save({f"{part}.{name}": value for part in "ab" for name, value in weights.items()}, self.path)
        self.assert_refused("several times, as a., b.: save only one", **self.good["hyper_parameters"])
        torch.save({f"_orig_mod.{name}x": value for name, value in weights.items()}, self.path)
        missing, unexpected = (
            '"encoder.net.0.weight", "encoder',
            'Unexpected key(s) in state_dict: "encoder.net.0.weightx',
        )
        self.assert_refused(missing, unexpected, **self.good["hyper_parameters"])

    def test_other_weights_are_loaded_with_a_warning_if_strict_is_false(self):
        weights = {**self.good["state_dict"], "more": torch.zeros(1)}
        del weights["encoder.net.0.bias"]
        self.save(state_dict=weights)
        self.assert_refused("cannot be loaded into")
        with warnings.catch_warnings(record=True) as caught:
            VAE.load_from_checkpoint(self.path, strict=False)
        messages = "".join(str(warning.message) for warning in caught)
        self.assertRegex(messages, "lacks weights of the module: encoder.net.0.bias.*that the module lacks: more$")

    def test_a_subclass_gets_its_own_hyperparameters(self):
        class Other(VAE):
            def __init__(self, beta, **others):
                super().__init__(**others)
                self.beta = beta

        model = Other(beta=4, **HPARAMS)  # VAE also has a hyperparameter with the name beta
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, self.path)
        self.assertEqual(Other.load_from_checkpoint(self.path).beta, 4)

"""Tests of EpochMeans in utils.py: `python -m unittest tests/unit/test_epoch_means.py`."""

import contextlib
import copy
import io
import unittest
import warnings
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner

from harness.settings import process_settings
from tests.helpers import TrainingTest, small_loaders
from train_pl import VAE
from utils import EpochMeans


class TestEpochMeans(unittest.TestCase):
    def test_each_image_has_the_same_weight_in_a_mean_which_keeps_its_digits_in_any_precision(self):
        """A quantity may be one value per image, one value for the minibatch, or a number."""
        for dtype in [torch.float32, torch.bfloat16, torch.float64]:
            means = EpochMeans()
            self.assertEqual(means.compute(), ({}, 0))
            for size in [200] * 400 + [100]:
                ones = torch.ones(size, dtype=dtype)
                means.add({"each": 3 * ones, "batch": torch.tensor(float(size)), "number": 0.1234567}, size)
            values, num_images = means.compute()
            self.assertEqual((values["each"], num_images), (3, 400 * 200 + 100))
            self.assertAlmostEqual(values["batch"], (400 * 200**2 + 100**2) / num_images)
            self.assertAlmostEqual(values["number"], 0.1234567, places=7)
            means.reset()
            means.add({"other": 5}, 2)
            self.assertEqual(means.compute(), ({"other": 5}, 2))

    def test_names_that_change_within_an_epoch_are_an_error(self):
        means = EpochMeans()
        means.add({"a": torch.ones(2)}, 2)
        with self.assertRaisesRegex(ValueError, "this step logs b, but the previous steps logged a"):
            means.add({"b": torch.ones(2)}, 2)


class TestInTraining(TrainingTest):
    def test_a_quantity_of_another_shape_is_an_error_that_names_it(self):
        words = r"the quantity mean must .* shape \[50\], .* got shape \[50, 2\]"
        quantities = mock.patch.object(VAE, "quantities", lambda model, terms, imgs: {"mean": terms.mean})
        with quantities, self.assertRaisesRegex(ValueError, words):
            self.train(epochs=1)

    def test_metrics_of_an_epoch_do_not_depend_on_earlier_computations_in_this_process(self):
        """Examples are Lightning's search for a learning rate, and a fit that failed."""
        loader = small_loaders(self.namespace(batch_size=50))[0]
        options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=self.folder)
        options |= dict(enable_checkpointing=False, max_epochs=1, num_sanity_val_steps=0)
        self.enter(process_settings())
        warnings.filterwarnings("ignore", message="You defined a `validation_step`")

        def stop(*args):
            raise KeyError

        logged = []
        for before in ["nothing", "lr_find", "a fit that failed"]:
            torch.manual_seed(1)
            model = VAE("MLP", [16], 4, 3, 1e-3)
            if before == "lr_find":
                with contextlib.redirect_stderr(io.StringIO()):
                    Tuner(pl.Trainer(**options)).lr_find(model, loader, num_training=10, update_attr=False)
            elif before == "a fit that failed":
                weights = copy.deepcopy(model.state_dict())
                patches = dict(on_train_epoch_end=stop, quantities=lambda *args: {"bpd": torch.tensor(100.0)})
                with mock.patch.multiple(VAE, **patches), self.assertRaises(KeyError):
                    pl.Trainer(**options).fit(model, loader)
                model.load_state_dict(weights)
            trainer = pl.Trainer(**options)
            torch.manual_seed(2)
            trainer.fit(model, loader)
            logged.append(trainer.callback_metrics["train_bpd"].item())
        for value in logged[1:]:
            self.assertAlmostEqual(value, logged[0], delta=0.01)

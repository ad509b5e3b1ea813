"""Tests of train_torch.py: `python -m unittest tests/unit/test_train_torch.py`."""

import argparse
import contextlib
import copy
import io
import math
import unittest
from unittest import mock

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import train_pl
import train_torch
from bmnist import binarize
from harness.report import quiet_libraries
from sources.rendered_digits import rendered_digits
from tests.helpers import SeededTest, small_loaders, summaries

SIZES = dict(hidden_dims=[24, 16], num_filters=4, z_dim=3)
TAGS = ["BPD", "Reconstruction Loss", "Regularization Loss", "ELBO"]


class TestAgreement(SeededTest):
    """With the same weights, minibatches and noise, train_pl.py and train_torch.py do the same."""

    def setUp(self):
        quiet_libraries()
        images = binarize(rendered_digits(300)[0])
        order = torch.randperm(300)
        batches = [(images[indices], indices % 10) for indices in order.split(64)]  # the last one is smaller
        self.loader = DataLoader(batches, batch_size=None)
        self.noise = [torch.randn(len(imgs), 3) for imgs, _ in 2 * batches]

    def randn_like(self):
        """A source of the noise, which is the same each time."""
        noise = iter(self.noise)
        return lambda share: next(noise).view(share.shape)

    def with_lightning(self, model):
        """Averages of an epoch of training and of validation; the model is trained in place."""
        off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **dict.fromkeys(off, False))
        with mock.patch.object(torch, "randn_like", self.randn_like()):
            trainer.fit(model, self.loader, self.loader)
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    def with_the_loop(self, model):
        """The same of train_torch.py."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        with mock.patch.object(torch, "randn_like", self.randn_like()):
            parts = [train_torch.train_vae(model, self.loader, optimizer), train_torch.test_vae(model, self.loader)]
        names = ["bpd", "reconstruction_loss", "regularization_loss"]
        return {
            f"{stage}_{name}": part[i] for stage, part in zip(["train", "val"], parts) for i, name in enumerate(names)
        }

    def test_an_epoch(self):
        for model_name in ["MLP", "CNN"]:
            model = train_pl.VAE(model_name, lr=1e-3, **SIZES)
            loop_model = train_torch.VAE(model_name, lr=1e-3, **SIZES)
            loop_model.load_state_dict(model.state_dict())
            untrained = copy.deepcopy(model.state_dict())
            metrics, averages = self.with_lightning(model), self.with_the_loop(loop_model)
            for name, value in averages.items():
                self.assertAlmostEqual(value, metrics[name], delta=1e-5 * max(1, abs(value)), msg=name)
            weights = loop_model.state_dict()
            for name, weight in model.state_dict().items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
                self.assertFalse(torch.equal(weight, untrained[name]), name)

    def test_checkpoints_of_each_other(self):
        for model_name in ["MLP", "CNN"]:
            models = [module.VAE(model_name, lr=1e-3, **SIZES) for module in [train_pl, train_torch]]
            for model, other in [models, models[::-1]]:
                path = self.folder / "epoch.pt"
                torch.save(other.state_dict(), path)
                model.load_state_dict(torch.load(path, weights_only=True))


class TestModes(SeededTest):
    def test_layers_that_behave_differently_in_training(self):
        """BatchNorm and Dropout: trained in train mode, tested and drawn in eval mode."""
        model = train_torch.VAE("CNN", **SIZES)
        model.encoder.net.insert(1, norm := torch.nn.BatchNorm2d(4))
        model.decoder.net.append(dropout := torch.nn.Dropout())
        loader = DataLoader([(torch.rand(9, 1, 28, 28).round(), torch.zeros(9))], batch_size=None)
        train_torch.train_vae(model, loader, torch.optim.Adam(model.parameters()))
        self.assertEqual((norm.num_batches_tracked, dropout.training), (1, True))
        writer = mock.Mock(log_dir=str(self.folder))
        train_torch.sample_and_save(model, 1, writer)
        self.assertTrue(norm.training and dropout.training)
        train_torch.test_vae(model, loader)
        self.assertEqual((norm.num_batches_tracked, norm.training, dropout.training), (1, False, False))
        modes = []
        dropout.register_forward_hook(lambda *_: modes.append(dropout.training))
        model.train()
        train_torch.sample_and_save(model, 2, writer)
        self.assertEqual(modes, [False])


class TestMain(SeededTest):
    def main(self, **flags):
        """The test bpd, what was printed, and the run's folder, of a run on few digits."""
        args = argparse.Namespace(**{"z_dim": 3, "hidden_dims": [16], "log_dir": str(self.folder), **flags})
        args.dataset = "rendered"
        with (
            mock.patch.object(train_torch, "rendered_mnist", return_value=[]),
            mock.patch.object(train_torch, "data_loaders", lambda *sizes: small_loaders(args)),
            mock.patch.object(torch, "set_flush_denormal"),  # in the process of the tests
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            args.batch_size = 100
            test_bpd = train_torch.main(args)
        return test_bpd, output.getvalue(), max(self.folder.iterdir())

    def test_what_a_run_leaves(self):
        test_bpd, output, folder = self.main(epochs=5, z_dim=2)
        self.assertRegex(folder.name, r"^\d{4}(_\d\d){5}$")
        pictures = {f"epoch_{epoch}_{name}.png" for epoch in [0, 5] for name in ["samples", "means"]}
        files = {
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "events" not in path.name
        }
        self.assertEqual(files, {*pictures, "vae_manifold.png", "checkpoints/epoch.pt"})
        lines = output.splitlines()
        self.assertEqual(lines[5:], [f"test bpd {test_bpd:.4f}", f"run folder {folder}"])
        curves = {}
        for curve in folder.iterdir():
            if curve.is_dir() and curve.name != "checkpoints":
                (tag,) = {summary.tag for _, summary in summaries(curve)}
                values = [(step, summary.tensor.float_val[0]) for step, summary in summaries(curve)]
                curves[tag, curve.name.rpartition("_")[2]] = dict(values)
        self.assertEqual(set(curves), {(tag, name) for tag in TAGS for name in ["train", "val"]} | {("BPD", "test")})
        self.assertEqual([list(curve) for key, curve in curves.items() if key[1] != "test"], 8 * [[1, 2, 3, 4, 5]])
        self.assertEqual(list(curves["BPD", "test"]), [5])
        for epoch, line in enumerate(lines[:5], 1):
            train, val = curves["BPD", "train"][epoch], curves["BPD", "val"][epoch]
            self.assertEqual(line, f"epoch   {epoch}/5  train bpd {train:.4f}  val bpd {val:.4f}")
            losses = [curves[tag, "val"][epoch] for tag in TAGS[1:]]
            self.assertAlmostEqual(losses[0] + losses[1], losses[2], places=3)
            self.assertAlmostEqual(losses[2] / math.log(2) / 784, val, places=5)
        images = [(step, summary.tag) for step, summary in summaries(folder)]
        self.assertEqual(images, [(step, tag) for step in [0, 5] for tag in ["samples", "means"]])

    def test_the_epoch_with_the_lowest_validation_bpd_is_tested(self):
        bpds, tested = iter([0.5, 0.3, 0.4]), []

        def train_vae(model, train_loader, optimizer):
            with torch.no_grad():
                model.decoder.net[0].bias += 1
            return 0.5, 0.0, 0.0

        def test_vae(model, data_loader):
            tested.append(model.decoder.net[0].bias[0].item())
            return next(bpds, 0.35), 0.0, 0.0

        with mock.patch.multiple(train_torch, train_vae=train_vae, test_vae=test_vae):
            test_bpd, _, folder = self.main(epochs=3)
        self.assertEqual((test_bpd, tested[3]), (0.35, tested[1]))
        weights = torch.load(folder / "checkpoints" / "epoch.pt", weights_only=True)
        self.assertEqual(weights["decoder.net.0.bias"][0].item(), tested[1])

    def test_the_same_seed_gives_the_same_run(self):
        first, _, _ = self.main(epochs=1)
        self.assertEqual(self.main(epochs=1)[0], first)
        self.assertNotEqual(self.main(epochs=1, seed=43)[0], first)

    def test_two_runs_in_one_second(self):
        (self.folder / "1" / "checkpoints").mkdir(parents=True)
        with mock.patch.object(train_torch.time, "strftime", side_effect=["1", "1", "2"]):
            self.assertEqual(self.main(epochs=1)[2].name, "2")
        self.assertEqual([path.name for path in (self.folder / "1").rglob("*")], ["checkpoints"])

    def test_flags_of_no_use(self):
        for flags in [dict(z_dim=0), dict(hidden_dims=[3, 0]), dict(lr=math.nan), dict(epochs=-1), dict(num_filters=0)]:
            with self.assertRaisesRegex(ValueError, f"--{next(iter(flags))} must be above 0, got "):
                self.main(**flags)
        self.assertEqual(list(self.folder.iterdir()), [])
        with self.assertRaisesRegex(ValueError, "model_name must be 'MLP' or 'CNN', got 'RNN'"):
            self.main(model="RNN")

    def test_a_loss_that_is_not_finite(self):
        with self.assertRaisesRegex(ValueError, "the loss of epoch 1 is not finite: try a smaller --lr"):
            self.main(epochs=2, lr=1e30)


class TestFlags(unittest.TestCase):
    def test_those_of_train_pl(self):
        """With its defaults; the assignment's, and where the data is."""
        flags = vars(train_torch.parser.parse_args([]))
        numbers = {"z_dim", "hidden_dims", "num_filters", "lr", "batch_size", "epochs", "seed", "num_workers"}
        self.assertEqual(set(flags), {*numbers, "model", "log_dir", "progress_bar", "dataset", "data_dir"})
        for name, default in flags.items():
            self.assertEqual(default, train_pl.make_parser().defaults[name], name)


if __name__ == "__main__":
    unittest.main()

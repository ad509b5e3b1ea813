"""
Tests of train_torch.py, in addition to the assignment's contract in unittests.py: `python -m unittest
tests/unit/test_train_torch.py`.
"""

import argparse
import contextlib
import io
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch

import train_pl
import train_torch
from tests.helpers import SeededTest, small_loaders, summaries

SIZES = dict(hidden_dims=[24, 16], num_filters=4, z_dim=3)
TAGS = ["BPD", "Reconstruction Loss", "Regularization Loss", "ELBO"]


class TestTraining(SeededTest):
    def test_an_epoch_changes_the_weights_as_train_pl_does(self):
        batches = [(torch.rand(size, 1, 28, 28).round(), torch.zeros(size)) for size in [8, 8, 4]]
        for model_name in ["MLP", "CNN"]:
            model, other = (program.VAE(model_name, lr=1e-3, **SIZES) for program in [train_pl, train_torch])
            other.load_state_dict(model.state_dict())
            torch.manual_seed(1)
            optimizer = model.configure_optimizers()
            for batch in batches:
                optimizer.zero_grad()
                model.training_step(batch, 0)["loss"].backward()
                optimizer.step()
            torch.manual_seed(1)
            train_torch.train_vae(other, batches, torch.optim.Adam(other.parameters(), lr=1e-3))
            torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=1e-6)

    def test_batch_norm_and_dropout_train_in_train_mode_and_are_tested_and_sampled_in_eval_mode(self):
        model, modes = train_torch.VAE("CNN", **SIZES), []
        model.encoder.net.insert(1, norm := torch.nn.BatchNorm2d(4))
        model.decoder.net.append(dropout := torch.nn.Dropout())
        dropout.register_forward_hook(lambda *_: modes.append(dropout.training))
        batches, writer = [(torch.rand(9, 1, 28, 28).round(), torch.zeros(9))], mock.Mock(log_dir=str(self.folder))
        train_torch.train_vae(model, batches, torch.optim.Adam(model.parameters()))
        train_torch.sample_and_save(model, 1, writer)
        self.assertTrue(norm.training and dropout.training)
        train_torch.test_vae(model, batches)
        self.assertEqual((norm.num_batches_tracked, norm.training, modes), (1, True, [True, False, False]))


class TestMain(SeededTest):
    def main(self, **flags):
        """Trains on few digits. Returns the test bpd, the output, and the run's folder."""
        flags = {"z_dim": 3, "hidden_dims": [16], "batch_size": 100, **flags}
        flags["log_dir"] = flags.get("log_dir") or tempfile.mkdtemp(dir=self.folder)
        args = argparse.Namespace(dataset="rendered", **flags)
        with (
            mock.patch.object(train_torch, "rendered_mnist", return_value=[]),
            mock.patch.object(train_torch, "data_loaders", lambda *sizes: small_loaders(args)),
            mock.patch.object(torch, "set_flush_denormal"),  # it would affect the other tests
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            test_bpd = train_torch.main(args)
        return test_bpd, output.getvalue(), max(Path(args.log_dir).iterdir())

    def test_a_run_writes_pictures_a_checkpoint_and_curves_into_its_folder(self):
        test_bpd, output, folder = self.main(epochs=5, z_dim=2)
        self.assertRegex(folder.name, r"^\d{4}(_\d\d){5}$")
        pictures = {f"epoch_{epoch}_{name}.png" for epoch in [0, 5] for name in ["samples", "means"]}
        self.assertEqual({path.name for path in folder.rglob("*.p*")}, {*pictures, "vae_manifold.png", "epoch.pt"})
        lines, curves = output.splitlines(), {}
        self.assertEqual(lines[5:], [f"test bpd {test_bpd:.4f}", f"run folder {folder}"])
        for curve in folder.iterdir():
            if curve.is_dir() and curve.name != "checkpoints":
                values = [(summary.tag, step, summary.tensor.float_val[0]) for step, summary in summaries(curve)]
                curves[values[0][0], curve.name.rpartition("_")[2]] = {step: value for _, step, value in values}
        self.assertEqual({*curves}, {(tag, name) for tag in TAGS for name in ["train", "val"]} | {("BPD", "test")})
        self.assertEqual(list(curves["BPD", "test"]), [5])
        for epoch, line in enumerate(lines[:5], 1):
            train, val = curves["BPD", "train"][epoch], curves["BPD", "val"][epoch]
            self.assertEqual(line, f"epoch   {epoch}/5  train bpd {train:.4f}  val bpd {val:.4f}")
            L_rec, L_reg, elbo = (curves[tag, "val"][epoch] for tag in TAGS[1:])
            self.assertAlmostEqual(L_rec + L_reg, elbo, places=3)
            self.assertGreater(L_rec, L_reg)
            self.assertAlmostEqual(elbo / math.log(2) / 784, val, places=5)
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

    def test_a_run_that_starts_in_the_same_second_as_another_run_waits(self):
        (self.folder / "1" / "checkpoints").mkdir(parents=True)
        with mock.patch.object(train_torch.time, "strftime", side_effect=["1", "1", "2"]):
            self.assertEqual(self.main(epochs=1, log_dir=str(self.folder))[2].name, "2")
        self.assertEqual([path.name for path in (self.folder / "1").rglob("*")], ["checkpoints"])

    def test_an_invalid_flag_is_a_value_error_before_anything_is_written(self):
        for name, value in dict(z_dim=0, hidden_dims=[3, 0], lr=math.nan, epochs=-1, num_filters=0).items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"--{name} must be a finite number above 0"):
                self.main(**{name: value, "log_dir": str(self.folder)})
        self.assertEqual(list(self.folder.iterdir()), [])
        with self.assertRaisesRegex(ValueError, "model_name must be 'MLP' or 'CNN', got 'RNN'"):
            self.main(model="RNN")

    def test_a_loss_that_is_not_finite_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "the loss of epoch 1 is not finite: try a smaller --lr"):
            self.main(epochs=2, lr=1e30)

    def test_every_flag_has_the_same_name_and_default_as_in_train_pl(self):
        for name, default in vars(train_torch.parser.parse_args([])).items():
            self.assertEqual(default, train_pl.make_parser().defaults[name], name)

"""Tests of train_pl.py: `python -m unittest tests/unit/test_train_pl.py`."""

import argparse
import contextlib
import copy
import io
import math
import os
import types
import unittest
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributions as D
from torch.utils.data import DataLoader, TensorDataset

import bmnist
import train_pl
from harness import processes, report, run
from harness.report import quiet_libraries
from tests.helpers import (
    REPOSITORY,
    SeededTest,
    TrainingTest,
    load,
    metrics,
    results,
    scalars_and_images,
    small_loaders,
)
from train_pl import TITLES, VAE, GenerateCallback, Terms, train_vae

BPD = 1 / math.log(2) / 784  # bits per dimension in a nat of an image


def known_terms(L_rec, L_reg):
    """What VAE.terms returns for losses [B]."""
    return Terms(L_rec, L_reg, L_rec + L_reg, *[None] * 4)


class TestVAE(SeededTest):
    def models(self, **hyperparameters):
        """A model of each kind."""
        defaults = dict(hidden_dims=[32], num_filters=4, z_dim=5, lr=1e-3)
        for model_name in ["MLP", "CNN"]:
            yield VAE(model_name, **{**defaults, **hyperparameters})

    def test_losses_are_the_negative_elbo_of_each_image(self):
        imgs = torch.rand(6, 1, 28, 28).round()
        for model in self.models():
            torch.manual_seed(1)
            terms = model.terms(imgs)
            torch.manual_seed(1)
            mean, log_std = model.encoder(imgs)
            posterior = D.Normal(mean, log_std.exp())
            z = posterior.rsample()
            logits = model.decoder(z)
            log_likelihood = D.Bernoulli(logits=logits).log_prob(imgs).sum(dim=(1, 2, 3))
            kl = D.kl_divergence(posterior, D.Normal(0.0, 1.0)).sum(dim=1)
            expected = known_terms(-log_likelihood, kl)[:3]
            torch.testing.assert_close(terms[:3], expected)
            torch.testing.assert_close(terms[3:], (mean, log_std, z.unsqueeze(1), logits.unsqueeze(1)))

    def test_predict(self):
        """The posterior of a batch, by Lightning's predict, of the loaders and of images alone."""
        loader = small_loaders(argparse.Namespace(batch_size=20))[2]
        images = DataLoader(TensorDataset(loader.dataset[torch.arange(50)][0]), batch_size=20)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        quiet_libraries()
        for model in self.models():
            expected = model.encoder(images.dataset[:][0])
            for data in [loader, images]:
                found = map(torch.cat, zip(*trainer.predict(model, data)))
                torch.testing.assert_close(tuple(found), tuple(part.detach() for part in expected))

    def test_hyperparameters_and_optimizer(self):
        for model in self.models(lr=0.03):
            own = {"img_size", "beta", "objective", "train_samples"}  # beside the assignment's
            self.assertEqual(set(model.hparams) - own, {"model_name", "hidden_dims", "num_filters", "z_dim", "lr"})
            optimizer = model.configure_optimizers()
            self.assertIsInstance(optimizer, torch.optim.Adam)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.03)
        with self.assertRaisesRegex(ValueError, "'MLP' or 'CNN'"):
            VAE("RNN", [512], 32, 20, 1e-3)


class TestGenerateCallback(SeededTest):
    def setUp(self):
        self.writer = mock.Mock()
        logger = types.SimpleNamespace(experiment=self.writer, log_dir=str(self.folder))
        self.trainer = types.SimpleNamespace(logger=logger, current_epoch=0)

    def pictures(self):
        """{(tag, epoch): picture} of all that went to TensorBoard."""
        return {(call.args[0], call.args[2]): call.args[1] for call in self.writer.add_image.call_args_list}

    def test_rhythm_and_tags(self):
        for z_dim, tags in [(3, {"Samples", "Means"}), (2, {"Samples", "Means", "Manifold"})]:
            self.writer.reset_mock()
            callback, model = GenerateCallback(), VAE("MLP", [8], 32, z_dim, 1e-3)
            callback.sample_and_save(self.trainer, model, epoch=0)
            for self.trainer.current_epoch in range(12):
                callback.on_train_epoch_end(self.trainer, model)
            self.assertEqual(set(self.pictures()), {(tag, epoch) for tag in tags for epoch in [0, 5, 10]})
            for (tag, _), picture in self.pictures().items():
                self.assertEqual(picture.shape, (3, 602, 602) if tag == "Manifold" else (3, 242, 242))
        self.assertEqual(os.listdir(self.folder), [])

    def test_files(self):
        callback = GenerateCallback(save_to_disk=True)
        callback.imgs = torch.zeros(32, 1, 28, 28)
        callback.sample_and_save(self.trainer, VAE("CNN", [8], 4, 3, 1e-3), epoch=10)
        names = {f"epoch_10_{name}.png" for name in ["samples", "means", "reconstructions"]}
        self.assertEqual(set(os.listdir(self.folder)), names)

    def test_reconstructions_are_beside_their_originals(self):
        callback, model = GenerateCallback(), VAE("MLP", [8], 32, 3, 1e-3)
        callback.imgs = imgs = torch.bernoulli(torch.full((32, 1, 28, 28), 0.1))
        callback.sample_and_save(self.trainer, model, epoch=0)
        grid = self.pictures()["Reconstructions", 0]
        with torch.no_grad():
            expected = torch.sigmoid(model.decoder(model.encoder(imgs)[0]))
        self.assertTrue(torch.equal(grid[0, 2:30, 2:30], imgs[0, 0]))
        self.assertTrue(torch.equal(grid[0, 2:30, 32:60], expected[0, 0]))
        self.assertTrue(torch.equal(grid[0, 32:60, 2:30], imgs[4, 0]))

    def test_same_latents_and_no_trace_in_the_random_numbers(self):
        callback, model = GenerateCallback(batch_size=4), VAE("MLP", [8], 32, 3, 1e-3)
        state = torch.get_rng_state()
        for epoch in [1, 2]:
            callback.sample_and_save(self.trainer, model, epoch)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            torch.rand(1)
            state = torch.get_rng_state()
        pictures = self.pictures()
        self.assertTrue(torch.equal(pictures["Samples", 1], pictures["Samples", 2]))

    def test_in_eval_mode_and_the_modes_put_back(self):
        """Of layers that behave differently in training: what they keep stays, and the pictures repeat themselves."""
        model = VAE("CNN", [8], 4, 2, 1e-3)
        for net in [model.encoder.net, model.decoder.net]:
            net.insert(1, torch.nn.BatchNorm2d(net[0].out_channels) if net is model.encoder.net else torch.nn.Dropout())
        model.encoder(torch.rand(9, 1, 28, 28))  # some statistics
        model.decoder.net.eval()
        kept, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
        self.assertEqual({*modes}, {True, False})
        callback = GenerateCallback(save_to_disk=False)
        callback.imgs = torch.rand(4, 1, 28, 28).round()
        for epoch in [1, 2]:
            callback.sample_and_save(self.trainer, model, epoch)
        torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
        self.assertEqual([part.training for part in model.modules()], modes)
        pictures = self.pictures()
        for name in ["Samples", "Means", "Reconstructions", "Manifold"]:
            self.assertTrue(torch.equal(pictures[name, 1], pictures[name, 2]), name)
        with mock.patch.object(VAE, "sample", side_effect=ZeroDivisionError), contextlib.redirect_stderr(io.StringIO()):
            callback.sample_and_save(self.trainer, model, 3)
        self.assertEqual([part.training for part in model.modules()], modes)


class TestFlags(TrainingTest):
    def test_flags_and_defaults(self):
        defaults = dict(model="MLP", z_dim=20, hidden_dims=[512], num_filters=32, lr=1e-3, batch_size=128, epochs=80)
        defaults.update(seed=42, num_workers=0, log_dir="VAE_logs", progress_bar=False, dataset="mnist", init="pytorch")
        defaults.update(data_dir="../data/", binarization="threshold", train_size=45_000, lr_schedule="constant")
        defaults.update(accelerator="auto", no_cuda_graph=False, run_name=None, devices=1, num_nodes=1)
        defaults.update(precision="32", threads="auto", beta=1.0, beta_warmup=0, objective="elbo", train_samples=1)
        self.assertEqual(vars(train_pl.make_parser().parse_args([])), defaults)

    def test_bad_flags(self):
        log_dir = self.folder / "logs"
        for flags in [
            *("--z_dim 0", "--hidden_dims -3", "--hidden_dims 512 0", "--hidden_dims", "--lr nan", "--lr 0"),
            *("--lr inf", "--batch_size 0", "--epochs -1", "--epochs 0", "--num_filters 0", "--num_workers -1"),
            *("--seed -1", "--seed 4294967296", "--devices 0", "--num_nodes 0", "--batch_size 7 --devices 2"),
            *("--run_name ..", "--init he --model CNN", "--z_dim two", "--model RNN", "--dataset cifar"),
            *("--train_size 50000", "--no_such_flag"),
        ]:
            code, message = self.main(*flags.split(), "--log_dir", str(log_dir))
            self.assertEqual(code, 2, flags)
            self.assertRegex(message, r"^train_pl.py: error: .*\n\Z")
            self.assertIn(flags.split()[0], message)
        for name, value in dict(z_dim=0, hidden_dims=[], lr=float("nan"), model="RNN", zdim=2, run_name="a\n").items():
            with self.assertRaisesRegex(ValueError, f"--{name} "):
                train_vae(self.namespace(log_dir=str(log_dir), **{name: value}))
        self.assertFalse(log_dir.exists())

    def test_other_errors_are_one_line(self):
        log_dir = self.folder / "logs"
        with mock.patch.object(train_pl, "load_data", mock.Mock(side_effect=bmnist.DataError("no data"))):
            self.assertEqual(self.main("--log_dir", str(log_dir)), (1, "train_pl.py: error: no data"))
        if not torch.cuda.is_available():
            code, message = self.main("--accelerator", "gpu", "--log_dir", str(log_dir))
            self.assertEqual((code, message.count("\n")), (1, 0))
        self.assertFalse(log_dir.exists())
        log_dir.touch()
        code, message = self.main("--log_dir", str(log_dir))
        self.assertEqual(code, 1)
        self.assertRegex(message, "cannot write to .*logs/lightning_logs .Not a directory.; choose another --log_dir")


class TestTraining(TrainingTest):
    def namespace(self, **flags):
        return super().namespace(**{"z_dim": 3, **flags})  # without a manifold, which takes its time

    def test_epoch_means_weigh_every_image_alike(self):
        """The last minibatch of an epoch is smaller: 44 of 300 images."""

        def terms(model, imgs, num_samples=1):
            loss = model.decoder.net[0].bias[0] * 0 + torch.full((len(imgs),), len(imgs) * (model.current_epoch + 1.0))
            return known_terms(loss, 3 * loss)

        with mock.patch.object(VAE, "terms", terms):
            folder, _ = self.train(epochs=2)
        for epoch, row in enumerate(metrics(folder)[1:], start=1):  # of its own images alone
            for stage, mean in [("train", epoch * (2 * 128**2 + 44**2) / 300), ("val", epoch * 50)]:
                for name, factor in [("reconstruction_loss", 1), ("regularization_loss", 3), ("ELBO", 4)]:
                    self.assertAlmostEqual(float(row[f"{stage}_{name}"]), factor * mean, places=3)
                self.assertAlmostEqual(float(row[f"{stage}_bpd"]), 4 * mean * BPD, places=6)

    def test_checkpoints(self):
        """best.ckpt is that of the lowest validation bpd and is what is tested; last.ckpt is the last epoch's."""

        def log_val_bpd(model):
            model.log("val_bpd", abs(model.current_epoch - 1.5) if model.trainer.state.fn == "fit" else 0.1)

        with mock.patch.object(VAE, "on_validation_epoch_end", log_val_bpd):
            folder, _ = self.train(epochs=4, model="CNN")
        best, last = load(folder, "best"), load(folder, "last")
        self.assertEqual((best["epoch"], last["epoch"]), (1, 3))
        self.assertEqual(results(folder)["best_epoch"], 2)
        model = VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt")
        self.assertEqual(list(best["state_dict"]), [name for name, _ in model.named_parameters()])
        hyperparameters = dict(model_name="CNN", hidden_dims=[16], num_filters=4, z_dim=3, lr=1e-3)
        self.assertEqual({name: model.hparams[name] for name in hyperparameters}, hyperparameters)
        self.assertAlmostEqual(results(folder)["test_bpd"], self.bpd_of_test_set(model), places=5)

    def bpd_of_test_set(self, model):
        """The test bpd of a model, with the noise of a run's test."""
        imgs, _ = small_loaders(self.namespace())[2].dataset[torch.arange(50)]
        torch.manual_seed(processes.derived_seed(42))
        with torch.no_grad():
            return model(imgs)[2].item()

    def test_the_loss_is_apart_from_the_metrics(self):
        """Four times the KL divergence is minimised; what is logged, selects and is tested is the ELBO."""
        terms, seen = VAE.terms, {}

        def watched_terms(model, imgs, num_samples=1):
            found = terms(model, imgs)
            L_rec, L_reg = found.L_rec, found.L_reg
            stage, epoch = "train" if model.training else model.trainer.state.fn.value, model.current_epoch + 1
            if stage == "fit":  # validation: by the ELBO epoch 2 is the best, with four times the divergence epoch 3
                L_rec, L_reg = L_rec + [6000, 0, 3000][epoch - 1], L_reg + [0, 2000, 0][epoch - 1]
            sums = torch.tensor([len(imgs), L_rec.sum(), L_reg.sum()])
            seen.setdefault((stage, epoch), []).append(sums)
            return found._replace(L_rec=L_rec, L_reg=L_reg, loss=L_rec + 4 * L_reg)

        flags = dict(epochs=3, lr=0.01)
        plain_folder, _ = self.train(**flags)
        with mock.patch.object(VAE, "terms", watched_terms):
            folder, _ = self.train(**flags)
        for epoch, row in enumerate(metrics(folder)[1:], start=1):
            for logged, stage in [("train", "train"), ("val", "fit")]:
                num_imgs, L_rec, L_reg = torch.stack(seen[stage, epoch]).sum(dim=0).tolist()
                bpd = (L_rec + L_reg) / num_imgs * BPD
                self.assertAlmostEqual(float(row[f"{logged}_bpd"]), bpd, places=5)
                self.assertAlmostEqual(float(row[f"{logged}_regularization_loss"]), L_reg / num_imgs, places=3)
        first_step = seen["train", 1][0][1:].sum().item() / 128 * BPD
        self.assertAlmostEqual(results(folder)["first_step_bpd"], first_step, places=5)
        self.assertEqual((results(folder)["best_epoch"], load(folder, "best")["epoch"] + 1), (2, 2))
        best = VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt")
        self.assertAlmostEqual(results(folder)["test_bpd"], self.bpd_of_test_set(best), places=5)
        divergences = [float(metrics(run)[3]["train_regularization_loss"]) for run in [folder, plain_folder]]
        self.assertLess(divergences[0], divergences[1] / 2)

    def test_one_more_quantity(self):
        """A line in VAE.quantities, as the README says, which may use anything of the step."""
        source = (REPOSITORY / "train_pl.py").read_text()
        line = '            "bpd": elbo_to_bpd(neg_elbo, imgs.shape),\n'
        self.assertEqual(source.count(line), 1)
        new = '            "squared_loss": terms.L_rec**2,\n            "batch": len(imgs),\n'
        new += '            "KL_of_z0": KLD(terms.mean[:, :1], terms.log_std[:, :1]),\n'
        new += '            "active": (terms.mean.var(dim=0) > 0.01).sum(),\n'
        source = source.replace(line, line + new)
        changed = types.ModuleType("changed")
        exec(compile(source, "changed", "exec"), vars(changed))
        changed.load_data = small_loaders

        terms = changed.VAE.terms

        def known_losses(model, imgs, num_samples=1):
            L_rec = model.decoder.net[0].bias[0] * 0 + torch.full((len(imgs),), len(imgs) / 10)
            return terms(model, imgs)._replace(L_rec=L_rec, loss=L_rec)

        changed.VAE.terms = known_losses
        with contextlib.redirect_stdout(io.StringIO()):
            changed.train_vae(self.namespace(accelerator="cpu", epochs=1))
        folder = self.run_folder()
        row = metrics(folder)[1]
        self.assertAlmostEqual(float(row["train_squared_loss"]), (256 * 12.8**2 + 44 * 4.4**2) / 300, places=3)
        self.assertAlmostEqual(float(row["train_batch"]), (256 * 128 + 44 * 44) / 300, places=3)
        self.assertAlmostEqual(float(row["val_squared_loss"]), 25, places=3)
        self.assertTrue(0 < float(row["val_KL_of_z0"]) < float(row["val_regularization_loss"]))
        self.assertTrue(0 <= float(row["val_active"]) <= 3)
        new = ["KL_of_z0", "active", "batch", "squared_loss"]
        self.assertEqual(
            list(row)[1:],
            [f"{stage}_{name}" for names in [TITLES, new] for stage in ["train", "val"] for name in names],
        )
        steps = {step for tag, step, _ in scalars_and_images(folder) if tag == "val_squared_loss"}
        self.assertEqual(steps, {0, 1})

    def test_initial_weights(self):
        with mock.patch.object(train_pl, "he_init") as init:
            self.train(epochs=1)
            init.assert_not_called()
            self.train(epochs=1, init="he")
        self.assertEqual([net[0].in_features for (net,), _ in init.call_args_list], [784, 3])

    def test_same_seed_same_weights(self):
        def weights(**flags):
            folder, _ = self.train(epochs=2, **flags)
            return load(folder, "last")["state_dict"].values()

        first = list(weights())
        self.assertTrue(all(map(torch.equal, first, weights())))
        self.assertTrue(all(map(torch.equal, first, weights(num_workers=2))))
        self.assertFalse(all(map(torch.equal, first, weights(seed=43))))

    def test_loss_that_is_not_finite(self):
        terms = VAE.terms
        for value in [float("nan"), float("inf")]:

            def diverge(model, imgs, num_samples=1, value=value):
                found = terms(model, imgs)
                return found._replace(L_rec=found.L_rec + (value if model.training and model.current_epoch == 2 else 0))

            with (
                mock.patch.object(VAE, "terms", diverge),
                self.assertRaisesRegex(report.TrainingDiverged, r"^train_bpd became \w+ in epoch 3.* --lr"),
            ):
                self.train()
            last = load(self.run_folder(), "last")
            self.assertEqual(last["epoch"], 1)
            self.assertTrue(all(weight.isfinite().all() for weight in last["state_dict"].values()))
        with self.assertRaisesRegex(report.TrainingDiverged, r"in epoch 1: try .*no checkpoint was written"):
            self.train(lr=1e30)

    def test_training_minimises_the_bpd(self):
        imgs, model = torch.rand(6, 1, 28, 28).round(), VAE("MLP", [8], 4, 3, 1e-3)
        torch.manual_seed(1)
        _, _, bpd = model(imgs)
        torch.manual_seed(1)
        outputs = model.training_step((imgs, None), 0)
        torch.testing.assert_close((outputs["loss"], outputs["bpd"]), (bpd, bpd))
        outputs["loss"].backward()
        self.assertTrue(all(parameter.grad.any() for parameter in model.parameters()))

    def test_everything_is_logged_once_per_epoch(self):
        """A call of self.log in every step would cost a third of the time."""
        log, logged = VAE.log, []

        def count(model, name, *args, **kwargs):
            logged.append(name)
            log(model, name, *args, **kwargs)

        with mock.patch.object(VAE, "log", count):
            self.train(epochs=2)  # of three minibatches each; validated before the first one, too
        for name in TITLES:
            self.assertEqual((logged.count(f"train_{name}"), logged.count(f"val_{name}")), (2, 3))

    def test_progress_bar(self):
        """On a terminal; in a file the lines of the epochs are there instead."""
        with mock.patch.object(run, "shows_bar", lambda args: args.progress_bar):
            _, output = self.train(epochs=1, progress_bar=True)
        self.assertRegex(output, r"Epoch 0: 100%.*val_bpd")
        self.assertNotIn("epoch   1/1", output)
        _, output = self.train(epochs=1, progress_bar=True)
        self.assertNotIn("Epoch 0", output)
        self.assertIn("epoch   1/1", output)

    def test_progress_bar_where_rich_is_installed(self):
        """Lightning would take its bar then."""
        connector = "pytorch_lightning.trainer.connectors.callback_connector"
        with (
            mock.patch(f"{connector}._RICH_AVAILABLE", True, create=True),  # Lightning 2.5 does not look for it
            mock.patch(f"{connector}.RichProgressBar", mock.Mock(side_effect=AssertionError)),
            mock.patch.object(run, "shows_bar", lambda args: args.progress_bar),
        ):
            _, output = self.train(epochs=1, progress_bar=True)
        self.assertRegex(output, r"Epoch 0: 100%.*val_bpd")


if __name__ == "__main__":
    unittest.main()

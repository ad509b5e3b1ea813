"""
Tests of train_pl.py, except class VAE, in addition to the assignment's contract in unittests.py: `python -m unittest
tests/unit/test_train_pl.py`.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import types
from unittest import mock

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint

import bmnist
import train_pl
from harness import processes, report, trainer
from harness.errors import UserError
from harness.folder import RunError
from tests.helpers import (
    NamedRunTest,
    SeededTest,
    TrainingTest,
    assert_left_the_same,
    load,
    metrics,
    printed_lines,
    results,
    scalars_and_images,
    small_loaders,
)
from train_pl import CHART_TITLES, VAE, GenerateCallback, train_vae
from utils import visualize_manifold as manifold

BPD = 1 / math.log(2) / 784  # bits per dimension in a nat of an image


class TestGenerateCallback(SeededTest):
    def setUp(self):
        self.writer = mock.Mock()
        logger = types.SimpleNamespace(experiment=self.writer, log_dir=str(self.folder))
        self.trainer = types.SimpleNamespace(logger=logger, loggers=[logger], current_epoch=0)

    def pictures(self):
        """Returns everything that was written to TensorBoard, as {(tag, epoch): picture}."""
        return {(call.args[0], call.args[2]): call.args[1] for call in self.writer.add_image.call_args_list}

    def test_the_manifold_of_two_latents_and_the_reconstructions_of_given_images_are_shown(self):
        model, callback = VAE("CNN", [8], 4, 2, 1e-3), GenerateCallback(save_to_disk=True)
        callback.imgs = imgs = torch.bernoulli(torch.full((32, 1, 28, 28), 0.1))
        callback.sample_and_save(self.trainer, model, epoch=5)
        shapes = {name: (*picture.shape,) for name, picture in self.pictures().items()}
        names = [("Samples", 5), ("Means", 5), ("Reconstructions", 5)]
        self.assertEqual(shapes, dict.fromkeys(names, (3, 242, 242)) | {("Manifold", 5): (3, 602, 602)})
        self.assertEqual({*os.listdir(self.folder)}, {f"epoch_5_{name.lower()}.png" for name, _ in names})
        grid = self.pictures()["Reconstructions", 5][0]
        with torch.no_grad():
            expected = torch.sigmoid(model.decoder(model.encoder(imgs)[0]))
        found = torch.stack([grid[2:30, 2:30], grid[2:30, 32:60], grid[32:60, 2:30]])
        torch.testing.assert_close(found, torch.stack([imgs[0, 0], expected[0, 0], imgs[4, 0]]))

    def test_pictures_are_reproducible_and_do_not_affect_the_modes_of_layers_or_the_training(self):
        """They are computed in eval mode, from the same latents in each epoch, with separate random numbers."""
        model = VAE("CNN", [8], 4, 2, 1e-3)
        model.encoder.net.insert(1, torch.nn.BatchNorm2d(4))
        model.decoder.net.insert(1, torch.nn.Dropout())
        model.encoder(torch.rand(9, 1, 28, 28))  # some statistics
        model.decoder.net.eval()
        callback, kept = GenerateCallback(), copy.deepcopy(model.state_dict())
        modes = [part.training for part in model.modules()]
        callback.imgs = torch.rand(4, 1, 28, 28).round()
        for epoch in [1, 2]:
            torch.rand(1)
            state = torch.get_rng_state()
            callback.sample_and_save(self.trainer, model, epoch)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            self.assertEqual([part.training for part in model.modules()], modes)
        torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
        pictures = self.pictures()
        for name in ["Samples", "Means", "Reconstructions", "Manifold"]:
            self.assertTrue(torch.equal(pictures[name, 1], pictures[name, 2]), name)
        with mock.patch.object(VAE, "sample", side_effect=ZeroDivisionError), contextlib.redirect_stderr(io.StringIO()):
            callback.sample_and_save(self.trainer, model, 3)
        self.assertEqual([part.training for part in model.modules()], modes)

    def test_samples_reconstructions_and_the_manifold_use_eval_mode_even_if_the_module_is_in_training_mode(self):
        model, imgs = VAE("CNN", [8], 4, 2, 1e-3).train(), torch.rand(4, 1, 28, 28).round()
        model.encoder.net.insert(1, torch.nn.BatchNorm2d(4))
        model.decoder.net.append(torch.nn.Dropout(0.9))
        kept = copy.deepcopy(model.state_dict())
        for picture in [lambda: model.sample(4)[1], lambda: model.reconstruct(imgs), lambda: manifold(model.decoder)]:
            pictures = []
            for _ in range(2):
                torch.manual_seed(1)
                pictures.append(picture())
                torch.rand(1)
            self.assertTrue(torch.equal(*pictures))
            self.assertLess((pictures[0] == 0.5).float().mean(), 0.5)
        self.assertTrue(all(part.training for part in model.modules()))
        torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


class TestFlags(TrainingTest):
    def test_an_invalid_flag_is_named_in_one_line_with_exit_code_2(self):
        for command in [
            *("--z_dim 0", "--z_dim two", "--hidden_dims 512 0", "--hidden_dims", "--num_filters 0", "--lr 0"),
            *("--lr inf", "--batch_size 0", "--batch_size 7 --devices 2", "--epochs 0", "--num_workers -1"),
            *("--seed -1", "--seed 4294967296", "--devices 0", "--num_nodes 0", "--run_name .."),
            *("--init he --model CNN", "--model RNN", "--dataset cifar", "--train_size 50000", "--beta -1"),
            *("--beta_warmup -1", "--train_samples 0", "--no_such_flag", "--objective vae"),
            *("--objective iwae --beta 2", "--objective iwae --beta_warmup 2"),
        ]:
            with self.subTest(command):
                code, message = self.main(*command.split(), "--log_dir", str(self.folder / "logs"))
                self.assertEqual(code, 2)
                self.assertRegex(message, rf"^train_pl.py: error: .*{command.split()[0]}.*\n\Z")
        self.assertFalse((self.folder / "logs").exists())

    def test_an_invalid_flag_of_a_namespace_is_a_value_error(self):
        for name, value in dict(z_dim=0, hidden_dims=[], lr=float("nan"), model="RNN", zdim=2, run_name="a\n").items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"--{name}\\b"):
                train_vae(self.namespace(**{name: value}))
        self.assertEqual(os.listdir(self.folder), [])

    def test_other_errors_are_one_line_with_exit_code_1(self):
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
        return super().namespace(**{"z_dim": 3, "epochs": 1, **flags})  # without a manifold, which is slow

    def test_the_best_checkpoint_has_the_lowest_validation_bpd_and_is_tested(self):
        def log_val_bpd(model):
            model.log("val_bpd", abs(model.current_epoch - 1.5) if model.trainer.state.fn == "fit" else 0.1)

        with mock.patch.object(VAE, "on_validation_epoch_end", log_val_bpd):
            folder, _ = self.train(epochs=4, model="CNN")
        best, last = load(folder, "best"), load(folder, "last")
        self.assertEqual((best["epoch"], last["epoch"]), (1, 3))
        self.assertEqual(results(folder)["best_epoch"], 2)
        model = VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt")
        self.assertEqual((model.hparams.model_name, model.hparams.num_filters), ("CNN", 4))
        self.assertAlmostEqual(results(folder)["test_bpd"], self.bpd_of_test_set(model), places=5)

    def bpd_of_test_set(self, model):
        """Returns the test bpd of a model, computed with the noise of a run's test."""
        imgs, _ = small_loaders(self.namespace())[2].dataset[torch.arange(50)]
        torch.manual_seed(processes.derive_seed(42))
        with torch.no_grad():
            return model(imgs)[2].item()

    def test_metrics_and_the_choice_of_the_tested_checkpoint_use_the_elbo_for_any_beta(self):
        folder, _ = self.train(epochs=3, lr=0.01, beta=4.0)
        for row, stage in itertools.product(metrics(folder)[1:], ["train", "val"]):
            L_rec, L_reg, elbo, bpd = (float(row[f"{stage}_{name}"]) for name in CHART_TITLES)
            self.assertAlmostEqual(elbo, L_rec + L_reg, places=3)
            self.assertAlmostEqual(bpd, elbo * BPD, places=5)
        best = VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt")
        self.assertAlmostEqual(results(folder)["test_bpd"], self.bpd_of_test_set(best), places=5)
        plain_folder, _ = self.train(epochs=3, lr=0.01)
        divergences = [float(metrics(run)[3]["train_regularization_loss"]) for run in [folder, plain_folder]]
        self.assertLess(divergences[0], divergences[1] / 2)

    def test_further_quantities_are_logged_and_reported_like_the_others(self):
        quantities, new = VAE.quantities, ["active", "batch"]  # in the order of the columns

        def more(model, terms, imgs):
            active = (terms.mean.var(dim=0) > 0.01).sum()
            return quantities(model, terms, imgs) | {"batch": len(imgs), "active": active}

        with mock.patch.object(VAE, "quantities", more):
            folder, _ = self.train()
        row = metrics(folder)[1]
        self.assertAlmostEqual(float(row["train_batch"]), (2 * 128**2 + 44**2) / 300, places=3)
        self.assertEqual(float(row["val_batch"]), 50)
        columns = [f"{stage}_{name}" for names in [CHART_TITLES, new] for stage in ["train", "val"] for name in names]
        self.assertEqual(list(row)[1:], columns)
        self.assertEqual({step for tag, step, _ in scalars_and_images(folder) if tag == "val_active"}, {0, 1})

    def test_the_flag_init_determines_the_initial_weights(self):
        for init, is_zero in [("pytorch", False), ("he", True)]:
            model = train_pl.make_vae(train_pl.complete_flags(self.namespace(init=init)))
            for network in [model.encoder, model.decoder]:
                self.assertEqual(not network.net[0].bias.any(), is_zero, init)

    def test_a_seed_gives_the_same_weights_with_any_number_of_workers_and_another_seed_gives_others(self):
        def weights(**flags):
            return load(self.train(**flags)[0], "last")["state_dict"].values()

        first = list(weights())
        self.assertTrue(all(map(torch.equal, first, weights())))
        self.assertTrue(all(map(torch.equal, first, weights(num_workers=2))))
        self.assertFalse(all(map(torch.equal, first, weights(seed=43))))

    def test_a_loss_that_is_not_finite_ends_the_run_and_the_previous_epoch_is_kept(self):
        terms = VAE.terms
        for value in [float("nan"), float("inf")]:

            def diverge(model, imgs, num_samples=1, value=value):
                found = terms(model, imgs)
                return found._replace(L_rec=found.L_rec + (value if model.training and model.current_epoch == 1 else 0))

            diverged = self.assertRaisesRegex(report.TrainingDiverged, r"^train_bpd became \w+ in epoch 2.* --lr")
            with mock.patch.object(VAE, "terms", diverge), diverged:
                self.train(epochs=3)
            last = load(self.run_folder(), "last")
            self.assertEqual(last["epoch"], 0)
            self.assertTrue(all(weight.isfinite().all() for weight in last["state_dict"].values()))
        with self.assertRaisesRegex(report.TrainingDiverged, r"in epoch 1: try .*no checkpoint was written"):
            self.train(lr=1e30)

    def test_a_terminal_shows_a_progress_bar_and_other_outputs_have_a_line_per_epoch(self):
        _, output = self.train(progress_bar=True)
        self.assertNotIn("Epoch 0", output)
        self.assertIn("epoch   1/1", output)
        connector = "pytorch_lightning.trainer.connectors.callback_connector"
        with (  # Lightning would use rich's bar if rich is installed; Lightning 2.5 does not look for it
            mock.patch(f"{connector}._RICH_AVAILABLE", True, create=True),
            mock.patch(f"{connector}.RichProgressBar", mock.Mock(side_effect=AssertionError)),
            mock.patch.object(trainer, "supports_progress_bar", lambda stream: True),
        ):
            _, output = self.train(progress_bar=True)
        self.assertRegex(output, r"Epoch 0: 100%.*val_bpd")
        self.assertNotIn("epoch   1/1", output)


class TestInitFrom(NamedRunTest):
    def test_a_run_starts_from_the_weights_of_a_checkpoint(self):
        """The checkpoint may be a bare state_dict. The run contains its checksum and is refused with another file."""
        first, _ = self.train(run_name="first", epochs=2, lr=0.01)
        path = self.folder / "first" / "checkpoints" / "best.ckpt"
        torch.save(load(self.folder / "first", "best")["state_dict"], self.folder / "weights.pt")
        for name, source in [("run", path), ("bare", self.folder / "weights.pt")]:
            _, output = self.train(run_name=name, epochs=1, lr=1e-6, init_from=source)
            self.assertIn(f"MLP with the weights of {source} on", output)
            values = [float(metrics(self.folder / name)[epoch]["val_bpd"]) for epoch in [0, 1]]
            for value in values:
                self.assertAlmostEqual(value, results(self.folder / "first")["best_val_bpd"], delta=0.01)
        flags = yaml.safe_load((self.folder / "run" / "hparams.yaml").read_text())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.assertEqual((flags["init_from"], flags["init_from_sha256"]), (str(path), sha256))
        self.assertIn("is finished", self.train(epochs=1, lr=1e-6, init_from=path)[1])
        with self.assertRaisesRegex(RunError, "other hyperparameters .*init_from"):
            self.train(epochs=1, lr=1e-6, init_from=self.folder / "weights.pt")

    def test_weights_that_do_not_fit_are_refused_before_the_run_has_a_folder(self):
        self.train(run_name="first", epochs=1)
        path = self.folder / "first" / "checkpoints" / "best.ckpt"
        (self.folder / "text.ckpt").write_text("no checkpoint")
        for flags, words in [
            ({"init_from": path, "z_dim": 4}, "best.ckpt cannot be loaded into VAE .*it was trained with z_dim 3$"),
            ({"init_from": path, "model": "CNN"}, "it was trained with model_name MLP$"),
            ({"init_from": path, "init": "he"}, "--init he .* without --init_from: leave --init he out"),
            ({"init_from": self.folder / "text.ckpt"}, "text.ckpt is not a checkpoint"),
            ({"init_from": self.folder / "gone.ckpt"}, "--init_from .*gone.ckpt. cannot be read"),
        ]:
            with self.subTest(words), self.assertRaisesRegex(UserError, words):
                self.train(**flags)
            self.assertFalse(self.run_folder().exists())


class TestCallbacks(NamedRunTest):
    def test_your_own_callbacks_are_called(self):
        class Stop(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = trainer.current_epoch == 1

        with printed_lines() as lines:
            train_vae(self.namespace(accelerator="cpu"), callbacks=[Stop()])
        self.assertIn("note: stopped early after 2 of 6 epochs", lines)
        self.assertEqual(results(self.run_folder())["epochs"], 2)

    def test_your_own_checkpoints_do_not_replace_those_of_the_run_and_a_resumed_run_continues_them(self):
        def mine():
            return ModelCheckpoint(monitor="train_bpd", mode="max", filename="best", save_last=True)

        def train(epochs):
            with printed_lines():
                train_vae(self.namespace(accelerator="cpu", lr=0.01, epochs=epochs), callbacks=mine())

        train(2)
        train(3)
        own, more = (self.run_folder() / name for name in ["checkpoints", "more_checkpoints"])
        self.assertEqual(sorted(os.listdir(own)), ["best.ckpt", "last.ckpt", "previous.ckpt"])
        self.assertEqual(sorted(os.listdir(more)), ["best.ckpt", "last.ckpt", "previous.ckpt"])
        self.assertEqual(load(self.run_folder(), "best")["epoch"] + 1, results(self.run_folder())["best_epoch"])
        self.assertEqual([row["epoch"] for row in load(self.run_folder(), "last")["run"]["history"]], [0, 1, 2, 3])
        history = torch.load(more / "last.ckpt", weights_only=True)["run"]["history"]
        self.assertEqual([row["epoch"] for row in history], [0, 1, 2, 3])

    def test_an_object_that_is_not_a_callback_is_refused_before_the_run_has_a_folder(self):
        with self.assertRaisesRegex(UserError, "callbacks must be a list of pytorch_lightning.Callback, got "):
            train_vae(self.namespace(accelerator="cpu"), callbacks=[object()])
        self.assertFalse(self.run_folder().exists())


class TestSchedules(NamedRunTest):
    def test_the_learning_rate_is_constant_or_falls_along_half_a_cosine(self):
        for lr_schedule, shares in [("constant", [1, 1, 1, 1]), ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])]:
            rates, step = [], VAE.training_step

            def training_step(model, batch, batch_idx, rates=rates, step=step):
                rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])
                return step(model, batch, batch_idx)

            with mock.patch.object(VAE, "training_step", training_step):
                self.train(epochs=4, lr=0.01, batch_size=300, run_name=lr_schedule, lr_schedule=lr_schedule)
            torch.testing.assert_close(rates, [0.01 * share for share in shares])

    def test_beta_rises_linearly_and_is_logged_also_in_a_resumed_run(self):
        wish = dict(epochs=4, beta=4.0, beta_warmup=2, train_samples=2)
        folder = self.folder / "uninterrupted"
        self.train(run_name=folder.name, **wish)
        self.assertEqual([float(row["train_beta"]) for row in metrics(folder)[1:]], [0, 2, 4, 4])
        self.assertEqual(VAE.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").hparams.beta, 4.0)
        self.stop_at(VAE, "on_validation_epoch_end", 1, **wish)
        self.train(**wish)
        assert_left_the_same(self, self.run_folder(), folder)
        self.train(epochs=1, run_name="plain")
        self.assertNotIn("train_beta", metrics(self.folder / "plain")[0])

    def test_the_importance_weighted_bound_is_logged_in_addition_to_the_elbo(self):
        folder, _ = self.train(epochs=1, objective="iwae", train_samples=5)
        for row, stage in itertools.product(metrics(folder)[1:], ["train", "val"]):
            values = {name.removeprefix(f"{stage}_"): float(row[name]) for name in row if name.startswith(stage)}
            self.assertLess(values["IWAE"], values["ELBO"])
            self.assertAlmostEqual(values["bpd"], values["ELBO"] * BPD, places=4)

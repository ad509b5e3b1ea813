"""Tests of --precision and of other precisions: `python -m unittest tests/unit/test_run_precision.py`."""

import copy
import warnings
from unittest import mock

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import utils
from harness import devices
from harness.settings import process_settings
from tests.helpers import GraphTest, load, metrics
from train_pl import VAE, GenerateCallback


class TestPrecision(GraphTest):
    def test_bf16_gives_the_same_weights_with_and_without_graphs_and_almost_the_same_bpd_as_float32(self):
        """A warning is printed if the processor has no native bfloat16."""
        folders = []
        for precision, no_cuda_graph, has_bf16 in [("bf16", True, False), ("bf16", False, True), ("32", True, False)]:
            with mock.patch.object(devices, "has_bf16", lambda kind, has_bf16=has_bf16: has_bf16):
                flags = dict(z_dim=4, batch_size=40, epochs=2, precision=precision, no_cuda_graph=no_cuda_graph)
                folder, output = self.train(**flags)
            folders.append(folder)
            self.assertEqual(output.count("bf16 is slower than 32 here"), precision == "bf16" and not has_bf16)
        self.assertTrue(self.replays)
        ordinary, replayed, _ = (load(folder, "last")["state_dict"] for folder in folders)
        torch.testing.assert_close(ordinary, replayed, rtol=0, atol=0)
        self.assertEqual({weight.dtype for weight in ordinary.values()}, {torch.float32})
        bpds = [float(metrics(folder)[-1]["val_bpd"]) for folder in [folders[0], folders[2]]]
        self.assertNotEqual(*bpds)
        self.assertAlmostEqual(*bpds, delta=0.005)

    def test_losses_are_in_float32_or_better(self):
        imgs = (torch.rand(3, 1, 28, 28) > 0.5).float()
        for model in ["MLP", "CNN"]:
            vae = VAE(model, [8], 2, 2, 1e-3, objective="iwae")
            with torch.autocast("cpu", torch.bfloat16):
                self.assertEqual(vae.encoder(imgs)[0].dtype, torch.bfloat16)
                self.assertEqual({loss.dtype for loss in vae.terms(imgs, 2)[:3]}, {torch.float32})
            for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
                losses = vae.to(dtype).terms(imgs.to(dtype), 2)[:3]
                self.assertEqual({loss.dtype for loss in losses}, {expected})

    def test_in_every_precision_of_lightning_the_logged_means_are_those_of_the_same_weights(self):
        """The means also agree in your own Trainer, up to rounding. (Adding ones in bfloat16 would stop at 256.)"""
        imgs = (torch.rand(300, 1, 28, 28) > 0.8).float()
        loader = DataLoader(TensorDataset(imgs, torch.zeros(300)), batch_size=20)
        options = dict(accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
        vae, logged = VAE("MLP", [16], 2, 2, 1e-3), {}
        self.enter(process_settings())  # hides Lightning's messages
        for precision in ["32-true", "bf16-true", "bf16-mixed", "64-true"]:
            trainer = pl.Trainer(precision=precision, **options)
            torch.manual_seed(1)
            trainer.validate(copy.deepcopy(vae), loader, verbose=False)
            logged[precision] = trainer.callback_metrics["val_bpd"].item()
            self.assertAlmostEqual(logged[precision], logged["32-true"], delta=1e-3)

    def test_pictures_are_saved_in_every_precision_except_float16_which_is_refused_because_adam_fails(self):
        data = TensorDataset((torch.rand(20, 1, 28, 28) > 0.8).float(), torch.zeros(20))
        options = dict(accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, max_epochs=1)
        options |= dict(enable_model_summary=False, log_every_n_steps=1)
        self.enter(process_settings())
        warnings.filterwarnings("ignore", message="You defined a `validation_step`")
        for precision in ["bf16-true", "64-true", "16-true"]:
            folder = self.folder / precision
            generate, logger = GenerateCallback(8, 1, save_to_disk=True), pl.loggers.CSVLogger(folder, "", "")
            generate.imgs = data[:4][0]
            trainer = pl.Trainer(precision=precision, logger=logger, callbacks=[generate], **options)
            vae = VAE("MLP", [16], 2, 2, 1e-3)
            if precision == "16-true":
                with self.assertRaisesRegex(ValueError, "give the Trainer precision 16-mixed or bf16-true"):
                    trainer.fit(vae, DataLoader(data, batch_size=20))
            else:
                trainer.fit(vae, DataLoader(data, batch_size=20))
                names = {path.name for path in folder.glob("*.png")}
                self.assertEqual(names, {f"epoch_1_{name}.png" for name in ["samples", "means", "reconstructions"]})
                self.assertEqual(utils.visualize_manifold(vae.decoder, 2).shape, (3, 62, 62))

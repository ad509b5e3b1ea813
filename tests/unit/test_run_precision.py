"""
Tests of --precision, on a CPU and with a stand-in for graphs: `python -m unittest tests/unit/test_run_precision.py`.
"""

import copy
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from harness import devices, graphs, run
from tests.helpers import GraphTest, load, metrics
from train_pl import VAE


class TestPrecision(GraphTest):
    def train(self, on_gpu=False, has_bf16=True, **flags):
        flags = {"z_dim": 4, "batch_size": 40, "epochs": 2, "precision": "bf16", **flags}
        with (
            mock.patch.object(graphs, "has_graphs", lambda device: on_gpu),
            mock.patch.object(run, "has_bf16", lambda kind: has_bf16),
        ):
            return super().train(**flags)

    def test_graphs_are_ordinary_training(self):
        (ordinary, _), (replayed, printed) = self.train(), self.train(on_gpu=True)
        self.assertNotIn("CUDA graphs", printed)
        weights = [load(folder, "last")["state_dict"] for folder in [ordinary, replayed]]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
        self.assertEqual({weight.dtype for weight in weights[0].values()}, {torch.float32})
        full, _ = self.train(precision=32)
        bpds = [float(metrics(folder)[-1]["val_bpd"]) for folder in [ordinary, full]]
        self.assertNotEqual(*bpds)
        self.assertAlmostEqual(*bpds, delta=0.005)

    def test_losses_are_in_float32(self):
        imgs = (torch.rand(3, 1, 28, 28) > 0.5).float()
        for model in ["MLP", "CNN"]:
            vae = VAE(model, [8], 2, 2, 1e-3, objective="iwae")
            with torch.autocast("cpu", torch.bfloat16):
                self.assertEqual(vae.encoder(imgs)[0].dtype, torch.bfloat16)
                self.assertEqual({loss.dtype for loss in vae.terms(imgs, 2)[:3]}, {torch.float32})
            in_float32 = vae.bfloat16().terms(imgs.bfloat16(), 2)[:3]
            self.assertEqual({loss.dtype for loss in in_float32}, {torch.float32})
        double = vae.double().terms(imgs.double())[:3]
        self.assertEqual({loss.dtype for loss in double}, {torch.float64})

    def test_every_precision_of_lightning(self):
        """A user's own Trainer: what is logged is what the same weights give, up to the rounding of the networks."""
        imgs = (torch.rand(300, 1, 28, 28) > 0.8).float()
        loader = DataLoader(TensorDataset(imgs, torch.zeros(300)), batch_size=20)
        options = dict(accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
        vae, logged = VAE("MLP", [16], 2, 2, 1e-3), {}
        for precision in ["32-true", "bf16-true", "bf16-mixed", "64-true"]:
            trainer = pl.Trainer(precision=precision, **options)
            torch.manual_seed(1)
            trainer.validate(copy.deepcopy(vae), loader, verbose=False)
            logged[precision] = trainer.callback_metrics["val_bpd"].item()
        for value in logged.values():  # sums in bfloat16 stopped at 256 images
            self.assertAlmostEqual(value, logged["32-true"], delta=1e-3)

    def test_a_line_where_it_is_slower(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(devices, "CPU_INFO", Path(folder) / "cpuinfo"):
            self.assertTrue(devices.has_bf16("cpu"))  # as far as it can be told
            for text, expected in [("flags : fpu avx512f\n", False), ("flags : avx512_bf16 fma\n", True)]:
                devices.CPU_INFO.write_text(text)
                self.assertEqual(devices.has_bf16("cpu"), expected)
        for has_bf16, num_lines in [(True, 0), (False, 1)]:
            with mock.patch.object(run, "note") as note:
                self.train(has_bf16=has_bf16, epochs=1)
            self.assertEqual(len(note.mock_calls), num_lines)


if __name__ == "__main__":
    unittest.main()

"""
Tests of --precision, on a CPU and with a graph's stand-in: `python -m unittest tests/unit/test_run_precision.py`.
"""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from harness import chunks, devices, run
from tests.helpers import ChunksTest, load, metrics
from train_pl import VAE


class TestPrecision(ChunksTest):
    def train(self, on_gpu=False, has_bf16=True, **flags):
        flags = {"z_dim": 4, "batch_size": 40, "epochs": 2, "precision": "bf16", **flags}
        with (
            mock.patch.object(chunks, "has_graphs", lambda device: on_gpu),
            mock.patch.object(run, "has_bf16", lambda kind: has_bf16),
        ):
            return super().train(**flags)

    def test_chunks_and_graphs_are_plain_training(self):
        (plain, _), (in_chunks, _) = self.train(plain=True), self.train()
        replayed, printed = self.train(on_gpu=True)
        self.assertNotIn("step by step", printed)
        weights = [load(folder, "last")["state_dict"] for folder in [plain, in_chunks, replayed]]
        torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
        torch.testing.assert_close(weights[2], weights[0], rtol=1e-2, atol=1e-3)
        self.assertEqual({weight.dtype for weight in weights[0].values()}, {torch.float32})
        full, _ = self.train(precision=32)
        bpds = [float(metrics(folder)[-1]["val_bpd"]) for folder in [plain, full]]
        self.assertNotEqual(*bpds)
        self.assertAlmostEqual(*bpds, delta=0.005)

    def test_losses_are_in_float32(self):
        imgs = (torch.rand(3, 1, 28, 28) > 0.5).float()
        for model in ["MLP", "CNN"]:
            vae = VAE(model, [8], 2, 2, 1e-3)
            with torch.autocast("cpu", torch.bfloat16):
                self.assertEqual(vae.encoder(imgs)[0].dtype, torch.bfloat16)
                self.assertEqual({loss.dtype for loss in vae.losses(imgs)}, {torch.float32})
        double = vae.double().losses(imgs.double())
        self.assertEqual({loss.dtype for loss in double}, {torch.float64})

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

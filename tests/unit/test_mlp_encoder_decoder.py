"""Tests of mlp_encoder_decoder.py: `python -m unittest tests/unit/test_mlp_encoder_decoder.py`."""

import inspect

import torch
from torch import nn

from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from tests.helpers import SeededTest
from train_pl import VAE


class TestMLP(SeededTest):
    def test_signatures(self):
        expected = {"input_dim": 784, "hidden_dims": [512], "z_dim": 20}
        self.assertEqual({p.name: p.default for p in inspect.signature(MLPEncoder).parameters.values()}, expected)
        expected = {"z_dim": 20, "hidden_dims": [512], "output_shape": [1, 28, 28]}
        self.assertEqual({p.name: p.default for p in inspect.signature(MLPDecoder).parameters.values()}, expected)

    def test_lists_are_not_written_to(self):
        hidden_dims, output_shape = [30, 20, 10], [1, 28, 28]
        MLPEncoder(hidden_dims=hidden_dims)
        MLPDecoder(hidden_dims=hidden_dims, output_shape=output_shape)
        model = VAE("MLP", hidden_dims, 32, 5, 1e-3)
        self.assertEqual((hidden_dims, output_shape), ([30, 20, 10], [1, 28, 28]))
        widths = [
            [layer.out_features for layer in net if isinstance(layer, nn.Linear)]
            for net in [model.encoder.net, model.decoder.net]
        ]
        self.assertEqual(widths, [[30, 20, 10, 10], [10, 20, 30, 784]])
        self.test_signatures()

    def test_encoder(self):
        for encoder in [MLPEncoder(z_dim=7), MLPEncoder(784, [], 7), MLPEncoder(hidden_dims=[64, 32], z_dim=7)]:
            mean, log_std = encoder(100 * torch.randn(32, 1, 28, 28))
            for output in [mean, log_std]:
                self.assertEqual(output.shape, (32, 7))
                self.assertTrue((output < 0).any() and (output > 0).any())
            self.assertFalse(torch.equal(mean, log_std))
        self.assertEqual(MLPEncoder(3 * 8 * 8, z_dim=4)(torch.randn(2, 3, 8, 8))[0].shape, (2, 4))

    def test_decoder(self):
        for decoder in [MLPDecoder(z_dim=7), MLPDecoder(7, [64, 32])]:
            logits = decoder(torch.randn(16, 7))
            self.assertEqual(logits.shape, (16, 1, 28, 28))
            self.assertTrue((logits < 0).any() and (logits > 0).any(), "logits, not means")
            self.assertEqual(decoder.device, torch.device("cpu"))
            self.assertEqual(decoder.to("meta").device, torch.device("meta"))
        self.assertEqual(MLPDecoder(7, output_shape=[3, 8, 9])(torch.randn(2, 7)).shape, (2, 3, 8, 9))

    def test_layers(self):
        for net in [MLPEncoder(hidden_dims=[9, 8]).net, MLPDecoder(hidden_dims=[9, 8]).net]:
            self.assertEqual([type(layer) for layer in net], [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear])

    def test_he_init(self):
        """It keeps the scale of a signal from layer to layer."""
        net = MLPEncoder(input_dim=500, hidden_dims=[600, 700, 800], z_dim=500).net
        he_init(net)
        x = torch.randn(400, 500)
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                self.assertEqual(layer.bias.abs().sum(), 0)
                # The variance before a ReLU is 2; after it, the mean square is 1. The last layer: Glorot & Bengio's.
                expected = 2 * 800 / (800 + 1000) if layer is net[-1] else 2
                self.assertAlmostEqual(x.var().item() / expected, 1, delta=0.1)

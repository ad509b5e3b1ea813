"""
Tests of mlp_encoder_decoder.py, in addition to the assignment's contract in unittests.py: `python -m unittest
tests/unit/test_mlp_encoder_decoder.py`.
"""

import torch
from torch import nn

from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from tests.helpers import SeededTest


class TestMLP(SeededTest):
    def test_networks_without_hidden_layers_are_linear(self):
        mean, log_std = MLPEncoder(784, [], 7)(torch.randn(2, 1, 28, 28))
        self.assertEqual((mean.shape, log_std.shape), ((2, 7), (2, 7)))
        self.assertEqual(MLPDecoder(7, [])(mean).shape, (2, 1, 28, 28))

    def test_he_init_keeps_the_scale_of_a_signal_from_layer_to_layer(self):
        net = MLPEncoder(input_dim=500, hidden_dims=[600, 700, 800], z_dim=500).net
        he_init(net)
        x = torch.randn(400, 500)
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                self.assertEqual(layer.bias.abs().sum(), 0)
                # Before a ReLU the variance is 2, after it the mean square is 1. The last layer is Glorot & Bengio's.
                expected = 2 * 800 / (800 + 1000) if layer is net[-1] else 2
                self.assertAlmostEqual(x.var().item() / expected, 1, delta=0.1)

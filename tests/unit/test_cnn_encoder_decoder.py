"""Tests of cnn_encoder_decoder.py: `python -m unittest tests/unit/test_cnn_encoder_decoder.py`."""

import inspect

import torch
from torch import nn

from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from tests.helpers import SeededTest


class TestCNN(SeededTest):
    def test_signatures(self):
        expected = {"num_input_channels": 1, "num_filters": 32, "z_dim": 20, "img_size": (28, 28)}
        for network in [CNNEncoder, CNNDecoder]:
            self.assertEqual({p.name: p.default for p in inspect.signature(network).parameters.values()}, expected)

    def test_encoder(self):
        for encoder in [CNNEncoder(z_dim=7), CNNEncoder(1, 8, 7)]:
            mean, log_std = encoder(100 * torch.randn(32, 1, 28, 28))
            for output in [mean, log_std]:
                self.assertEqual(output.shape, (32, 7))
                self.assertTrue((output < 0).any() and (output > 0).any())
            self.assertFalse(torch.equal(mean, log_std))
        self.assertEqual(CNNEncoder(3, z_dim=4)(torch.randn(2, 3, 28, 28))[0].shape, (2, 4))

    def test_decoder(self):
        for decoder in [CNNDecoder(z_dim=7), CNNDecoder(1, 8, 7)]:
            logits = decoder(torch.randn(16, 7))
            self.assertEqual(logits.shape, (16, 1, 28, 28))
            self.assertTrue((logits < 0).any() and (logits > 0).any(), "logits, not means")
            self.assertEqual(decoder.device, torch.device("cpu"))
            self.assertEqual(decoder.to("meta").device, torch.device("meta"))
        self.assertEqual(CNNDecoder(3, z_dim=7)(torch.randn(2, 7)).shape, (2, 3, 28, 28))

    def test_any_size(self):
        """Of an image, odd or even, small or large; the decoder's means have it again."""
        for img_size in [(28, 28), (1, 1), (2, 3), (8, 31), (32, 32), (33, 65), (40, 20)]:
            imgs = torch.randn(2, 1, *img_size)
            mean, _ = CNNEncoder(1, 4, 7, img_size)(imgs)
            self.assertEqual(mean.shape, (2, 7))
            self.assertEqual(CNNDecoder(1, 4, 7, img_size)(mean).shape, imgs.shape)

    def test_layers(self):
        def shapes(net, x):
            for layer in net:
                x = layer(x)
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    self.assertEqual(layer.kernel_size, (3, 3))
                    yield tuple(x.shape[1:])

        encoder, decoder = CNNEncoder(1, 8).net, CNNDecoder(1, 8).net
        self.assertEqual(
            list(shapes(encoder, torch.zeros(1, 1, 28, 28))),
            [(8, 14, 14), (8, 14, 14), (16, 7, 7), (16, 7, 7), (16, 4, 4)],
        )
        self.assertEqual(
            list(shapes(decoder, torch.zeros(1, 20))), [(16, 7, 7), (16, 7, 7), (8, 14, 14), (8, 14, 14), (1, 28, 28)]
        )
        self.assertEqual([sum(isinstance(layer, nn.GELU) for layer in net) for net in [encoder, decoder]], [5, 5])
        self.assertIsInstance(encoder[-1], nn.Linear)
        self.assertIsInstance(decoder[-1], nn.ConvTranspose2d)

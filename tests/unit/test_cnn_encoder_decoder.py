"""
Tests of cnn_encoder_decoder.py, in addition to the assignment's contract in unittests.py: `python -m unittest
tests/unit/test_cnn_encoder_decoder.py`.
"""

import torch
from torch import nn

from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from tests.helpers import SeededTest


class TestCNN(SeededTest):
    def test_images_of_any_size_are_encoded_and_decoded_to_that_size(self):
        for img_size in [(28, 28), (1, 1), (2, 3), (8, 31), (32, 32), (33, 65), (40, 20)]:
            with self.subTest(img_size):
                imgs = torch.randn(2, 1, *img_size)
                mean, _ = CNNEncoder(1, 4, 7, img_size)(imgs)
                self.assertEqual(mean.shape, (2, 7))
                self.assertEqual(CNNDecoder(1, 4, 7, img_size)(mean).shape, imgs.shape)

    def test_the_layers_are_those_of_the_courses_autoencoder(self):
        def shapes(net, x):
            for layer in net:
                x = layer(x)
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    self.assertEqual(layer.kernel_size, (3, 3))
                    yield tuple(x.shape[1:])

        encoder, decoder = CNNEncoder(1, 8).net, CNNDecoder(1, 8).net
        down = [(8, 14, 14), (8, 14, 14), (16, 7, 7), (16, 7, 7), (16, 4, 4)]
        up = [(16, 7, 7), (16, 7, 7), (8, 14, 14), (8, 14, 14), (1, 28, 28)]
        self.assertEqual(list(shapes(encoder, torch.zeros(1, 1, 28, 28))), down)
        self.assertEqual(list(shapes(decoder, torch.zeros(1, 20))), up)
        self.assertEqual([sum(isinstance(layer, nn.GELU) for layer in net) for net in [encoder, decoder]], [5, 5])

"""Tests of the assignment's contract: `python -m unittest unittests.py`. They need no network and no data."""
import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributions as D
import torch.nn as nn
import torch.nn.functional as F
import yaml
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.datasets import MNIST

import bmnist
import checkpoints
import cuda_graph
import processes
import run_folder
import slurm_job
import summary
import train_pl
from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from rendered_digits import rendered_digits
from train_pl import VAE, GenerateCallback, train_vae
from utils import (
    KLD,
    active_units,
    elbo_to_bpd,
    log_likelihood,
    manifold_latents,
    quadrature_log_likelihood,
    sample_reparameterize,
    visualize_manifold,
)

HERE = Path(__file__).resolve().parent


class SeededTest(unittest.TestCase):
    """A test that draws the same random numbers, alone or after others."""

    def run(self, result=None):
        torch.manual_seed(0)
        return super().run(result)


class TestKLD(SeededTest):

    def test_unit_gaussian_is_exactly_zero(self):
        self.assertTrue((KLD(torch.zeros(5, 3), torch.zeros(5, 3)) == 0).all())

    def test_exactly_symmetric_in_the_mean(self):
        mean, log_std = torch.randn(2, 16, 20)
        self.assertTrue(torch.equal(KLD(mean, log_std), KLD(-mean, log_std)))

    def test_agrees_with_torch_distributions(self):
        mean, log_std = 2 * torch.randn(2, 7, 16, 20, dtype=torch.float64)
        oracle = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0., 1.)).sum(dim=-1)
        torch.testing.assert_close(KLD(mean, log_std), oracle)

    def test_keeps_its_digits_close_to_the_prior(self):
        log_std = torch.full((1,), 1e-4)  # KL = log_std**2 to first order, far below float32's rounding of 1
        self.assertAlmostEqual(KLD(torch.zeros(1), log_std).item() * 1e8, 1., places=2)


class TestReparameterization(SeededTest):

    def test_gradients(self):
        mean, std = torch.randn(16, 4, requires_grad=True), torch.rand(16, 4).add(0.5).requires_grad_()
        z = sample_reparameterize(mean, std)
        z.sum().backward()
        eps = ((z - mean) / std).detach()
        torch.testing.assert_close(mean.grad, torch.ones(16, 4))
        torch.testing.assert_close(std.grad, eps)

    def test_distribution(self):
        mean, std = torch.tensor([-3., 0., 2.]), torch.tensor([0.1, 1., 4.])
        z = sample_reparameterize(mean.expand(100_000, 3), std.expand(100_000, 3))
        self.assertEqual(z.shape, (100_000, 3))
        torch.testing.assert_close((z.mean(dim=0) - mean) / std, torch.zeros(3), atol=0.02, rtol=0)
        torch.testing.assert_close(z.std(dim=0) / std, torch.ones(3), atol=0.02, rtol=0)

    def test_no_noise_without_deviation(self):
        mean = torch.randn(5)
        self.assertTrue(torch.equal(sample_reparameterize(mean, torch.zeros(5)), mean))


class TestBPD(SeededTest):

    def test_uniform_image_has_one_bit_per_pixel(self):
        for shape in [(8, 1, 28, 28), (8, 3, 11, 17)]:
            elbo = -torch.full(shape, 0.5).log().sum(dim=(1, 2, 3))
            bpd = elbo_to_bpd(elbo, torch.Size(shape))
            self.assertEqual(bpd.shape, (8,))
            torch.testing.assert_close(bpd, torch.ones(8))


class TestLogLikelihood(SeededTest):
    """On a VAE of 2 latents with a linear decoder, whose posteriors have one peak, fitted to drawn digits."""

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        imgs = bmnist.binarize(rendered_digits(5_100)[0])
        cls.imgs = imgs[5_000:]
        cls.encoder, cls.decoder = MLPEncoder(hidden_dims=[64], z_dim=2), MLPDecoder(z_dim=2, hidden_dims=[])
        optimizer = torch.optim.Adam([*cls.encoder.parameters(), *cls.decoder.parameters()], lr=0.005)
        for _ in range(300):
            optimizer.zero_grad()
            cls.elbo(imgs[torch.randint(5_000, (100,))]).mean().neg().backward()
            optimizer.step()

    @classmethod
    def elbo(cls, imgs):
        mean, log_std = cls.encoder(imgs)
        log_p_x = D.Bernoulli(logits=cls.decoder(sample_reparameterize(mean, log_std.exp()))).log_prob(imgs)
        return log_p_x.sum(dim=(1, 2, 3)) - KLD(mean, log_std)

    def small_vae(self):
        """All 256 images of 8 pixels, and untrained networks for them."""
        imgs = torch.cartesian_prod(*[torch.tensor([0., 1.])] * 8).view(256, 1, 1, 8)
        decoder = MLPDecoder(z_dim=2, hidden_dims=[16], output_shape=[1, 1, 8])
        nn.init.normal_(decoder.net[-1].weight)
        return imgs, MLPEncoder(input_dim=8, hidden_dims=[16], z_dim=2), decoder

    def test_probabilities_of_all_images_add_up_to_one(self):
        imgs, encoder, decoder = self.small_vae()
        self.assertAlmostEqual(quadrature_log_likelihood(imgs, decoder).exp().sum().item(), 1., places=4)
        p = log_likelihood(imgs, encoder, decoder, num_samples=20_000).exp()
        self.assertAlmostEqual(p.sum().item(), 1., delta=0.01)

    def test_agrees_with_quadrature(self):
        """An encoder as good as a Gaussian can be leaves no difference, on each image; the trained one on average."""
        axis = torch.arange(-160, 161) / 20
        z = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            logits = self.decoder(z).flatten(1)
        log_joint = logits @ self.imgs.flatten(1).T - F.softplus(logits).sum(1, keepdim=True) - (z**2).sum(1, True) / 2
        posterior = log_joint.softmax(dim=0).T
        mean = posterior @ z
        std = (posterior @ z**2 - mean**2).sqrt()
        exact = quadrature_log_likelihood(self.imgs, self.decoder, step=0.05, limit=8)
        matched = log_likelihood(self.imgs, lambda _: (mean, (1.2 * std).log()), self.decoder, num_samples=3_000)
        self.assertEqual(matched.shape, (100,))
        torch.testing.assert_close(matched, exact, atol=0.05, rtol=0)
        trained = log_likelihood(self.imgs, self.encoder, self.decoder, num_samples=3_000)
        self.assertAlmostEqual(trained.mean().item(), exact.mean().item(), delta=0.05)

    def test_one_sample_is_the_elbo_in_expectation(self):
        imgs = self.imgs[:2].repeat_interleave(10_000, dim=0)
        bounds = log_likelihood(imgs, self.encoder, self.decoder, num_samples=1).view(2, -1)
        with torch.no_grad():
            elbos = self.elbo(imgs).view(2, -1)
        error = ((bounds.var(dim=1) + elbos.var(dim=1)) / 10_000).sqrt()
        self.assertTrue(((bounds.mean(dim=1) - elbos.mean(dim=1)).abs() < 4 * error).all())
        self.assertLess(error.max().item(), 0.1)

    def test_never_falls_with_more_samples(self):
        """Not but by chance: over 20 estimates, the mean of every image."""
        imgs = self.imgs.repeat(20, 1, 1, 1)
        bounds = [log_likelihood(imgs, self.encoder, self.decoder, k).view(20, 100) for k in [1, 5, 25, 125]]
        for fewer, more in zip(bounds, bounds[1:]):
            error = ((fewer.var(dim=0) + more.var(dim=0)) / 20).sqrt()
            self.assertTrue((more.mean(dim=0) > fewer.mean(dim=0) - 4 * error).all())
            self.assertGreater(more.mean(), fewer.mean())

    def test_memory_is_bounded(self):
        sizes = []

        def decoder(z):
            sizes.append(len(z))
            return self.decoder(z)

        for num_images, num_samples, expected in [(100, 12, [500, 500, 200]), (100, 1, [100]), (1, 1001, [512, 489])]:
            sizes.clear()
            log_likelihood(self.imgs[:num_images], self.encoder, decoder, num_samples)
            self.assertEqual(sizes, expected)

    def test_weights_that_underflow(self):
        """Far below the smallest float, the estimate is still the mean of the weights."""
        x = torch.ones(1, 1, 28, 28)
        log_p = log_likelihood(x, lambda x: (torch.zeros(1, 2), torch.zeros(1, 2)),
                               lambda z: torch.full((len(z), 1, 28, 28), -50.), num_samples=10)
        torch.testing.assert_close(log_p, torch.tensor([-50. * 784]))

    def test_no_samples(self):
        with self.assertRaisesRegex(ValueError, "num_samples must be at least 1, got 0"):
            log_likelihood(self.imgs, self.encoder, self.decoder, num_samples=0)

    def test_active_units(self):
        means = torch.randn(10_000, 4) * torch.tensor([0.01, 0.09, 0.11, 1.]) + torch.tensor([5., 5., 0., 0.])
        self.assertEqual(active_units(means).tolist(), [False, False, True, True])
        self.assertEqual(active_units(means, threshold=1e-5).tolist(), [True] * 4)


class TestManifold(SeededTest):

    class Decoder(nn.Module):
        """Paints each image in the grey of one of its latents' percentiles."""
        device = torch.device('cpu')

        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, z):
            self.z = z
            return torch.logit(D.Normal(0., 1.).cdf(z[:, self.dim])).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    def test_latents_are_the_percentiles(self):
        z = manifold_latents(20)
        self.assertEqual((z.shape, z.dtype), ((400, 2), torch.float32))
        percentiles = D.Normal(0., 1.).cdf(z.double())
        expected = torch.arange(1, 21).double() / 21
        for dim in range(2):
            torch.testing.assert_close(percentiles[:, dim].unique(), expected, check_dtype=False, atol=1e-6, rtol=0)
        self.assertTrue(torch.equal(z.sort(dim=0).values, -z.sort(dim=0, descending=True).values), "not symmetric")

    def test_picture(self):
        for dim in range(2):
            grid = visualize_manifold(self.Decoder(dim), grid_size=4)
            self.assertEqual(grid.shape, (3, 4 * 30 + 2, 4 * 30 + 2))
            pixels = grid[0, 16::30, 16::30]  # the middle of each image
            expected = torch.arange(1, 5) / 5
            expected = expected.expand(4, 4) if dim == 0 else expected.flip(0)[:, None].expand(4, 4)
            torch.testing.assert_close(pixels, expected)
        self.assertEqual(visualize_manifold(self.Decoder(0)).shape, (3, 602, 602))

    def test_one_image_and_none(self):
        self.assertTrue(torch.equal(manifold_latents(1), torch.zeros(1, 2)))
        with self.assertRaisesRegex(ValueError, "grid_size"):
            manifold_latents(0)


class TestNetworks(SeededTest):

    def defaults(self, network):
        return {name: parameter.default for name, parameter in inspect.signature(network).parameters.items()}

    def test_signatures(self):
        self.assertEqual(self.defaults(MLPEncoder), {'input_dim': 784, 'hidden_dims': [512], 'z_dim': 20})
        self.assertEqual(self.defaults(MLPDecoder), {'z_dim': 20, 'hidden_dims': [512], 'output_shape': [1, 28, 28]})
        for network in [CNNEncoder, CNNDecoder]:
            self.assertEqual(self.defaults(network), {'num_input_channels': 1, 'num_filters': 32, 'z_dim': 20})

    def test_lists_are_not_written_to(self):
        hidden_dims, output_shape = [30, 20, 10], [1, 28, 28]
        MLPEncoder(hidden_dims=hidden_dims)
        MLPDecoder(hidden_dims=hidden_dims, output_shape=output_shape)
        model = VAE('MLP', hidden_dims, 32, 5, 1e-3)
        self.assertEqual((hidden_dims, output_shape), ([30, 20, 10], [1, 28, 28]))
        widths = [[layer.out_features for layer in net.net if isinstance(layer, nn.Linear)]
                  for net in [model.encoder, model.decoder]]
        self.assertEqual(widths, [[30, 20, 10, 10], [10, 20, 30, 784]])
        self.test_signatures()

    def test_encoders(self):
        for encoder in [MLPEncoder(z_dim=7), MLPEncoder(784, [], 7), MLPEncoder(hidden_dims=[64, 32], z_dim=7),
                        CNNEncoder(z_dim=7), CNNEncoder(1, 8, 7)]:
            mean, log_std = encoder(100 * torch.randn(32, 1, 28, 28))
            for output in [mean, log_std]:
                self.assertEqual(output.shape, (32, 7))
                self.assertTrue((output < 0).any() and (output > 0).any())
            self.assertFalse(torch.equal(mean, log_std))
        self.assertEqual(MLPEncoder(3 * 8 * 8, z_dim=4)(torch.randn(2, 3, 8, 8))[0].shape, (2, 4))
        self.assertEqual(CNNEncoder(3, z_dim=4)(torch.randn(2, 3, 28, 28))[0].shape, (2, 4))

    def test_decoders(self):
        for decoder in [MLPDecoder(z_dim=7), MLPDecoder(7, [64, 32]), CNNDecoder(z_dim=7), CNNDecoder(1, 8, 7)]:
            logits = decoder(torch.randn(16, 7))
            self.assertEqual(logits.shape, (16, 1, 28, 28))
            self.assertTrue((logits < 0).any() and (logits > 0).any(), "logits, not means")
            self.assertEqual(decoder.device, torch.device('cpu'))
            self.assertEqual(decoder.to('meta').device, torch.device('meta'))
        self.assertEqual(MLPDecoder(7, output_shape=[3, 8, 9])(torch.randn(2, 7)).shape, (2, 3, 8, 9))
        self.assertEqual(CNNDecoder(3, z_dim=7)(torch.randn(2, 7)).shape, (2, 3, 28, 28))

    def test_mlp_layers(self):
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

    def test_cnn_layers(self):
        def shapes(net, x):
            for layer in net:
                x = layer(x)
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    self.assertEqual(layer.kernel_size, (3, 3))
                    yield tuple(x.shape[1:])

        encoder, decoder = CNNEncoder(1, 8).net, CNNDecoder(1, 8).net
        self.assertEqual(list(shapes(encoder, torch.zeros(1, 1, 28, 28))),
                         [(8, 14, 14), (8, 14, 14), (16, 7, 7), (16, 7, 7), (16, 4, 4)])
        self.assertEqual(list(shapes(decoder, torch.zeros(1, 20))),
                         [(16, 7, 7), (16, 7, 7), (8, 14, 14), (8, 14, 14), (1, 28, 28)])
        self.assertEqual([sum(isinstance(layer, nn.GELU) for layer in net) for net in [encoder, decoder]], [5, 5])
        self.assertIsInstance(encoder[-1], nn.Linear)
        self.assertIsInstance(decoder[-1], nn.ConvTranspose2d)


class TestVAE(SeededTest):

    def models(self, **hyperparameters):
        for model_name in ['MLP', 'CNN']:
            yield VAE(**{**dict(model_name=model_name, hidden_dims=[32], num_filters=4, z_dim=5, lr=1e-3),
                         **hyperparameters})

    def test_forward_is_the_negative_elbo(self):
        imgs = torch.rand(6, 1, 28, 28).round()
        for model in self.models():
            torch.manual_seed(1)
            L_rec, L_reg, bpd = model(imgs)
            torch.manual_seed(1)
            mean, log_std = model.encoder(imgs)
            posterior = D.Normal(mean, log_std.exp())
            logits = model.decoder(posterior.rsample())
            log_likelihood = D.Bernoulli(logits=logits).log_prob(imgs).sum(dim=(1, 2, 3))
            kl = D.kl_divergence(posterior, D.Normal(0., 1.)).sum(dim=1)
            torch.testing.assert_close(L_rec, -log_likelihood.mean())
            torch.testing.assert_close(L_reg, kl.mean())
            torch.testing.assert_close(bpd, (kl - log_likelihood).mean() / np.log(2) / 784, check_dtype=False)
            self.assertEqual([x.shape for x in (L_rec, L_reg, bpd)], [()] * 3)
            bpd.backward()
            self.assertTrue(all(p.grad is not None for p in model.parameters()))

    def test_untrained_bpd_is_about_one(self):
        for model in self.models(hidden_dims=[512], num_filters=32, z_dim=20):
            bpd = model(torch.rand(64, 1, 28, 28).round())[2].item()
            self.assertTrue(1.0 < bpd < 1.1, bpd)

    def test_sample(self):
        for model in self.models():
            samples, means = model.sample(600)
            self.assertEqual((samples.shape, means.shape), ((600, 1, 28, 28), (600, 1, 28, 28)))
            self.assertEqual(samples.unique().tolist(), [0., 1.])
            self.assertTrue(((means > 0) & (means < 1)).all() and means.std(dim=0).mean() > 0)
            self.assertAlmostEqual(samples.mean().item(), means.mean().item(), places=2)
            self.assertFalse(samples.requires_grad or means.requires_grad)

    def test_hyperparameters_and_optimizer(self):
        for model in self.models(lr=0.03):
            self.assertEqual(set(model.hparams), {'model_name', 'hidden_dims', 'num_filters', 'z_dim', 'lr'})
            optimizer = model.configure_optimizers()
            self.assertIsInstance(optimizer, torch.optim.Adam)
            self.assertEqual(optimizer.param_groups[0]['lr'], 0.03)
        with self.assertRaisesRegex(ValueError, "'MLP' or 'CNN'"):
            VAE('RNN', [512], 32, 20, 1e-3)

    def test_the_package_does_not_use_torch_distributions(self):
        for path in HERE.glob('*.py'):
            if path.name != 'unittests.py':
                self.assertNotIn('torch.distributions', path.read_text(), path.name)


def idx(tensor):
    """The bytes of an IDX file, MNIST's format, of a uint8 tensor."""
    head = (0x0800 + tensor.dim()).to_bytes(4, 'big') + b''.join(size.to_bytes(4, 'big') for size in tensor.shape)
    return head + tensor.to(torch.uint8).numpy().tobytes()


class TestData(SeededTest):
    """The data path on a small stand-in for MNIST: 60 training images and 10 test images."""

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.folder = self.root / 'MNIST' / 'raw'
        images, labels = rendered_digits(70)
        self.content = dict(zip(bmnist.FILES, [idx(images[:60]), idx(labels[:60]), idx(images[60:]), idx(labels[60:])]))
        # packed once: gzip writes the time into its header
        self.packed = {f'{name}.gz': gzip.compress(content) for name, content in self.content.items()}
        self.images, self.labels = images, labels
        files = {name: (hashlib.md5(content).hexdigest(), len(content)) for name, content in self.content.items()}
        stack.enter_context(mock.patch.object(bmnist, 'FILES', files))
        stack.enter_context(mock.patch.object(MNIST, 'mirrors', []))  # no test ever asks the real ones

    def write(self, **changes):
        """Writes the four files, with changes by the beginning of their names (_ for -)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.content.items():
            (self.folder / name).write_bytes(changes.get(name[:name.index('-idx')].replace('-', '_'), content))

    def error(self, download=False):
        with self.assertRaises(bmnist.DataError) as caught, contextlib.redirect_stdout(io.StringIO()):
            bmnist.bmnist(self.root, download=download)
        self.assertNotIn('\n', str(caught.exception))
        return str(caught.exception)

    def test_reads_what_is_there(self):
        self.write()
        loaders = bmnist.bmnist(str(self.root), batch_size=7)
        train, test = loaders[0].dataset, loaders[2].dataset
        self.assertTrue(torch.equal(train.images, self.images[:60]))
        self.assertTrue(torch.equal(train.labels, self.labels[:60]))
        self.assertTrue(torch.equal(test.images, self.images[60:]))
        self.assertEqual(self.defaults(), {'root': '../data/', 'batch_size': 128, 'num_workers': 0, 'download': True,
                                           'binarization': 'threshold', 'train_size': 45_000})

    def defaults(self):
        return {name: parameter.default for name, parameter in inspect.signature(bmnist.bmnist).parameters.items()}

    def test_files_of_mnist(self):
        self.doCleanups()  # the real table
        self.assertEqual({name: md5 for name, (md5, _) in bmnist.FILES.items()},
                         {'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
                          'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
                          't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
                          't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637'})

    def test_splits_and_batches(self):
        """On tensors of MNIST's size whose labels are the images' numbers."""
        images = torch.arange(256, dtype=torch.uint8).repeat(60_000 * 4 // 256 + 1)[:60_000 * 4].view(60_000, 2, 2)
        labels, test_labels = torch.arange(60_000), 60_000 + torch.arange(10_000)
        loaders = bmnist.data_loaders(images, labels, images[:10_000], test_labels)
        seen = [torch.cat([batch_labels for _, batch_labels in loader]) for loader in loaders]
        self.assertEqual([len(loader) for loader in loaders], [352, 40, 79])  # the last, smaller batch is there
        self.assertFalse(torch.equal(seen[0], torch.arange(45_000)))
        self.assertFalse(torch.equal(seen[0], torch.cat([batch_labels for _, batch_labels in loaders[0]])))
        self.assertTrue(torch.equal(seen[0].sort().values, torch.arange(45_000)))
        self.assertTrue(torch.equal(seen[1], torch.arange(45_000, 50_000)))
        self.assertTrue(torch.equal(seen[2], test_labels))
        imgs, numbers = next(iter(loaders[0]))
        self.assertEqual((imgs.shape, imgs.dtype), ((128, 1, 2, 2), torch.float32))
        self.assertEqual((numbers.shape, numbers.dtype), ((128,), torch.int64))
        self.assertTrue(torch.equal(imgs[:, 0], (images[numbers].float() / 255 > 0.5).float()))

    def test_train_sizes(self):
        images, labels = torch.zeros(60_000, 2, 2, dtype=torch.uint8), torch.arange(60_000)
        for train_size in [45_000, 55_000]:
            loaders = bmnist.data_loaders(images, labels, images[:10], labels[:10], train_size=train_size)
            self.assertTrue(torch.equal(loaders[0].dataset.labels, torch.arange(train_size)))
            self.assertTrue(torch.equal(loaders[1].dataset.labels, torch.arange(train_size, train_size + 5_000)))
        for choice in [dict(train_size=50_000), dict(binarization='half')]:
            with self.assertRaisesRegex(ValueError, 'must be one of'):
                bmnist.data_loaders(images, labels, images, labels, **choice)

    def test_stochastic_binarization(self):
        """Each pixel is a draw of its own, with its intensity as its mean."""
        images = torch.arange(256, dtype=torch.uint8).repeat(4_000).view(4_000, 16, 16)
        before = images.clone()
        dataset = bmnist.SampledImages(images, torch.zeros(4_000, dtype=torch.int64))
        draws = dataset[torch.arange(4_000)][0]
        self.assertEqual(set(draws.unique().tolist()), {0., 1.})
        intensities = torch.arange(256) / 255
        self.assertTrue(torch.equal(draws[:, 0, 0, 0], torch.zeros(4_000)))
        self.assertTrue(torch.equal(draws[:, 0, -1, -1], torch.ones(4_000)))
        torch.testing.assert_close(draws.mean(dim=0).flatten(), intensities, atol=0.035, rtol=0)  # 4.4 standard errors
        self.assertAlmostEqual((draws.mean(dim=0).flatten() - intensities).mean().item(), 0, delta=0.002)
        torch.testing.assert_close(torch.corrcoef(draws[:, 0, 7, 8:].T), torch.eye(8), atol=0.08, rtol=0)
        first = dataset.images.clone()
        dataset.redraw(1)
        self.assertFalse(torch.equal(dataset.images, first))
        dataset.redraw(0)
        self.assertTrue(torch.equal(dataset.images, first))
        self.assertTrue(torch.equal(images, before))

    def test_when_images_are_drawn(self):
        """Training images anew for each pass, the others once and for all, whatever the random numbers are."""
        images = torch.full((60_000, 2, 2), 100, dtype=torch.uint8)
        labels = torch.arange(60_000)
        passes = []
        for seed in [0, 0, 1]:
            torch.manual_seed(seed)
            loaders = bmnist.data_loaders(images, labels, images[:10_000], labels[:10_000], binarization='stochastic')
            passes.append([torch.cat([imgs[labels.argsort()] for imgs, labels in [map(torch.cat, zip(*loader))]])
                           for loader in loaders for _ in range(2)])
        for train, train_again, val, val_again, test, test_again in passes:
            self.assertFalse(torch.equal(train, train_again))
            self.assertTrue(torch.equal(val, val_again) and torch.equal(test, test_again))
            self.assertTrue(torch.equal(val, passes[0][2]) and torch.equal(test, passes[0][4]))
        self.assertTrue(torch.equal(passes[0][0], passes[1][0]))
        self.assertFalse(torch.equal(passes[0][0], passes[2][0]))

    def test_threshold(self):
        images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        dataset = bmnist.BinaryImages(images, torch.zeros(1, dtype=torch.int64))
        img, label = dataset[0]
        self.assertTrue(torch.equal(img.flatten(), (torch.arange(256) >= 128).float()))
        self.assertEqual((img.shape, label), ((1, 16, 16), 0))

    def test_workers_change_nothing(self):
        self.write()
        batches = []
        for num_workers in [0, 2]:
            torch.manual_seed(3)
            train_loader = bmnist.bmnist(self.root, batch_size=25, num_workers=num_workers)[0]
            batches.append([imgs for _ in range(2) for imgs, _ in train_loader] + [torch.rand(3)])
        self.assertEqual([len(imgs) for imgs in batches[0]], [25, 25, 10, 25, 25, 10, 3])
        self.assertTrue(all(map(torch.equal, *batches)))

    def test_missing(self):
        for download in [False, True]:
            error = self.error(download)
            for part in [str(self.folder), *bmnist.FILES, '--dataset rendered', 'download']:
                self.assertIn(part, error)
        self.write()
        (self.folder / 't10k-labels-idx1-ubyte').unlink()
        self.assertIn('1 are missing', self.error())

    def test_damaged_files(self):
        good = self.content['train-images-idx3-ubyte']
        twin = self.content['t10k-images-idx3-ubyte']
        for problem, bad in [('truncated', good[:-100]), ('truncated', good[:200]), ('number', b''),
                             ('number', b'\x1f\x8b' + good[2:]), ('number', b'\0\0\x08\x01' + good[4:]),
                             ('MD5', good[:-1] + b'\x01'), ('files swapped', twin)]:
            self.write(train_images=bad)
            error = self.error(download=True)
            self.assertIn(str(self.folder / 'train-images-idx3-ubyte'), error)
            self.assertIn(problem, error)
        train_labels, t10k_labels = (self.content[f'{split}-labels-idx1-ubyte'] for split in ['train', 't10k'])
        self.write(train_labels=t10k_labels, t10k_labels=train_labels)
        self.assertIn('train-labels-idx1-ubyte', self.error())

    @contextlib.contextmanager
    def mirror(self, cut_after=None):
        """A local HTTP server as MNIST's only mirror; each answer breaks off after `cut_after` bytes, if given."""
        packed, requests = self.packed, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path[1:]
                requests.append(name)
                self.send_response(200 if name in packed else 404)
                self.send_header('Content-Length', str(len(packed.get(name, b''))))
                self.end_headers()
                self.wfile.write(packed.get(name, b'')[:cut_after])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
        with mock.patch.object(MNIST, 'mirrors', [f'http://127.0.0.1:{server.server_port}/']), \
                mock.patch.object(MNIST, 'resources', resources):
            yield requests
        server.shutdown()
        server.server_close()

    def assert_complete(self):
        left = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.name != '.lock'}
        self.assertEqual(left, self.content)

    def test_download(self):
        with self.mirror() as requests, contextlib.redirect_stdout(io.StringIO()) as output:
            bmnist.bmnist(self.root)
            self.assertEqual(len(set(requests)), 4)
            del requests[:]
            bmnist.bmnist(self.root)
            self.assertEqual(requests, [])
        self.assertEqual(output.getvalue(), f'Downloading MNIST to {self.folder}\n')
        self.assert_complete()

    def test_broken_download_leaves_nothing_behind(self):
        with self.mirror(cut_after=50):
            self.assertIn('could not be downloaded', self.error(download=True))
        self.assertEqual([path.name for path in self.folder.iterdir()], ['.lock'])
        with self.mirror(), contextlib.redirect_stdout(io.StringIO()):
            bmnist.bmnist(self.root)
        self.assert_complete()

    def test_download_after_a_process_was_killed(self):
        staged = self.folder / '.download' / 'MNIST' / 'raw'
        staged.mkdir(parents=True)
        for name, content in self.content.items():
            (staged / name).write_bytes(content[:99])
        with self.mirror(), contextlib.redirect_stdout(io.StringIO()):
            bmnist.bmnist(self.root)
        self.assert_complete()

    def test_mirror_that_never_answers(self):
        with socket.create_server(('127.0.0.1', 0)) as silent, mock.patch.object(bmnist, 'TIMEOUT', 0.2), \
                mock.patch.object(MNIST, 'mirrors', [f'http://127.0.0.1:{silent.getsockname()[1]}/']):
            self.assertIn('timed out', self.error(download=True))
        self.assertIsNone(socket.getdefaulttimeout())

    def test_packed_files_brought_along(self):
        self.folder.mkdir(parents=True)
        with self.mirror() as requests:
            for name, content in self.packed.items():
                (self.folder / name).write_bytes(content)
            with contextlib.redirect_stdout(io.StringIO()):
                bmnist.bmnist(self.root)
        self.assertEqual(requests, [])

    def test_eight_processes_at_once(self):
        context = multiprocessing.get_context('fork')
        with self.mirror() as requests:
            processes = [context.Process(target=self.load_quietly) for _ in range(8)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
                process.kill()
        self.assertEqual([process.exitcode for process in processes], [0] * 8)
        self.assertEqual({requests.count(name) for name in requests}, {requests.count(requests[0])})
        self.assertLess(len(requests), 9)  # one process asked (twice per file: torchvision looks for redirections)
        self.assert_complete()

    def load_quietly(self):
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        with contextlib.redirect_stdout(io.StringIO()):
            train_loader = bmnist.bmnist(self.root)[0]
        if not torch.equal(train_loader.dataset.images, self.images[:60]):
            sys.exit(3)

    def test_command(self):
        self.write()
        with mock.patch.object(sys, 'argv', ['bmnist.py', '--data_dir', str(self.root)]), \
                mock.patch.multiple(bmnist, TRAIN_SIZES=[50], NUM_VAL=10,
                                    bmnist=functools.partial(bmnist.bmnist, train_size=50)), \
                contextlib.redirect_stdout(io.StringIO()) as output:
            bmnist.main()
        ink = (self.images[:50] > 127).float().mean().item()
        self.assertRegex(output.getvalue(), rf'verified\ntrain +50 images +ink {ink:.2%}\nvalidation +10 images')
        self.write(t10k_images=b'nonsense')
        with self.assertRaises(SystemExit) as caught, mock.patch.object(sys, 'argv', ['x', f'--data_dir={self.root}']):
            bmnist.main()
        self.assertIn('t10k-images-idx3-ubyte is not MNIST', caught.exception.code)


class TestRenderedDigits(SeededTest):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = rendered_digits()
        cls.ink = cls.images > 127

    def test_shapes_and_types(self):
        self.assertEqual(self.images.shape, (60_000, 28, 28))
        self.assertEqual(self.images.dtype, torch.uint8)
        self.assertEqual((self.images.min().item(), self.images.max().item()), (0, 255))
        self.assertEqual(self.labels.shape, (60_000,))
        self.assertEqual(self.labels.dtype, torch.int64)

    def test_number_of_images(self):
        for number in (1, 3, 1_000, 1_001):
            images, labels = rendered_digits(number)
            self.assertTrue(torch.equal(images, self.images[:number]))
            self.assertTrue(torch.equal(labels, self.labels[:number]))
        for number in (0, -1):
            with self.assertRaisesRegex(ValueError, "num_images must be at least 1"):
                rendered_digits(number)

    def test_seed(self):
        images, labels = rendered_digits(5_000, seed=0)
        self.assertTrue(torch.equal(images, self.images[:5_000]))
        self.assertTrue(torch.equal(labels, self.labels[:5_000]))
        images, labels = rendered_digits(5_000, seed=1)
        self.assertLess((labels == self.labels[:5_000]).float().mean().item(), 0.2)
        same = (images == self.images[:5_000]).flatten(1).all(1)
        self.assertFalse(same.any())

    def test_number_of_threads_does_not_matter(self):
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                images, labels = rendered_digits(5_000)
                self.assertTrue(torch.equal(images, self.images[:5_000]))
                self.assertTrue(torch.equal(labels, self.labels[:5_000]))
                self.assertEqual(torch.get_num_threads(), threads)
        finally:
            torch.set_num_threads(before)

    def test_global_random_numbers_untouched(self):
        before = torch.get_rng_state()
        rendered_digits(100, seed=5)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_ink(self):
        # MNIST has 0.13 of its pixels inked; no digit is empty or a blot.
        shares = self.ink.flatten(1).float().mean(1)
        self.assertGreater(shares.mean().item(), 0.11)
        self.assertLess(shares.mean().item(), 0.15)
        self.assertGreater(shares.min().item(), 0.03)
        self.assertLess(shares.max().item(), 0.35)

    def test_inside_the_frame(self):
        border = torch.ones(28, 28, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        touching = self.ink[:, border].any(1).float().mean().item()
        self.assertLess(touching, 0.01)  # the feet of some sevens; MNIST has 0.011

    def test_size_and_centre(self):
        rows, columns = self.ink.any(2), self.ink.any(1)
        height, width = (28 - side.byte().argmax(1) - side.flip(1).byte().argmax(1) for side in (rows, columns))
        longer = torch.maximum(height, width)
        self.assertGreaterEqual(longer.min().item(), 17)
        self.assertLessEqual(longer.max().item(), 21)
        grey = self.images.float()
        pixels = torch.arange(28.0)
        for axis in (1, 2):
            profile = grey.sum(3 - axis)
            centre = (profile * pixels).sum(1) / profile.sum(1)
            self.assertAlmostEqual(centre.mean().item(), 14, delta=0.2)
            self.assertLess((centre - 14).abs().max().item(), 1.5)

    def test_every_split_is_a_fair_sample(self):
        for labels in self.labels.split([45_000, 5_000, 10_000]):
            share = torch.bincount(labels, minlength=10) / len(labels)
            self.assertEqual(len(share), 10)
            self.assertGreater(share.min().item(), 0.08)
            self.assertLess(share.max().item(), 0.12)

    def test_labels_belong_to_the_images(self):
        # Nearest class mean: 0.96 of all, 0.85 of the fives, with the right labels; 0.1 with shuffled ones.
        train, test = self.ink[:45_000].flatten(1).float(), self.ink[50_000:].flatten(1).float()
        train_labels, test_labels = self.labels[:45_000], self.labels[50_000:]
        means = torch.stack([train[train_labels == digit].mean(0) for digit in range(10)])
        right = torch.cdist(test, means).argmin(1) == test_labels
        for digit in range(10):
            self.assertGreater(right[test_labels == digit].float().mean().item(), 0.75, f"digit {digit}")

    def test_labels_name_the_digits(self):
        # Closed loops tell what a mean cannot: whether the pictures called 8 are eights. Background is filled from a
        # corner; what stays dry is a hole. Zero, four, six, eight and nine have one; the others none.
        paper = ~self.ink[50_000:52_000]
        labels = self.labels[50_000:52_000]
        wet = torch.zeros_like(paper)
        wet[:, 0, 0] = True
        while True:
            spread = wet.clone()
            spread[:, 1:] |= wet[:, :-1]
            spread[:, :-1] |= wet[:, 1:]
            spread[:, :, 1:] |= wet[:, :, :-1]
            spread[:, :, :-1] |= wet[:, :, 1:]
            spread &= paper
            if torch.equal(spread, wet):
                break
            wet = spread
        dry = paper & ~wet
        hole = dry.flatten(1).sum(1) > 3
        for digit in range(10):
            share = hole[labels == digit].float().mean().item()
            if digit in (0, 4, 6, 8, 9):
                self.assertGreater(share, 0.9, f"digit {digit}")
            else:
                self.assertLess(share, 0.1, f"digit {digit}")
        rows = torch.arange(28)[:, None].expand(28, 28)
        mean_row = {digit: (dry[labels == digit] * rows).sum() / dry[labels == digit].sum() for digit in (6, 9)}
        self.assertGreater(mean_row[6].item(), 15)  # the loop of a six is below the middle,
        self.assertLess(mean_row[9].item(), 13)  # that of a nine above


class TestGenerateCallback(SeededTest):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.writer = mock.Mock()
        self.trainer = types.SimpleNamespace(
            logger=types.SimpleNamespace(experiment=self.writer, log_dir=self.folder), current_epoch=0)

    def pictures(self):
        """{(tag, epoch): picture} of all that went to TensorBoard."""
        return {(call.args[0], call.args[2]): call.args[1] for call in self.writer.add_image.call_args_list}

    def test_defaults(self):
        parameters = inspect.signature(GenerateCallback).parameters
        self.assertEqual({name: parameter.default for name, parameter in parameters.items()},
                         {'batch_size': 64, 'every_n_epochs': 5, 'save_to_disk': False})

    def test_rhythm_and_tags(self):
        for z_dim, tags in [(3, {'Samples', 'Means'}), (2, {'Samples', 'Means', 'Manifold'})]:
            self.writer.reset_mock()
            callback, model = GenerateCallback(), VAE('MLP', [8], 32, z_dim, 1e-3)
            callback.sample_and_save(self.trainer, model, epoch=0)
            for self.trainer.current_epoch in range(12):
                callback.on_train_epoch_end(self.trainer, model)
            self.assertEqual(set(self.pictures()), {(tag, epoch) for tag in tags for epoch in [0, 5, 10]})
            for (tag, _), picture in self.pictures().items():
                self.assertEqual(picture.shape, (3, 602, 602) if tag == 'Manifold' else (3, 242, 242))
        self.assertEqual(os.listdir(self.folder), [])

    def test_files(self):
        callback = GenerateCallback(save_to_disk=True)
        callback.imgs = torch.zeros(32, 1, 28, 28)
        callback.sample_and_save(self.trainer, VAE('CNN', [8], 4, 3, 1e-3), epoch=10)
        self.assertEqual(set(os.listdir(self.folder)), {f'epoch_10_{name}.png' for name in ['samples', 'means',
                                                                                            'reconstructions']})

    def test_reconstructions_are_beside_their_originals(self):
        callback, model = GenerateCallback(), VAE('MLP', [8], 32, 3, 1e-3)
        callback.imgs = imgs = torch.bernoulli(torch.full((32, 1, 28, 28), 0.1))
        callback.sample_and_save(self.trainer, model, epoch=0)
        grid = self.pictures()['Reconstructions', 0]
        with torch.no_grad():
            expected = torch.sigmoid(model.decoder(model.encoder(imgs)[0]))
        self.assertTrue(torch.equal(grid[0, 2:30, 2:30], imgs[0, 0]))
        self.assertTrue(torch.equal(grid[0, 2:30, 32:60], expected[0, 0]))
        self.assertTrue(torch.equal(grid[0, 32:60, 2:30], imgs[4, 0]))

    def test_same_latents_and_no_trace_in_the_random_numbers(self):
        callback, model = GenerateCallback(batch_size=4), VAE('MLP', [8], 32, 3, 1e-3)
        state = torch.get_rng_state()
        for epoch in [1, 2]:
            callback.sample_and_save(self.trainer, model, epoch)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            torch.rand(1)
            state = torch.get_rng_state()
        pictures = self.pictures()
        self.assertTrue(torch.equal(pictures['Samples', 1], pictures['Samples', 2]))


def small_loaders(args):
    """Loaders of rendered digits: 300 to train on, 50 to validate, 50 to test."""
    images, labels = rendered_digits(400)
    splits = [slice(0, 300), slice(300, 350), slice(350, 400)]
    is_stochastic = getattr(args, 'binarization', None) == 'stochastic'
    Images = bmnist.SampledImages if is_stochastic else bmnist.BinaryImages
    return tuple(bmnist.DataLoader(Images(images[split], labels[split]), args.batch_size,
                                   shuffle=split.start == 0, num_workers=args.num_workers,
                                   collate_fn=bmnist.already_a_batch) for split in splits)


def scalars_and_images(folder):
    """All that a run's event files hold: how often each (tag, step, value) is there."""
    points = Counter()
    for path in folder.glob('events.out.tfevents.*'):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name in ('scalars', 'images'):
                    points[value.tag, event.step, value.tensor.SerializeToString()] += 1
    return points


def what_a_run_left(folder):
    """Everything that must not depend on whether a run was interrupted, by name."""
    with open(folder / 'metrics.csv') as file:
        metrics = [{name: value for name, value in row.items() if name != 'seconds'} for row in csv.DictReader(file)]
    results = json.loads((folder / 'results.json').read_text())
    left = {'metrics.csv': metrics, 'TensorBoard': scalars_and_images(folder),
            'results.json': {name: value for name, value in results.items() if 'seconds' not in name},
            'files': sorted(path.name for path in folder.rglob('*') if 'tfevents' not in path.name)}
    for name in ['best', 'last']:
        checkpoint = torch.load(folder / 'checkpoints' / f'{name}.ckpt', weights_only=True)
        left[name] = {**checkpoint['state_dict'], 'epoch': checkpoint['epoch'], 'step': checkpoint['global_step'],
                      'adam': [list(state.values()) for state in checkpoint['optimizer_states'][0]['state'].values()]}
    for path in folder.glob('epoch_*.png'):
        left[path.name] = path.read_bytes()
    return left


class TrainingTest(SeededTest):
    """A test that trains on few digits, in a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        patch = mock.patch.object(train_pl, 'load_data', small_loaders)
        patch.start()
        self.addCleanup(patch.stop)

    def namespace(self, **flags):
        """The flags of the assignment's template and no other."""
        return argparse.Namespace(**{**dict(model='MLP', z_dim=2, hidden_dims=[16], num_filters=4, lr=1e-3,
                                            batch_size=128, epochs=6, seed=42, num_workers=0, log_dir=self.folder,
                                            progress_bar=False), **flags})

    def main(self, *flags):
        """Exit code and the error message of a command."""
        error = io.StringIO()
        with mock.patch.object(sys, 'argv', ['train_pl.py', *flags]), self.assertRaises(SystemExit) as caught, \
                contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            train_pl.main()
        code = caught.exception.code
        return (1, code) if isinstance(code, str) else (code, error.getvalue())


class TestTraining(TrainingTest):

    def train(self, **flags):
        """Trains on the CPU, whose results repeat bit for bit; returns the run's folder and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_vae(self.namespace(accelerator='cpu', **flags))
        return self.run_folder(), output.getvalue()

    def run_folder(self):
        return max((Path(self.folder) / 'lightning_logs').iterdir(), key=lambda path: int(path.name.split('_')[1]))

    def test_flags_and_defaults(self):
        defaults = dict(model='MLP', z_dim=20, hidden_dims=[512], num_filters=32, lr=1e-3, batch_size=128, epochs=80,
                        seed=42, num_workers=0, log_dir='VAE_logs', progress_bar=False, dataset='mnist', init='pytorch',
                        data_dir='../data/', binarization='threshold', train_size=45_000, lr_schedule='constant',
                        accelerator='auto', plain=False, run_name=None, devices=1, num_nodes=1)
        self.assertEqual(vars(train_pl.make_parser().parse_args([])), defaults)

    def test_a_run_from_a_notebook(self):
        args = self.namespace()
        before = copy.deepcopy(args)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            result = train_vae(args)
        self.assertEqual(args, before)
        self.assertEqual([list(metrics) for metrics in result], [['test_bpd']])
        folder = self.run_folder()

        names = {path.name for path in folder.iterdir()}
        events = {name for name in names if name.startswith('events.out.tfevents')}
        self.assertTrue(events)
        self.assertEqual(names - events, {
            '.lock', 'hparams.yaml', 'metrics.csv', 'results.json', 'checkpoints', 'bpd_curves.png', 'vae_manifold.png',
            'samples_over_training.png', *(f'epoch_{epoch}_{name}.png' for epoch in [0, 5]
                                           for name in ['samples', 'means', 'reconstructions'])})
        self.assertEqual(set(os.listdir(folder / 'checkpoints')), {'best.ckpt', 'last.ckpt', 'previous.ckpt'})
        for path in folder.glob('*.png'):
            self.assertEqual(path.read_bytes()[:8], b'\x89PNG\r\n\x1a\n')

        flags = {**vars(train_pl.make_parser().parse_args([])), **vars(args)}
        hparams = yaml.safe_load((folder / 'hparams.yaml').read_text())
        self.assertEqual(hparams, flags)
        with open(folder / 'metrics.csv') as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([int(row['epoch']) for row in rows], list(range(7)))
        self.assertEqual((rows[0]['train_bpd'], float(rows[6]['train_ELBO']) > 0), ('', True))

        results = json.loads((folder / 'results.json').read_text())
        self.assertEqual(results['test_bpd'], result[0]['test_bpd'])
        val_bpds = [float(row['val_bpd']) for row in rows[1:]]
        self.assertEqual((results['best_val_bpd'], results['best_epoch']),
                         (min(val_bpds), 1 + val_bpds.index(min(val_bpds))))
        self.assertEqual((results['dataset'], results['seed']), ('mnist', 42))
        self.assertEqual(results['hyperparameters'], flags)
        self.assertEqual(results['versions']['torch'], torch.__version__)
        self.assertEqual(results['versions']['pytorch_lightning'], pl.__version__)
        self.assertTrue(1.0 < results['first_step_bpd'] < 1.1 and results['device'])
        self.assertTrue(0 < results['fit_seconds'] <= results['seconds'])

        lines = output.getvalue().splitlines()
        self.assertEqual([line[:11] for line in lines[1:8]], [f'epoch   {epoch}/6' for epoch in range(7)])
        self.assertRegex(lines[2], r'^epoch   1/6  train bpd \d\.\d{4}  val bpd \d\.\d{4}  \d+\.\d s$')
        self.assertEqual(lines[-2:], [f"test bpd {results['test_bpd']:.4f}", f'run folder {folder}'])
        self.check_tensorboard(folder, rows, results)

    def check_tensorboard(self, folder, rows, results):
        events = EventAccumulator(str(folder), size_guidance={'images': 0}).Reload()
        scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()['scalars']}
        names = ['reconstruction_loss', 'regularization_loss', 'ELBO', 'bpd']
        self.assertEqual(len(scalars), 9)
        for name in names:
            self.assertEqual(sorted(scalars[f'train_{name}']), list(range(1, 7)))
            self.assertEqual(sorted(scalars[f'val_{name}']), list(range(7)))  # begins with the untrained model
        for row in rows[1:]:
            epoch, elbo = int(row['epoch']), float(row['train_ELBO'])
            self.assertAlmostEqual(scalars['train_ELBO'][epoch], elbo, places=3)
            self.assertAlmostEqual(float(row['train_reconstruction_loss']) + float(row['train_regularization_loss']),
                                   elbo, places=2)
            self.assertAlmostEqual(scalars['train_bpd'][epoch], elbo / np.log(2) / 784, places=5)
        self.assertEqual(list(scalars['test_bpd']), [6])
        self.assertAlmostEqual(scalars['test_bpd'][6], results['test_bpd'], places=6)
        self.assertEqual({tag: sorted(event.step for event in events.Images(tag)) for tag in events.Tags()['images']},
                         {tag: [0, 5] for tag in ['Samples', 'Means', 'Reconstructions', 'Manifold']})
        summaries = {summary.tag: summary for path in folder.glob('events.out*')
                     for event in EventFileLoader(str(path)).Load() for summary in event.summary.value}
        layout = Layout.FromString(summaries['custom_scalars__config__'].tensor.string_val[0])
        charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
        self.assertCountEqual(charts, [[f'train_{name}', f'val_{name}'] for name in names])
        hparams = {tag: HParamsPluginData.FromString(summaries[f'_hparams_/{tag}'].metadata.plugin_data.content)
                   for tag in ['experiment', 'session_start_info']}
        self.assertEqual([metric.name.tag for metric in hparams['experiment'].experiment.metric_infos], ['test_bpd'])
        flags = hparams['session_start_info'].session_start_info.hparams
        self.assertEqual(set(flags), set(results['hyperparameters']))
        self.assertEqual((flags['z_dim'].number_value, flags['hidden_dims'].string_value), (2, '[16]'))

    def test_epoch_means_weigh_every_image_alike(self):
        """The last batch of an epoch is smaller: 44 of 300 images."""
        def forward(model, imgs):
            return 3 * [model.decoder.net[0].bias[0] * 0 + len(imgs) * (model.current_epoch + 1)]

        with mock.patch.object(VAE, 'forward', forward):
            folder, _ = self.train(epochs=2)
        with open(folder / 'metrics.csv') as file:
            rows = list(csv.DictReader(file))
        for epoch in [1, 2]:  # of its own images alone
            self.assertAlmostEqual(float(rows[epoch]['train_bpd']), epoch * (2 * 128**2 + 44**2) / 300, places=3)
            self.assertAlmostEqual(float(rows[epoch]['val_bpd']), epoch * 50, places=3)

    def test_checkpoints(self):
        """best.ckpt is that of the lowest validation bpd and is what is tested; last.ckpt is the last epoch's."""
        with mock.patch.object(VAE, 'on_validation_epoch_end', lambda self: self.log(
                'val_bpd', abs(self.current_epoch - 1.5) if self.trainer.state.fn == 'fit' else 0.1)):
            folder, _ = self.train(epochs=4, model='CNN')
        best, last = (torch.load(folder / 'checkpoints' / f'{name}.ckpt', weights_only=True)
                      for name in ['best', 'last'])
        self.assertEqual((best['epoch'], last['epoch']), (1, 3))
        self.assertEqual(json.loads((folder / 'results.json').read_text())['best_epoch'], 2)
        model = VAE.load_from_checkpoint(folder / 'checkpoints' / 'best.ckpt')
        self.assertEqual(list(best['state_dict']), [name for name, _ in model.named_parameters()])
        self.assertEqual(dict(model.hparams), dict(model_name='CNN', hidden_dims=[16], num_filters=4, z_dim=2, lr=1e-3))
        torch.manual_seed(processes.derived_seed(42))
        with torch.no_grad():
            losses = [(len(imgs), model(imgs)[2].item()) for imgs, _ in small_loaders(self.namespace())[2]]
        self.assertAlmostEqual(json.loads((folder / 'results.json').read_text())['test_bpd'],
                               sum(n * bpd for n, bpd in losses) / 50, places=5)

    def test_initial_weights(self):
        with mock.patch.object(train_pl, 'he_init') as init:
            self.train(epochs=1)
            init.assert_not_called()
            self.train(epochs=1, init='he')
        self.assertEqual([net[0].in_features for (net,), _ in init.call_args_list], [784, 2])

    def test_same_seed_same_weights(self):
        def weights(**flags):
            folder, _ = self.train(epochs=2, **flags)
            return torch.load(folder / 'checkpoints' / 'last.ckpt', weights_only=True)['state_dict'].values()

        first = list(weights())
        self.assertTrue(all(map(torch.equal, first, weights())))
        self.assertTrue(all(map(torch.equal, first, weights(num_workers=2))))
        self.assertFalse(all(map(torch.equal, first, weights(seed=43))))

    def test_loss_that_is_not_finite(self):
        forward = VAE.forward
        for value in [float('nan'), float('inf')]:
            def diverge(model, imgs, value=value):
                return [loss + value if model.training and model.current_epoch == 2 else loss
                        for loss in forward(model, imgs)]

            with mock.patch.object(VAE, 'forward', diverge), \
                    self.assertRaisesRegex(run_folder.TrainingDiverged, r'^train_bpd became \w+ in epoch 3.* --lr'):
                self.train()
            last = torch.load(self.run_folder() / 'checkpoints' / 'last.ckpt', weights_only=True)
            self.assertEqual(last['epoch'], 1)
            self.assertTrue(all(weight.isfinite().all() for weight in last['state_dict'].values()))
        with self.assertRaisesRegex(run_folder.TrainingDiverged, r'in epoch 1: try .*no checkpoint was written'):
            self.train(lr=1e30)

    def test_interrupt(self):
        def on_train_epoch_start(model):
            if model.current_epoch == 2:
                raise KeyboardInterrupt

        handler = signal.getsignal(signal.SIGINT)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        with mock.patch.object(VAE, 'on_train_epoch_start', on_train_epoch_start), \
                self.assertRaises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()) as output:
            train_vae(self.namespace())
        self.assertEqual(caught.exception.code, 1)
        self.assertIn(f'Interrupted in epoch 3. {self.run_folder()} stays usable', output.getvalue())
        VAE.load_from_checkpoint(self.run_folder() / 'checkpoints' / 'last.ckpt')
        self.assertIn('The same command and --run_name lightning_logs/version_0 continues it', output.getvalue())
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_vae(self.namespace(run_name='lightning_logs/version_0'))
        self.assertIn('version_0, continued after epoch 2\n', output.getvalue())

    def test_runs_are_numbered(self):
        folders = []
        for version in [None, None, 0]:  # the last one has lost a race for the number
            with mock.patch.object(run_folder.TensorBoardLogger, '_get_next_version', lambda self: 0) if version == 0 \
                    else contextlib.nullcontext(), run_folder.open_run(self.folder, None, {}, {}) as run:
                folders.append(os.path.relpath(run.folder, self.folder))
        self.assertEqual(folders, [f'lightning_logs/version_{number}' for number in range(3)])

    def test_bad_flags(self):
        log_dir = os.path.join(self.folder, 'logs')
        for flags in ['--z_dim 0', '--hidden_dims -3', '--hidden_dims 512 0', '--hidden_dims', '--lr nan', '--lr 0',
                      '--lr inf', '--batch_size 0', '--epochs -1', '--epochs 0', '--num_filters 0', '--num_workers -1',
                      '--seed -1', '--devices 0', '--num_nodes 0', '--batch_size 7 --devices 2', '--run_name ..',
                      '--init he --model CNN', '--z_dim two', '--model RNN', '--dataset cifar', '--no_such_flag']:
            code, message = self.main(*flags.split(), '--log_dir', log_dir)
            self.assertEqual(code, 2, flags)
            self.assertRegex(message, r'^train_pl.py: error: .*\n\Z')
            self.assertIn(flags.split()[0], message)
        for flags in [dict(z_dim=0), dict(hidden_dims=[]), dict(lr=float('nan')), dict(model='RNN'),
                      dict(dataset='MNIST')]:
            with self.assertRaisesRegex(ValueError, next(iter(flags))):
                train_vae(self.namespace(log_dir=log_dir, **flags))
        self.assertFalse(os.path.exists(log_dir))

    def test_other_errors_are_one_line(self):
        log_dir = os.path.join(self.folder, 'logs')
        with mock.patch.object(train_pl, 'load_data', mock.Mock(side_effect=bmnist.DataError('no data'))):
            self.assertEqual(self.main('--log_dir', log_dir), (1, 'train_pl.py: error: no data'))
        if not torch.cuda.is_available():
            code, message = self.main('--accelerator', 'gpu', '--log_dir', log_dir)
            self.assertEqual((code, message.count('\n')), (1, 0))
        self.assertFalse(os.path.exists(log_dir))
        Path(log_dir).touch()
        code, message = self.main('--log_dir', log_dir)
        self.assertEqual(code, 1)
        self.assertRegex(message, 'cannot write to the log directory .*logs .*--log_dir')

    def test_progress_bar(self):
        with contextlib.redirect_stderr(io.StringIO()) as bar:
            _, output = self.train(epochs=1, progress_bar=True)
        self.assertIn('Epoch 0: 100%', output + bar.getvalue())
        self.assertNotIn('epoch   1/1', output)


class TestContinuedRuns(TrainingTest):
    """Runs that stop somewhere and are given again by the same name, against one that never stopped."""

    def train(self, **flags):
        """A run's result and what was printed; on the CPU, and on its plain path unless a test says otherwise."""
        flags = {'accelerator': 'cpu', 'log_dir': os.path.join(self.folder, 'stopped'), 'run_name': 'run', **flags}
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            result = train_vae(self.namespace(**flags))
        return result, output.getvalue()

    def stop_at(self, owner, name, epoch, **flags):
        """Trains until a method is called while the number of epochs trained is `epoch`, and ends the process there."""
        original, trainers = getattr(owner, name), []
        make_trainer = train_pl.make_trainer

        def method(*args, **kwargs):
            if trainers[0].current_epoch == epoch:
                raise Killed
            return original(*args, **kwargs)

        def remember(*args):
            trainers.append(make_trainer(*args))
            return trainers[0]

        with mock.patch.object(owner, name, method), mock.patch.object(train_pl, 'make_trainer', remember), \
                self.assertRaises(Killed):
            self.train(**flags)

    @property
    def run_there(self):
        return Path(self.folder) / 'stopped' / 'run'

    def check(self, **flags):
        """Continues the run that was stopped and compares it with one that never was. Returns what was printed."""
        _, output = self.train(**flags)
        self.train(**{**flags, 'log_dir': os.path.join(self.folder, 'undisturbed')})
        left, expected = map(what_a_run_left, [self.run_there, Path(self.folder) / 'undisturbed' / 'run'])
        for run in [left, expected]:
            del run['results.json']['hyperparameters']  # their log directories differ
        self.assertEqual(left.keys(), expected.keys())
        for name in left:
            if name in ['best', 'last']:
                torch.testing.assert_close(left[name], expected[name], rtol=0, atol=0)
            else:
                self.assertEqual(left[name], expected[name], name)
        return output

    def test_stopped_at_the_start_of_an_epoch(self):
        """The last time after an epoch with pictures, and with files that were being written."""
        for epoch in [0, 3, 5]:
            self.stop_at(VAE, 'on_train_epoch_start', epoch)
        for path in [*self.run_there.glob('events.out.tfevents.*'), self.run_there / 'checkpoints' / 'best.ckpt']:
            path.with_name(f'{path.name}.tmp').write_bytes(path.read_bytes())
        output = self.check()
        self.assertIn(f'in {self.run_there}, continued after epoch 5\nepoch   6/6', output)

    def test_stopped_between_two_checkpoints(self):
        """After best.ckpt and before last.ckpt: of the first epoch, of one in the middle, and of the last one."""
        save = checkpoints.CheckpointFiles.save_checkpoint

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            if checkpoint['epoch'] in [0, 2, 5] and path.endswith('last.ckpt'):
                raise Killed
            save(self, checkpoint, path)

        for _ in range(3):
            with mock.patch.object(checkpoints.CheckpointFiles, 'save_checkpoint', save_checkpoint), \
                    self.assertRaises(Killed):
                self.train()
        self.assertIn('continued after epoch 6\ntest bpd', self.check())

    def test_stopped_while_it_logs(self):
        """After the checkpoint of an epoch and before the epoch's means of training are in TensorBoard."""
        self.stop_at(run_folder.EpochLogger, 'log_metrics', 2)
        self.check()

    def test_pictures_are_on_disk_before_their_checkpoint(self):
        pictures = {}

        def save_checkpoint(files, checkpoint, path, storage_options=None):
            pictures[checkpoint['epoch'] + 1] = {(tag, step) for tag, step, _ in scalars_and_images(self.run_there)
                                                 if tag[0].isupper()}
            save(files, checkpoint, path)

        save = checkpoints.CheckpointFiles.save_checkpoint
        with mock.patch.object(checkpoints.CheckpointFiles, 'save_checkpoint', save_checkpoint):
            self.train(epochs=5)
        self.assertEqual(pictures[5] - pictures[4], {(tag, 5) for tag in ['Samples', 'Means', 'Reconstructions',
                                                                         'Manifold']})

    def test_stopped_while_it_tests_and_draws(self):
        for owner, name in [(VAE, 'test_step'), (train_pl, 'draw_figures'), (run_folder, 'write_results')]:
            self.stop_at(owner, name, 6)
        self.check()

    def test_other_models_and_paths(self):
        """A CNN, that begins in chunks with their checkpoints in the background, and goes on without, with workers."""
        def speed_up(trainer, *args):
            trainer.strategy.checkpoint_io = cuda_graph.BackgroundCheckpointIO(trainer.strategy.checkpoint_io)
            return original(trainer, *args)

        original = cuda_graph.speed_up
        with mock.patch.object(cuda_graph, 'suits', return_value=True), \
                mock.patch.object(cuda_graph, 'speed_up', speed_up):
            for epoch in [2, 4]:
                self.stop_at(VAE, 'on_train_epoch_start', epoch, model='CNN', z_dim=3)
        self.check(model='CNN', z_dim=3, num_workers=1)

    def test_drawn_images_and_learning_rate(self):
        """Of each epoch, whenever the run stops, in chunks and with workers, too."""
        flags = dict(binarization='stochastic', lr_schedule='cosine', lr=0.01)
        with mock.patch.object(cuda_graph, 'suits', return_value=True):
            for epoch in [2, 4]:
                self.stop_at(VAE, 'on_train_epoch_start', epoch, **flags)
        self.check(**flags, num_workers=1)
        lrs = []
        with mock.patch.object(bmnist.SampledImages, 'redraw', autospec=True) as redraw, \
                mock.patch.object(VAE, 'on_train_epoch_end', autospec=True, side_effect=lambda model: lrs.append(
                    model.optimizers().param_groups[0]['lr'])):
            self.train(**flags, log_dir=os.path.join(self.folder, 'watched'))
        torch.testing.assert_close(lrs, [0.005 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)])
        seeds = [call.args[1] for call in redraw.call_args_list]
        self.assertEqual(seeds[:3], [0, 0, 0])  # the three sets
        self.assertEqual(len(set(seeds[3:])), 6)  # the epochs

    def test_a_folder_that_was_moved(self):
        """The score of the best checkpoint is kept, although it is another file now."""
        def log_best_first(model):
            model.log('val_bpd', float(model.current_epoch))

        with mock.patch.object(VAE, 'on_validation_epoch_end', log_best_first):
            self.stop_at(VAE, 'on_train_epoch_start', 3)
            os.rename(self.run_there, Path(self.folder) / 'run')
            self.train(log_dir=self.folder)
        best = torch.load(Path(self.folder) / 'run' / 'checkpoints' / 'best.ckpt', weights_only=True)
        self.assertEqual(best['epoch'], 0)

    def test_damaged_checkpoints(self):
        self.stop_at(VAE, 'on_train_epoch_start', 4)
        last = self.run_there / 'checkpoints' / 'last.ckpt'
        good = last.read_bytes()
        middle = len(good) // 2
        for bad in [good[:-100], good[:1000], b'', b'nonsense',
                    good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]]:
            (last.parent / 'best.ckpt').write_bytes(bad)  # which is of the same epoch
            last.write_bytes(bad)
            with contextlib.redirect_stderr(io.StringIO()) as error:
                run_folder.newest_checkpoint(last.parent)
            self.assertRegex(error.getvalue(),
                             rf'{last} is no checkpoint, .* \(.*\); continuing from previous.ckpt, epoch 3\n')
            self.assertEqual(last.read_bytes(), (last.parent / 'previous.ckpt').read_bytes())
        last.write_bytes(good[:-100])
        self.assertIn('continued after epoch 3', self.check())

    def test_all_checkpoints_damaged(self):
        self.stop_at(VAE, 'on_train_epoch_start', 2)
        for path in (self.run_there / 'checkpoints').iterdir():
            path.write_bytes(b'nonsense')
        before = self.contents()
        with self.assertRaisesRegex(run_folder.RunFolderError, 'last.ckpt is no .*previous.*delete.*--run_name'):
            self.train()
        self.assertEqual(self.contents(), before)

    def contents(self):
        """All files of the run and when they were changed; the lock may be taken and given back."""
        return {path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
                for path in [self.run_there, *self.run_there.rglob('*')] if path.name != '.lock'}

    def test_a_finished_run_is_left_alone(self):
        result, _ = self.train(epochs=1)
        before = self.contents()
        with mock.patch.object(train_pl, 'load_data', mock.Mock(side_effect=AssertionError)):
            again, output = self.train(epochs=1, num_workers=1)
        self.assertEqual((again, output),
                         (result, f"{self.run_there} is finished: test bpd {result[0]['test_bpd']:.4f}\n"))
        self.assertEqual(self.contents(), before)

    def test_other_hyperparameters(self):
        for epoch in [0, 1]:
            self.stop_at(VAE, 'on_train_epoch_start', epoch)
            before = self.contents()
            with self.assertRaises(run_folder.RunFolderError) as caught:
                self.train(hidden_dims=[8, 4], seed=1, num_workers=1)
            self.assertIn('(--hidden_dims was [16], is [8, 4]; --seed was 42, is 1)', str(caught.exception))
            self.assertEqual(self.contents(), before)
        hparams = self.run_there / 'hparams.yaml'
        hparams.write_text(hparams.read_text().replace('binarization: threshold\n', ''))  # as of an older version
        with self.assertRaisesRegex(run_folder.RunFolderError, 'binarization was threshold, is stochastic'):
            self.train(binarization='stochastic')
        self.assertIn('continued', self.train(hidden_dims=(16,), epochs=6)[1])

    def test_a_folder_that_is_no_run(self):
        self.run_there.mkdir(parents=True)
        (self.run_there / 'thesis.tex').touch()
        with self.assertRaisesRegex(run_folder.RunFolderError, 'holds no run: choose another --run_name'):
            self.train()
        self.assertEqual(os.listdir(self.run_there), ['thesis.tex'])

    def test_one_process_at_a_time(self):
        with mock.patch.object(run_folder, 'LOCK_TIMEOUT', 0.1), \
                run_folder.open_run(self.run_there.parent, 'run', vars(self.namespace(epochs=1)), {}), \
                self.assertRaisesRegex(run_folder.RunFolderError, 'in use by another process'):
            self.train(epochs=1)
        self.train(epochs=1)

    def test_run_names(self):
        for name in ['', '.', '..', os.path.abspath('run'), '../run', 'a/../..']:
            with self.assertRaisesRegex(ValueError, '--run_name'):
                self.train(run_name=name)
        self.assertEqual(os.listdir(self.folder), [])
        self.train(run_name='sweep/a', epochs=1)
        self.assertTrue((Path(self.folder) / 'stopped' / 'sweep' / 'a' / 'results.json').exists())

    def test_a_checkpoint_is_whole_or_not_there(self):
        files, path = checkpoints.CheckpointFiles(), os.path.join(self.folder, 'last.ckpt')
        for epoch in range(3):
            files.save_checkpoint({'epoch': epoch}, path)

        def half(checkpoint, path):
            Path(path).write_bytes(b'half')
            raise Killed

        with mock.patch.object(torch, 'save', half), self.assertRaises(Killed):
            files.save_checkpoint({'epoch': 3}, path)
        epochs = {name: torch.load(os.path.join(self.folder, name), weights_only=True)['epoch']
                  for name in ['last.ckpt', 'previous.ckpt']}
        self.assertEqual(epochs, {'last.ckpt': 2, 'previous.ckpt': 1})


class TestCheckpoints(TrainingTest):
    """What is loaded as a checkpoint: tensors and plain values, or nothing."""

    class Exploit:
        """A pickle of it makes a folder when it is loaded."""

        def __init__(self, folder):
            self.folder = folder

        def __reduce__(self):
            return os.mkdir, (self.folder,)

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.folder, 'some.ckpt')
        trained = os.path.join(self.folder, 'run', 'checkpoints')
        with contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace(epochs=1, run_name='run', accelerator='cpu'))
        self.good = torch.load(os.path.join(trained, 'best.ckpt'), weights_only=True)

    def assert_refused(self, *parts):
        for load in [VAE.load_from_checkpoint, functools.partial(checkpoints.load_model, VAE)]:
            with self.assertRaises(checkpoints.CheckpointError) as caught:
                load(self.path)
            for part in [self.path, *parts]:
                self.assertIn(part, str(caught.exception))
            self.assertNotIn('\n', str(caught.exception))

    def test_what_train_pl_wrote(self):
        torch.save(self.good, self.path)
        model = VAE.load_from_checkpoint(self.path)
        torch.testing.assert_close(dict(model.state_dict()), dict(self.good['state_dict']), rtol=0, atol=0)
        self.assertEqual((model.hparams.z_dim, model.hparams.lr), (2, 1e-3))
        self.assertEqual(VAE.load_from_checkpoint(self.path, map_location='cpu', lr=0.5).hparams.lr, 0.5)

    def test_malicious_pickles(self):
        folder = os.path.join(self.folder, 'made by the exploit')
        exploit = self.Exploit(folder)
        for content in [exploit, {**self.good, 'x': exploit}, {**self.good, 'state_dict': exploit},
                        {**self.good, 'hyper_parameters': {'model_name': exploit}}]:
            for save in [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False),
                         lambda content, path: Path(path).write_bytes(pickle.dumps(content))]:
                save(content, self.path)
                self.assert_refused('refused' if zipfile.is_zipfile(self.path) else 'no checkpoint')
                with self.assertRaises(checkpoints.CheckpointError):
                    checkpoints.CheckpointFiles().load_checkpoint(self.path)
                last = os.path.join(self.folder, 'run', 'checkpoints', 'last.ckpt')
                shutil.copy(self.path, last)
                os.utime(last)
                with contextlib.redirect_stderr(io.StringIO()) as error:
                    run_folder.newest_checkpoint(os.path.dirname(last))
                self.assertIn('continuing from best.ckpt', error.getvalue())
                self.assertFalse(os.path.exists(folder))
        torch.save(exploit, self.path)
        torch.load(self.path, weights_only=False)
        self.assertTrue(os.path.exists(folder), 'the exploit is none')

    def test_no_checkpoints(self):
        for content in [b'', b'nonsense', Path(__file__).read_bytes()]:
            Path(self.path).write_bytes(content)
            self.assert_refused('no checkpoint, or a damaged one (File is not a zip file)')
        for names in [[], ['notes.txt'], ['archive/data.pkl', 'archive/version']]:
            with zipfile.ZipFile(self.path, 'w') as archive:
                for name in names:
                    archive.writestr(name, 'text')
            self.assert_refused()
        for path, error in [(self.folder, IsADirectoryError), (f'{self.path}.not', FileNotFoundError)]:
            with self.assertRaises(error):
                VAE.load_from_checkpoint(path)

    def test_other_programs(self):
        for content in [torch.zeros(3), nn.Linear(2, 3).state_dict(), {'epoch': 3, 'state_dict': {}}, [1, 2],
                        {**self.good, 'hyper_parameters': None}]:
            torch.save(content, self.path)
            self.assert_refused('of another program')

    def test_shapes_that_do_not_fit(self):
        parameters, weights = self.good['hyper_parameters'], self.good['state_dict']
        for change, part in [({'hyper_parameters': {**parameters, 'z_dim': 5}}, 'size mismatch for encoder.net.2'),
                             ({'hyper_parameters': {**parameters, 'hidden_dims': [16, 16]}}, 'does not fit'),
                             ({'hyper_parameters': {**parameters, 'hidden_dims': 'wide'}}, 'does not fit'),
                             ({'hyper_parameters': {**parameters, 'z_dim': -1}}, 'does not fit'),
                             ({'hyper_parameters': {**parameters, 'depth': 5}}, 'depth'),
                             ({'hyper_parameters': {**parameters, 'model_name': 'GAN'}}, 'model_name must be'),
                             ({'state_dict': {}}, 'does not fit'),
                             ({'state_dict': {**weights, 'encoder.net.0.weight': 'x'}}, 'does not fit')]:
            torch.save({**self.good, **change}, self.path)
            self.assert_refused(part)


class Killed(BaseException):
    """In the place of SIGKILL; no code of ours or Lightning's goes on after it, but for its clean-up."""


class TestSlurmJob(TrainingTest):
    """A batch job as the program sees it; tests/test_slurm.py runs real ones."""

    def setUp(self):
        super().setUp()
        job = dict(SLURM_JOB_ID='7', SLURM_JOB_NAME='vae', SLURM_NTASKS='1', SLURM_PROCID='0', SLURM_LOCALID='0',
                   SLURM_NODEID='0')
        patch = mock.patch.dict(os.environ, job)
        patch.start()
        self.addCleanup(patch.stop)
        for number in [signal.SIGTERM, signal.SIGUSR1]:
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def test_names(self):
        self.assertEqual(slurm_job.run_name(), 'job_7')
        with mock.patch.dict(os.environ, SLURM_ARRAY_JOB_ID='5', SLURM_ARRAY_TASK_ID='2'):
            self.assertEqual(slurm_job.run_name(), 'job_5_2')
        with mock.patch.dict(os.environ, SLURM_JOB_NAME='interactive'):
            self.assertIsNone(slurm_job.run_name())
        with mock.patch.object(sys, 'ps1', '>>> ', create=True):
            self.assertIsNone(slurm_job.run_name())
        del os.environ['SLURM_JOB_ID']
        self.assertIsNone(slurm_job.run_name())

    def test_checkpoints_of_other_jobs_are_not_read(self):
        """Lightning's hpc_ckpt_N.ckpt, which it would load from the Trainer's root directory."""
        for folder in ['', 'logs']:
            os.makedirs(os.path.join(self.folder, folder), exist_ok=True)
            Path(self.folder, folder, 'hpc_ckpt_1.ckpt').write_bytes(b'of another job')
        with contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace(log_dir=os.path.join(self.folder, 'logs'), epochs=1))
        self.assertEqual(set(os.listdir(os.path.join(self.folder, 'logs'))), {'hpc_ckpt_1.ckpt', 'job_7'})

    def test_signals(self):
        """SIGTERM changes nothing; SIGUSR1 requeues the job; both at each stage, where Lightning has its handlers."""
        seen = []

        def kill_twice(model):
            seen.append(model.trainer.state.fn)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)

        hooks = ['on_train_epoch_start', 'on_validation_epoch_start', 'on_test_epoch_start']
        with mock.patch.multiple(VAE, **dict.fromkeys(hooks, kill_twice)), \
                mock.patch.object(subprocess, 'run') as run, mock.patch.object(os, 'write') as write, \
                contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace(epochs=2, batch_size=20))  # several batches at each stage
        self.assertEqual(seen, ['validate', *['fit'] * 4, 'test'])
        self.assertEqual(run.mock_calls, [mock.call(['scontrol', 'requeue', '7'])] * 6)
        self.assertEqual(write.mock_calls.count(mock.call(1, b'Time is almost up: requeueing job 7\n')), 6)
        self.assertTrue((Path(self.folder) / 'job_7' / 'results.json').exists())

    def test_lightning_does_not_requeue(self):
        plugin, = slurm_job.environment(devices=1, num_nodes=1)
        self.assertFalse(plugin.auto_requeue)
        del os.environ['SLURM_NTASKS']
        self.assertEqual(slurm_job.environment(devices=1, num_nodes=1), [])

    def test_signals_outside_of_a_job(self):
        del os.environ['SLURM_JOB_ID']
        with mock.patch.object(VAE, 'on_train_epoch_start', lambda self: os.kill(os.getpid(), signal.SIGTERM)), \
                self.assertRaises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace())

    def test_tasks_that_do_not_fit_the_flags(self):
        for variables, devices in [(dict(SLURM_NTASKS='4'), 1), (dict(SLURM_NNODES='2'), 2),
                                   (dict(SLURM_NTASKS='4', SLURM_NTASKS_PER_NODE='4'), 1)]:
            with mock.patch.dict(os.environ, variables):
                code, message = self.main(f'--log_dir={self.folder}', '--accelerator=cpu', f'--devices={devices}')
            self.assertEqual((code, message.count('\n')), (1, 0), message)
            self.assertRegex(message, '^train_pl.py: error: You set .*(tasks|nodes)')
        self.assertEqual(os.listdir(self.folder), [])


class TestSummary(SeededTest):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def add_run(self, name, test_bpd=None, **flags):
        """The folder of a finished run, or without test_bpd of one that goes on."""
        (self.folder / name).mkdir(parents=True)
        (self.folder / name / 'hparams.yaml').touch()
        if test_bpd:
            (self.folder / name / 'results.json').write_text(json.dumps(dict(
                test_bpd=test_bpd, best_val_bpd=test_bpd + 0.01, hyperparameters=dict(lr=0.001, **flags))))

    def summary(self, *folders):
        """What the command prints, with its plot in plot.png."""
        words = ['summary.py', *map(str, folders), '--plot', str(self.folder / 'plot.png')]
        with mock.patch.object(sys, 'argv', words), contextlib.redirect_stdout(io.StringIO()) as output:
            summary.main()
        return output.getvalue().splitlines()

    def test_table(self):
        for seed, bpd in [(1, 0.16), (2, 0.18)]:
            self.add_run(f'job_7_{seed}', bpd, z_dim=20, hidden_dims=[512], seed=seed, run_name=f'{seed}')
        self.add_run('a/job_7_3', 0.3, z_dim=3, hidden_dims=[64, 32], seed=1, run_name=None)
        self.add_run('job_7_4', None)
        lines = self.summary(self.folder)
        self.assertEqual([line.split() for line in lines[1:3]], [
            ['z_dim', '3,', 'hidden_dims', '64', '32', '1', '0.3000', '0.3100'],
            ['z_dim', '20,', 'hidden_dims', '512', '2', '0.1700', '+-', '0.0141', '0.1800', '+-', '0.0141']])
        self.assertEqual(lines[3], f"not finished: {self.folder / 'job_7_4'}")
        self.assertEqual((self.folder / 'plot.png').read_bytes()[:4], b'\x89PNG')
        lines = self.summary(self.folder / 'job_7_1', self.folder / 'job_7_2', self.folder / 'job_7_2')
        self.assertRegex(lines[1], '^all runs +2 ')  # a folder that was named twice counts once

    def test_nothing_to_sum_up(self):
        self.add_run('job_8', None)
        with self.assertRaises(SystemExit) as caught:
            self.summary(self.folder)
        self.assertRegex(caught.exception.code, 'summary.py: error: there is no finished run in .*results.json')


class TestProcesses(SeededTest):

    def test_shares_make_the_minibatches_of_one_process(self):
        images, labels = torch.zeros(23, 2, 2, dtype=torch.uint8), torch.arange(23)
        for shuffle in [True, False]:
            loader = bmnist.DataLoader(bmnist.BinaryImages(images, labels), 8, shuffle=shuffle,
                                       collate_fn=bmnist.already_a_batch)
            orders = set()
            for epoch in range(2):
                batches = {}
                for world_size in [1, 2, 4]:
                    trainers = [types.SimpleNamespace(world_size=world_size, global_rank=rank)
                                for rank in range(world_size)]
                    shares = [processes.share_out(loader, trainer, seed=3) for trainer in trainers]
                    if shuffle:
                        for share in shares:
                            share.sampler.set_epoch(epoch)
                    labels_of = [[batch_labels.tolist() for _, batch_labels in share] for share in shares]
                    batches[world_size] = [sorted(sum(parts, [])) for parts in zip(*labels_of, strict=True)]
                orders.add(str(batches[1]))
                for world_size in [2, 4]:
                    self.assertEqual(batches[world_size][:2], batches[1][:2])
                    self.assertEqual(set(batches[world_size][2]), set(batches[1][2]) if not shuffle else
                                     set(batches[1][2]) | set(batches[world_size][2]))
                    self.assertEqual(len(batches[world_size][2]), 8 if shuffle else 7)
                self.assertEqual(sorted(sum(batches[1], [])), list(range(23)))
            self.assertEqual(len(orders), 2 if shuffle else 1)

    def test_seeds(self):
        seeds = {processes.derived_seed(seed, epoch) for seed in range(9) for epoch in range(9)}
        self.assertEqual(len(seeds), 81)

    def test_shares_of_the_noise(self):
        mean, std = torch.randn(2, 12, 5)
        torch.manual_seed(1)
        expected = sample_reparameterize(mean, std)
        for world_size in [2, 3]:
            for rank in range(world_size):
                torch.manual_seed(1)
                with processes.SharedNoise(types.SimpleNamespace(global_rank=rank, world_size=world_size)):
                    z = sample_reparameterize(mean[rank::world_size], std[rank::world_size])
                torch.testing.assert_close(z, expected[rank::world_size], rtol=0, atol=0)

    def test_on_rank_zero(self):
        """Two processes, of which the second gets what the first one sent."""
        sent = []
        first = types.SimpleNamespace(is_global_zero=True, strategy=mock.Mock(broadcast=lambda x: sent.append(x) or x))
        second = types.SimpleNamespace(is_global_zero=False, strategy=mock.Mock(broadcast=lambda x: sent[-1]))
        self.assertEqual(processes.on_rank_zero(first, lambda: 5), 5)
        self.assertEqual(processes.on_rank_zero(second, None), 5)
        with self.assertRaises(ZeroDivisionError):
            processes.on_rank_zero(first, lambda: 1 / 0)
        with self.assertRaises(SystemExit) as caught:
            processes.on_rank_zero(second, None)
        self.assertEqual(caught.exception.code, 1)


class TestFastPath(SeededTest):
    """cuda_graph on a CPU: everything but the graph itself, in whose place a function runs again."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.replays = []  # the number of images of each chunk that a stand-in for a graph replayed
        for patch in [mock.patch.object(train_pl, 'load_data', small_loaders),
                      mock.patch.object(cuda_graph, 'CHUNK', 100)]:
            patch.start()
            self.addCleanup(patch.stop)

    def run_and_capture(self, function, indices):
        """A graph's stand-in: a replay runs the function again and leaves its result in the same tensor."""
        result = function(indices)
        replay_result = torch.zeros_like(result)

        def replay():
            self.replays.append(len(indices))
            replay_result.copy_(function(indices))

        return result, replay, replay_result

    def use_stand_in(self):
        for patch in [mock.patch.object(cuda_graph.ChunkedSteps, 'use_graph', True),
                      mock.patch.object(cuda_graph, 'run_and_capture', self.run_and_capture)]:
            patch.start()
            self.addCleanup(patch.stop)

    def train(self, fast, **flags):
        """A run of train_vae, 8 steps per epoch: its metrics.csv, last checkpoint, results and TensorBoard's x axes."""
        args = dict(hidden_dims=[16], z_dim=16, batch_size=40, epochs=3, log_dir=self.folder, accelerator='cpu')
        with mock.patch.object(cuda_graph, 'suits', lambda trainer, model, train_loader: fast), \
                contextlib.redirect_stdout(io.StringIO()):
            train_vae(argparse.Namespace(**{**args, **flags}))
        folder = max((Path(self.folder) / 'lightning_logs').iterdir(), key=lambda path: int(path.name.split('_')[1]))
        with open(folder / 'metrics.csv') as file:
            rows = [{name: value for name, value in row.items() if name != 'seconds'} for row in csv.DictReader(file)]
        events = EventAccumulator(str(folder)).Reload()
        curves = {tag: sorted(event.step for event in events.Scalars(tag)) for tag in events.Tags()['scalars']}
        return (rows, torch.load(folder / 'checkpoints' / 'last.ckpt', weights_only=True),
                json.loads((folder / 'results.json').read_text()), curves)

    def compare(self, run, other, **tolerance):
        """Two runs: the same names, epochs and counts, and the same numbers (within a tolerance)."""
        for row, other_row in zip(run[0], other[0], strict=True):
            self.assertEqual(row.keys(), other_row.keys())
            for name, value in row.items():
                self.assertAlmostEqual(float(value or 0), float(other_row[name] or 0), places=3, msg=name)
        for name in ['epoch', 'global_step', 'hyper_parameters']:
            self.assertEqual(run[1][name], other[1][name])
        torch.testing.assert_close(run[1]['state_dict'], other[1]['state_dict'], **tolerance)
        torch.testing.assert_close(run[1]['optimizer_states'], other[1]['optimizer_states'], **tolerance)
        for name in ['test_bpd', 'first_step_bpd', 'best_val_bpd']:
            self.assertAlmostEqual(run[2][name], other[2][name], places=5)
        self.assertEqual(run[3], other[3])

    def test_chunks_are_plain_training_to_the_bit(self):
        with warnings.catch_warnings(record=True) as caught:
            plain, chunks = self.train(fast=False), self.train(fast=True)
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.compare(plain, chunks, rtol=0, atol=0)
        self.assertEqual(chunks[1]['global_step'], 3 * 8)  # 7 minibatches of 40 images and one of 20
        self.assertEqual(self.train(fast=True, batch_size=128)[1]['global_step'], 3 * 3)  # larger than a chunk

    def test_plain_flag(self):
        with mock.patch.object(cuda_graph, 'speed_up', mock.Mock(side_effect=AssertionError)):
            self.train(fast=True, plain=True)

    def test_graph_is_replayed(self):
        """Chunks of 80, 80, 80 and 60 images: the first of each size runs, the others are replayed."""
        plain = self.train(fast=False)
        self.use_stand_in()
        fast = self.train(fast=True)
        self.assertEqual(self.replays, [80, 80] + 2 * [80, 80, 80, 60])
        self.compare(plain, fast, rtol=1e-4, atol=1e-5)  # a graph's learning rate is in single precision
        groups, plain_groups = (run[1]['optimizer_states'][0]['param_groups'] for run in [fast, plain])
        self.assertEqual(groups, plain_groups)

    @mock.patch('warnings.warn')  # Lightning's, that the folder is there already
    def test_checkpoints_continue_either_way(self, _):
        run_folder.quiet_libraries()
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40, num_workers=0))
        final = {}
        for first_fast in [False, True]:
            path = None
            for fast, epochs in [(first_fast, 2), (not first_fast, 4)]:
                pl.seed_everything(epochs)
                model = VAE('MLP', [16], 4, 2, 1e-3)
                checkpoint = pl.callbacks.ModelCheckpoint(os.path.join(self.folder, f'{first_fast}'))
                trainer = pl.Trainer(max_epochs=epochs, accelerator='cpu', logger=False, callbacks=[checkpoint],
                                     enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
                loaders = train_loader, val_loader
                if fast:
                    loaders = cuda_graph.speed_up(trainer, model, *loaders)
                    trainer.strategy.checkpoint_io = cuda_graph.BackgroundCheckpointIO(trainer.strategy.checkpoint_io)
                trainer.fit(model, *loaders, ckpt_path=path)
                self.assertEqual((trainer.current_epoch, trainer.global_step), (epochs, 8 * epochs))
                path = checkpoint.best_model_path
                self.assertTrue(path.endswith(f'epoch={epochs - 1}-step={8 * epochs}.ckpt'), path)
            final[first_fast] = model.state_dict()
        torch.testing.assert_close(final[False], final[True], rtol=0, atol=0)

    def test_learning_rate_reaches_the_graph(self):
        self.use_stand_in()
        trainer = mock.Mock(lr_scheduler_configs=[], optimizers=[torch.optim.Adam([torch.zeros(1)], lr=0.5)])
        model = VAE('MLP', [16], 4, 2, 1e-3)
        group, = trainer.optimizers[0].param_groups
        steps = cuda_graph.ChunkedSteps(trainer, model, None, batch_size=4)
        captured = []

        def minibatches(indices):
            captured.append(group['lr'])
            return indices.sum()

        with mock.patch.object(steps, 'steps', minibatches), mock.patch.object(steps, 'count_steps'):
            for size in [4, 3]:
                steps.training_step(torch.arange(size), 0)
            graphs_read = captured.copy()
            group['lr'] = 0.25
            self.assertEqual(steps.training_step(torch.full([4], 2), 1), 8)
        self.assertEqual([lr.item() for lr in graphs_read], [0.25, 0.25])
        self.assertEqual(group['lr'], 0.25)

    def test_what_a_graph_cannot_do_is_an_error(self):
        self.use_stand_in()

        def scheduled(model):
            optimizer = torch.optim.Adam(model.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        def logging(model, batch, batch_idx):
            loss = model(batch[0])[2]
            model.log('train_loss', loss)
            return loss

        for name, function in [('configure_optimizers', scheduled), ('training_step', logging)]:
            with mock.patch.object(VAE, name, function), \
                    self.assertRaisesRegex(MisconfigurationException, 'graph|plain'):
                self.train(fast=True)

    def test_capture(self):
        """The calls to torch.cuda, on mocks of them."""
        names = ['Stream', 'CUDAGraph', 'current_stream', 'stream', 'graph']
        with mock.patch.multiple(torch.cuda, **{name: mock.MagicMock() for name in names}):
            torch.cuda.graph.return_value.__exit__.return_value = False  # lets errors pass
            function = mock.Mock(side_effect=[1, 2])
            self.assertEqual(cuda_graph.run_and_capture(function, 5), (1, torch.cuda.CUDAGraph().replay, 2))
            self.assertEqual(function.mock_calls, [mock.call(5), mock.call(5)])
            function = mock.Mock(side_effect=[1, RuntimeError('not permitted when stream is capturing\nCUDA kernel')])
            with self.assertRaisesRegex(MisconfigurationException, 'not permitted.* --plain$'):
                cuda_graph.run_and_capture(function, 5)

    def test_where_it_suits(self):
        class Watched(VAE):
            def on_after_backward(self):
                pass

        class Watcher(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                pass

        loader = small_loaders(argparse.Namespace(batch_size=40, num_workers=0))[0]
        room = 2 * 300 * 28 * 28 + 1
        generate = GenerateCallback()
        for expected, device, world_size, free, vae, callback in [
                (True, 'cuda', 1, room, VAE, generate), (False, 'cpu', 1, room, VAE, generate),
                (False, 'cuda', 2, room, VAE, generate), (False, 'cuda', 1, room - 1, VAE, generate),
                (False, 'cuda', 1, room, Watched, generate), (False, 'cuda', 1, room, VAE, Watcher())]:
            trainer = mock.Mock(world_size=world_size, callbacks=[callback])
            trainer.strategy.root_device = torch.device(device)
            with mock.patch.object(torch.cuda, 'mem_get_info', lambda device, free=free: (free, free)):
                self.assertEqual(cuda_graph.suits(trainer, vae('MLP', [4], 4, 2, 1e-3), loader), expected)

    def test_checkpoints_in_the_background(self):
        """The weights are those of the call; no file waits while a newer one of its name is made."""
        running, most = [], 0

        class SlowCheckpointIO(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                time.sleep(0.05)
                super().save_checkpoint(checkpoint, path)
                running.remove(path)

        checkpoint_io = cuda_graph.BackgroundCheckpointIO(SlowCheckpointIO())
        path, other_path = Path(self.folder) / 'a.ckpt', Path(self.folder) / 'b.ckpt'
        weight = torch.ones(2)
        for epoch in range(3):
            running += [path, other_path]
            checkpoint_io.save_checkpoint({'weight': weight, 'epoch': epoch}, path)
            checkpoint_io.save_checkpoint({'weight': weight, 'epoch': epoch}, other_path)
            most = max(most, len(running))
        weight.zero_()
        checkpoint_io.teardown()
        self.assertEqual(running, [])
        self.assertLessEqual(most, 2)
        loaded = torch.load(path)
        self.assertEqual((loaded['weight'].tolist(), loaded['epoch']), ([1, 1], 2))
        self.assertEqual(set(os.listdir(self.folder)), {'a.ckpt', 'b.ckpt'})


class TestEntryPoint(SeededTest):

    def test_one_epoch_on_rendered_digits(self):
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run([sys.executable, HERE / 'train_pl.py', '--dataset', 'rendered', '--epochs', '1',
                                  '--log_dir', 'logs'], cwd=folder, capture_output=True, text=True, timeout=300)
            self.assertEqual((run.returncode, run.stderr), (0, ''))
            self.assertIn('rendered', run.stdout.splitlines()[0])
            self.assertEqual(run.stdout.splitlines()[-1], 'run folder logs/lightning_logs/version_0')
            results = json.loads((Path(folder) / 'logs/lightning_logs/version_0/results.json').read_text())
            self.assertEqual(results['dataset'], 'rendered')
            self.assertLess(results['test_bpd'], 0.5)
            self.assertEqual(os.listdir(folder), ['logs'])


if __name__ == '__main__':
    unittest.main()

"""Tests of the likelihoods in utils.py: `python -m unittest tests/unit/test_likelihoods.py`."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli

from bmnist import binarize
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from sources.rendered_digits import rendered_digits
from tests.helpers import SeededTest
from utils import KLD, log_likelihood, quadrature_log_likelihood, sample_reparameterize, sum_softplus


class TestSumSoftplus(SeededTest):
    def test_the_sum_agrees_with_torch_for_any_number_of_pixels_and_any_logits(self):
        for num_pixels in [1, 7, 24, 784, 841]:
            logits = torch.cat([torch.randn(2, 5, num_pixels) * scale for scale in [0, 1e-3, 1, 10, 200]])
            expected = F.softplus(logits.double()).sum(dim=-1)
            torch.testing.assert_close(sum_softplus(logits).double(), expected, rtol=2e-6, atol=2e-6 * num_pixels)


class TestLogLikelihood(SeededTest):
    """Tests with a VAE of small digits: 2 latents and a linear decoder, so that each posterior has a single peak."""

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        imgs = binarize(rendered_digits(2_100)[0][:, ::2, ::2])  # a quarter of the pixels is faster
        cls.imgs = imgs[2_000:]
        cls.encoder = MLPEncoder(input_dim=14 * 14, hidden_dims=[64], z_dim=2)
        cls.decoder = MLPDecoder(z_dim=2, hidden_dims=[], output_shape=[1, 14, 14])
        optimizer = torch.optim.Adam([*cls.encoder.parameters(), *cls.decoder.parameters()], lr=0.01)
        for _ in range(400):
            optimizer.zero_grad()
            cls.elbo(imgs[torch.randint(2_000, (100,))]).mean().neg().backward()
            optimizer.step()

    @classmethod
    def elbo(cls, imgs):
        mean, log_std = cls.encoder(imgs)
        log_p_x = Bernoulli(logits=cls.decoder(sample_reparameterize(mean, log_std.exp()))).log_prob(imgs)
        return log_p_x.sum(dim=(1, 2, 3)) - KLD(mean, log_std)

    def small_vae(self):
        """Returns all 64 binary images of 6 pixels, and untrained networks for them."""
        imgs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).view(64, 1, 1, 6)
        decoder = MLPDecoder(z_dim=2, hidden_dims=[16], output_shape=[1, 1, 6])
        nn.init.normal_(decoder.net[-1].weight)
        return imgs, MLPEncoder(input_dim=6, hidden_dims=[16], z_dim=2), decoder

    def test_probabilities_of_all_images_add_up_to_one(self):
        imgs, encoder, decoder = self.small_vae()
        self.assertAlmostEqual(quadrature_log_likelihood(imgs, decoder).exp().sum().item(), 1, places=4)
        p = log_likelihood(imgs, encoder, decoder, num_samples=10_000).exp()
        self.assertAlmostEqual(p.sum().item(), 1, delta=0.01)

    def test_the_estimate_agrees_with_quadrature(self):
        """With the best Gaussian encoder, it agrees on each image; with the trained encoder, on average."""
        imgs = self.imgs[:40]
        axis = torch.arange(-80, 81) / 10  # the posteriors are wider than 0.2
        z = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            logits = self.decoder(z).flatten(1)
        log_joint = logits @ imgs.flatten(1).T - F.softplus(logits).sum(1, keepdim=True) - (z**2).sum(1, True) / 2
        posterior = log_joint.softmax(dim=0).T
        mean = posterior @ z
        std = (posterior @ z**2 - mean**2).sqrt()
        exact = quadrature_log_likelihood(imgs, self.decoder, step=0.1, limit=8)
        matched = log_likelihood(imgs, lambda _: (mean, (1.2 * std).log()), self.decoder, num_samples=1_000)
        self.assertEqual(matched.shape, (40,))
        torch.testing.assert_close(matched, exact, atol=0.05, rtol=0)
        trained = log_likelihood(imgs, self.encoder, self.decoder, num_samples=1_000)
        self.assertAlmostEqual(trained.mean().item(), exact.mean().item(), delta=0.03)

    def test_the_expectation_of_the_estimate_with_one_sample_is_the_elbo(self):
        imgs = self.imgs[:2].repeat_interleave(10_000, dim=0)
        bounds = log_likelihood(imgs, self.encoder, self.decoder, num_samples=1).view(2, -1)
        with torch.no_grad():
            elbos = self.elbo(imgs).view(2, -1)
        error = ((bounds.var(dim=1) + elbos.var(dim=1)) / 10_000).sqrt()
        self.assertTrue(((bounds.mean(dim=1) - elbos.mean(dim=1)).abs() < 4 * error).all())
        self.assertLess(error.max().item(), 0.1)

    def test_the_mean_of_20_estimates_does_not_decrease_with_more_samples(self):
        imgs = self.imgs[:25].repeat(20, 1, 1, 1)
        bounds = [log_likelihood(imgs, self.encoder, self.decoder, k).view(20, 25) for k in [1, 5, 25, 125]]
        for fewer, more in zip(bounds, bounds[1:]):
            error = ((fewer.var(dim=0) + more.var(dim=0)) / 20).sqrt()
            self.assertTrue((more.mean(dim=0) > fewer.mean(dim=0) - 4 * error).all())
            self.assertGreater(more.mean(), fewer.mean())

    def test_memory_is_bounded_for_any_number_of_samples(self):
        sizes = []

        def decoder(z):
            sizes.append(len(z))
            return self.decoder(z)

        for num_images, num_samples, expected in [(100, 12, [500, 500, 200]), (100, 1, [100]), (1, 1001, [512, 489])]:
            sizes.clear()
            log_likelihood(self.imgs[:num_images], self.encoder, decoder, num_samples)
            self.assertEqual(sizes, expected)

    def test_weights_far_below_the_smallest_float_do_not_underflow(self):
        networks = lambda x: torch.zeros(2, 1, 2), lambda z: torch.full((len(z), 1, 28, 28), -50.0)
        log_p = log_likelihood(torch.ones(1, 1, 28, 28), *networks, num_samples=10)
        torch.testing.assert_close(log_p, torch.tensor([-50.0 * 784]))

    def test_zero_samples_are_an_error(self):
        with self.assertRaisesRegex(ValueError, "num_samples must be at least 1, got 0"):
            log_likelihood(self.imgs, self.encoder, self.decoder, num_samples=0)

"""Tests of utils.py but for the likelihoods: `python -m unittest tests/unit/test_utils.py`."""

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from tests.helpers import SeededTest
from utils import KLD, active_units, elbo_to_bpd, manifold_latents, sample_reparameterize, visualize_manifold


class TestKLD(SeededTest):
    def test_unit_gaussian_is_exactly_zero(self):
        self.assertTrue((KLD(torch.zeros(5, 3), torch.zeros(5, 3)) == 0).all())

    def test_exactly_symmetric_in_the_mean(self):
        mean, log_std = torch.randn(2, 16, 20)
        self.assertTrue(torch.equal(KLD(mean, log_std), KLD(-mean, log_std)))

    def test_agrees_with_torch_distributions(self):
        mean, log_std = 2 * torch.randn(2, 7, 16, 20, dtype=torch.float64)
        expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(dim=-1)
        torch.testing.assert_close(KLD(mean, log_std), expected)

    def test_keeps_its_digits_close_to_the_prior(self):
        log_std = torch.full((1,), 1e-4)  # KL = log_std**2 to first order, far below float32's rounding of 1
        self.assertAlmostEqual(KLD(torch.zeros(1), log_std).item() * 1e8, 1, places=2)


class TestReparameterization(SeededTest):
    def test_gradients(self):
        mean, std = torch.randn(16, 4, requires_grad=True), torch.rand(16, 4).add(0.5).requires_grad_()
        z = sample_reparameterize(mean, std)
        z.sum().backward()
        eps = ((z - mean) / std).detach()
        torch.testing.assert_close(mean.grad, torch.ones(16, 4))
        torch.testing.assert_close(std.grad, eps)

    def test_distribution(self):
        mean, std = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.1, 1.0, 4.0])
        z = sample_reparameterize(mean.expand(100_000, 3), std.expand(100_000, 3))
        self.assertEqual(z.shape, (100_000, 3))
        torch.testing.assert_close((z.mean(dim=0) - mean) / std, torch.zeros(3), atol=0.02, rtol=0)
        torch.testing.assert_close(z.std(dim=0) / std, torch.ones(3), atol=0.02, rtol=0)

    def test_no_noise_without_deviation(self):
        mean = torch.randn(5)
        self.assertTrue(torch.equal(sample_reparameterize(mean, torch.zeros(5)), mean))

    def test_given_noise(self):
        """Of several samples, too."""
        mean, std = torch.randn(2, 4, 1, 5, dtype=torch.float64)
        noise = torch.randn(4, 3, 5, dtype=torch.float64)
        self.assertTrue(torch.equal(sample_reparameterize(mean, std, noise), mean + std * noise))


class TestBPD(SeededTest):
    def test_uniform_image_has_one_bit_per_pixel(self):
        for shape in [(8, 1, 28, 28), (8, 3, 11, 17)]:
            neg_elbo = -torch.full(shape, 0.5).log().sum(dim=(1, 2, 3))
            bpd = elbo_to_bpd(neg_elbo, torch.Size(shape))
            self.assertEqual(bpd.shape, (8,))
            torch.testing.assert_close(bpd, torch.ones(8))


class TestActiveUnits(SeededTest):
    def test_active_units(self):
        means = torch.randn(10_000, 4) * torch.tensor([0.01, 0.09, 0.11, 1]) + torch.tensor([5, 5, 0, 0])
        self.assertEqual(active_units(means).tolist(), [False, False, True, True])
        self.assertEqual(active_units(means, threshold=1e-5).tolist(), [True] * 4)


class TestManifold(SeededTest):
    class Decoder(nn.Module):
        """Paints each image in the grey of one of its latents' percentiles."""

        device = torch.device("cpu")

        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, z):
            return torch.logit(Normal(0.0, 1.0).cdf(z[:, self.dim])).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    def test_latents_are_the_percentiles(self):
        z = manifold_latents(20)
        self.assertEqual((z.shape, z.dtype), ((400, 2), torch.float32))
        percentiles = Normal(0.0, 1.0).cdf(z.double())
        expected = torch.arange(1, 21).double() / 21
        for dim in range(2):
            torch.testing.assert_close(percentiles[:, dim].unique(), expected, check_dtype=False, atol=1e-6, rtol=0)
        self.assertTrue(torch.equal(z.sort(dim=0).values, -z.sort(dim=0, descending=True).values), "not symmetric")

    def test_picture(self):
        for dim in range(2):
            grid = visualize_manifold(self.Decoder(dim), grid_size=4)
            self.assertEqual(grid.shape, (3, 4 * 30 + 2, 4 * 30 + 2))
            pixels = grid[0, 16::30, 16::30]  # the middle of each image
            percentiles = torch.arange(1, 5) / 5
            expected = percentiles.expand(4, 4) if dim == 0 else percentiles.flip(0)[:, None].expand(4, 4)
            torch.testing.assert_close(pixels, expected)
        self.assertEqual(visualize_manifold(self.Decoder(0)).shape, (3, 602, 602))

    def test_one_image_and_none(self):
        self.assertTrue(torch.equal(manifold_latents(1), torch.zeros(1, 2)))
        with self.assertRaisesRegex(ValueError, "grid_size"):
            manifold_latents(0)

    def test_on_the_cpu_by_any_default(self):
        """A Mac's GPU has no double precision."""
        with torch.device("meta"):
            self.assertEqual(manifold_latents(3).device.type, "cpu")

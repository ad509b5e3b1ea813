"""
Tests of utils.py, except its likelihoods, in addition to the assignment's contract in unittests.py: `python -m
unittest tests/unit/test_utils.py`.
"""

import torch

from tests.helpers import SeededTest
from utils import KLD, active_units, manifold_latents, sample_reparameterize


class TestKLD(SeededTest):
    def test_the_divergence_keeps_its_digits_close_to_the_prior(self):
        log_std = torch.full((1,), 1e-4)  # KL = log_std**2 to first order, far below float32's rounding of 1
        self.assertAlmostEqual(KLD(torch.zeros(1), log_std).item() * 1e8, 1, places=2)


class TestReparameterization(SeededTest):
    def test_given_noise_is_used_for_each_of_several_samples(self):
        mean, std = torch.randn(2, 4, 1, 5, dtype=torch.float64)
        noise = torch.randn(4, 3, 5, dtype=torch.float64)
        self.assertTrue(torch.equal(sample_reparameterize(mean, std, noise), mean + std * noise))


class TestActiveUnits(SeededTest):
    def test_a_unit_is_active_if_its_variance_is_above_the_threshold(self):
        means = torch.randn(10_000, 4) * torch.tensor([0.01, 0.09, 0.11, 1]) + torch.tensor([5, 5, 0, 0])
        self.assertEqual(active_units(means).tolist(), [False, False, True, True])
        self.assertEqual(active_units(means, threshold=1e-5).tolist(), [True] * 4)


class TestManifold(SeededTest):
    def test_a_grid_has_at_least_one_image(self):
        self.assertTrue(torch.equal(manifold_latents(1), torch.zeros(1, 2)))
        with self.assertRaisesRegex(ValueError, "grid_size"):
            manifold_latents(0)

    def test_latents_are_computed_on_the_cpu_since_a_macs_gpu_has_no_double_precision(self):
        with torch.device("meta"):
            self.assertEqual(manifold_latents(3).device.type, "cpu")

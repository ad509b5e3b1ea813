"""
Tests of class VAE in train_pl.py, in addition to the assignment's contract in unittests.py: `python -m unittest
tests/unit/test_vae.py`.
"""

import argparse
import functools
import math
import types
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributions as D
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import utils
from harness.processes import SharedNoise
from harness.settings import process_settings
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from tests.helpers import SeededTest, small_loaders
from train_pl import VAE
from utils import decode


def small_vae(objective, beta=1.0):
    """Returns the parts of a VAE that VAE.terms uses: with 2 latents, for images of 6 pixels, in double precision."""
    decoder = MLPDecoder(z_dim=2, hidden_dims=[8], output_shape=[1, 1, 6])
    nn.init.normal_(decoder.net[-1].weight)
    vae = nn.Module()
    vae.encoder, vae.decoder = MLPEncoder(input_dim=6, hidden_dims=[8], z_dim=2), decoder
    vae.hparams, vae.beta = types.SimpleNamespace(objective=objective), beta
    return vae.double()


def mean_losses(vae, imgs, num_samples):
    """Returns L_rec, L_reg and the loss, as means over a batch."""
    return [loss.mean() for loss in VAE.terms(vae, imgs, num_samples)[:3]]


def some_images(number):
    """Returns the first of the 64 binary images of 6 pixels."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).view(64, 1, 1, 6).double()[:number]


def gradients(loss, vae):
    """Returns the gradients of all weights, as one vector."""
    gradients = torch.autograd.grad(loss, list(vae.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


class TestTerms(SeededTest):
    def test_the_terms_of_a_single_sample_are_those_of_the_negative_elbo_of_each_image(self):
        imgs = torch.rand(6, 1, 28, 28).round()
        for model_name in ["MLP", "CNN"]:
            model = VAE(model_name, [32], 4, 5, 1e-3, beta=3.0)
            torch.manual_seed(1)
            terms = model.terms(imgs)
            torch.manual_seed(1)
            mean, log_std = model.encoder(imgs)
            posterior = D.Normal(mean, log_std.exp())
            z = posterior.rsample()
            logits = model.decoder(z)
            L_rec = -D.Bernoulli(logits=logits).log_prob(imgs).sum(dim=(1, 2, 3))
            L_reg = D.kl_divergence(posterior, D.Normal(0.0, 1.0)).sum(dim=1)
            expected = L_rec, L_reg, L_rec + 3 * L_reg, mean, log_std, z.unsqueeze(1), logits.unsqueeze(1)
            torch.testing.assert_close(tuple(terms), expected)

    def test_training_minimises_the_negative_elbo_in_bpd_with_beta_as_the_weight_of_the_divergence(self):
        imgs = torch.rand(6, 1, 28, 28).round()
        for options in [dict(), dict(beta=4.0), dict(objective="iwae")]:
            with self.subTest(options):
                model = VAE("MLP", [32], 4, 5, 1e-3, **options)
                torch.manual_seed(1)
                L_rec, L_reg, bpd = model(imgs)
                loss = (L_rec + options.get("beta", 1) * L_reg) / math.log(2) / 784
                torch.manual_seed(1)
                output = model.training_step((imgs, None), 0)
                torch.testing.assert_close((output["loss"], output["bpd"]), (loss, bpd))
                torch.testing.assert_close(gradients(output["loss"], model), gradients(loss, model))

    def test_the_importance_weighted_bound_and_its_gradient_agree_with_torch_distributions(self):
        vae, imgs = small_vae("iwae"), some_images(7)
        torch.manual_seed(1)
        L_rec, L_reg, loss = mean_losses(vae, imgs, 5)
        torch.manual_seed(1)
        mean, log_std = vae.encoder(imgs)
        posterior, prior = D.Normal(mean, log_std.exp()), D.Normal(torch.zeros(2).double(), torch.ones(2).double())
        z = [mean + log_std.exp() * noise for noise in torch.randn(7, 5, 2, dtype=torch.float64).unbind(dim=1)]
        log_p_x = [D.Bernoulli(logits=vae.decoder(z_k)).log_prob(imgs).sum(dim=(1, 2, 3)) for z_k in z]
        log_ratios = [(prior.log_prob(z_k) - posterior.log_prob(z_k)).sum(dim=1) for z_k in z]
        weights = [(log_p + log_ratio).exp() for log_p, log_ratio in zip(log_p_x, log_ratios)]
        bound = (sum(weights) / 5).log().mean()
        torch.testing.assert_close((-loss, -gradients(loss, vae)), (bound, gradients(bound, vae)))
        divergence = D.kl_divergence(posterior, prior).sum(dim=1).mean()
        torch.testing.assert_close((L_rec, L_reg), (-sum(log_p_x).mean() / 5, divergence))

    def test_several_samples_of_the_elbo_are_averaged(self):
        vae, imgs = small_vae("elbo", beta=3.0), some_images(7)
        L_rec, L_reg, loss = mean_losses(vae, imgs, 2_000)
        torch.testing.assert_close(loss, L_rec + 3 * L_reg)
        two = torch.stack([mean_losses(vae, imgs, 2)[0] for _ in range(500)])
        self.assertAlmostEqual(L_rec.item(), two.mean().item(), delta=7 * two.std().item() / math.sqrt(500))

    def test_memory_is_bounded_for_any_number_of_samples(self):
        """The losses and their gradients do not depend on the bound."""
        vae, imgs = small_vae("iwae"), some_images(10)

        def losses(max_pixels):
            """Returns the terms, their gradient, the bytes kept for it, and the maximum of images decoded at once."""
            torch.manual_seed(1)
            kept, decoded = [], []
            handle = vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
            keep = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
            )
            with keep, mock.patch.object(utils, "decode", functools.partial(decode, max_pixels=max_pixels)):
                terms = VAE.terms(vae, imgs, 100)
            gradient = gradients(terms.loss.mean(), vae)
            handle.remove()
            return terms, gradient, sum(kept), max(decoded)

        whole, in_parts = (losses(number * imgs[0].numel()) for number in [1_000, 64])
        torch.testing.assert_close([whole[0].L_rec, whole[1]], [in_parts[0].L_rec, in_parts[1]])
        self.assertEqual((whole[3], in_parts[3]), (1_000, 60))
        self.assertEqual((whole[0].logits.shape, in_parts[0].logits), ((10, 100, 1, 1, 6), None))
        self.assertLess(in_parts[2], whole[2] / 3)  # latents and weights are kept, and 8 numbers per sample

    def test_processes_share_the_noise_of_a_minibatch(self):
        """Two processes, each with every other image, use the same samples as a single process."""
        vae, imgs = small_vae("iwae"), some_images(8)
        torch.manual_seed(1)
        expected = mean_losses(vae, imgs, 3)
        shares = []
        for rank in range(2):
            torch.manual_seed(1)
            with SharedNoise(rank, 2):
                shares.append(torch.stack(mean_losses(vae, imgs[rank::2], 3)))
        torch.testing.assert_close(torch.stack(expected), sum(shares) / 2)


class TestVAE(SeededTest):
    def test_predict_returns_the_latents_of_images_with_or_without_labels_in_any_precision(self):
        loader = small_loaders(argparse.Namespace(batch_size=20))[2]
        images = DataLoader(TensorDataset(loader.dataset[torch.arange(50)][0]), batch_size=20)
        self.enter(process_settings())  # fewer warnings
        model = VAE("MLP", [32], 4, 5, 1e-3)
        model.iw_samples = 50
        with torch.no_grad():
            mean, log_std = model.encoder(images.dataset[:][0])
        options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        for data, precision in [(loader, "32-true"), (images, "32-true"), (loader, "bf16-mixed"), (loader, "64-true")]:
            with self.subTest(precision):
                parts = pl.Trainer(**options, precision=precision).predict(model, data)
                found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                self.assertEqual("label" in found, data is loader)
                if data is loader:
                    self.assertTrue(torch.equal(found["label"], loader.dataset.labels))
                tolerance = 0.02 if precision == "bf16-mixed" else 1e-5
                torch.testing.assert_close(found["mean"].float(), mean, rtol=0, atol=tolerance)
                torch.testing.assert_close(found["log_std"].float(), log_std, rtol=0, atol=tolerance)
                self.assertLess(found["elbo"].mean(), found["log_likelihood"].mean())
                self.assertGreater(found["elbo"].mean() + 20, found["log_likelihood"].mean())

    def test_an_unknown_kind_of_network_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "'MLP' or 'CNN'"):
            VAE("RNN", [512], 32, 20, 1e-3)

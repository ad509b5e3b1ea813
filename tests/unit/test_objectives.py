"""Tests of what a VAE minimises, and of the bounds in utils.py: `python -m unittest tests/unit/test_objectives.py`."""

import functools
import itertools
import math
import shutil
import types
import unittest
from unittest import mock

import torch
import torch.distributions as D
from torch import nn

import train_pl
from harness.processes import SharedNoise
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from tests.helpers import GraphTest, NamedRunTest, SeededTest, load, metrics, results
from train_pl import VAE
from utils import decode, importance_weighted_bound, log_prior_ratio, quadrature_log_likelihood


def small_vae(objective, train_samples, beta=1.0):
    """What VAE.terms takes for a VAE: of 2 latents, for images of 6 pixels, in double precision."""
    decoder = MLPDecoder(z_dim=2, hidden_dims=[8], output_shape=[1, 1, 6])
    nn.init.normal_(decoder.net[-1].weight)
    vae = nn.Module()
    vae.encoder, vae.decoder = MLPEncoder(input_dim=6, hidden_dims=[8], z_dim=2), decoder
    vae.hparams = types.SimpleNamespace(objective=objective, train_samples=train_samples)
    vae.beta = beta
    return vae.double()


def mean_losses(vae, imgs):
    """L_rec, L_reg and what is minimised, means over a batch."""
    terms = VAE.terms(vae, imgs, vae.hparams.train_samples)
    return terms.L_rec.mean(), terms.L_reg.mean(), terms.loss.mean()


def all_images():
    """The 64 images of 6 pixels."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).view(64, 1, 1, 6).double()


def gradients(loss, vae):
    """Those of all weights, as one vector."""
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(vae.parameters()))])


class TestLosses(SeededTest):
    def test_one_sample_is_the_elbo(self):
        imgs, labels = torch.rand(6, 1, 28, 28).round(), None
        for objective, model_name in itertools.product(["elbo", "iwae"], ["MLP", "CNN"]):
            model = VAE(model_name, [32], 4, 5, 1e-3, objective=objective)
            torch.manual_seed(1)
            expected = model(imgs)[2]
            torch.manual_seed(1)
            output = model.training_step((imgs, labels), 0)
            torch.testing.assert_close((output["loss"], output["bpd"]), (expected, expected))
            torch.testing.assert_close(gradients(output["loss"], model), gradients(expected, model))

    def test_importance_weighted_gradient(self):
        """Each log w_k by itself, image by image; the gradient is the mean of theirs with the normalised weights."""
        vae, imgs = small_vae("iwae", train_samples=5), all_images()[:7]
        torch.manual_seed(1)
        L_rec, L_reg, objective = mean_losses(vae, imgs)
        torch.manual_seed(1)
        noise = torch.randn(7, 5, 2, dtype=torch.float64)
        bound, gradient, recs, regs = 0, 0, [], []
        for img, eps in zip(imgs, noise):
            log_weights, of_each = [], []
            for eps_k in eps:
                mean, log_std = (output[0] for output in vae.encoder(img.unsqueeze(0)))
                q, prior = D.Normal(mean, log_std.exp()), D.Normal(torch.zeros(2).double(), torch.ones(2).double())
                z = mean + log_std.exp() * eps_k
                log_p_x = D.Bernoulli(logits=vae.decoder(z.unsqueeze(0))[0]).log_prob(img).sum()
                log_weight = log_p_x + prior.log_prob(z).sum() - q.log_prob(z).sum()
                of_each.append(gradients(log_weight, vae))
                log_weights.append(log_weight.item())
                recs.append(-log_p_x.item())
            regs.append(D.kl_divergence(q, prior).sum().item())
            weights = torch.tensor(log_weights, dtype=torch.float64).exp()
            bound += weights.mean().log() / 7
            gradient += sum(weight * one for weight, one in zip(weights / weights.sum(), of_each)) / 7
        torch.testing.assert_close(-objective.detach(), bound)
        torch.testing.assert_close(-gradients(objective, vae), gradient)
        self.assertAlmostEqual(L_rec.item(), sum(recs) / len(recs))
        self.assertAlmostEqual(L_reg.item(), sum(regs) / len(regs))

    def test_several_samples_of_the_elbo(self):
        """Their mean: the same in expectation, with less noise; beta weighs the KL divergence."""
        imgs = all_images()[:7]
        vae = small_vae("elbo", train_samples=2_000, beta=3.0)
        L_rec, L_reg, objective = mean_losses(vae, imgs)
        torch.testing.assert_close(objective, L_rec + 3 * L_reg)
        vae.hparams.train_samples = 2
        one = torch.stack([mean_losses(vae, imgs)[0] for _ in range(1_000)])
        self.assertAlmostEqual(L_rec.item(), one.mean().item(), delta=5 * one.std().item() / math.sqrt(500))

    def test_the_bound_never_falls_with_the_number_of_samples(self):
        """In expectation; and it comes close to log p(x), which quadrature knows."""
        vae, imgs = small_vae("iwae", train_samples=None), all_images()
        with torch.no_grad():
            mean, log_std = (output.unsqueeze(1) for output in vae.encoder(imgs))
            eps = torch.randn(64, 12_800, 2, dtype=torch.float64)
            z = mean + log_std.exp() * eps
            log_weights = log_prior_ratio(z, eps, log_std) - decode(vae.decoder, z, imgs)[1]
            bounds = [
                importance_weighted_bound(log_weights.unflatten(1, (-1, num_samples))).mean().item()
                for num_samples in [1, 2, 5, 20, 12_800]
            ]
            exact = quadrature_log_likelihood(imgs.float(), vae.decoder.float()).mean().item()
        self.assertEqual(bounds, sorted(bounds))
        self.assertGreater(bounds[2] - bounds[0], 0.01)
        self.assertAlmostEqual(bounds[-1], exact, delta=0.01)

    def test_memory_is_bounded(self):
        """The memory is bounded, whatever the number of samples; the losses and their gradients are the same."""
        vae, imgs = small_vae("iwae", train_samples=None), all_images()[:10]

        def losses(max_pixels):
            """A bound, its gradient, the bytes that are kept for that, and the most images that are decoded at once."""
            torch.manual_seed(1)
            kept, decoded = [], []
            handle = vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
            mock_decode = functools.partial(decode, max_pixels=max_pixels)
            with (
                torch.autograd.graph.saved_tensors_hooks(
                    lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
                ),
                mock.patch.object(train_pl, "decode", mock_decode),
            ):
                terms = VAE.terms(vae, imgs, 100)
            gradient = gradients(terms.loss.mean(), vae)
            handle.remove()
            return terms, gradient, sum(kept), max(decoded)

        whole, in_parts = (losses(number * imgs[0].numel()) for number in [1_000, 64])
        torch.testing.assert_close([whole[0].L_rec, whole[1]], [in_parts[0].L_rec, in_parts[1]])
        self.assertEqual((whole[3], in_parts[3]), (1_000, 60))
        self.assertEqual((whole[0].logits.shape, in_parts[0].logits), ((10, 100, 1, 1, 6), None))
        self.assertLess(in_parts[2], whole[2] / 3)  # latents and weights are left, of each sample 8 numbers

    def test_processes_share_the_noise(self):
        """The images of a minibatch, each process having every other one, get the samples that one process draws."""
        vae, imgs = small_vae("iwae", train_samples=3), all_images()[:8]
        torch.manual_seed(1)
        expected = mean_losses(vae, imgs)
        shares = []
        for rank in range(2):
            torch.manual_seed(1)
            with SharedNoise(rank, 2):
                shares.append(torch.stack(mean_losses(vae, imgs[rank::2])))
        torch.testing.assert_close(torch.stack(expected), sum(shares) / 2)


WISHES = [
    dict(beta=4.0, beta_warmup=2),
    dict(objective="iwae", train_samples=3),
    dict(train_samples=2, beta=0.5),
    dict(beta=0),
]


class TestRuns(NamedRunTest):
    def test_beta(self):
        """It weighs what is minimised, rises, and is logged; what else is logged is the ELBO."""
        folder, _ = self.train(epochs=4, beta=4.0, beta_warmup=2)
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in metrics(folder)]
        self.assertEqual([row["train_beta"] for row in rows[1:]], [0, 2, 4, 4])
        for row, stage in itertools.product(rows[1:], ["train", "val"]):
            elbo = row[f"{stage}_reconstruction_loss"] + row[f"{stage}_regularization_loss"]
            self.assertAlmostEqual(row[f"{stage}_bpd"], elbo * math.log2(math.e) / 784, places=5)
        self.assertLess(results(folder)["test_bpd"], 1.1)
        weighed = load(folder, "last")["state_dict"]
        self.train(epochs=4, run_name="plain")
        plain = load(self.folder / "plain", "last")["state_dict"]
        self.assertFalse(torch.equal(weighed["encoder.net.0.weight"], plain["encoder.net.0.weight"]))
        self.assertNotIn("train_beta", metrics(self.folder / "plain")[0])
        self.assertEqual(VAE.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").hparams.beta, 4.0)

    def test_what_is_minimised(self):
        imgs = torch.rand(6, 1, 28, 28).round()
        model = VAE("MLP", [8], 4, 3, 1e-3, beta=4.0)
        torch.manual_seed(1)
        L_rec, L_reg, bpd = model(imgs)
        torch.manual_seed(1)
        output = model.training_step((imgs, None), 0)
        torch.testing.assert_close(output["loss"], (L_rec + 4 * L_reg) * math.log2(math.e) / 784)
        torch.testing.assert_close(output["bpd"], bpd)

    def test_iwae_is_logged_under_its_own_name(self):
        folder, _ = self.train(epochs=2, objective="iwae", train_samples=5)
        for row, stage in itertools.product(metrics(folder)[1:], ["train", "val"]):
            values = {name.removeprefix(f"{stage}_"): float(row[name]) for name in row if name.startswith(stage)}
            self.assertLess(values["IWAE"], values["ELBO"])
            self.assertAlmostEqual(values["bpd"], values["ELBO"] * math.log2(math.e) / 784, places=4)

    def test_continued_to_the_bit(self):
        for wish in WISHES[:2]:
            self.train(epochs=3, run_name="undisturbed", **wish)
            undisturbed = self.folder / "undisturbed"
            weights, rows = load(undisturbed, "last")["state_dict"], metrics(undisturbed)
            self.stop_at(VAE, "on_validation_epoch_end", 2, epochs=3, **wish)
            self.train(epochs=3, **wish)
            torch.testing.assert_close(load(self.run_folder(), "last")["state_dict"], weights, rtol=0, atol=0)
            for row, other in zip(metrics(self.run_folder()), rows, strict=True):
                self.assertEqual({**row, "seconds": 0}, {**other, "seconds": 0})
            for name in ["undisturbed", "run"]:
                shutil.rmtree(self.folder / name)

    def test_of_no_use(self):
        for flags, words in [
            (["--beta", "-1"], "--beta must be a finite number of at least 0, got -1.0"),
            (["--beta", "nan"], "--beta must be a finite number of at least 0, got nan"),
            (["--beta_warmup", "-1"], "--beta_warmup must be at least 0"),
            (["--train_samples", "0"], "--train_samples must be at least 1"),
            (["--objective", "vae"], "invalid choice: 'vae'"),
            (["--objective", "iwae", "--beta", "2"], "leave out one of them"),
            (["--objective", "iwae", "--beta_warmup", "2"], "leave out one of them"),
        ]:
            code, error = self.main(*flags)
            self.assertEqual(code, 2)
            self.assertIn(words, error)
            self.assertEqual(list(self.folder.iterdir()), [])


class TestGraphs(GraphTest):
    def test_graphs_train_alike(self):
        for wish in WISHES:
            runs = []
            for no_cuda_graph in [True, False]:
                folder, output = self.train(batch_size=40, z_dim=16, epochs=3, no_cuda_graph=no_cuda_graph, **wish)
                self.assertNotIn("CUDA graphs", output)
                runs.append((load(folder, "last")["state_dict"], metrics(folder)))
            torch.testing.assert_close(*(weights for weights, _ in runs), rtol=0, atol=0)
            for row, other in zip(*(rows[1:] for _, rows in runs), strict=True):
                for name, value in row.items():
                    if not name.startswith("val"):  # validation has larger minibatches there, and other noise
                        self.assertAlmostEqual(float(value), float(other[name]), places=5, msg=name)


if __name__ == "__main__":
    unittest.main()

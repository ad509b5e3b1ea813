"""
Tests of the assignment's contract: `python -m unittest unittests.py`.

They import only the assignment's own names, so a copy of this file tests any solution in the same folder. Tests of
files that do not exist are skipped with a message, and every failure names the likely mistake. No data is needed: noise
replaces MNIST if MNIST is not in ../data/ or ../shared/data/. If tests/unit exists, its tests run as well.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import logging
import math
import os
import re
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.special import ndtr, ndtri
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve().parent
FILES = ["utils", "mlp_encoder_decoder", "cnn_encoder_decoder", "bmnist", "train_pl", "train_torch"]
LOG2_E = math.log2(math.e)
REQUIRED = inspect.Parameter.empty
PER_IMAGE, AVERAGE = "one sum per image", "the batch mean of one sum per image"
REDUCTIONS = {
    PER_IMAGE: lambda x: x.sum(dim=1),
    AVERAGE: lambda x: x.sum(dim=1).mean(),
    "summed over the batch": lambda x: x.sum(),
    "averaged over the pixels or latents": lambda x: x.mean(dim=1),
    "averaged over the batch and the pixels or latents": lambda x: x.mean(),
    "averaged over the pixels or latents and summed over the batch": lambda x: x.mean(dim=1).sum(),
    "one value per pixel or latent": lambda x: x,
    "summed over dimension 0": lambda x: x.sum(dim=0),
}

sys.path.insert(0, str(HERE))  # finds the files next to this one from any working directory
os.environ.setdefault("MPLBACKEND", "Agg")  # training programs must not open windows


def load_tests(loader, tests, pattern):
    """Adds the tests of tests/unit, the unit tests of this package, if they exist."""
    if (HERE / "tests" / "helpers").is_dir():
        names = [f"tests.unit.{path.stem}" for path in sorted((HERE / "tests" / "unit").glob("test_*.py"))]
        tests.addTests(loader.loadTestsFromNames(names))
    return tests


def load_or_skip(file, name):
    """Returns the object with this name from a file of the assignment. Skips the test if the file is missing."""
    if not (HERE / f"{file}.py").is_file():
        raise unittest.SkipTest(f"{file}.py does not exist in this folder")
    try:
        module = importlib.import_module(file)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing in [*FILES, "pytorch_lightning", "lightning"]:
            raise unittest.SkipTest(f"{file}.py imports {missing}, which is missing") from error
        raise AssertionError(f"{file}.py cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise AssertionError(f"{file}.py does not define {name}")
    return getattr(module, name)


def build(kind, *args, **kwargs):
    """Returns an instance of a class. Skips the test if the CNN is not implemented yet: that question is a bonus."""
    try:
        return kind(*args, **kwargs)
    except NotImplementedError as error:
        if "CNN" not in [kind.__name__[:3], kwargs.get("model_name")]:
            raise
        raise unittest.SkipTest("the CNN is not implemented yet") from error


def is_implemented(file):
    """Returns whether a training file no longer raises the template's NotImplementedError."""
    try:
        load_or_skip(file, "VAE")("MLP", [32], 4, 3, 1e-3)(torch.zeros(2, 1, 28, 28))
    except Exception as error:
        return not isinstance(error, (NotImplementedError, unittest.SkipTest))
    return True


class Stub(nn.Module):
    """
    A mock network that computes the given function, so that the losses are known. It has one parameter, with the value
    0, and stores its inputs.
    """

    def __init__(self, function):
        super().__init__()
        self.function, self.inputs, self.zero = function, [], nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.inputs.append(x.detach())
        output = self.function(x)
        return tuple(part + self.zero for part in output) if isinstance(output, tuple) else output + self.zero

    @property
    def device(self):
        return self.zero.device


class ContractTest(unittest.TestCase):
    longMessage = False  # no "False is not true" before the message

    def setUp(self):
        torch.manual_seed(0)
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # libraries may warn about the style of a solution

    def assert_shape(self, tensor, shape, what):
        self.assertEqual(list(tensor.shape), shape, f"{what} must have the shape {shape}, got {list(tensor.shape)}")

    def assert_close(self, found, right, what, mistakes=(), rtol=1e-3, atol=1e-4):
        """Asserts that shapes and values agree. The message names the mistake that explains the values, if one does."""
        tensors = [torch.as_tensor(x).detach().cpu().double() for x in [found, right, *dict(mistakes).values()]]
        found, right = tensors[:2]
        same = [x.shape == found.shape and torch.allclose(x, found, rtol=rtol, atol=atol) for x in tensors[1:]]
        guess = next((words for words, match in zip(mistakes, same[1:]) if match), "the values are wrong")
        first, expected = ([round(value, 4) for value in x.flatten()[:3].tolist()] for x in [found, right])
        shapes = f"; the shape is {list(found.shape)}, expected {list(right.shape)}" * (found.shape != right.shape)
        self.assertTrue(same[0], f"{what}: {guess}. The first values are {first}, expected {expected}{shapes}")

    def assert_reduced(self, found, values, right, what):
        """Asserts that `found` is values[""] with the reduction `right`. Other values and reductions are mistakes."""
        mistakes = {}
        for name, value in values.items():
            for way, reduce in REDUCTIONS.items():
                words = [name] * (name != "") + [f"it is {way}, but must be {right}"] * (way != right)
                mistakes.setdefault("; ".join(words), reduce(value.flatten(1)))
        self.assert_close(found, mistakes.pop(""), what, mistakes)

    def assert_signature(self, function, **expected):
        """Checks names, order and defaults of the parameters. Additional parameters come last and have defaults."""
        parameters = [p for p in inspect.signature(function).parameters.values() if "VAR" not in p.kind.name]
        found = [(p.name, list(p.default) if isinstance(p.default, tuple) else p.default) for p in parameters]
        more = [default for _, default in found[len(expected) :]]
        right = found[: len(expected)] == [*expected.items()] and REQUIRED not in more
        words = ", ".join(name if default is REQUIRED else f"{name}={default}" for name, default in expected.items())
        self.assertTrue(
            right, f"{function.__qualname__}{inspect.signature(function)} must have the parameters ({words})"
        )


def kl_per_latent(mean, log_std):
    """Returns a dict with the KL divergence per latent under "", and its value with each mistake."""
    s, s2, m2, std, var = log_std, 2 * log_std, mean**2, log_std.exp(), (2 * log_std).exp()
    return {
        "": (var + m2 - 1 - s2) / 2,
        "log_std must count twice: log std^2 is 2 log std": (var + m2 - 1 - s) / 2,
        "log_std must count twice: std^2 is exp(2 log std)": (std + m2 - 1 - s2) / 2,
        "log_std must count twice: log std^2 is 2 log std, std^2 is exp(2 log std)": (std + m2 - 1 - s) / 2,
        "log std^2 is 2 log std, not (log std)^2": (var + m2 - 1 - s**2) / 2,
        "log_std is used as std, but std is exp(log_std)": (s**2 + m2 - 1 - (s**2).log()) / 2,
        "the -1 is missing": (var + m2 - s2) / 2,
        "the division by 2 is missing": var + m2 - 1 - s2,
        "mean must be squared": (var + mean - 1 - s2) / 2,
        "the sign is wrong: a KL divergence is never negative": -(var + m2 - 1 - s2) / 2,
    }


class TestKLD(ContractTest):
    def test_it_is_the_closed_form_per_image(self):
        KLD, (mean, log_std) = load_or_skip("utils", "KLD"), torch.randn(2, 7, 20)
        kls = kl_per_latent(mean, log_std)
        self.assert_reduced(KLD(mean, log_std), kls, PER_IMAGE, "KLD")
        mistakes = {"it sums over dimension 1, not the last": kls[""].sum(dim=0)[None]}
        self.assert_close(
            KLD(mean[None], log_std[None]), kls[""].sum(dim=1)[None], "KLD of inputs with three dimensions", mistakes
        )

    def test_it_is_exactly_zero_for_the_prior_and_symmetric_in_the_mean(self):
        KLD = load_or_skip("utils", "KLD")
        self.assertTrue(
            (KLD(torch.zeros(5, 3), torch.zeros(5, 3)) == 0).all(), "KLD must be exactly 0 if mean and log_std are 0"
        )
        mean, log_std = torch.randn(2, 16, 20)
        self.assertTrue(
            (KLD(mean, log_std) == KLD(-mean, log_std)).all(), "KLD must not depend on the sign of the mean"
        )


class TestReparameterization(ContractTest):
    def test_samples_have_the_given_mean_and_standard_deviation(self):
        mean, std = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.25, 1.0, 3.0])
        z = load_or_skip("utils", "sample_reparameterize")(mean.expand(20_000, 3), std.expand(20_000, 3))
        self.assert_shape(z, [20_000, 3], "z")
        self.assertTrue((z[0] != z[1]).all(), "sample_reparameterize adds the same noise to all images")
        self.assertLess(
            torch.corrcoef(z.T)[0, 1].abs(), 0.1, "sample_reparameterize adds the same noise to all latents"
        )
        mistakes = {
            "std is used as log_std, but it is already the standard deviation": std.exp(),
            "std is used as the variance, but it is already the standard deviation": std.sqrt(),
            "the noise is multiplied by std^2, not by std": std**2,
            "std is not used": torch.ones(3),
            "the noise is uniform (torch.rand), not normal (torch.randn)": std / 12**0.5,
        }
        self.assert_close(z.std(dim=0), std, "The standard deviation of the samples", mistakes, rtol=0.05)
        self.assert_close(
            (z.mean(dim=0) - mean) / std, torch.zeros(3), "The mean of the noise in the samples", atol=0.05
        )

    def test_gradients_reach_the_mean_and_the_standard_deviation(self):
        mean, std = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4).add(0.5).requires_grad_()
        z = load_or_skip("utils", "sample_reparameterize")(mean, std)
        self.assert_shape(z, [2, 3, 4], "z")
        self.assertTrue(z.requires_grad, "sample_reparameterize stops the gradients: return mean + std * noise")
        z.sum().backward()
        for name, x, gradient in [("mean", mean, torch.ones(2, 3, 4)), ("std", std, (z - mean) / std)]:
            self.assertIsNotNone(x.grad, f"sample_reparameterize stops the gradient of {name}")
            self.assert_close(x.grad, gradient, f"The gradient of mean + std * noise with respect to {name}")


class TestBPD(ContractTest):
    def test_it_converts_nats_per_image_to_bits_per_dimension(self):
        elbo = 50 + 100 * torch.rand(6)
        bits = elbo.view(6, 1) * LOG2_E / 105
        values = {
            "": bits,
            "it is in nats: multiply by log2(e) to get bits": bits / LOG2_E,
            "it is divided by log2(e), not multiplied": bits / LOG2_E**2,
            "it is also divided by the batch size: the dimensions are img_shape[1:]": bits / 6,
            "it is in nats and also divided by the batch size: use log2(e) and img_shape[1:]": bits / LOG2_E / 6,
            "it is not divided by the channels: the dimensions are img_shape[1:]": bits * 3,
            "it is not divided by the number of dimensions": bits * 105,
            "the sign is wrong: `elbo` is already the negative ELBO": -bits,
        }
        found = load_or_skip("utils", "elbo_to_bpd")(elbo, torch.Size([6, 3, 5, 7]))
        self.assert_reduced(found, values, PER_IMAGE, "elbo_to_bpd")


class TestManifold(ContractTest):
    def manifold(self, axis, grid_size):
        """Returns the decoded latents and the picture, for a decoder whose grey value grows with the latent z[axis]."""
        decoder = Stub(lambda z: ndtr(z[:, axis]).logit(1e-6).view(-1, 1, 1, 1).expand(-1, 1, 28, 28))
        picture = torch.as_tensor(load_or_skip("utils", "visualize_manifold")(decoder, grid_size=grid_size)).detach()
        z = torch.cat(decoder.inputs)
        self.assert_shape(z, [len(z), 2], "The decoder's input")
        self.assertEqual(z.dtype, torch.float32, f"The decoder's input is {z.dtype}, but must be float32")
        return z, picture

    def tiles(self, z, picture):
        """Returns the grey value of each image, in rows and columns."""
        size = math.isqrt(len(z))
        padding = max((picture.shape[-1] - 28 * size) // (size + 1), 0)
        side = 28 * size + padding * (size + 1)
        self.assert_shape(picture, [3, side, side], f"A grid of {len(z)} images, {size} per row,")
        return picture[0, padding + 14 :: padding + 28, padding + 14 :: padding + 28]

    def test_it_decodes_grid_size_squared_images(self):
        self.assert_signature(load_or_skip("utils", "visualize_manifold"), decoder=REQUIRED, grid_size=20)
        for size in [4, 7]:
            count = len(self.manifold(0, size)[0])
            hint = " (use grid_size points per axis, not the hint's grid_size + 1)" * (count == (size + 1) ** 2)
            self.assertEqual(count, size**2, f"grid_size {size} must give {size**2} images, got {count}{hint}")

    def test_latents_are_the_percentiles_of_the_normal_distribution(self):
        n, i = 5, torch.arange(1, 6).double()
        mistakes = {
            "their percentiles are 1/grid_size apart, not 1/(grid_size + 1)": ndtri((i - 0.5) / n),
            "their percentiles are not centred on 0.5": ndtri((i - 0.5) / (n + 1)),
            "their percentiles are more than 1/(grid_size + 1) apart": ndtri(torch.linspace(0.5, n + 0.5, n) / (n + 1)),
        }
        z, _ = self.manifold(0, n)
        for axis in range(2):
            points = (z[:, axis] * 1e4).round().unique() / 1e4
            if points.min() > 0:
                mistakes["they are the percentiles themselves: the inverse normal CDF (ndtri) is missing"] = points
            self.assert_close(points, ndtri(i / (n + 1)), f"The latents z[{axis}]", mistakes)

    def test_the_first_latent_grows_to_the_right_and_the_second_upwards(self):
        ways = []
        for axis in range(2):
            grey = self.tiles(*self.manifold(axis, 4))
            right, down = grey.diff(dim=1), grey.diff(dim=0)
            steps = {"to the right": right, "to the left": -right, "upwards": -down, "downwards": down}
            ways.append(next((way for way, step in steps.items() if (step > 1e-4).all()), "nowhere"))
        fault = "swapped" if ways[0] in ["upwards", "downwards"] else "mirrored"
        words = f"The axes are {fault}: z[0] grows {ways[0]}, z[1] {ways[1]}; expected: to the right, upwards"
        self.assertEqual(ways, ["to the right", "upwards"], words)

    def test_it_shows_the_means_of_the_pixels(self):
        z, picture = self.manifold(0, 3)
        found, means = self.tiles(z, picture).flatten().sort().values, ndtr(z[:, 0]).sort().values
        mistakes = {
            "they are the decoder's logits: the sigmoid is missing": means.logit(),
            "the sigmoid is applied twice": means.sigmoid(),
            "they are rescaled (normalize=True of make_grid)": (means - means[0]) / (means[-1] - means[0]),
        }
        if set(found.tolist()) <= {0, 1}:
            mistakes["they are black or white, but must be the means"] = found
        self.assert_close(found, means, "The manifold's pixels", mistakes)


class NetworkTests:
    """Tests of mlp_encoder_decoder.py and cnn_encoder_decoder.py."""

    def network(self, name, *args, **kwargs):
        return build(load_or_skip(f"{self.kind.lower()}_encoder_decoder", self.kind + name), *args, **kwargs)

    def test_parameters_have_the_assignments_names_and_defaults(self):
        for name, expected in self.signatures.items():
            self.assert_signature(load_or_skip(f"{self.kind.lower()}_encoder_decoder", self.kind + name), **expected)

    def test_the_encoder_returns_mean_and_log_std(self):
        outputs = self.network("Encoder", z_dim=14)(torch.randn(32, 1, 28, 28))
        for name, output in zip(["mean", "log_std"], outputs):
            self.assert_shape(output, [32, 14], f"{self.kind}Encoder's {name}")
            signs = (output < 0).any() and (output > 0).any()
            self.assertTrue(signs, f"{name} has only one sign: remove the last activation, and return log_std, not std")
        self.assertFalse(torch.equal(*outputs), "mean and log_std are equal: the encoder needs two outputs")

    def test_the_decoder_returns_logits_and_knows_its_device(self):
        decoder = self.network("Decoder", z_dim=14)
        logits = decoder(5 * torch.randn(64, 14))
        self.assert_shape(logits, [64, 1, 28, 28], f"{self.kind}Decoder's output")
        signs = (logits < 0).any() and (logits > 0).any()
        self.assertTrue(signs, f"{self.kind}Decoder's logits have one sign: remove the last sigmoid or ReLU")
        device = str(decoder.to("meta").device)
        self.assertEqual(
            device,
            "meta",
            f"{self.kind}Decoder.device is {device} after decoder.to('meta'): make `device` a property that returns "
            "next(self.parameters()).device",
        )

    def test_images_of_other_shapes_are_encoded_and_decoded(self):
        mean, _ = self.network("Encoder", *self.encoder)(torch.randn(2, *self.image))
        self.assert_shape(mean, [2, 4], f"The mean of {self.kind}Encoder{self.encoder}")
        logits = self.network("Decoder", *self.decoder)(torch.randn(2, 4))
        self.assert_shape(logits, [2, *self.image], f"The output of {self.kind}Decoder{self.decoder}")


class TestMLP(NetworkTests, ContractTest):
    kind = "MLP"
    signatures = {
        "Encoder": dict(input_dim=784, hidden_dims=[512], z_dim=20),
        "Decoder": dict(z_dim=20, hidden_dims=[512], output_shape=[1, 28, 28]),
    }
    image, encoder, decoder = [3, 8, 9], (216, [30, 20], 4), (4, [30, 20], [3, 8, 9])

    def test_the_decoder_is_not_linear(self):
        decoder, (a, b) = self.network("Decoder", 4, [32, 32]), 3 * torch.randn(2, 8, 4)
        bend = decoder(a) + decoder(b) - decoder(a + b) - decoder(torch.zeros(8, 4))
        self.assertGreater(bend.abs().max(), 1e-4, "MLPDecoder is linear: put a ReLU between its layers")

    def test_the_callers_lists_are_not_changed(self):
        hidden_dims, shape = [30, 20], [1, 28, 28]
        self.network("Encoder", 784, hidden_dims), self.network("Decoder", 20, hidden_dims, shape)
        words = f"hidden_dims [30, 20] became {hidden_dims}, output_shape became {shape}: copy the lists"
        self.assertEqual((hidden_dims, shape), ([30, 20], [1, 28, 28]), words)
        self.network("Encoder"), self.network("Decoder")
        self.test_parameters_have_the_assignments_names_and_defaults()  # all calls share a default list


class TestCNN(NetworkTests, ContractTest):
    kind = "CNN"
    signatures = dict.fromkeys(["Encoder", "Decoder"], dict(num_input_channels=1, num_filters=32, z_dim=20))
    image, encoder, decoder = [3, 28, 28], (3, 8, 4), (3, 8, 4)


class TestData(ContractTest):
    NAMES = ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"]

    def test_parameters_have_the_assignments_names_and_defaults(self):
        expected = dict(root="../data/", batch_size=128, num_workers=mock.ANY, download=True)
        self.assert_signature(load_or_skip("bmnist", "bmnist"), **expected)

    def write_mock_mnist(self, raw):
        """Writes noise in the format of MNIST's files."""
        raw.mkdir(parents=True)
        for name, shape in zip(self.NAMES, [(60_000, 28, 28), (10_000, 28, 28), (60_000,), (10_000,)]):
            values = np.random.default_rng(0).integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
            (raw / name).write_bytes(np.array([0x800 + len(shape), *shape], ">i4").tobytes() + values.tobytes())

    def test_splits_batches_and_pixels_are_the_assignments(self):
        bmnist, roots = (
            load_or_skip("bmnist", "bmnist"),
            [HERE.parent / "data", HERE.parent / "shared" / "data", self.folder],
        )
        raws = [root / "MNIST" / "raw" for root in roots]
        raw = next((raw for raw in raws if all((raw / name).is_file() for name in self.NAMES)), raws[-1])
        if raw is raws[-1]:
            self.write_mock_mnist(raw)
        try:
            loaders = bmnist(str(raw.parents[1]), batch_size=700, num_workers=0, download=False)
        except Exception as error:
            if raw is raws[-1] and re.search("md5|checksum", str(error), re.IGNORECASE):
                self.skipTest("this bmnist accepts only the original MNIST files, which are not in ../data/")
            raise
        files = [torch.from_numpy(np.fromfile(raw / name, np.uint8)) for name in self.NAMES]
        pixels = [(file[16:] > 127).view(-1, 1, 28, 28).float() for file in files[:2]]
        labels = [file[8:].long() for file in files[2:]]
        rule = "the first 45,000 images train, the next 5,000 validate, 10,000 test, in order; no batch is dropped"
        counts = [len(loader) for loader in loaders]
        self.assertEqual(counts, [65, 8, 15], f"The loaders have {counts} batches of 700, expected [65, 8, 15]: {rule}")
        for name, loader, part, start in [("Validation", loaders[1], 0, 45_000), ("Test", loaders[2], 1, 0)]:
            imgs, numbers = next(iter(loader))
            self.assert_shape(imgs, [700, 1, 28, 28], f"{name} images of a batch")
            right = torch.equal(imgs, pixels[part][start : start + 700])
            self.assertTrue(right, f"{name} images are wrong: {rule}; a pixel is 1 if intensity / 255 > 0.5, else 0")
            self.assertTrue(
                torch.equal(numbers, labels[part][start : start + 700]), f"{name} labels do not belong to the images"
            )
        imgs, again = (next(iter(loaders[0]))[0] for _ in range(2))
        self.assertFalse(torch.equal(imgs, again), "The training images must be shuffled again in each epoch")
        known = {image.tobytes() for image in pixels[0][:45_000].bool().numpy()}
        self.assertTrue(
            known.issuperset(image.tobytes() for image in imgs.bool().numpy()), f"Training images are wrong: {rule}"
        )


class VAETests:
    """Tests of train_pl.py and train_torch.py. The assignment asks for one of them; the other may be the template."""

    def setUp(self):
        super().setUp()
        load_or_skip(self.file, "VAE")
        if not is_implemented(self.file) and is_implemented(self.other):
            self.skipTest(f"{self.file}.py is not implemented, but {self.other}.py is")

    def vae(self, encoder=None, decoder=None, **hyperparameters):
        """Returns a small VAE. The given functions replace its networks, see Stub."""
        defaults = dict(model_name="MLP", hidden_dims=[32], num_filters=4, z_dim=3, lr=1e-3)
        model = build(load_or_skip(self.file, "VAE"), **{**defaults, **hyperparameters})
        model.encoder = Stub(encoder) if encoder else model.encoder
        model.decoder = Stub(decoder) if decoder else model.decoder
        return model

    def test_forward_returns_the_batch_means_of_the_losses(self):
        imgs, logits = torch.rand(6, 1, 28, 28).round(), torch.randn(6, 1, 28, 28)
        mean, log_std = torch.randn(2, 6, 3)
        outputs = self.vae(lambda x: (mean, log_std), lambda z: logits)(imgs)
        self.assertEqual(len(outputs), 3, f"forward must return (L_rec, L_reg, bpd), got {len(outputs)} values")
        outputs = [output.squeeze() for output in outputs]
        rec, twice = (F.binary_cross_entropy_with_logits(x, imgs, reduction="none") for x in [logits, logits.sigmoid()])
        kls = kl_per_latent(mean, log_std)
        bpd = (rec.flatten(1).sum(dim=1) + kls[""].sum(dim=1)).view(6, 1) * LOG2_E / 784
        bpds = {
            "": bpd,
            "L_rec or L_reg is wrong, not the formula of bpd": (outputs[0] + outputs[1]).view(-1, 1) * LOG2_E / 784,
            "it is in nats: multiply by log2(e)": bpd / LOG2_E,
            "it is divided by the batch size twice": bpd / 6,
            "the sign is wrong: bpd is the negative ELBO, a loss": -bpd,
        }
        recs = {
            "": rec,
            "the sign is wrong: L_rec is the negative log-likelihood": -rec,
            "two sigmoids are applied": twice,
        }
        for name, output, values in zip(["L_rec", "L_reg", "bpd"], outputs, [recs, kls, bpds]):
            with self.subTest(name):
                self.assert_reduced(output, values, AVERAGE, name)

    def test_latents_are_sampled_from_the_posterior(self):
        mean, log_std = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-2.0, 1.0, -1.0])
        posterior = (mean.expand(2_000, 3), log_std.expand(2_000, 3))
        model = self.vae(lambda x: posterior, lambda z: torch.zeros(2_000, 1, 28, 28))
        model(torch.zeros(2_000, 1, 28, 28))
        z = torch.cat(model.decoder.inputs)
        mistakes = {
            "log_std is used as std, which is exp(log_std)": log_std.abs(),
            "it is 2^log_std, but std is e^log_std": 2**log_std,
            "it is the variance, but std is exp(log_std)": (2 * log_std).exp(),
            "log_std is used as the log variance, but std is exp(log_std)": (log_std / 2).exp(),
            "the mean is decoded, not a sample": torch.zeros(3),
        }
        self.assert_close(z.std(dim=0), log_std.exp(), "The standard deviation of z", mistakes, rtol=0.1)
        self.assert_close(z.mean(dim=0), mean, "The mean of z", atol=0.3)

    def test_gradients_reach_both_networks(self):
        def reached(index):
            model = self.vae()
            model(torch.rand(6, 1, 28, 28).round())[index].sum().backward()
            return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

        trained = reached(2)
        for network in ["encoder", "decoder"]:
            self.assertIn(
                network,
                {name.partition(".")[0] for name in trained},
                f"the gradient of bpd does not reach the {network}",
            )
        for index, loss in enumerate(["L_rec", "L_reg"]):
            missed = [name for name in sorted(trained - reached(index)) if name.startswith("encoder")]
            words = f"the gradient of {loss} does not reach {missed}: remove detach(), item() or no_grad()"
            self.assertEqual(missed, [], words)

    def test_an_untrained_model_needs_about_one_bit_per_pixel(self):
        for model_name in ["MLP", "CNN"]:
            with self.subTest(model_name):
                model = self.vae(model_name=model_name, hidden_dims=[512], num_filters=8, z_dim=20)
                bpd = model(torch.rand(32, 1, 28, 28).round())[2].mean().item()
                self.assertTrue(0.99 < bpd < 1.5, f"the bpd of an untrained VAE must be about 1, got {bpd:.4g}")
                for name, x in zip(["x_samples", "x_mean"], model.sample(5)):
                    self.assert_shape(x, [5, 1, 28, 28], name)

    def test_samples_are_binary_and_have_their_means(self):
        means = torch.linspace(0.1, 0.9, 784).view(1, 28, 28)
        model = self.vae(decoder=lambda z: means.logit().expand(len(z), 1, 28, 28))
        x_samples, x_mean = (x.detach().float() for x in model.sample(2_000))
        swapped = set(x_mean.unique().tolist()) == {0, 1}
        self.assertFalse(swapped, "sample must return (x_samples, x_mean), in this order")
        mistakes = {"the sigmoid is missing": means.logit(), "the sigmoid is applied twice": means.sigmoid()}
        self.assert_close(x_mean[0], means, "x_mean", mistakes)
        binary = set(x_samples.unique().tolist()) <= {0, 1}
        self.assertTrue(binary, "x_samples must be 0 or 1: use torch.bernoulli(x_mean)")
        mistakes = {
            "the means are thresholded, not sampled (torch.bernoulli)": means.round(),
            "0 and 1 are swapped: x_mean is the probability of 1": 1 - means,
            "x_samples are sampled from the sigmoid of x_mean, not from x_mean": means.sigmoid(),
        }
        self.assert_close(x_samples.mean(dim=0), means, "The frequency of 1 in x_samples", mistakes, atol=0.06)
        z = torch.cat(model.decoder.inputs)
        self.assert_shape(z, [2_000, 3], "The decoder's input")
        mistakes = {"torch.rand is uniform, but the prior is normal (torch.randn)": torch.full((3,), 12**-0.5)}
        self.assert_close(z.std(dim=0), torch.ones(3), "The standard deviation of z in sample", mistakes, rtol=0.1)
        self.assert_close(z.mean(dim=0), torch.zeros(3), "The mean of z in sample", atol=0.15)

    def test_the_decoder_has_the_hidden_layers_reversed(self):
        hidden_dims = [48, 24]
        model = self.vae(hidden_dims=hidden_dims)
        self.assertEqual(hidden_dims, [48, 24], "VAE changes the caller's hidden_dims: use hidden_dims[::-1], a copy")
        for name, expected in [("encoder", [48, 24]), ("decoder", [24, 48])]:
            layers = [layer for layer in getattr(model, name).modules() if isinstance(layer, nn.Linear)]
            widths = [layer.out_features for layer in layers if layer.out_features in expected]
            words = "the decoder gets hidden_dims reversed, the encoder in the given order"
            self.assertEqual(
                widths, expected, f"with hidden_dims [48, 24], the {name} has layers of {widths} units: {words}"
            )

    def known_losses(self):
        """Returns a VAE with known losses, a loader with batches of 8, 8 and 4 images, and the losses of each image."""
        imgs = (torch.rand(20, 1, 28, 28) < torch.linspace(0.1, 0.9, 20).view(-1, 1, 1, 1)).float()
        ink = imgs.sum(dim=(1, 2, 3))
        networks = [lambda x: (x.sum(dim=(1, 2, 3)).view(-1, 1).expand(-1, 3) / 400, torch.zeros(len(x), 3))]
        model = self.vae(*networks, lambda z: torch.ones(len(z), 1, 28, 28), lr=0.0)
        rec, reg = 784 * F.softplus(torch.tensor(1.0)) - ink, 1.5 * (ink / 400) ** 2
        losses = {"L_rec": rec, "L_reg": reg, "ELBO": rec + reg, "bpd": (rec + reg) * LOG2_E / 784}
        return model, DataLoader(TensorDataset(imgs, torch.arange(20) % 10), batch_size=8), losses

    def assert_average(self, found, losses, name, what):
        """Checks the mean of a loss over all images."""
        means = torch.stack([batch.mean() for batch in losses[name].split(8)])
        mistakes = {
            "it is the mean of the batch means: weight each batch by its size": means.mean(),
            "it is the mean of the last batch only": means[-1],
            "it is the sum of the batch means": means.sum(),
            **{f"it is {other}": values.mean() for other, values in losses.items() if other != name},
        }
        self.assert_close(found, losses[name].mean(), what, mistakes)

    def assert_pictures(self, save):
        """Checks the PNG files that save(epoch) writes: samples and means, each 8x8 images of 28x28 pixels."""
        for count, epoch in [(2, 0), (4, 5)]:
            save(epoch)
            paths = sorted(self.folder.rglob("*.png"))
            words = f"sample_and_save wrote {len(paths)} PNG files, expected {count}: samples and means for each epoch"
            self.assertGreaterEqual(len(paths), count, words)
        for path in paths:
            size = np.frombuffer(path.read_bytes()[16:24], ">u4").tolist()
            self.assertGreaterEqual(min(size), 224, f"{path.name} has {size} pixels: too small for 8x8 images of 28x28")


class TestTrainPL(VAETests, ContractTest):
    file, other = "train_pl", "train_torch"

    def test_hyperparameters_are_saved_and_adam_has_the_learning_rate(self):
        values = dict(model_name="MLP", hidden_dims=[32], num_filters=4, z_dim=3, lr=0.03)
        self.assert_signature(load_or_skip(self.file, "VAE"), **dict.fromkeys(values, REQUIRED))
        model = self.vae(**values)
        for name, value in values.items():
            self.assertEqual(
                model.hparams.get(name), value, f"hparams.{name} is not {value}: call save_hyperparameters()"
            )
        optimizer = model.configure_optimizers()
        while isinstance(optimizer, (list, tuple, dict)):
            optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer[0]
        self.assertIsInstance(optimizer, torch.optim.Adam, "configure_optimizers must return torch.optim.Adam")
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.03, "the learning rate of Adam must be VAE's lr")

    def test_metrics_are_means_over_the_images_of_an_epoch(self):
        model, loader, losses = self.known_losses()
        modules = [kind.__module__ for kind in type(model).__mro__ if kind.__name__ == "LightningModule"]
        self.assertTrue(
            modules, "VAE in train_pl.py is not a LightningModule: derive it from pytorch_lightning.LightningModule"
        )
        lightning = importlib.import_module(modules[0].partition(".core")[0])  # pytorch_lightning or lightning
        for name in ["pytorch_lightning", "lightning.pytorch"]:
            logging.getLogger(name).setLevel(logging.ERROR)
        off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        options = dict(accelerator="cpu", devices=1, num_sanity_val_steps=0, default_root_dir=self.folder)
        trainer = lightning.Trainer(max_epochs=1, **options, **dict.fromkeys(off, False))
        trainer.fit(model, loader, loader)
        found = dict(trainer.callback_metrics)
        trainer.test(model, loader, verbose=False)
        found.update(trainer.callback_metrics)
        names = {"reconstruction_loss": "L_rec", "regularization_loss": "L_reg", "ELBO": "ELBO", "bpd": "bpd"}
        expected = {f"{stage}_{name}": names[name] for stage in ["train", "val"] for name in names}
        for name, loss in {**expected, "test_bpd": "bpd"}.items():
            with self.subTest(name):
                self.assertIn(name, found, f"{name} is not logged. Logged are: {', '.join(sorted(found))}")
                self.assert_average(found[name], losses, loss, f"{name} of the epoch")

    def test_the_callback_samples_every_n_epochs(self):
        GenerateCallback = load_or_skip(self.file, "GenerateCallback")
        self.assert_signature(GenerateCallback, batch_size=64, every_n_epochs=5, save_to_disk=False)
        callback, epochs = GenerateCallback(every_n_epochs=5), []
        with mock.patch.object(callback, "sample_and_save") as sample_and_save:
            for epoch in range(12):
                for hook in ["on_train_epoch_end", "on_epoch_end"]:  # the second name is from Lightning 1
                    getattr(callback, hook, mock.Mock())(mock.Mock(current_epoch=epoch), mock.Mock())
                epochs += [epoch + 1] * sample_and_save.called
                sample_and_save.reset_mock()
        self.assertEqual(epochs, [5, 10], f"every_n_epochs=5 must sample after epochs 5 and 10 of 12, got {epochs}")

    def test_the_callback_saves_samples_and_means(self):
        GenerateCallback, model, trainer = load_or_skip(self.file, "GenerateCallback"), self.vae(), mock.MagicMock()
        trainer.logger.log_dir = trainer.log_dir = trainer.default_root_dir = str(self.folder)
        GenerateCallback().sample_and_save(trainer, model, epoch=0)
        count = trainer.logger.experiment.add_image.call_count + trainer.logger.experiment.add_images.call_count
        self.assertGreaterEqual(count, 2, f"add_image must add samples and means to TensorBoard, got {count} calls")
        self.assertEqual([*self.folder.rglob("*.png")], [], "save_to_disk=False must write no file")
        self.assert_pictures(lambda epoch: GenerateCallback(save_to_disk=True).sample_and_save(trainer, model, epoch))


class TestTrainTorch(VAETests, ContractTest):
    file, other = "train_torch", "train_pl"

    def test_parameters_have_the_assignments_names_and_defaults(self):
        model = load_or_skip(self.file, "VAE")("MLP", [32], 4, 3, 1e-3, lr=1e-3)
        self.assertEqual(
            (model.z_dim, str(model.device)), (3, "cpu"), "VAE must have z_dim, and the device of its decoder"
        )
        writer = dict(epoch=REQUIRED, summary_writer=REQUIRED, batch_size=64)
        self.assert_signature(load_or_skip(self.file, "sample_and_save"), model=REQUIRED, **writer)
        self.assert_signature(load_or_skip(self.file, "seed_everything"), seed=REQUIRED)
        self.assert_signature(load_or_skip(self.file, "test_vae"), model=REQUIRED, data_loader=REQUIRED)
        self.assert_signature(
            load_or_skip(self.file, "train_vae"), model=REQUIRED, train_loader=REQUIRED, optimizer=REQUIRED
        )

    def test_losses_are_averaged_over_all_images(self):
        for name in ["train_vae", "test_vae"]:
            model, loader, losses = self.known_losses()
            optimizer = [torch.optim.SGD(model.parameters(), lr=0.0)] * (name == "train_vae")
            averages = load_or_skip(self.file, name)(model, loader, *optimizer)
            for average, loss in zip(averages, ["bpd", "L_rec", "L_reg"]):
                with self.subTest(f"{name}, {loss}"):
                    self.assert_average(average, losses, loss, f"{loss} in (bpd, L_rec, L_reg) of {name}")
                    number = isinstance(average, (int, float, np.number))
                    self.assertTrue(number, f"{name} must return numbers, got {type(average).__name__}: call .item()")
        self.assertIsNone(model.decoder.zero.grad, "test_vae computes gradients: use torch.no_grad()")

    def test_an_epoch_minimises_the_bpd(self):
        model, loader, _ = self.known_losses()
        load_or_skip(self.file, "train_vae")(model, loader, torch.optim.SGD([model.decoder.zero], lr=1e-5))
        change = -1e5 * model.decoder.zero  # in units of lr, which is too small to change the gradients
        slopes = [784 * torch.tensor(1.0).sigmoid() - imgs.sum() / len(imgs) for imgs, _ in loader]
        steps = torch.stack(slopes) * LOG2_E / 784
        mistakes = {
            "the parameter does not change: call loss.backward() and optimizer.step()": 0.0,
            "the gradients of all batches add up: optimizer.zero_grad() is missing": steps.cumsum(0).sum(),
            "it minimises L_rec + L_reg, not the bpd": steps.sum() * 784 / LOG2_E,
            "it maximises the loss": -steps.sum(),
        }
        self.assert_close(change, steps.sum(), "The step of a parameter in train_vae", mistakes, rtol=0.02)

    def test_samples_and_means_are_saved(self):
        writer, model, sample_and_save = mock.MagicMock(), self.vae(), load_or_skip(self.file, "sample_and_save")
        writer.log_dir = writer.get_logdir.return_value = str(self.folder)
        self.assert_pictures(lambda epoch: sample_and_save(model, epoch, writer))

    def test_main_returns_the_test_bpd(self):
        main, flags = (
            load_or_skip(self.file, "main"),
            dict(model="MLP", z_dim=3, hidden_dims=[32], num_filters=4, lr=1e-3),
        )
        flags.update(batch_size=8, epochs=1, seed=42, num_workers=0, log_dir=str(self.folder), progress_bar=False)
        loader = DataLoader(TensorDataset(torch.rand(20, 1, 28, 28).round(), torch.arange(20) % 10), batch_size=8)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)  # some programs save pictures in the working directory
        fakes = dict(bmnist=mock.Mock(return_value=[loader] * 3), test_vae=mock.Mock(return_value=(0.25, 180.0, 20.0)))
        with mock.patch.multiple(self.file, **fakes), contextlib.redirect_stdout(io.StringIO()):
            found = main(argparse.Namespace(**flags))
        self.assertEqual(
            found, 0.25, f"main returns {found}, but must return the first value of test_vae, the bpd 0.25"
        )
        files = [*self.folder.glob("*/checkpoints/epoch.pt")]
        self.assertEqual(len(files), 1, "main must save the best epoch as <log_dir>/<time>/checkpoints/epoch.pt")
        self.vae().load_state_dict(torch.load(files[0], map_location="cpu", weights_only=True))


class TestFiles(ContractTest):
    def test_torch_distributions_is_not_used(self):
        use = r"^[^#]*(torch\.distributions\.\w|import torch\.distributions|from torch(\.| import .*\b)distributions)"
        for path in [HERE / f"{file}.py" for file in FILES if (HERE / f"{file}.py").is_file()]:
            used = re.search(use, path.read_text(encoding="utf-8"), re.MULTILINE)
            self.assertIsNone(used, f"{path.name} uses torch.distributions, which the assignment forbids")


if __name__ == "__main__":
    unittest.main()

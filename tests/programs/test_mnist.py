"""Tests on MNIST, if ../shared/data or ../data contains it: `python -m unittest tests/programs/test_mnist.py`."""

import re
import unittest

import torch

from bmnist import bmnist
from likelihoods import posteriors, statistics
from tests.helpers import MNIST_DIR, NO_MNIST, NO_NETWORK, REPOSITORY, CommandTest
from train_pl import VAE


@unittest.skipUnless(MNIST_DIR, NO_MNIST)
class TestMNIST(CommandTest):
    def test_bmnist_prints_the_splits(self):
        code, stdout, stderr = self.run_command("bmnist.py", "--data_dir", MNIST_DIR, **NO_NETWORK)
        self.assertEqual((code, stderr), (0, ""))
        train, val, test = stdout.splitlines()[1:]
        self.assertEqual(train, "train       45,000 images  13.26% of the pixels are 1")
        self.assertEqual(val, "validation   5,000 images  13.23% of the pixels are 1")
        self.assertEqual(test, "test        10,000 images  13.42% of the pixels are 1")

    def test_the_mlp_reaches_the_expected_bpd_on_mnist(self):
        _, results = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--epochs", "2")
        self.assertEqual(results["dataset"], "mnist")
        self.assertTrue(1.0 < results["first_step_bpd"] < 1.1)
        self.assertLess(results["final_train_bpd"], 0.21)  # 0.206 after 2 epochs, 0.146 after 80
        self.assertLess(results["test_bpd"], 0.195)

    def test_the_cnn_reaches_the_expected_bpd_on_mnist(self):
        _, results = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--model", "CNN", "--epochs", "1")
        self.assertTrue(0.99 < results["first_step_bpd"] < 1.1)
        self.assertLess(results["test_bpd"], 0.32)

    def test_the_pretrained_weights_have_the_bpd_and_elbo_in_both_readmes(self):
        dataset = bmnist(MNIST_DIR)[2].dataset
        readme = (REPOSITORY / "README.md").read_text()
        for name in ["mlp_2", "mlp_20", "cnn_20"]:
            with self.subTest(name), torch.no_grad():
                model = VAE.load_from_checkpoint(REPOSITORY / "pretrained" / f"{name}.ckpt").eval()
                torch.manual_seed(0)
                elbos, _, _ = posteriors(model, dataset)
                numbers = statistics("elbo", elbos, dataset, "bpd")
                row = re.search(rf"\| `{name}.ckpt` .*", (REPOSITORY / "pretrained" / "README.md").read_text())[0]
                bpd, elbo = (float(number) for number in re.findall(r"\| (-?[\d.]+) \+- ", row)[:2])
                self.assertAlmostEqual(numbers["bpd"], bpd, delta=0.0002)
                self.assertAlmostEqual(numbers["elbo"], elbo, delta=0.1)
                for cell in re.findall(r"-?[\d.]+ \+- [\d.]+", row):
                    self.assertTrue(f"| {cell} |" in readme, cell)

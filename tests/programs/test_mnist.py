"""Programs on MNIST itself, if ../shared/data or ../data has it: `python -m unittest tests/programs/test_mnist.py`."""

import os
import shutil
import unittest

from tests.helpers import MNIST_DIR, NO_MNIST, NO_NETWORK, CommandTest


@unittest.skipUnless(MNIST_DIR, NO_MNIST)
class TestMNIST(CommandTest):
    def test_bmnist_prints_the_splits(self):
        code, stdout, stderr = self.run_command("bmnist.py", "--data_dir", MNIST_DIR, **NO_NETWORK)
        self.assertEqual((code, stderr), (0, ""))
        self.assertEqual(
            stdout.splitlines()[1:],
            [
                "train       45,000 images  ink 13.26%",
                "validation   5,000 images  ink 13.23%",
                "test        10,000 images  ink 13.42%",
            ],
        )

    def test_damaged_files_are_errors_of_one_line(self):
        data = self.folder / "data"
        raw = data / "MNIST" / "raw"
        shutil.copytree(MNIST_DIR / "MNIST" / "raw", raw)
        raw.chmod(0o755)
        for path in raw.iterdir():
            path.chmod(0o644)
        with open(raw / "train-images-idx3-ubyte", "r+b") as file:
            file.truncate(20_000_000)
        self.assert_one_line(
            self.run_forked("train_pl.py", "--data_dir", data, "--log_dir", "logs"),
            *(1, raw / "train-images-idx3-ubyte", "truncated"),
        )
        shutil.copy(MNIST_DIR / "MNIST" / "raw" / "train-images-idx3-ubyte", raw / "train-images-idx3-ubyte")
        for train, test in [
            ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
            ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
        ]:
            os.rename(raw / train, raw / "spare")
            os.rename(raw / test, raw / train)
            os.rename(raw / "spare", raw / test)
        self.assert_one_line(self.run_forked("bmnist.py", "--data_dir", data), 1, "swapped", "train-images-idx3-ubyte")
        self.assertFalse((self.folder / "logs").exists())

    def test_the_mlp_reaches_its_bpd(self):
        _, results = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--epochs", "2")
        self.assertEqual(results["dataset"], "mnist")
        self.assertTrue(1.0 < results["first_step_bpd"] < 1.1)
        self.assertLess(results["final_train_bpd"], 0.21)  # 0.206 after 2 epochs, 0.146 after 80
        self.assertLess(results["test_bpd"], 0.195)

    def test_the_cnn_reaches_its_bpd(self):
        _, results = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--model", "CNN", "--epochs", "1")
        self.assertTrue(0.99 < results["first_step_bpd"] < 1.1)
        self.assertLess(results["test_bpd"], 0.32)

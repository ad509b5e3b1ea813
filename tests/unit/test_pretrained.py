"""Tests of pretrained/: `python -m unittest tests/unit/test_pretrained.py`."""

import os
import re
import unittest

import torch

from bmnist import data_loaders
from harness.checkpoints import read_checkpoint
from sources.rendered_digits import rendered_mnist
from tests.helpers import REPOSITORY, SeededTest
from train_pl import VAE

FOLDER = REPOSITORY / "pretrained"
PARTS = ["epoch", "global_step", "hyper_parameters", "pytorch-lightning_version", "run", "state_dict"]


class TestPretrained(SeededTest):
    def test_the_three_files_are_smaller_than_9_megabytes_together(self):
        files = sorted(FOLDER.glob("*.ckpt"))
        self.assertEqual([file.name for file in files], ["cnn_20.ckpt", "mlp_2.ckpt", "mlp_20.ckpt"])
        self.assertLess(sum(file.stat().st_size for file in files), 9e6)

    def test_each_file_contains_only_weights_and_hyperparameters(self):
        for file in FOLDER.glob("*.ckpt"):
            with self.subTest(file.name):
                checkpoint = read_checkpoint(file)
                self.assertEqual(sorted(checkpoint), PARTS)
                self.assertEqual([*checkpoint["run"]], ["flags"])
                self.assertNotIn("/", str(checkpoint["run"]) + str(checkpoint["hyper_parameters"]))
                rows = re.findall(rf"^\| `{file.name}` \| .*? \| (\d+) \|", (FOLDER / "README.md").read_text(), re.M)
                self.assertEqual(rows, [str(checkpoint["epoch"] + 1)])

    def test_the_python_code_of_the_page_converts_a_checkpoint_to_such_a_file(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        os.symlink(FOLDER, "pretrained")
        path = self.folder / "VAE_logs" / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        checkpoint = read_checkpoint(FOLDER / "mlp_2.ckpt")
        checkpoint["run"]["flags"].update(log_dir="/mine", data_dir="/mine")
        torch.save({**checkpoint, "optimizer_states": [1], "loops": {}}, path)
        for block in re.findall(
            r"^```python\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE
        ):
            exec(block, {})
        made, expected = read_checkpoint("weights.ckpt"), read_checkpoint(FOLDER / "mlp_2.ckpt")
        self.assertEqual((sorted(made), made["run"]), (PARTS, expected["run"]))
        torch.testing.assert_close(made["state_dict"], expected["state_dict"], rtol=0, atol=0)

    def test_each_file_is_a_trained_model(self):
        digits = rendered_mnist(1, 200)
        test_loader = data_loaders(*digits, train_size=None, num_val=0, batch_size=200)[2]
        imgs, labels = next(iter(test_loader))
        for name, z_dim, bpd in [("mlp_2", 2, 0.40), ("mlp_20", 20, 0.22), ("cnn_20", 20, 0.20)]:
            with self.subTest(name), torch.no_grad():
                model = VAE.load_from_checkpoint(FOLDER / f"{name}.ckpt").eval()
                self.assertEqual(model.hparams.z_dim, z_dim)
                self.assertLess(model(imgs)[2].item(), bpd)  # an untrained model has 1.0


if __name__ == "__main__":
    unittest.main()

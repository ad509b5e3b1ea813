"""Tests of `python evaluate.py` as users run it: `python -m unittest tests/programs/test_evaluate.py`."""

import json
import unittest

from tests.helpers import MNIST_DIR, NO_MNIST, CommandTest


class TestCommand(CommandTest):
    def test_an_evaluation_prints_its_results(self):
        """If a flag or a file is invalid, evaluate.py prints one line and writes no file."""
        run, trained = self.train(
            *("--hidden_dims", "16", "--binarization", "stochastic", "--train_size", "55000"),
            *("--lr_schedule", "cosine", "--data_dir", "nowhere"),
        )
        checkpoint = run / "checkpoints" / "best.ckpt"
        code, stdout, stderr = self.run_command("evaluate.py", checkpoint, "--iw_samples", "2", "--progress_bar")
        self.assertEqual((code, stderr), (0, ""))  # only terminals have a progress bar
        results = json.loads((run / "evaluation" / "evaluation.json").read_text())
        self.assertRegex(stdout, r"MLP, 20 latents, after 1 epoch, on 10,000 test images of rendered \(stochastic\)")
        self.assertRegex(stdout, rf"test bpd +{results['test_bpd']:.4f} \+- 0\.000\d\n")
        self.assertRegex(stdout, rf"log p\(x\) +{results['log_likelihood']:.2f} \+- 0\.\d\d nats, importance-weighted")
        self.assertRegex(stdout, r"active units +\d+ of 20\n")
        self.assertAlmostEqual(results["test_bpd"], trained["test_bpd"], delta=0.002)

        before = sorted(self.folder.rglob("*"))
        wrong = self.folder / "logs" / "wrong.ckpt"
        for flags, code, *parts in [
            ([wrong], 1, wrong, "No such file"),
            ([checkpoint, "--iw_samples", "0"], 2, "--iw_samples"),
            ([checkpoint, "--dataset", "mnist"], 1, "MNIST"),
            ([checkpoint, "--out", run / "results.json"], 1, "results.json (File exists): choose", "--out"),
            ([], 2, "checkpoint"),
        ]:
            self.assert_one_line(self.run_forked("evaluate.py", *flags), code, *parts)
        self.assertEqual(sorted(self.folder.rglob("*")), before)

    @unittest.skipUnless(MNIST_DIR, NO_MNIST)
    def test_mnist_is_read_from_the_data_folder_of_the_training(self):
        run, trained = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--hidden_dims", "16")
        code, stdout, stderr = self.run_forked("evaluate.py", run / "checkpoints" / "best.ckpt", "--iw_samples", "2")
        self.assertEqual((code, stderr), (0, ""))
        results = json.loads((run / "evaluation" / "evaluation.json").read_text())
        self.assertAlmostEqual(results["test_bpd"], trained["test_bpd"], delta=0.002)
        self.assertEqual((results["dataset"], results["binarization"]), ("mnist", "threshold"))

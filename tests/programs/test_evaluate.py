"""`python evaluate.py` as a user runs it: `python -m unittest tests/programs/test_evaluate.py`."""

import functools
import json
import os
import unittest

import numpy as np
import torch

from tests.helpers import MNIST_DIR, NO_MNIST, CommandTest, Forked, use_few_digits
from train_pl import VAE


class TestCommand(CommandTest):
    def test_an_evaluation_prints_its_results(self):
        """Errors are a line each, and leave nothing behind."""
        run, trained = self.train(
            *("--hidden_dims", "16", "--binarization", "stochastic", "--train_size", "55000"),
            *("--lr_schedule", "cosine", "--data_dir", "nowhere"),
        )
        checkpoint = run / "checkpoints" / "best.ckpt"
        code, stdout, stderr = self.run_command("evaluate.py", checkpoint, "--iw_samples", "2", "--progress_bar")
        self.assertEqual((code, stderr), (0, ""))  # a progress bar is for terminals
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
            ([run / "results.json"], 1, "no checkpoint"),
            ([checkpoint, "--out", run / "results.json"], 1, "results.json (File exists): choose", "--out"),
            ([], 2, "checkpoint"),
        ]:
            self.assert_one_line(self.run_forked("evaluate.py", *flags), code, *parts)
        self.assertEqual(sorted(self.folder.rglob("*")), before)

    def test_a_checkpoint_of_the_assignment_template_is_evaluated(self):
        """ModelCheckpoint(save_weights_only=True) writes it, in the folders that Lightning makes."""
        run = self.folder / "lightning_logs" / "version_0"
        (run / "checkpoints").mkdir(parents=True)
        (run / "hparams.yaml").touch()
        model = VAE("MLP", [16], 32, 3, lr=np.float64(1e-3))
        content = {"epoch": 4, "global_step": 5, "pytorch-lightning_version": "2.0.0", "state_dict": model.state_dict()}
        torch.save({**content, "hyper_parameters": dict(model.hparams)}, run / "checkpoints" / "epoch=4.ckpt")
        flags = ["epoch=4.ckpt", "--iw_samples", "2"]
        setup = functools.partial(use_few_digits, sizes=(300, 100, 200))
        for more, code in [([], 2), (["--dataset", "rendered"], 0)]:
            process = Forked("evaluate.py", *flags, *more, cwd=run / "checkpoints", setup=setup)
            stdout, stderr = process.communicate()
            self.assertEqual((process.returncode, stderr == ""), (code, code == 0), stderr)
            if code:
                self.assertRegex(stderr, r"^evaluate.py: error: epoch=4.ckpt does not say .* give --dataset .*\n$")
                self.assertFalse((run / "evaluation").exists())
        self.assertIn("after 5 epochs", stdout)
        self.assertTrue((run / "evaluation" / "evaluation.json").exists())
        self.assertEqual([path.name for path in (run / "checkpoints").iterdir()], ["epoch=4.ckpt"])

    def test_a_malicious_checkpoint_is_refused(self):
        made = self.folder / "made"

        class Exploit:
            def __reduce__(self):
                return os.mkdir, (str(made),)

        checkpoint = {"epoch": 1, "state_dict": Exploit(), "hyper_parameters": {}, "callbacks": {}}
        torch.save(checkpoint, self.folder / "bad.ckpt")
        self.assert_one_line(self.run_forked("evaluate.py", self.folder / "bad.ckpt"), 1, "bad.ckpt is refused")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["bad.ckpt"])

    @unittest.skipUnless(MNIST_DIR, NO_MNIST)
    def test_mnist_is_taken_from_where_the_training_had_it(self):
        run, trained = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, "--hidden_dims", "16")
        code, stdout, stderr = self.run_forked("evaluate.py", run / "checkpoints" / "best.ckpt", "--iw_samples", "2")
        self.assertEqual((code, stderr), (0, ""))
        results = json.loads((run / "evaluation" / "evaluation.json").read_text())
        self.assertAlmostEqual(results["test_bpd"], trained["test_bpd"], delta=0.002)
        self.assertEqual((results["dataset"], results["binarization"]), ("mnist", "threshold"))

"""Tests of `python train_torch.py` as users run it: `python -m unittest tests/programs/test_train_torch.py`."""

import signal
import unittest

from tests.helpers import MNIST_DIR, NO_MNIST, NO_NETWORK, REPOSITORY, CommandTest

SMALL = ["--hidden_dims", "16", "--epochs", "1", "--log_dir", "logs"]


class TestCommand(CommandTest):
    def train_torch(self, *flags):
        """Trains. Returns the run's folder and the test bpd."""
        code, stdout, stderr = self.run_command("train_torch.py", *SMALL, *flags)
        self.assertEqual((code, stderr), (0, ""))
        test_line, folder_line = stdout.splitlines()[-2:]
        return self.folder / folder_line.removeprefix("run folder "), float(test_line.removeprefix("test bpd "))

    def test_a_run_is_trained_and_evaluated(self):
        run, test_bpd = self.train_torch("--dataset", "rendered")
        flags = [run / "checkpoints" / "epoch.pt", "--dataset", "rendered", "--iw_samples", "1"]
        without_sizes = self.run_forked("evaluate.py", *flags)
        self.assert_one_line(without_sizes, 1, "size mismatch", "give the --model", "--hidden_dims")
        code, stdout, stderr = self.run_forked("evaluate.py", *flags, "--hidden_dims", "16")
        self.assertEqual((code, stderr), (0, ""))
        (line,) = (line for line in stdout.splitlines() if line.startswith("test bpd"))
        self.assertAlmostEqual(float(line.split()[2]), test_bpd, delta=0.002)
        self.assertTrue((run / "evaluation" / "evaluation.json").exists())

    @unittest.skipUnless(MNIST_DIR, NO_MNIST)
    def test_an_epoch_on_mnist_reaches_about_the_same_bpd_as_train_pl(self):
        """The bpds are not equal, because the order of the images differs."""
        _, test_bpd = self.train_torch("--data_dir", MNIST_DIR)
        _, results = self.train("--dataset", "mnist", "--data_dir", MNIST_DIR, *SMALL)
        self.assertAlmostEqual(test_bpd, results["test_bpd"], delta=0.01)

    def test_an_invalid_flag_or_missing_data_ends_the_command_with_one_line(self):
        for flags, code, *parts in [
            (["--epochs", "0"], 1, "--epochs must be a finite number above 0, got 0"),
            (["--model", "RNN"], 2, "--model"),
            (["--data_dir", "nowhere"], 1, "nowhere", "missing"),
        ]:
            self.assert_one_line(self.run_command("train_torch.py", *flags, **NO_NETWORK), code, *parts)

    def test_a_signal_ends_the_command_with_a_nonzero_exit_code(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        self.addCleanup(signal.signal, signal.SIGINT, before)
        for number, expected in [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)]:
            process = self.start(REPOSITORY / "train_torch.py", "--dataset", "rendered", "--epochs", "10000")
            self.assertTrue(process.stdout.readline().startswith("epoch   1/"))
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
            self.assertEqual(process.returncode, expected)
            self.assertEqual(stderr, "" if expected < 0 else "train_torch.py: error: interrupted\n")

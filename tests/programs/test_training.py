"""Tests of `python train_pl.py` as users run it: `python -m unittest tests/programs/test_training.py`."""

import fcntl
import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path

from sources.mnist_files import FILES
from tests.helpers import NO_NETWORK, REPOSITORY, CommandTest, few_digits, hold, load, metrics, use_few_digits
from train_pl import VAE

ENDLESS = ["--dataset", "rendered", "--hidden_dims", "64", "--epochs", "10000"]  # a run that must be stopped


def take_terminal():
    """Makes stdin the controlling terminal of this process, so that Ctrl-C in it interrupts the process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which background jobs of a shell ignore


class TestTraining(CommandTest):
    def until_second_epoch(self, process):
        """Reads the output of a run up to the line of its second epoch."""
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                return

    def test_an_epoch_on_rendered_digits_reaches_half_a_bit_per_pixel(self):
        flags = ["--dataset", "rendered", "--epochs", "1", "--log_dir", "logs"]
        code, stdout, stderr = self.run_command("train_pl.py", *flags)
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("rendered, 45,000 training images", stdout.splitlines()[0])
        self.assertEqual(stdout.splitlines()[-1], "run folder logs/lightning_logs/version_0")
        results = json.loads((self.folder / "logs/lightning_logs/version_0/results.json").read_text())
        self.assertEqual(results["dataset"], "rendered")
        self.assertLess(results["test_bpd"], 0.5)
        self.assertEqual(os.listdir(self.folder), ["logs"])

    def test_two_processes_reach_the_bpd_of_one(self):
        sizes = (2000, 500, 1000)
        ways = {
            "1": dict(setup=functools.partial(use_few_digits, sizes)),
            "2": dict(run=self.run_command, **few_digits(self.folder, sizes)),
        }
        for seed, wish in [("1", ""), ("2", "--beta 2 --beta_warmup 2"), ("3", "--objective iwae --train_samples 3")]:
            with self.subTest(wish):
                flags = ["--accelerator", "cpu", "--hidden_dims", "64", "--epochs", "3", "--seed", seed, *wish.split()]
                bpds = [self.train(*flags, "--devices", number, **way)[1]["test_bpd"] for number, way in ways.items()]
                self.assertAlmostEqual(*bpds, delta=0.001)

    def test_the_processes_of_a_users_own_script_disconnect_after_the_training(self):
        """If Gloo's threads still run at the end of Python, they sometimes abort it."""
        (self.folder / "script.py").write_text(
            "import argparse, torch, train_pl\n"
            "train_pl.train_vae(argparse.Namespace(dataset='rendered', epochs=1, accelerator='cpu', devices=2))\n"
            "print(f'connected: {torch.distributed.is_initialized()}\\n', end='')\n"  # in a single write
        )
        process = self.start("script.py", **few_digits(self.folder))
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ""), stdout)
        self.assertEqual(re.findall("connected: .*", stdout), ["connected: False"] * 2, stdout)

    def test_ctrl_c_in_a_terminal_ends_a_run_in_a_line_and_leaves_usable_checkpoints(self):
        keyboard, terminal = pty.openpty()
        self.addCleanup(os.close, keyboard)
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / "train_pl.py", *ENDLESS],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(terminal)
        self.until_second_epoch(process)
        os.write(keyboard, b"\x03")
        stdout, stderr = process.communicate(timeout=120)
        self.assertEqual((process.returncode, stderr), (1, ""))
        epoch, folder = re.search(r"Interrupted in epoch (\d+). (.*) stays usable", stdout).groups()
        VAE.load_from_checkpoint(self.folder / folder / "checkpoints" / "best.ckpt").sample(2)
        self.assertIn(load(self.folder / folder, "last")["epoch"] + 1, [int(epoch) - 1, int(epoch)])
        self.assertIn(len(metrics(self.folder / folder)), [int(epoch), int(epoch) + 1])  # the first is epoch 0

    def test_sigterm_ends_a_run_of_one_or_two_processes_like_ctrl_c_with_exit_code_143(self):
        variables = few_digits(self.folder)
        for flags in [[], ["--devices", "2", "--accelerator", "cpu"]]:
            process = self.start(REPOSITORY / "train_pl.py", *ENDLESS, *flags, **variables)
            self.until_second_epoch(process)
            process.terminate()
            stdout, stderr = process.communicate(timeout=120)
            self.assertEqual((process.returncode, stderr), (143, ""))
            self.assertRegex(stdout, r"\nInterrupted in epoch \d+. .* stays usable.* The same command and --run_name")

    def test_a_disk_that_is_full_ends_a_run_in_a_line_and_the_same_command_resumes_it(self):
        flags = ["--dataset", "rendered", "--epochs", "2", "--hidden_dims", "64", "--run_name", "run"]
        for code, limit in [(1, 2**20), (0, -1)]:
            variables = few_digits(self.folder)
            with open(self.folder / "sitecustomize.py", "a") as file:
                file.write(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))\n")
            result = self.run_command("train_pl.py", *flags, **variables)
            if code:
                checkpoint = "VAE_logs/run/checkpoints/best.ckpt"
                self.assert_one_line(result, 1, f"error: cannot write {checkpoint} (File too large); make room and")
                self.assertEqual(list((self.folder / "VAE_logs").rglob("*.unfinished")), [])
        self.assertEqual((result[0], result[2]), (0, ""))

    def test_a_run_continues_if_its_output_is_closed_as_by_head(self):
        flags = ["--dataset", "rendered", "--epochs", "1", "--run_name", "run"]
        variables = few_digits(self.folder)
        hold(self.folder, epoch=0)
        process = self.start(REPOSITORY / "train_pl.py", *flags, **variables)
        process.stdout.readline()
        process.stdout.close()
        (self.folder / "go_on").touch()
        self.assertEqual(process.stderr.read().count("nothing more can be printed here (Broken pipe)"), 1)
        self.assertEqual((process.wait(120), process.stderr.close()), (0, None))
        self.assertTrue((self.folder / "VAE_logs" / "run" / "results.json").exists())

    def test_two_processes_of_a_users_own_trainer_log_the_mean_over_the_images_of_both(self):
        """Each sums its own losses, although Lightning's DDP shares the buffers of modules."""
        (self.folder / "script.py").write_text(
            "import pytorch_lightning as pl, torch\n"
            "from argparse import Namespace\n"
            "from train_pl import VAE, load_data, complete_flags\n"
            "torch.manual_seed(0)\n"
            "model = VAE('MLP', [16], 4, 3, 0.01)\n"
            "train_loader, *_ = load_data(complete_flags(Namespace(dataset='rendered', batch_size=50)))\n"
            "seen, step = [], model.training_step\n"
            "def training_step(batch, batch_idx):\n"
            "    output = step(batch, batch_idx)\n"
            "    seen.append(output['bpd'].item())\n"
            "    return output\n"
            "model.training_step = training_step\n"
            "options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)\n"
            "trainer = pl.Trainer(max_epochs=1, accelerator='cpu', devices=2, strategy='ddp', **options)\n"
            "trainer.fit(model, train_loader)\n"
            "logged = trainer.callback_metrics['train_bpd'].item()\n"
            "print(f'logged and seen: {logged} {sum(seen) / len(seen)}\\n', end='')\n"  # a single write
        )
        process = self.start("script.py", **few_digits(self.folder))
        stdout, stderr = process.communicate(timeout=600)
        lines = [line.split(": ")[1].split() for line in stdout.splitlines() if line.startswith("logged and seen")]
        self.assertEqual(len(lines), 2, (stdout, stderr))
        logged, seen = zip(*(map(float, line) for line in lines))
        self.assertAlmostEqual(logged[0], sum(seen) / 2, places=4)

    def test_tensorboard_shows_a_runs_curves_and_pictures(self):
        folder, results = self.train("--z_dim", "2", setup=use_few_digits)
        server = self.start("-m", "tensorboard.main", "--logdir", folder.parent, "--host", "127.0.0.1", "--port", "0")
        self.addCleanup(server.communicate)
        self.addCleanup(server.kill)

        found = next(filter(None, (re.search(r"http://127\S+", line) for line in server.stderr)), None)
        self.assertIsNotNone(found, "TensorBoard ended")

        def ask(plugin):
            with urllib.request.urlopen(f"{found[0]}data/plugin/{plugin}", timeout=60) as answer:
                return json.load(answer)

        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.1)
            if "test_bpd" in ask("scalars/tags").get("version_0", {}):
                break
        self.assertIn("val_bpd", ask("scalars/tags")["version_0"])
        self.assertEqual(set(ask("images/tags")["version_0"]), {"Samples", "Means", "Reconstructions", "Manifold"})
        curve = ask("scalars/scalars?tag=val_bpd&run=version_0")
        self.assertEqual([step for _, step, _ in curve], [0, 1])
        self.assertAlmostEqual(ask("scalars/scalars?tag=test_bpd&run=version_0")[0][2], results["test_bpd"], places=5)

    def test_an_invalid_flag_ends_the_command_in_a_line_with_exit_code_2(self):
        self.assert_one_line(self.run_command("train_pl.py", "--z_dim", "0", "--log_dir", "logs"), 2, "--z_dim")
        self.assertEqual(os.listdir(self.folder), [])

    def test_without_data_the_command_names_the_missing_files_and_the_stand_in(self):
        result = self.run_forked("train_pl.py", "--data_dir", "data", "--log_dir", "logs", **NO_NETWORK)
        self.assert_one_line(result, 1, Path("data/MNIST/raw"), *FILES, "refused", "--dataset rendered")
        self.assertFalse((self.folder / "logs").exists())

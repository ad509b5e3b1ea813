"""What `python train_pl.py` does for a user: `python -m unittest tests/programs/test_training.py`."""

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
import unittest
import urllib.request
from pathlib import Path

import torch

import bmnist
from tests.helpers import NO_NETWORK, REPOSITORY, CommandTest, few_digits, hold, load, metrics, use_few_digits
from train_pl import VAE

ENDLESS = ["--dataset", "rendered", "--hidden_dims", "64", "--epochs", "10000"]  # a run that does not end by itself


def take_terminal():
    """Makes stdin the terminal of this process, whose Ctrl-C it gets."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what is in its background without it


class TestTraining(CommandTest):
    def test_one_epoch_on_rendered_digits(self):
        code, stdout, stderr = self.run_command(
            *("train_pl.py", "--dataset", "rendered", "--epochs", "1", "--log_dir", "logs")
        )
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("rendered, 45,000 training images", stdout.splitlines()[0])
        self.assertEqual(stdout.splitlines()[-1], "run folder logs/lightning_logs/version_0")
        results = json.loads((self.folder / "logs/lightning_logs/version_0/results.json").read_text())
        self.assertEqual(results["dataset"], "rendered")
        self.assertLess(results["test_bpd"], 0.5)
        self.assertEqual(os.listdir(self.folder), ["logs"])

    def test_same_weights_with_any_number_of_workers(self):
        setup = functools.partial(use_few_digits, (2000, 300, 300))
        weights = []
        for num_workers in ["0", "1", "2"]:
            folder, _ = self.train("--num_workers", num_workers, "--hidden_dims", "64", setup=setup)
            weights.append(load(folder, "last")["state_dict"].values())
        self.assertTrue(all(map(torch.equal, weights[0], weights[1])))
        self.assertTrue(all(map(torch.equal, weights[0], weights[2])))

    def test_two_processes_reach_the_bpd_of_one(self):
        sizes = (5000, 500, 1000)
        ways = {
            "1": dict(setup=functools.partial(use_few_digits, sizes)),
            "2": dict(run=self.run_command, **few_digits(self.folder, sizes)),
        }
        for seed, wish in [("1", ""), ("2", "--beta 2 --beta_warmup 3"), ("3", "--objective iwae --train_samples 3")]:
            flags = ["--accelerator", "cpu", "--hidden_dims", "64", "--epochs", "8", "--seed", seed, *wish.split()]
            bpds = [self.train(*flags, "--devices", devices, **way)[1]["test_bpd"] for devices, way in ways.items()]
            self.assertAlmostEqual(*bpds, delta=0.001)

    def test_processes_disconnect(self):
        """From a script of one's own. Gloo's threads, where they still run, at times abort the end of Python."""
        (self.folder / "script.py").write_text(
            "import argparse, torch, train_pl\n"
            "train_pl.train_vae(argparse.Namespace(dataset='rendered', epochs=1, accelerator='cpu', devices=2))\n"
            "print(f'connected: {torch.distributed.is_initialized()}\\n', end='')\n"  # in one piece, even if unbuffered
        )
        process = self.start("script.py", **few_digits(self.folder))
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ""), stdout)
        self.assertEqual(re.findall("connected: .*", stdout), ["connected: False"] * 2, stdout)

    def test_interrupt(self):
        """Ctrl-C in a terminal, which sends SIGINT."""
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
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                os.write(keyboard, b"\x03")
                break
        stdout, stderr = process.communicate(timeout=120)
        self.assertEqual((process.returncode, stderr), (1, ""))
        epoch, folder = re.search(r"Interrupted in epoch (\d+). (.*) stays usable", stdout).groups()
        VAE.load_from_checkpoint(self.folder / folder / "checkpoints" / "best.ckpt").sample(2)
        self.assertIn(load(self.folder / folder, "last")["epoch"] + 1, [int(epoch) - 1, int(epoch)])
        self.assertIn(len(metrics(self.folder / folder)), [int(epoch), int(epoch) + 1])  # the first is epoch 0

    def test_terminate(self):
        """kill sends SIGTERM: the same words as for Ctrl-C, and the exit code that a shell expects."""
        variables = few_digits(self.folder)
        process = self.start(REPOSITORY / "train_pl.py", *ENDLESS, **variables)
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.terminate()
                break
        stdout, stderr = process.communicate(timeout=120)
        self.assertEqual((process.returncode, stderr), (143, ""))
        self.assertRegex(stdout, r"Interrupted in epoch \d+. .* stays usable.* The same command and --run_name")
        process = self.start(
            REPOSITORY / "train_pl.py", *ENDLESS, "--devices", "2", "--accelerator", "cpu", **variables
        )
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.terminate()
                break
        stdout, stderr = process.communicate(timeout=120)
        self.assertEqual((process.returncode, stderr), (143, ""))
        self.assertRegex(stdout, r"\nInterrupted in epoch \d")

    def test_no_room_for_a_checkpoint(self):
        """As over quota: one line, and with room again the same command goes on."""
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
            else:
                self.assertEqual((result[0], result[2]), (0, ""))

    def test_a_pipe_that_is_closed(self):
        """As by `train_pl.py | head -1`: the run goes on without its lines."""
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

    def test_own_trainer_with_two_processes(self):
        """Each keeps the sums of its own losses, although Lightning's DDP shares the buffers of modules."""
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
            "print(f'logged and seen: {logged} {sum(seen) / len(seen)}\\n', end='')\n"  # in one piece
        )
        process = self.start("script.py", **few_digits(self.folder))
        stdout, stderr = process.communicate(timeout=600)
        lines = [line.split(": ")[1].split() for line in stdout.splitlines() if line.startswith("logged and seen")]
        self.assertEqual(len(lines), 2, (stdout, stderr))
        logged, seen = zip(*(map(float, line) for line in lines))
        self.assertAlmostEqual(logged[0], sum(seen) / 2, places=4)

    def test_tensorboard_shows_the_run(self):
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

    def test_bad_flags(self):
        for run, flags, code, part in [
            (self.run_command, ["--z_dim", "0", "--log_dir", "logs"], 2, "--z_dim"),
            (self.run_forked, ["--no_such_flag", "--log_dir", "logs"], 2, "no_such_flag"),
            (self.run_forked, ["--dataset", "rendered", "--log_dir", "file"], 1, "file"),
        ]:
            (self.folder / "file").touch()
            self.assert_one_line(run("train_pl.py", *flags), code, part)
        self.assertEqual(os.listdir(self.folder), ["file"])

    def test_no_data(self):
        result = self.run_forked("train_pl.py", "--data_dir", "data", "--log_dir", "logs", **NO_NETWORK)
        self.assert_one_line(result, 1, Path("data/MNIST/raw"), *bmnist.FILES, "refused", "--dataset rendered")
        self.assertFalse((self.folder / "logs").exists())


if __name__ == "__main__":
    unittest.main()

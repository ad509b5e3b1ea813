"""Tests of `python train_pl.py` as users run it: `python -m unittest tests/programs/test_training.py`."""

import functools
import json
import os
import re
import signal
from pathlib import Path

from sources.mnist_files import FILES
from tests.helpers import (
    NO_NETWORK,
    REPOSITORY,
    CommandTest,
    few_digits,
    load,
    metrics,
    pause_after_epoch,
    use_few_digits,
)
from train_pl import VAE

ENDLESS = ["--dataset", "rendered", "--hidden_dims", "64", "--epochs", "10000"]  # a run that must be stopped


class TestTraining(CommandTest):
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

    def test_two_processes_reach_the_bpd_of_one_process(self):
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

    def test_the_processes_of_a_users_own_script_disconnect_after_the_training_and_one_of_them_warns(self):
        """If the threads of Gloo still run when Python ends, they sometimes abort Python."""
        (self.folder / "script.py").write_text(
            "import argparse, torch, train_pl, warnings\n"
            "step = train_pl.VAE.validation_step\n"
            "train_pl.VAE.validation_step = lambda *args: [warnings.warn('of a library'), step(*args)][1]\n"
            "flags = dict(dataset='rendered', epochs=1, accelerator='cpu', devices=2, remark='of the user')\n"
            "train_pl.train_vae(argparse.Namespace(**flags))\n"
            "print(f'connected: {torch.distributed.is_initialized()}\\n', end='')\n"  # in a single write
        )
        process = self.start("script.py", **few_digits(self.folder))
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual(process.returncode, 0, stderr)
        warned = [line for line in stderr.splitlines() if "warning:" in line.lower()]
        self.assertRegex("|".join(warned), "^[^|]*ignored unknown flags: remark[|][^|]*UserWarning: of a library$")
        self.assertEqual(re.findall("connected: .*", stdout), ["connected: False"] * 2, stdout)

    def test_ctrl_c_and_sigterm_end_a_run_of_one_or_two_processes_with_one_line_and_usable_checkpoints(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        self.addCleanup(signal.signal, signal.SIGINT, before)
        flags, variables = ["--dataset", "rendered", "--hidden_dims", "64", "--epochs", "9999"], few_digits(self.folder)
        for number, code, more in [
            (signal.SIGINT, 1, []),
            (signal.SIGTERM, 143, []),
            (signal.SIGTERM, 143, ["--devices", "2", "--accelerator", "cpu"]),
        ]:
            process = self.start(REPOSITORY / "train_pl.py", *flags, *more, **variables)
            for line in process.stdout:
                if line.startswith("epoch   2/"):
                    break
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=120)
            self.assertEqual((process.returncode, stderr), (code, ""))
            message = (
                r"\nnote: interrupted in epoch (\d+). (.*) contains the metrics.* give the same command with --run_name"
            )
            epoch, folder = int(re.search(message, stdout)[1]), self.folder / re.search(message, stdout)[2]
            VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt").sample(2)
            self.assertIn(load(folder, "last")["epoch"] + 1, [epoch - 1, epoch])
            self.assertIn(len(metrics(folder)), [epoch, epoch + 1])  # the first row is of epoch 0

    def test_a_full_disk_ends_a_run_with_one_line_and_the_same_command_resumes_the_run(self):
        flags = ["--dataset", "rendered", "--epochs", "2", "--hidden_dims", "64", "--run_name", "run"]
        for code, limit in [(1, 2**20), (0, -1)]:
            variables = few_digits(self.folder)
            with open(self.folder / "sitecustomize.py", "a") as file:
                file.write(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))\n")
            result = self.run_command("train_pl.py", *flags, **variables)
            if code:
                checkpoint = "VAE_logs/run/checkpoints/best.ckpt"
                self.assert_one_line(result, 1, f"error: cannot write {checkpoint} (File too large); free disk space")
                self.assertEqual(list((self.folder / "VAE_logs").rglob("*.unfinished")), [])
        self.assertEqual((result[0], result[2]), (0, ""))

    def test_a_run_continues_if_the_pipe_of_its_output_is_closed(self):
        flags = ["--dataset", "rendered", "--epochs", "1", "--run_name", "run"]
        variables = few_digits(self.folder)
        pause_after_epoch(self.folder, epoch=0)
        process = self.start(REPOSITORY / "train_pl.py", *flags, **variables)
        process.stdout.readline()
        process.stdout.close()
        (self.folder / "go_on").touch()
        self.assertEqual(process.stderr.read().count("the output cannot be printed any more (Broken pipe)"), 1)
        self.assertEqual((process.wait(120), process.stderr.close()), (0, None))
        self.assertTrue((self.folder / "VAE_logs" / "run" / "results.json").exists())

    def test_two_processes_of_a_users_own_trainer_log_the_mean_over_the_images_of_both(self):
        """Each process sums only its own losses, although Lightning's DDP shares the buffers of modules."""
        (self.folder / "script.py").write_text(
            "import pytorch_lightning as pl\n"
            "from argparse import Namespace\n"
            "from train_pl import VAE, load_data, complete_flags\n"
            "VAE.quantities = lambda model, terms, imgs: {'bpd': terms.L_rec, 'rank': 1.0 + model.global_rank}\n"
            "train_loader, *_ = load_data(complete_flags(Namespace(dataset='rendered')))\n"
            "options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)\n"
            "trainer = pl.Trainer(max_epochs=1, accelerator='cpu', devices=2, strategy='ddp', **options)\n"
            "trainer.fit(VAE('MLP', [16], 4, 3, 0.01), train_loader)\n"
            "print(f'mean of 1 and 2: {trainer.callback_metrics[\"train_rank\"]}\\n', end='')\n"  # a single write
        )
        stdout, stderr = self.start("script.py", **few_digits(self.folder)).communicate(timeout=600)
        self.assertEqual(re.findall("mean of 1 and 2: .*", stdout), ["mean of 1 and 2: 1.5"] * 2, (stdout, stderr))

    def test_without_data_the_command_names_the_missing_files_and_the_flag_for_rendered_digits(self):
        result = self.run_forked("train_pl.py", "--data_dir", "data", "--log_dir", "logs", **NO_NETWORK)
        self.assert_one_line(result, 1, Path("data/MNIST/raw"), *FILES, "refused", "--dataset rendered")
        self.assertFalse((self.folder / "logs").exists())

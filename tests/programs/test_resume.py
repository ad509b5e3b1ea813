"""Tests that killed runs resume as if nothing had happened: `python -m unittest tests/programs/test_resume.py`."""

import functools
import os
import random
import re
import select
import signal
import time
from statistics import median

from harness.checkpoints import LAST
from tests.helpers import (
    REPOSITORY,
    CommandTest,
    Forked,
    assert_left_the_same,
    few_digits,
    pause_after_epoch,
    use_few_digits,
)

KILLS = 20
SIZES = (2000, 200, 200)  # large enough that a kill may hit an epoch or the writing after it
FLAGS = ["--dataset", "rendered", "--run_name", "run"]


def wait_for_lines(process, text, number, seconds):
    """
    Reads the output of a run until it has `number` lines, not counting the line of epoch 0, or until the seconds are
    over. Returns `text`, the output that was read before, followed by the new output.
    """
    end = time.monotonic() + seconds
    while len(re.findall(r"^(?!epoch +0/).*\n", text, re.MULTILINE)) < number:
        if not select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            break
        new = os.read(process.stdout.fileno(), 65536).decode()
        if not new:
            break  # the process has ended
        text += new
    return text


class ResumeTest(CommandTest):
    @classmethod
    def setUpClass(cls):
        Forked(
            "train_pl.py", "--help", cwd=REPOSITORY
        ).communicate()  # only the first Forked process waits for the imports

    def start_run(self, where, *flags):
        """Starts a run on few digits in the folder `where`."""
        (self.folder / where).mkdir(exist_ok=True)
        return Forked(
            *("train_pl.py", *FLAGS, *flags), cwd=self.folder / where, setup=functools.partial(use_few_digits, SIZES)
        )

    def run_left(self, where):
        """Returns the folder of the run that start_run starts in the folder `where`."""
        return self.folder / where / "VAE_logs" / "run"

    def uninterrupted(self, *flags):
        """Trains to the end. Returns the seconds to the first line, from there to epoch 1's line, and per epoch."""
        start = time.monotonic()
        process = self.start_run("uninterrupted", *flags)
        moments = []
        for _ in process.stdout:
            moments.append(time.monotonic() - start)
        self.assertEqual((process.communicate()[1], process.returncode), ("", 0))
        return moments[0], moments[2] - moments[0], median(b - a for a, b in zip(moments[2:-3], moments[3:-2]))

    def kill_at_random(self, *flags):
        """
        Kills a run KILLS times at random moments, then lets it finish. A quarter of the moments is before the first
        line, a quarter before the line of the first epoch, and half within a later epoch, each spread evenly.
        """
        to_first_line, to_first_epoch, epoch = self.uninterrupted(*flags)
        seed = random.randrange(1000)
        moments = random.Random(seed)
        stages = [(0, to_first_line), (1, to_first_epoch), (2, epoch), (2, epoch)]
        attempts = [
            (lines, (part + moments.random()) / (KILLS // 4) * seconds)
            for lines, seconds in stages
            for part in range(KILLS // 4)
        ]
        moments.shuffle(attempts)
        print(f"\n{' '.join(flags)}: {KILLS} kills, seed {seed}, after epochs", end=" ", flush=True)
        reported = 0
        for lines, seconds in attempts:
            process = self.start_run("killed", *flags)
            text = wait_for_lines(process, "", lines, 120)
            # Kills at the next line at the latest: even on a fast machine, no attempt trains more than two epochs.
            text = wait_for_lines(process, text, lines + 1, seconds)
            process.kill()
            stdout, stderr = process.communicate()
            text += stdout
            self.assertNotIn("finished", text, "too few epochs for so many kills")
            self.assertEqual((stderr, process.returncode), ("", -signal.SIGKILL))
            if match := re.search(r"(resumed after epoch (\d+))?\n", text):
                resumed = int(match[2] or 0)
                # If writing is slower than training, an epoch's line comes before the checkpoint of the previous epoch.
                self.assertGreaterEqual(resumed, reported - 2)
                print(resumed, end=" ", flush=True)
            reported = max([reported, *map(int, re.findall(r"^epoch +(\d+)/", text, re.MULTILINE))])
        has_checkpoint = (self.run_left("killed") / "checkpoints" / LAST).exists()  # a slow disk may have none yet
        stdout, stderr = self.start_run("killed", *flags).communicate()
        self.assertEqual(stderr, "")
        if has_checkpoint:
            self.assertIn("resumed after epoch", stdout)
        assert_left_the_same(self, self.run_left("uninterrupted"), self.run_left("killed"))

    def test_an_mlp_killed_at_random_moments_ends_as_if_it_had_never_been_killed(self):
        self.kill_at_random("--epochs", "30", "--hidden_dims", "32", "--z_dim", "2")

    def test_a_cnn_killed_at_random_moments_ends_as_if_it_had_never_been_killed(self):
        self.kill_at_random("--epochs", "30", "--model", "CNN", "--num_filters", "1", "--batch_size", "500")

    def test_a_run_of_two_processes_resumes_after_rank_0_is_killed(self):
        """Rank 1 ends by itself, because it has lost rank 0."""
        words = [*FLAGS, "--accelerator", "cpu", "--devices", "2", "--epochs", "20", "--hidden_dims", "32"]
        variables = few_digits(self.folder)
        outputs = []
        for where, line in [("uninterrupted", None), ("killed", "epoch   2/20"), ("killed", None)]:
            if line:
                pause_after_epoch(self.folder, epoch=2)
            process = self.start(REPOSITORY / "train_pl.py", *words, "--log_dir", where, **variables)
            if line:
                next(text for text in process.stdout if text.startswith(line))
                process.kill()
                (self.folder / "go_on").touch()
            outputs.append(process.communicate(timeout=120))
        self.assertEqual([stderr for _, stderr in [outputs[0], outputs[2]]], ["", ""])
        self.assertIn("resumed after epoch", outputs[2][0])
        assert_left_the_same(self, self.folder / "uninterrupted" / "run", self.folder / "killed" / "run")

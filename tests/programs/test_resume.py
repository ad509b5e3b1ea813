"""
Runs that are killed and started again, against runs that never were: `python -m unittest
tests/programs/test_resume.py`.
"""

import functools
import os
import random
import re
import select
import signal
import time
import unittest
from collections import Counter
from statistics import median

from harness.checkpoints import LAST, read_checkpoint
from tests.helpers import (
    REPOSITORY,
    CommandTest,
    Forked,
    assert_left_the_same,
    few_digits,
    hold,
    metrics,
    use_few_digits,
)

KILLS = 20
SIZES = (2000, 200, 200)  # an epoch is long enough to be hit, and so is the writing after it
FLAGS = ["--dataset", "rendered", "--run_name", "run"]


def wait_for_lines(process, text, number, seconds):
    """
    Reads what a run prints until it is so many lines, but for that of epoch 0, for some seconds at most.
    Inputs:
        process - Its process; nobody else reads its stdout meanwhile.
        text - What it has printed so far.
    Outputs:
        text - The same with what has come since.
    """
    end = time.monotonic() + seconds
    while len(re.findall(r"^(?!epoch +0/).*\n", text, re.MULTILINE)) < number:
        if not select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            break
        new = os.read(process.stdout.fileno(), 65536).decode()
        if not new:
            break  # it has ended
        text += new
    return text


class ResumeTest(CommandTest):
    @classmethod
    def setUpClass(cls):
        Forked("train_pl.py", "--help", cwd=REPOSITORY).communicate()  # the first one waits for the imports

    def start_run(self, where, *flags):
        """A run on few digits in a folder of that name."""
        (self.folder / where).mkdir(exist_ok=True)
        return Forked(
            *("train_pl.py", *FLAGS, *flags), cwd=self.folder / where, setup=functools.partial(use_few_digits, SIZES)
        )

    def run_left(self, where):
        """What start_run makes there."""
        return self.folder / where / "VAE_logs" / "run"

    def undisturbed(self, *flags):
        """Lets a run end. Returns the seconds up to its first line, from there to its first epoch's, and per epoch."""
        start = time.monotonic()
        process = self.start_run("undisturbed", *flags)
        moments = []
        for _ in process.stdout:
            moments.append(time.monotonic() - start)
        self.assertEqual((process.communicate()[1], process.returncode), ("", 0))
        return moments[0], moments[2] - moments[0], median(b - a for a, b in zip(moments[2:-3], moments[3:-2]))

    def where_it_was(self, text):
        """What a process was doing when it was killed, as far as its output and its folder tell."""
        folder = self.run_left("killed")
        if "\n" not in text:
            return "before its first line"
        if list(folder.rglob("*.unfinished")):
            return "writing a file"
        try:
            epochs = read_checkpoint(folder / "checkpoints" / LAST)["epoch"] + 1
        except FileNotFoundError:
            return "before its first checkpoint"
        return "between report and checkpoint" if len(metrics(folder)) - 1 > epochs else "in an epoch"

    def kill_at_random(self, *flags):
        """
        Kills a run KILLS times at random moments, evenly spread over each of four stages of its life, and lets it end:
        before its first line, before its first epoch's, and, for half of them, within an epoch after that.
        """
        to_first_line, to_first_epoch, epoch = self.undisturbed(*flags)
        seed = random.randrange(1000)
        moments = random.Random(seed)
        stages = [(0, to_first_line), (1, to_first_epoch), (2, epoch), (2, epoch)]
        lives = [
            (lines, (part + moments.random()) / (KILLS // 4) * seconds)
            for lines, seconds in stages
            for part in range(KILLS // 4)
        ]
        moments.shuffle(lives)
        print(f"\n{' '.join(flags)}: {KILLS} kills, seed {seed}, after epochs", end=" ", flush=True)
        reported, places = 0, Counter()
        for lines, seconds in lives:
            process = self.start_run("killed", *flags)
            text = wait_for_lines(process, "", lines, 120)
            # Or at the next line: however fast the machine, no life takes the run further than two epochs.
            text = wait_for_lines(process, text, lines + 1, seconds)
            process.kill()
            stdout, stderr = process.communicate()
            text += stdout
            self.assertNotIn("finished", text, "too few epochs for so many kills")
            self.assertEqual((stderr, process.returncode), ("", -signal.SIGKILL))
            if match := re.search(r"(continued after epoch (\d+))?\n", text):
                continued = int(match[2] or 0)
                # Where writing takes longer than an epoch, its line comes before the checkpoint of the one before.
                self.assertGreaterEqual(continued, reported - 2)
                print(continued, end=" ", flush=True)
            reported = max([reported, *map(int, re.findall(r"^epoch +(\d+)/", text, re.MULTILINE))])
            places[self.where_it_was(text)] += 1
        print(*(f"{number} {place}" for place, number in places.most_common()), sep=", ")
        has_checkpoint = (self.run_left("killed") / "checkpoints" / LAST).exists()  # not on a slow disk
        stdout, stderr = self.start_run("killed", *flags).communicate()
        self.assertEqual(stderr, "")
        if has_checkpoint:
            self.assertIn("continued after epoch", stdout)
        assert_left_the_same(self, self.run_left("undisturbed"), self.run_left("killed"))

    def test_random_kills_mlp(self):
        self.kill_at_random("--epochs", "30", "--hidden_dims", "32", "--z_dim", "2")

    def test_random_kills_cnn(self):
        self.kill_at_random("--epochs", "30", "--model", "CNN", "--num_filters", "1", "--batch_size", "500")

    def test_two_processes(self):
        """Killed once; the second process ends by itself, since it has lost the first."""
        words = [*FLAGS, "--accelerator", "cpu", "--devices", "2", "--epochs", "20", "--hidden_dims", "32"]
        variables = few_digits(self.folder)
        outputs = []
        for where, line in [("undisturbed", None), ("killed", "epoch   2/20"), ("killed", None)]:
            if line:
                hold(self.folder, epoch=2)
            process = self.start(REPOSITORY / "train_pl.py", *words, "--log_dir", where, **variables)
            if line:
                next(text for text in process.stdout if text.startswith(line))
                process.kill()
                (self.folder / "go_on").touch()
            outputs.append(process.communicate(timeout=120))
        self.assertEqual([stderr for _, stderr in [outputs[0], outputs[2]]], ["", ""])
        self.assertIn("continued after epoch", outputs[2][0])
        assert_left_the_same(self, self.folder / "undisturbed" / "run", self.folder / "killed" / "run")


if __name__ == "__main__":
    unittest.main()

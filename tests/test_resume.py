"""
Runs that are killed and started again, against runs that never were: `python -m unittest tests/test_resume.py`, some
minutes.
"""
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from statistics import median

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from unittests import what_a_run_left  # noqa: E402

KILLS = 20


class ResumeTest(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def start(self, where, *flags):
        (self.folder / where).mkdir(exist_ok=True)
        command = [sys.executable, REPOSITORY / 'train_pl.py', '--dataset', 'rendered', '--run_name', 'run', *flags]
        return subprocess.Popen(command, cwd=self.folder / where, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def finish(self, where, *flags):
        stdout, stderr = self.start(where, *flags).communicate(timeout=600)
        self.assertEqual(stderr, '')
        return stdout

    def assert_same(self, where, other):
        left, other_left = (what_a_run_left(self.folder / name / 'VAE_logs' / 'run') for name in [where, other])
        self.assertEqual(left.keys(), other_left.keys())
        for name in left:
            if name in ['best', 'last']:
                torch.testing.assert_close(left[name], other_left[name], rtol=0, atol=0)
            else:
                self.assertEqual(left[name], other_left[name], name)

    def kill_at_random(self, *flags):
        """Kills a run KILLS times, each within one and a half epochs' time after its start, and lets it end."""
        stdout = self.finish('undisturbed', *flags)
        epoch_seconds = median(map(float, re.findall(r'([\d.]+) s$', stdout, re.MULTILINE)))
        seed = random.randrange(1000)
        moments = random.Random(seed)
        print(f'\n{" ".join(flags)}: {KILLS} kills, seed {seed}, after epochs', end=' ', flush=True)
        reported = 0
        for _ in range(KILLS):
            process = self.start('killed', *flags)
            first_line = process.stdout.readline()
            self.assertNotIn('finished', first_line, 'too few epochs for so many kills')
            continued = int((re.search(r'continued after epoch (\d+)', first_line) or [0, 0])[1])
            self.assertGreaterEqual(continued, reported - 1)
            print(continued, end=' ', flush=True)
            time.sleep(moments.uniform(0, 1.5 * epoch_seconds))
            process.kill()
            stdout, stderr = process.communicate()
            self.assertEqual(stderr, '')
            reported = max([reported, *map(int, re.findall(r'^epoch +(\d+)/', stdout, re.MULTILINE))])
        self.finish('killed', *flags)
        self.assert_same('undisturbed', 'killed')

    def test_random_kills_mlp(self):
        self.kill_at_random('--epochs', '30', '--hidden_dims', '32', '--z_dim', '2')

    def test_random_kills_cnn(self):
        self.kill_at_random('--epochs', '30', '--model', 'CNN', '--num_filters', '1', '--batch_size', '500')

    def test_two_processes(self):
        """Killed once; the second process ends by itself, since it has lost the first."""
        flags = ['--accelerator', 'cpu', '--devices', '2', '--epochs', '3', '--hidden_dims', '32']
        self.finish('undisturbed', *flags)
        process = self.start('killed', *flags)
        for line in process.stdout:
            if line.startswith('epoch   2/3'):
                process.kill()
                break
        process.communicate(timeout=120)
        self.assertIn('continued after epoch', self.finish('killed', *flags))
        self.assert_same('undisturbed', 'killed')


if __name__ == '__main__':
    unittest.main()

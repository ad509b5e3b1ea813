"""Tests of summary.py: `python -m unittest tests/unit/test_summary.py`."""

import contextlib
import io
import json
import subprocess
import sys
from unittest import mock

import summary
from tests.helpers import REPOSITORY, SeededTest


class TestSummary(SeededTest):
    def add_run(self, name, test_bpd=None, **flags):
        """The folder of a finished run, or without test_bpd of one that goes on."""
        (self.folder / name).mkdir(parents=True)
        (self.folder / name / "hparams.yaml").touch()
        if test_bpd:
            bpds = {"test_bpd": test_bpd, "best_val_bpd": test_bpd + 0.01}
            text = json.dumps({**bpds, "hyperparameters": {"lr": 0.001, **flags}})
            (self.folder / name / "results.json").write_text(text)

    def summary(self, *folders, plot="plot.png"):
        """The lines that the command prints."""
        words = ["summary.py", *map(str, folders), "--plot", str(self.folder / plot)]
        with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(io.StringIO()) as output:
            summary.main()
        return output.getvalue().splitlines()

    def test_table(self):
        for seed, bpd in [(1, 0.16), (2, 0.18)]:
            self.add_run(f"job_7_{seed}", bpd, z_dim=20, hidden_dims=[512], seed=seed, run_name=f"{seed}")
        self.add_run("a/job_7_3", 0.3, z_dim=3, hidden_dims=[64, 32], seed=1, run_name=None)
        self.add_run("job_7_4", None)
        lines = self.summary(self.folder)
        rows = [
            ["z_dim", "3,", "hidden_dims", "64", "32", "1", "0.3000", "0.3100"],
            ["z_dim", "20,", "hidden_dims", "512", "2", "0.1700", "+-", "0.0141", "0.1800", "+-", "0.0141"],
        ]
        self.assertEqual([line.split() for line in lines[1:3]], rows)
        self.assertEqual(lines[3], f"not finished: {self.folder / 'job_7_4'}")
        self.assertEqual(lines[4], f"plot {self.folder / 'plot.png'}")
        self.assertEqual((self.folder / "plot.png").read_bytes()[:4], b"\x89PNG")
        lines = self.summary(self.folder / "job_7_1", self.folder / "job_7_2", self.folder / "job_7_2")
        self.assertRegex(lines[1], "^all runs +2 ")  # a folder that was named twice counts once

    def test_nothing_to_sum_up(self):
        self.add_run("job_8", None)
        with self.assertRaises(SystemExit) as caught:
            self.summary(self.folder)
        self.assertRegex(caught.exception.code, "summary.py: error: there is no finished run in .*results.json")

    def test_plot_that_cannot_be_written(self):
        self.add_run("job_9", 0.1)
        with self.assertRaises(SystemExit) as caught:
            self.summary(self.folder, plot="no folder/plot.png")
        self.assertRegex(caught.exception.code, r"summary.py: error: cannot write .*plot.png \(No such.*--plot")

    def test_help_needs_no_library(self):
        """It is there at once: nothing is imported that takes seconds."""
        code = (
            "import atexit, runpy, sys; "
            "libraries = {'torch', 'pytorch_lightning', 'tensorboard', 'matplotlib', 'numpy'}; "
            "atexit.register(lambda: print('imported:', sorted(libraries & set(sys.modules)))); "
            "sys.argv[1:] = ['--help']; runpy.run_path('summary.py', run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertIn("--plot", run.stdout)
        self.assertEqual(run.stdout.splitlines()[-1], "imported: []")

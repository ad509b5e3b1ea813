"""Tests of summary.py: `python -m unittest tests/unit/test_summary.py`."""

import contextlib
import io
import json
import subprocess
import sys
from unittest import mock

import summary
from pictures import figures
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
        """The lines that the command prints; those on stderr are kept in `errors`, also where it fails."""
        words = ["summary.py", *map(str, folders), "--plot", str(self.folder / plot)]
        self.output, error = io.StringIO(), io.StringIO()
        try:
            with (
                mock.patch.object(sys, "argv", words),
                contextlib.redirect_stdout(self.output),
                contextlib.redirect_stderr(error),
            ):
                summary.main()
        finally:
            self.errors = error.getvalue().splitlines()
        return self.output.getvalue().splitlines()

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

    def test_files_of_ones_own(self):
        """By name and content; one that was renamed is the same, and torch is not needed to say what others are."""
        for name, bpd, flags in [
            ("a", 0.1, {"dataset": "/x/own.npz", "dataset_sha256": "a" * 64}),
            ("b", 0.3, {"dataset": "/y/renamed.npz", "dataset_sha256": "a" * 64}),
            ("c", 0.4, {"dataset": "/x/own.npz", "dataset_sha256": "c" * 64}),
            ("d", 0.5, {"dataset": "mnist"}),
        ]:
            self.add_run(name, bpd, **flags)
        with mock.patch.dict(sys.modules, train_pl=None):
            lines = self.summary(self.folder)
        self.assertRegex(lines[1], r"dataset mnist +1 +0\.5000")
        self.assertRegex(lines[2], r"dataset own\.npz \(aaaaaaaa\) +2 +0\.2000")
        self.assertRegex(lines[3], r"dataset own\.npz \(cccccccc\) +1 +0\.4000")

    def test_flags_of_newer_versions(self):
        """A run of an older version was trained with their defaults."""
        self.add_run("old", 0.2)
        self.add_run("new", 0.3, beta=1.0, objective="elbo")
        self.add_run("weighed", 0.4, beta=4.0, objective="elbo")
        lines = self.summary(self.folder)
        self.assertEqual(
            [line.split()[:4] for line in lines[1:3]],
            [["beta", n, m, b] for n, m, b in [("1.0", "2", "0.2500"), ("4.0", "1", "0.4000")]],
        )

    def test_nothing_to_sum_up(self):
        self.add_run("job_8", None)
        with self.assertRaises(SystemExit) as caught:
            self.summary(self.folder)
        self.assertRegex(caught.exception.code, "summary.py: error: there is no finished run in .*results.json")

    def test_the_same_run_twice(self):
        """By links, other spellings and links that lead back, each run counts once."""
        self.add_run("logs/a", 0.1, z_dim=2)
        self.add_run("elsewhere/b", 0.3, z_dim=2)
        for link, target in [
            ("logs/b", "../elsewhere/b"),
            ("logs/a again", "a"),
            ("logs/back", "../logs"),
            ("elsewhere/b/back", "../../logs"),
            ("logs/nowhere", "../nothing"),
            ("all", "logs"),
        ]:
            (self.folder / link).symlink_to(target)
        for folders in [["logs"], ["all"], ["all/", "logs/a", "logs/../logs"], ["elsewhere"], ["logs/back", "logs"]]:
            lines = self.summary(*(f"{self.folder}/{folder}" for folder in folders))
            self.assertEqual((lines[1].split()[:4], self.errors), (["all", "runs", "2", "0.2000"], []), folders)

    def test_damaged_results(self):
        self.add_run("good", 0.1, z_dim=2)
        self.add_run("worse", 0.3, z_dim=2)
        good = json.loads((self.folder / "good" / "results.json").read_text())
        damaged = self.folder / "worse" / "results.json"
        for left in [
            *(b"", b"\0" * 50, b'{"test_bpd": 0.1', b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null", b"{}"),
            *(json.dumps({**good, "test_bpd": bpd}).encode() for bpd in [None, "0.1", [0.1], True, float("nan")]),
            json.dumps({**good, "hyperparameters": None}).encode(),
            json.dumps({"score": 1}).encode(),
        ]:
            damaged.write_bytes(left)
            with mock.patch.object(figures, "bpd_by_setting"):
                self.assertRegex(self.summary(self.folder)[1], r"^all runs +1  0\.1000 ")
            self.assertEqual(len(self.errors), 1, left)
            self.assertRegex(self.errors[0], f"^{damaged} is left out: .")
        with self.assertRaises(SystemExit) as caught:
            self.summary(self.folder / "worse")
        self.assertRegex(caught.exception.code, "there is no finished run in .*worse")
        damaged.unlink()
        damaged.mkdir()
        self.assertRegex(self.summary(self.folder)[1], r"^all runs +1  0\.1000 ")
        self.assertEqual(len(self.errors), 1)

    def test_values_of_any_types(self):
        for number, value in enumerate([3, 0.5, None, "a", True, [3, "a"], [3, 4], {"b": 1}, {"a": 1}, [[]]]):
            self.add_run(f"{number}", 0.1, value=value)
        self.assertEqual(len(self.summary(self.folder)), 1 + 10 + 1)

    def test_folders_that_are_none(self):
        """A shell's * names files, too, which is no mistake; a name that is not there is one."""
        self.add_run("good", 0.1)
        (self.folder / "file").touch()
        self.summary(self.folder / "good", self.folder / "file")
        self.assertEqual(self.errors, [])
        self.summary(self.folder / "good", self.folder / "godo")
        self.assertRegex("".join(self.errors), "^.*godo is left out: No such file or directory$")

    def test_plot_that_cannot_be_written(self):
        """The table is printed all the same."""
        self.add_run("job_9", 0.1)
        (self.folder / "folder.png").mkdir()
        for plot, message in [("no folder/plot.png", "No such"), ("folder.png", "directory")]:
            with self.assertRaises(SystemExit) as caught:
                self.summary(self.folder, plot=plot)
            self.assertRegex(caught.exception.code, rf"^summary.py: error: no plot \(.*{plot}.*{message}.*--plot$")
            self.assertIn("all runs", self.output.getvalue())
        with (
            mock.patch.object(figures, "bpd_by_setting", side_effect=ValueError("odd\ntext")),
            self.assertRaises(SystemExit) as caught,
        ):
            self.summary(self.folder)
        self.assertRegex(caught.exception.code, r"^summary.py: error: no plot \(ValueError: odd text\): .*--plot$")
        left = {path.name for path in self.folder.iterdir()}
        self.assertEqual(left, {"job_9", "folder.png"})

    def test_plot_that_is_no_picture(self):
        """It is known before anything is read, and no file is overwritten that is none by its name."""
        self.add_run("job_9", 0.1)
        for name in ["runs.txt", "job_9/results.json", "plot", "png", "job_9", "", "a.png.bak"]:
            before = {path: path.is_file() and path.read_bytes() for path in self.folder.rglob("*")}
            with mock.patch.object(summary, "read_runs"), self.assertRaises(SystemExit) as caught:
                self.summary(self.folder, plot=name)
            self.assertEqual((caught.exception.code, len(self.errors)), (2, 1))
            self.assertRegex(self.errors[0], "--plot must be a file whose name ends with .png, .*, got ")
            self.assertEqual({path: path.is_file() and path.read_bytes() for path in self.folder.rglob("*")}, before)
        for name, start in [("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a.jpg", b"\xff\xd8")]:
            self.summary(self.folder, plot=name)
            self.assertTrue((self.folder / name).read_bytes().startswith(start), name)

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

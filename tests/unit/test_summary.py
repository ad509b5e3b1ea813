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
        """Makes the folder of a finished run, or of an unfinished run if test_bpd is None."""
        (self.folder / name).mkdir(parents=True)
        (self.folder / name / "hparams.yaml").touch()
        if test_bpd:
            bpds = {"test_bpd": test_bpd, "best_val_bpd": test_bpd + 0.01}
            text = json.dumps({**bpds, "hyperparameters": {"lr": 0.001, **flags}})
            (self.folder / name / "results.json").write_text(text)

    def summary(self, *folders, plot="plot.png"):
        """Returns the lines that the command prints. `errors` are the lines on stderr, even if the command fails."""
        words = ["summary.py", *(str(self.folder / name) for name in folders), "--plot", str(self.folder / plot)]
        self.output, error = io.StringIO(), io.StringIO()
        streams = contextlib.redirect_stdout(self.output), contextlib.redirect_stderr(error)
        try:
            with mock.patch.object(sys, "argv", words), streams[0], streams[1]:
                summary.main()
        finally:
            self.errors = error.getvalue().splitlines()
        return self.output.getvalue().splitlines()

    def assert_ends(self, message, *folders, **options):
        """Checks that the command fails with a message and exit code 1."""
        with self.assertRaises(SystemExit) as caught:
            self.summary(*folders, **options)
        self.assertRegex(caught.exception.code, f"^summary.py: error: {message}")

    def test_runs_that_differ_only_in_the_seed_are_one_row(self):
        for seed, bpd in [(1, 0.16), (2, 0.18)]:
            self.add_run(f"job_7_{seed}", bpd, z_dim=20, hidden_dims=[512], seed=seed, run_name=f"{seed}")
        self.add_run("a/job_7_3", 0.3, z_dim=3, hidden_dims=[64, 32], seed=1, run_name=None)
        self.add_run("job_7_4", None)
        lines = self.summary("")
        rows = [
            "z_dim 3, hidden_dims 64 32 1 0.3000 0.3100",
            "z_dim 20, hidden_dims 512 2 0.1700 +- 0.0141 0.1800 +- 0.0141",
            f"note: not finished: {self.folder / 'job_7_4'}",
            f"plot {self.folder / 'plot.png'}",
        ]
        self.assertEqual([" ".join(line.split()) for line in lines[1:]], rows)
        self.assertEqual((self.folder / "plot.png").read_bytes()[:4], b"\x89PNG")
        self.assertRegex(self.summary("job_7_1", "job_7_2", "job_7_2")[1], "^all runs +2 ")  # each folder counts once

    def test_your_own_files_are_distinguished_by_content_without_an_import_of_torch(self):
        for name, bpd, flags in [
            ("a", 0.1, {"dataset": "/x/own.npz", "dataset_sha256": "a" * 64}),
            ("b", 0.3, {"dataset": "/y/renamed.npz", "dataset_sha256": "a" * 64}),
            ("c", 0.4, {"dataset": "/x/own.npz", "dataset_sha256": "c" * 64}),
            ("d", 0.5, {"dataset": "mnist"}),
            ("e", 0.6, {"dataset": "mnist", "init_from": "/x/best.ckpt", "init_from_sha256": "e" * 64}),
        ]:
            self.add_run(name, bpd, **{**flags, "init_from": flags.get("init_from")})
        with mock.patch.dict(sys.modules, train_pl=None):
            lines = self.summary("")
        self.assertRegex(lines[1], r"dataset mnist, init_from None +1 +0\.5000")
        self.assertRegex(lines[2], r"dataset mnist, init_from best.ckpt \(eeeeeeee\) +1 +0\.6000")
        self.assertRegex(lines[3], r"dataset own\.npz \(aaaaaaaa\), init_from None +2 +0\.2000")
        self.assertRegex(lines[4], r"dataset own\.npz \(cccccccc\), init_from None +1 +0\.4000")

    def test_a_flag_that_is_missing_in_a_run_of_an_older_version_has_its_default(self):
        self.add_run("old", 0.2)
        self.add_run("new", 0.3, beta=1.0, objective="elbo")
        self.add_run("weighed", 0.4, beta=4.0, objective="elbo")
        rows = [line.split()[:4] for line in self.summary("")[1:3]]
        self.assertEqual(rows, [["beta", "1.0", "2", "0.2500"], ["beta", "4.0", "1", "0.4000"]])

    def test_flags_of_any_types_can_be_sorted(self):
        for number, value in enumerate([3, 0.5, None, "a", True, [3, "a"], [3, 4], {"b": 1}, {"a": 1}, [[]]]):
            self.add_run(f"{number}", 0.1, value=value)
        self.assertEqual(len(self.summary("")), 1 + 10 + 1)

    def test_a_run_counts_once_even_if_several_links_lead_to_it(self):
        self.add_run("logs/a", 0.1, z_dim=2)
        self.add_run("elsewhere/b", 0.3, z_dim=2)
        links = {"logs/b": "../elsewhere/b", "logs/a again": "a", "logs/back": "../logs", "all": "logs"}
        for link, target in {**links, "elsewhere/b/back": "../../logs", "logs/nowhere": "../nothing"}.items():
            (self.folder / link).symlink_to(target)
        for folders in [["logs"], ["all"], ["all/", "logs/a", "logs/../logs"], ["elsewhere"], ["logs/back", "logs"]]:
            with self.subTest(folders):
                self.assertRegex(self.summary(*folders)[1], r"^all runs +2  0\.2000 ")
                self.assertEqual(self.errors, [])

    def test_damaged_results_are_skipped_with_a_warning_of_one_line(self):
        self.add_run("good", 0.1, z_dim=2)
        self.add_run("worse", 0.3, z_dim=2)
        path = self.folder / "worse" / "results.json"
        for damage in [lambda: path.write_text("{"), lambda: [path.unlink(), path.mkdir()]]:
            damage()
            self.assertRegex(self.summary("")[1], r"^all runs +1  0\.1000 ")
            self.assertEqual(len(self.errors), 1)
            self.assertRegex(self.errors[0], f"^warning: {path} is skipped: .")
        self.assert_ends("there is no finished run in .*worse .no results.json.: train a run to its end", "worse")

    def test_a_file_among_the_folders_is_ignored_and_a_name_that_does_not_exist_is_a_warning(self):
        """A shell's * also expands to the names of files."""
        self.add_run("good", 0.1)
        (self.folder / "file").touch()
        for name, lines in [
            ("file", []),
            ("godo", [f"warning: {self.folder / 'godo'} is skipped: No such file or directory"]),
        ]:
            self.summary("good", name)
            self.assertEqual(self.errors, lines)

    def test_the_table_is_printed_even_if_the_plot_cannot_be_saved(self):
        self.add_run("job_9", 0.1)
        (self.folder / "folder.png").mkdir()
        for plot, message in [("no folder/plot.png", "No such"), ("folder.png", "directory")]:
            self.assert_ends(rf"the plot cannot be saved \(.*{plot}.*{message}.*--plot$", "", plot=plot)
            self.assertIn("all runs", self.output.getvalue())
        with mock.patch.object(figures, "bpd_by_setting", side_effect=ValueError("odd\ntext")):
            self.assert_ends(r"the plot cannot be saved \(ValueError: odd text\): .*--plot$", "")
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"job_9", "folder.png"})

    def test_a_plot_never_overwrites_a_file_without_the_extension_of_a_picture(self):
        self.add_run("job_9", 0.1)
        (self.folder / "runs.txt").write_text("mine")
        for name in ["runs.txt", "job_9/results.json", "plot", "png", "job_9", "", "a.png.bak"]:
            with self.subTest(name):
                before = {p: p.is_file() and p.read_bytes() for p in self.folder.rglob("*")}
                with mock.patch.object(summary, "read_runs"), self.assertRaises(SystemExit) as caught:
                    self.summary("", plot=name)
                self.assertEqual((caught.exception.code, len(self.errors)), (2, 1))
                self.assertRegex(self.errors[0], "--plot must be a file whose name ends with .png, .*, got ")
                self.assertEqual({p: p.is_file() and p.read_bytes() for p in self.folder.rglob("*")}, before)
        for name, start in [("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a.jpg", b"\xff\xd8")]:
            self.summary("", plot=name)
            self.assertTrue((self.folder / name).read_bytes().startswith(start), name)

    def test_help_is_printed_at_once_since_no_large_library_is_imported(self):
        libraries = ["torch", "pytorch_lightning", "tensorboard", "matplotlib", "numpy"]
        code = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({libraries})); sys.argv[1:] = ['--help']; "
            "runpy.run_path('summary.py', run_name='__main__')"
        )
        options = dict(cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        process = subprocess.run([sys.executable, "-c", code], **options)
        self.assertEqual((process.returncode, process.stderr), (0, ""))
        self.assertIn("--plot", process.stdout)

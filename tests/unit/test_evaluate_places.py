"""Tests of where evaluate.py finds data and puts results: `python -m unittest tests/unit/test_evaluate_places.py`."""

import contextlib
import io
import os
import unittest
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch

import evaluate
from tests.helpers import SeededTest, small_loaders
from train_pl import VAE


class TestProgressBar(SeededTest):
    def test_on_a_terminal_alone(self):
        """In a file, or where stderr goes nowhere, it would cost the evaluation."""
        test_set = small_loaders(Namespace(batch_size=50, num_workers=0))[2].dataset
        model = VAE("MLP", [4], 4, 3, 1e-3)
        for is_terminal in [True, False]:
            stderr = io.StringIO()
            stderr.isatty = lambda is_terminal=is_terminal: is_terminal
            with contextlib.redirect_stderr(stderr), torch.no_grad():
                evaluate.likelihoods(model, test_set, 1, progress_bar=True)
            self.assertEqual("100%" in stderr.getvalue(), is_terminal)
        with contextlib.redirect_stderr(None), torch.no_grad():
            evaluate.likelihoods(model, test_set, 1, progress_bar=True)


class TestPlaces(SeededTest):
    """Where the results go, and where the data is found."""

    def make(self, *names):
        """Makes files, and the folders that they are in; returns the first one."""
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return self.folder / names[0]

    def run_folder(self, path, cwd, pwd=None):
        """What evaluate.run_folder finds in a working directory, as a path without links."""
        before = os.getcwd()
        os.chdir(self.folder / cwd)
        try:
            with mock.patch.dict(os.environ, PWD=str(self.folder / cwd if pwd is None else pwd)):
                return Path(os.path.realpath(evaluate.run_folder(Path(path))))
        finally:
            os.chdir(before)

    def test_from_anywhere(self):
        best = self.make("logs/run/checkpoints/best.ckpt", "logs/run/hparams.yaml", "other/x")
        self.make("2/checkpoints/best.ckpt", "2/hparams.yaml", "3/checkpoints/x", "3/hparams.yaml")
        run = Path(os.path.realpath(self.folder / "logs" / "run"))
        for path, cwd in [
            (best, "other"),
            ("best.ckpt", "logs/run/checkpoints"),
            ("./best.ckpt", "logs/run/checkpoints"),
            ("checkpoints/best.ckpt/", "logs/run"),
            ("run/checkpoints//best.ckpt", "logs"),
            ("../checkpoints/best.ckpt", "logs/run/checkpoints"),
            ("../logs/run/checkpoints/best.ckpt", "other"),
        ]:
            # Also where PWD is that of another time.
            for pwd in [self.folder / cwd, "/nowhere", "", *(self.folder / other / "checkpoints" for other in "23")]:
                self.assertEqual(self.run_folder(path, cwd, pwd), run, (path, cwd, pwd))

    def test_by_links(self):
        self.make("logs/run/hparams.yaml", "scratch/checkpoints/best.ckpt", "other/x", "scratch/17/last.ckpt")
        run = self.folder / "logs" / "run"
        for link, target in [
            (run / "checkpoints", "../../scratch/checkpoints"),
            (self.folder / "other" / "my.ckpt", "../logs/run/checkpoints/best.ckpt"),
            (self.folder / "other" / "again.ckpt", "my.ckpt"),
            (self.folder / "current", run),
            (self.folder / "logs" / "run 2", self.folder / "other"),
            (self.folder / "other" / "checkpoints", "../scratch/17"),
        ]:
            link.symlink_to(target)
        self.make("other/hparams.yaml")
        for path, cwd in [
            ("best.ckpt", "logs/run/checkpoints"),
            ("best.ckpt", "current/checkpoints"),
            (run / "checkpoints" / "best.ckpt", "."),
            ("current/checkpoints/best.ckpt", "."),
            ("my.ckpt", "other"),
            ("other/again.ckpt", "."),
        ]:
            self.assertEqual(self.run_folder(path, cwd), Path(os.path.realpath(run)), (path, cwd))
        self.assertEqual(self.run_folder("run 2/checkpoints/last.ckpt", "logs").name, "other")

    def test_of_no_run(self):
        self.make("models/a.ckpt", "models/checkpoints/b.ckpt")
        (self.folder / "c.ckpt").symlink_to("models/a.ckpt")
        for path, cwd in [("a.ckpt", "models"), ("c.ckpt", "."), ("b.ckpt", "models/checkpoints")]:
            self.assertEqual(self.run_folder(path, cwd).name, "models")

    def test_data(self):
        """The first one of the places that is there, and before all those that hold MNIST."""
        self.make("moved/data/MNIST/raw/x", "was/MNIST/raw/x", "flag/MNIST/raw/x", "empty/x", "moved/run/x")
        run, there = self.folder / "moved" / "run", {name: str(self.folder / name) for name in ["was", "flag", "empty"]}
        for kept, expected in [
            ({"data_dir_from_run": "../data", "data_dir": there["was"]}, "data"),
            ({"data_dir_from_run": "../nothing", "data_dir": there["was"]}, "was"),
            ({"data_dir_from_run": "../../empty", "data_dir": there["was"]}, "was"),
            ({"data_dir": "/nowhere"}, "flag"),
            ({"data_dir": 3, "data_dir_from_run": None}, "flag"),
            ({}, "flag"),
        ]:
            self.assertEqual(Path(evaluate.data_dir_of(run, kept, there["flag"])).name, expected, kept)
        self.assertEqual(evaluate.data_dir_of(run, {"data_dir": there["empty"]}, "nothing"), there["empty"])
        self.make("fashion/FashionMNIST/raw/x")
        fashion = str(self.folder / "fashion")
        for dataset, expected in [("fashion", fashion), ("mnist", there["was"]), ("kmnist", there["was"])]:
            place = evaluate.data_dir_of(run.parent, {"data_dir": there["was"]}, fashion, dataset)
            self.assertEqual(place, expected)
        self.assertEqual(evaluate.data_dir_of(run, {"data_dir": "/nowhere"}, "../data"), "../data")


if __name__ == "__main__":
    unittest.main()

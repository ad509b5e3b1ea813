"""Tests of sources/locations.py: `python -m unittest tests/unit/test_locations.py`."""

import os
from pathlib import Path
from unittest import mock

from sources.locations import data_locations, file_locations, find_data_dir, run_folder
from tests.helpers import SeededTest


class TestPlaces(SeededTest):
    def setUp(self):
        self.path = Path(os.path.realpath(self.folder))
        self.addCleanup(os.chdir, os.getcwd())

    def make(self, *names):
        """Makes files and their folders. Returns the path of the first file."""
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return self.folder / names[0]

    def run_folder(self, path, directory):
        """Returns the result of run_folder in a working directory, as a path without links."""
        os.chdir(self.path / directory)
        return run_folder(Path(path)).resolve()

    def test_a_run_is_found_from_any_working_directory(self):
        best = self.make("logs/run/checkpoints/best.ckpt", "logs/run/hparams.yaml", "other/x")
        for path, directory in [
            (best, "other"),
            ("best.ckpt", "logs/run/checkpoints"),
            ("checkpoints/best.ckpt/", "logs/run"),
            ("../logs/run/checkpoints/best.ckpt", "other"),
            ("../../run/checkpoints/../checkpoints/best.ckpt", "logs/run/checkpoints"),
        ]:
            with self.subTest(path, directory=directory):
                self.assertEqual(self.run_folder(path, directory), self.path / "logs" / "run")

    def test_a_run_is_found_through_links(self):
        """The checkpoint, the run's folder and its folder `checkpoints` may each be a link."""
        self.make("logs/run/hparams.yaml", "scratch/checkpoints/best.ckpt", "other/x")
        self.make("logs/2/hparams.yaml", "logs/2/checkpoints/best.ckpt")
        for link, target in [
            ("logs/run/checkpoints", "../../scratch/checkpoints"),
            ("current", "logs/run"),
            ("other/my.ckpt", "../logs/2/checkpoints/best.ckpt"),
            ("other/again.ckpt", "my.ckpt"),
            ("other/to_2", "../logs/2/checkpoints"),
        ]:
            (self.folder / link).symlink_to(target)
        for path, directory, run in [
            ("checkpoints/best.ckpt", "logs/run", "run"),
            ("current/checkpoints/best.ckpt", ".", "run"),
            ("other/again.ckpt", ".", "2"),
            ("to_2/best.ckpt", "other", "2"),
        ]:
            with self.subTest(path, directory=directory):
                self.assertEqual(self.run_folder(path, directory), self.path / "logs" / run)

    def test_the_folder_of_a_checkpoint_that_does_not_belong_to_a_run_is_the_folder_that_contains_it(self):
        self.make("models/a.ckpt", "models/checkpoints/b.ckpt")
        (self.folder / "c.ckpt").symlink_to("models/a.ckpt")
        for path, directory in [("a.ckpt", "models"), ("c.ckpt", "."), ("b.ckpt", "models/checkpoints")]:
            self.assertEqual(self.run_folder(path, directory).name, "models")

    def test_locations_are_absolute_paths_and_paths_relative_to_the_run(self):
        self.make("logs/run/x", "data/x", "own/x")
        os.chdir(self.path / "own")
        data, flags = str(self.path / "data"), {"data_dir": "../data/", "dataset": str(self.path / "own" / "my.npz")}
        expected = {"data_dir": data, "data_dir_from_run": "../../data", "dataset_from_run": "../../own/my.npz"}
        self.assertEqual(data_locations(flags, self.path / "logs" / "run"), expected)
        with mock.patch.object(os.path, "relpath", side_effect=ValueError("another drive")):
            self.assertEqual(data_locations(flags, "logs"), {"data_dir": data})
        self.assertNotIn("dataset_from_run", data_locations(flags | {"dataset": "mnist"}, "logs"))

    def test_the_data_directory_is_the_first_one_that_contains_the_data(self):
        """If none contains the data, it is the first one that exists."""
        self.make("moved/data/MNIST/raw/x", "was/MNIST/raw/x", "flag/MNIST/raw/x", "empty/x", "moved/run/x")
        run, there = self.folder / "moved" / "run", {name: str(self.folder / name) for name in ["was", "flag", "empty"]}
        for run_data, expected in [
            ({"data_dir_from_run": "../data", "data_dir": there["was"]}, "data"),
            ({"data_dir_from_run": "../nothing", "data_dir": there["was"]}, "was"),
            ({"data_dir_from_run": "../../empty", "data_dir": there["was"]}, "was"),
            ({"data_dir": 3, "data_dir_from_run": None}, "flag"),
        ]:
            with self.subTest(run_data):
                self.assertEqual(Path(find_data_dir(run, run_data, there["flag"], "MNIST")).name, expected)
        self.assertEqual(find_data_dir(run, {"data_dir": there["empty"]}, "nothing", "MNIST"), there["empty"])
        self.assertEqual(find_data_dir(run, {"data_dir": "/nowhere"}, "../data", "MNIST"), "../data")

    def test_a_file_may_be_at_its_path_relative_to_the_run_or_at_its_original_path(self):
        places = file_locations(self.path / "run", {"dataset_from_run": "../my.npz"}, "/was")
        self.assertEqual(places, [str(self.path / "my.npz"), "/was"])
        self.assertEqual(file_locations(self.path, {}, "/was"), ["/was"])

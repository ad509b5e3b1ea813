"""Tests of sources/__init__.py, and of runs on your own images: `python -m unittest tests/unit/test_sources.py`."""

import argparse
import hashlib
import os
import shutil
from unittest import mock

import numpy as np

import sources
import train_pl
from bmnist import load_data
from evaluate import evaluate
from harness import processes
from harness.errors import UserError
from harness.folder import RunError
from pictures import latent_space
from sources import load_images
from tests.helpers import NamedRunTest, SeededTest, load, metrics, results
from tests.helpers.fake_data import own_images, write_npz


class TestSources(SeededTest):
    def test_each_source_returns_its_images(self):
        """The number of rendered digits is the number of images that the splits need."""
        for name, kinds in [("load_mnist", ["mnist", "fashion", "kmnist"]), ("rendered_mnist", ["rendered"])]:
            for kind in kinds:
                with self.subTest(kind), mock.patch.object(sources, name) as load:
                    args = argparse.Namespace(dataset=kind, data_dir="data", train_size=55_000)
                    self.assertIs(load_images(args, False), load.return_value)
                    load.assert_called_once_with(*(60_000,) if kind == "rendered" else ("data", False, kind))

    def test_the_path_and_the_checksum_of_your_own_file_are_added_to_the_flags(self):
        """The path and the checksum of another run are replaced."""
        path = write_npz(self.folder)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        args = argparse.Namespace(dataset="own.npz", dataset_sha256="0" * 64)
        sources.complete_dataset(args)
        self.assertEqual(os.path.realpath(args.dataset), os.path.realpath(path))
        self.assertEqual(args.dataset_sha256, hashlib.sha256(path.read_bytes()).hexdigest())
        args.dataset = "mnist"
        sources.complete_dataset(args)
        self.assertEqual(vars(args), {"dataset": "mnist"})


class TestRunsOnYourOwnImages(NamedRunTest):
    def setUp(self):
        super().setUp()
        self.enter(mock.patch.object(train_pl, "load_data", load_data))
        # Pictures of such images are tested in test_latent_space.py
        self.enter(mock.patch.object(latent_space, "save_pictures"))

    def write(self, name="own.npz", **arrays):
        """Writes a file, see write_npz. Returns its path."""
        return write_npz(self.folder, name, **arrays)

    def evaluate(self, checkpoint=None, **options):
        """Evaluates a checkpoint with few samples. Returns what evaluate returns."""
        checkpoint = checkpoint or self.run_folder() / "checkpoints" / "best.ckpt"
        return evaluate(checkpoint, iw_samples=2, accelerator="cpu", **options)

    def test_invalid_data_ends_the_program_with_one_line(self):
        """The exit code is 1 or 2, and no file is written."""
        for dataset, code, words in [
            ("nothing.npz", 1, "nothing.npz cannot be read (No such file or directory): give"),
            ("cifar", 2, "--dataset must be one of mnist, fashion, kmnist, rendered, or the path of an .npz file"),
            (str(self.folder), 2, "--dataset must be one of mnist"),
            (str(self.write(train_images=own_images(9))), 1, "has 9 images"),
        ]:
            with self.subTest(words):
                before = sorted(self.folder.iterdir())
                left = self.main("--dataset", dataset, "--log_dir", str(self.folder / "logs"))
                self.assertEqual(left[0], code, left)
                self.assertIn(words, left[1])
                self.assertEqual(sorted(self.folder.iterdir()), before)

    def test_models_are_trained_and_evaluated_on_your_own_images(self):
        """The images may have labels or not. Both kinds of networks are tested."""
        labels = {"train_labels": np.arange(200) % 12, "test_labels": np.arange(100) % 12}
        for model, arrays in [("MLP", {}), ("CNN", labels)]:
            with self.subTest(model):
                path = self.write(f"{model}.npz", **arrays)
                _, output = self.train(model=model, epochs=1, dataset=str(path), run_name=model)
                described = (
                    f"{model} on {path}, 180 training images of 20x14, validation set: the next 20 images, on cpu"
                )
                self.assertIn(described, output)
                run = self.folder / model
                left, _ = self.evaluate(run / "checkpoints" / "best.ckpt")
                self.assertAlmostEqual(left["test_bpd"], results(run)["test_bpd"], delta=0.02)
                self.assertEqual(left["test_images"], 100)
                self.assertEqual(load(run, "best")["hyper_parameters"]["img_size"], [20, 14])

    def test_a_run_resumes_with_the_same_content(self):
        """The file and the working directory may have changed their places. Other content is an error."""
        path = self.write()
        self.train(epochs=1, dataset=str(path))
        path.rename(self.folder / "moved.npz")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.train(epochs=2, dataset="moved.npz")
        self.assertEqual(len(metrics(self.run_folder())), 3)
        self.write("moved.npz", test_images=own_images(101))
        with self.assertRaisesRegex(RunError, "other hyperparameters .the file of --dataset has different content."):
            self.train(epochs=3, dataset="moved.npz")
        with self.assertRaisesRegex(RunError, "--dataset was .*moved.npz, is mnist"):
            self.train(epochs=2, dataset="mnist")

    def test_evaluation_uses_the_content_of_the_training(self):
        """Other content is an error, unless --dataset asks for it."""
        self.train(epochs=1, dataset=str(self.write()))
        self.assertEqual(self.evaluate()[0]["test_images"], 100)
        self.write(test_images=own_images(120))
        with self.assertRaisesRegex(UserError, "has changed since the training: give --dataset"):
            self.evaluate()
        self.assertEqual(self.evaluate(dataset=str(self.folder / "own.npz"))[0]["test_images"], 120)
        other = self.write("other.npz", train_images=own_images(200, 20, 20), test_images=own_images(100, 20, 20))
        with self.assertRaisesRegex(UserError, r"images of \[20, 20\] pixels, .* was trained on images of \[20, 14\]"):
            self.evaluate(dataset=str(other))
        (self.folder / "own.npz").unlink()
        with self.assertRaisesRegex(
            UserError, "training data .*own.npz does not exist any more: give its path with --dataset"
        ):
            self.evaluate()

    def test_a_run_and_its_file_may_be_moved_together(self):
        """The file may be a link to a file of any name. It is found by its content, in the old or in the new place."""
        file, link = self.write().rename(self.folder / "content"), self.folder / "data" / "link.npz"
        link.parent.mkdir()
        link.symlink_to(file)
        self.train(epochs=1, dataset=str(link))
        elsewhere = self.folder / "elsewhere"
        for name in ["data", "run"]:
            shutil.copytree(self.folder / name, elsewhere / name, symlinks=True)
        link.unlink()
        checkpoint = elsewhere / "run" / "checkpoints" / "best.ckpt"
        self.assertEqual(self.evaluate(checkpoint)[0]["test_images"], 100)
        (elsewhere / "data" / "link.npz").unlink()
        self.write("elsewhere/data/link.npz", test_images=own_images(130))
        link.symlink_to(file)
        self.assertEqual(self.evaluate(checkpoint)[0]["test_images"], 100)

    def test_several_processes_need_the_same_content(self):
        def broadcast(trainer, result, error=None):
            return "another" if isinstance(result, str) else result

        other = self.assertRaisesRegex(RunError, "is a different file in this process")
        with mock.patch.object(processes, "broadcast_or_exit", broadcast), other:
            self.train(epochs=1, dataset=str(self.write()))

"""Tests of data_sources.py, and of runs on one's own images: `python -m unittest tests/unit/test_data_sources.py`."""

import contextlib
import gzip
import io
import os
import shutil
import tracemalloc
import unittest
import zipfile
from unittest import mock

import numpy as np
import torch
from harness.program import CHECKSUM, UserError

import train_pl
from bmnist import DataError
from evaluate import evaluate
from harness import processes
from harness.folder import RunError
from sources import checksum, load_data, load_file
from sources.rendered_digits import rendered_digits
from tests.helpers import NamedRunTest, load, metrics, results


def images(number, *size):
    """Digits of another size than MNIST's, as a NumPy array."""
    height, width = size or (20, 14)
    digits = rendered_digits(number)[0].repeat(1, 2, 2)[:, 4 : 4 + height, 4 : 4 + width]
    return digits.numpy()


class FileTest(NamedRunTest):
    def write(self, name="own.npz", **arrays):
        """The path of a file of 200 images to train on and 100 to test, with changes; None leaves an array out."""
        arrays = {"train_images": images(200), "test_images": images(100), **arrays}
        path = self.folder / name
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path


class TestFile(FileTest):
    def test_what_is_read(self):
        path = self.write(train_labels=np.arange(200) % 7, test_labels=np.arange(100, dtype=np.uint8))
        train_images, train_labels, test_images, test_labels = load_file(str(path))
        self.assertTrue(torch.equal(train_images, torch.from_numpy(images(200))))
        self.assertTrue(torch.equal(test_images, torch.from_numpy(images(100))))
        self.assertTrue(torch.equal(train_labels, torch.arange(200) % 7))
        self.assertTrue(torch.equal(test_labels, torch.arange(100)))
        self.assertEqual((train_images.dtype, test_labels.dtype), (torch.uint8, torch.int64))
        np.savez_compressed(path, train_images=np.asfortranarray(images(200)), test_images=images(100)[::-1])
        train_images, train_labels, test_images, _ = load_file(str(path))
        self.assertEqual(train_labels.unique().tolist(), [-1])
        self.assertTrue(torch.equal(train_images, torch.from_numpy(images(200))))
        self.assertTrue(torch.equal(test_images, torch.from_numpy(images(100)).flip(0)))
        self.assertTrue(train_images.is_contiguous())  # SampledImages draws its pixels in place

    def test_splits(self):
        """The last tenth validates; as many images as MNIST's have its splits."""
        args = train_pl.complete_flags(self.namespace(dataset=str(self.write())))
        self.assertEqual([len(loader.dataset) for loader in load_data(args)], [180, 20, 100])
        white = {
            "train_images": np.full((60_000, 2, 2), 200, np.uint8),
            "test_images": np.full((100, 2, 2), 200, np.uint8),
        }
        args = train_pl.complete_flags(self.namespace(dataset=str(self.write(**white))))
        self.assertEqual([len(loader.dataset) for loader in load_data(args)], [45_000, 5_000, 100])
        args.train_size = 55_000
        self.assertEqual([len(loader.dataset) for loader in load_data(args)], [55_000, 5_000, 100])

    def test_files_of_no_use(self):
        objects = np.array([object()] * 200)
        for arrays, words in [
            ({"train_images": None}, "it lacks train_images"),
            ({"test_images": None}, "it lacks test_images"),
            ({"train_images": images(200).astype(np.float32)}, "train_images is float32"),
            ({"train_images": images(200)[..., None]}, r"train_images is uint8 of shape \[200, 20, 14, 1\]"),
            ({"train_images": images(200)[:, :0]}, r"of shape \[200, 0, 14\]"),
            ({"train_images": images(99)}, "train_images has 99 images, and must have 100 or more"),
            ({"test_images": images(7)}, "test_images has 7 images"),
            ({"train_images": images(200) // 2}, "no pixel of its train_images is above 127"),
            ({"test_images": images(100, 20, 20)}, "of 20x14 and of 20x20 pixels"),
            ({"train_labels": np.arange(200)}, "labels of one part alone"),
            ({"train_labels": np.arange(9), "test_labels": np.arange(100)}, r"train_labels is int64 of shape \[9\]"),
            ({"train_labels": np.ones(200), "test_labels": np.arange(100)}, "train_labels is float64"),
            ({"train_labels": np.arange(200) - 1, "test_labels": np.arange(100)}, "train_labels goes from -1 to 198"),
            ({"train_images": objects}, "is no .npz file of plain arrays"),
        ]:
            with self.subTest(words), self.assertRaisesRegex(DataError, words) as caught:
                load_file(str(self.write(**arrays)))
            self.assertNotIn("\n", str(caught.exception))

    def test_broken_files(self):
        path = self.write()
        content = path.read_bytes()
        middle = len(content) // 2
        for broken in [
            *(b"", b"PK\3\4", content[:-1_000], content[:middle], content[middle:]),
            content[:middle] + bytes(100) + content[middle + 100 :],
            *(gzip.compress(content), b"\x93NUMPY" + content, b"[]", b"<html>"),
        ]:
            path.write_bytes(broken)
            with self.assertRaisesRegex(DataError, "own.npz is no .npz file of plain arrays"):
                load_file(str(path))
        for member in [b"", b"text", b"\x93NUMPY\1\0\x76\0{'descr': 'uint8'}", b"\x93NUMPY\1\0\x76\0" + bytes(118)]:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("train_images.npy", member)
            with self.assertRaisesRegex(DataError, "own.npz is (no .npz file of plain arrays|of no use)"):
                load_file(str(path))
        np.save(self.folder / "array.npy", images(200))
        (self.folder / "array.npy").rename(path)
        with self.assertRaisesRegex(DataError, "own.npz is no .npz file"):
            load_file(str(path))

    def test_a_file_that_changes_meanwhile(self):
        """Between its checksum, which the run keeps, and its images."""
        args = train_pl.complete_flags(self.namespace(dataset=str(self.write())))
        load_data(args)
        self.write(test_images=images(101))
        with self.assertRaisesRegex(DataError, "own.npz has changed since the command began: give the same"):
            load_data(args)

    def test_a_file_larger_than_the_memory(self):
        path = self.write()
        with (
            mock.patch.object(np, "ascontiguousarray", side_effect=MemoryError("Unable to allocate 9 GiB")),
            self.assertRaisesRegex(DataError, "memory is too small for .*own.npz, or it is damaged .*Unable to"),
        ):
            load_file(str(path))
        path = self.write(other=np.zeros(3 * 2**20, np.uint8))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        load_file(str(path), checksum(path))
        self.assertLess(tracemalloc.get_traced_memory()[1], 2.5 * 2**20)

    def test_commands(self):
        """One line, exit code 1 or 2, and nothing is left."""
        for dataset, code, words in [
            ("nothing.npz", 1, "nothing.npz cannot be read (No such file or directory): give mnist, fashion"),
            ("cifar", 2, "--dataset must be one of mnist, fashion, kmnist, rendered, or the path of an .npz file"),
            (str(self.folder), 2, "--dataset must be one of mnist"),
            (str(self.write(train_images=images(9))), 1, "has 9 images"),
        ]:
            before = sorted(self.folder.iterdir())
            with mock.patch.object(train_pl, "load_data", load_data):
                left = self.main("--dataset", dataset, "--log_dir", str(self.folder / "logs"))
            self.assertEqual(left[0], code, left)
            self.assertIn(words, left[1])
            self.assertEqual(sorted(self.folder.iterdir()), before)


class TestRuns(FileTest):
    def setUp(self):
        super().setUp()
        patch = mock.patch.object(train_pl, "load_data", load_data)
        patch.start()
        self.addCleanup(patch.stop)

    def evaluate(self, **options):
        return evaluate(self.run_folder() / "checkpoints" / "best.ckpt", iw_samples=2, accelerator="cpu", **options)

    def test_training_and_evaluation(self):
        """With labels and without, of both kinds of networks; every picture is drawn."""
        labels = {"train_labels": np.arange(200) % 12, "test_labels": np.arange(100) % 12}
        for model, z_dim, arrays in [("MLP", 2, {}), ("CNN", 3, labels), ("MLP", 1, {})]:
            path = self.write(f"{model}{z_dim}.npz", **arrays)
            _, output = self.train(model=model, z_dim=z_dim, epochs=1, dataset=str(path), run_name=path.stem)
            self.assertIn(
                f"{model} on {path}, 180 training images of 20x14, the 20 after them validate, on cpu", output
            )
            run = self.folder / path.stem
            left, folder = evaluate(run / "checkpoints" / "best.ckpt", iw_samples=2, accelerator="cpu")
            self.assertAlmostEqual(left["test_bpd"], results(run)["test_bpd"], delta=0.02)
            self.assertEqual(left["test_images"], 100)
            drawn = {file.stem for file in folder.glob("*.png")}
            self.assertLessEqual({"reconstructions", "interpolations", "samples", "latent_space"}, drawn)
            self.assertEqual("manifold" in drawn, z_dim == 2)
            self.assertEqual(load(run, "best")["hyper_parameters"]["img_size"], [20, 14])

    def test_continued(self):
        """From another place, and another working directory, but not with another content."""
        path = self.write()
        self.train(epochs=1, dataset=str(path))
        moved = self.folder / "moved.npz"
        path.rename(moved)
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        self.train(epochs=2, dataset="moved.npz")
        self.assertEqual(len(metrics(self.run_folder())), 3)
        self.write("moved.npz", test_images=images(101))
        for epochs in [2, 3]:
            with self.assertRaisesRegex(RunError, "other hyperparameters .what the file --dataset holds."):
                self.train(epochs=epochs, dataset="moved.npz")
        with self.assertRaisesRegex(RunError, "--dataset was .*moved.npz, is mnist"):
            self.train(epochs=2, dataset="mnist")

    def test_evaluation_of_what_was_trained_on(self):
        self.train(epochs=1, dataset=str(self.write()))
        self.assertEqual(self.evaluate()[0]["test_images"], 100)
        self.write(test_images=images(120))
        with self.assertRaisesRegex(UserError, "has changed since the training: give --dataset"):
            self.evaluate()
        self.assertEqual(self.evaluate(dataset=str(self.folder / "own.npz"))[0]["test_images"], 120)
        other = self.write("other.npz", train_images=images(200, 20, 20), test_images=images(100, 20, 20))
        with self.assertRaisesRegex(UserError, r"images of \[20, 20\] pixels, .* is for those of \[20, 14\]"):
            self.evaluate(dataset=str(other))
        (self.folder / "own.npz").unlink()
        with self.assertRaisesRegex(UserError, "own.npz, what it was trained on, is gone: give --dataset"):
            self.evaluate()

    def test_run_and_file_moved_together(self):
        self.train(epochs=1, dataset=str(self.write()))
        (self.folder / "elsewhere").mkdir()
        for name in ["run", "own.npz"]:
            (self.folder / name).rename(self.folder / "elsewhere" / name)
        left, _ = evaluate(self.folder / "elsewhere/run/checkpoints/best.ckpt", iw_samples=2, accelerator="cpu")
        self.assertEqual(left["test_images"], 100)

    def test_file_by_a_link(self):
        """Of any name; and another file in its first place does not hide it where it is now."""
        file = self.write().rename(self.folder / "content")
        (self.folder / "data").mkdir()
        (self.folder / "data" / "link.npz").symlink_to(file)
        self.train(epochs=1, dataset=str(self.folder / "data" / "link.npz"))
        self.assertEqual(self.evaluate()[0]["test_images"], 100)
        for name in ["data", "run"]:
            shutil.copytree(self.folder / name, self.folder / "elsewhere" / name, symlinks=True)
        (self.folder / "data" / "link.npz").unlink()
        checkpoint = self.folder / "elsewhere" / "run" / "checkpoints" / "best.ckpt"
        self.assertEqual(evaluate(checkpoint, iw_samples=2, accelerator="cpu")[0]["test_images"], 100)
        (self.folder / "elsewhere" / "data" / "link.npz").unlink()
        self.write("elsewhere/data/link.npz", test_images=images(130))
        (self.folder / "data" / "link.npz").symlink_to(file)
        self.assertEqual(evaluate(checkpoint, iw_samples=2, accelerator="cpu")[0]["test_images"], 100)

    def test_flags_of_another_run(self):
        """Their checksum is not that of this one's data."""
        args = train_pl.complete_flags(self.namespace(dataset="rendered"))
        args.dataset_sha256 = "0" * 64
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertNotIn(CHECKSUM, vars(train_pl.complete_flags(args)))
            args.dataset = str(self.write())
            self.assertNotEqual(train_pl.complete_flags(args).dataset_sha256, "0" * 64)

    def test_several_processes(self):
        """Of one run, they read the same content, and each has an image to validate."""

        def shared(trainer, result, error=None):
            return "another" if isinstance(result, str) else result

        with mock.patch.object(processes, "shared", shared), self.assertRaisesRegex(RunError, "is another file here"):
            self.train(epochs=1, dataset=str(self.write()))
        loaders = load_data(train_pl.complete_flags(self.namespace(dataset=str(self.write()))))
        loaders[1].dataset.labels = loaders[1].dataset.labels[:0]
        loaders[0].sampler.set_epoch = None
        with (
            mock.patch.object(train_pl, "load_data", lambda *_, **__: loaders),
            self.assertRaisesRegex(RunError, "0 validation images are too few"),
        ):
            self.train(epochs=1)
        self.assertFalse(self.run_folder().exists())


if __name__ == "__main__":
    unittest.main()

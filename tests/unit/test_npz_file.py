"""Tests of sources/npz_file.py: `python -m unittest tests/unit/test_npz_file.py`."""

import zipfile
from unittest import mock

import numpy as np
import torch

from harness.errors import DataError
from sources.npz_file import checksum, load_file, open_dataset_file
from tests.helpers import SeededTest
from tests.helpers.fake_data import own_images, write_npz


class TestLoadFile(SeededTest):
    def test_images_and_labels_are_loaded(self):
        path = write_npz(self.folder, train_labels=np.arange(200) % 7, test_labels=np.arange(100, dtype=np.uint8))
        train_images, train_labels, test_images, test_labels, *how = load_file(str(path))
        self.assertEqual(how, [None, ""])
        torch.testing.assert_close(train_images, torch.from_numpy(own_images(200)))
        torch.testing.assert_close(test_images, torch.from_numpy(own_images(100)))
        torch.testing.assert_close(train_labels, torch.arange(200) % 7)
        torch.testing.assert_close(test_labels, torch.arange(100))

    def test_arrays_of_any_memory_layout_are_read(self):
        """The tensors are contiguous, so that StochasticBinaryImages can sample in place. Missing labels are -1."""
        path = self.folder / "own.npz"
        np.savez_compressed(path, train_images=np.asfortranarray(own_images(200)), test_images=own_images(100)[::-1])
        train_images, train_labels, test_images, *_ = load_file(str(path))
        self.assertTrue(torch.equal(train_images, torch.from_numpy(own_images(200))))
        self.assertTrue(torch.equal(test_images, torch.from_numpy(own_images(100)).flip(0)))
        self.assertTrue(train_images.is_contiguous())
        self.assertEqual((train_labels.unique().tolist(), len(train_labels)), ([-1], 200))

    def test_invalid_arrays_are_one_line_errors(self):
        images, test_labels = own_images(200), np.arange(100)
        for arrays, words in [
            ({"train_images": None}, "it lacks train_images"),
            ({"train_images": images.astype(np.float32) - 1}, "train_images is float32 .* values from -1.0 to 254.0"),
            ({"train_images": images.astype(np.uint16) * 257}, "train_images is uint16 .* values from 0 to 65535, but"),
            (
                {"train_images": images / np.float32(255) - 0.5},
                "values from -0.5 to 0.5, but must contain whole numbers",
            ),
            ({"train_images": images / np.where(images, 255, np.nan)}, "values from nan to nan"),
            ({"train_images": images // 255}, "only the values 0 and 1: convert train_images to bool, or"),
            ({"train_images": images.reshape(200, -1)}, r"shape \[200, 280\], but must be of shape \[N,H,W\], \[N,H"),
            ({"train_images": images[:, None, :, :3]}, r"shape \[200, 1, 20, 3\], but must be"),
            ({"train_images": np.stack([images] * 4, axis=-1)}, r"shape \[200, 20, 14, 4\], but must be"),
            ({"train_images": images * 0 + 255}, r"every pixel of its train_images is above 127 .*: scale "),
            (
                {
                    "train_images": np.repeat(
                        images[:, :1, :1] * 0 + np.arange(200)[:, None, None].astype(np.uint8), 20, 1
                    )
                },
                r"in every image of its train_images, all pixels are equal \(perhaps 16-bit",
            ),
            ({"x_train": images}, "both kinds of names, test_images and train_images and x_train: use only one"),
            ({"val_images": images[:0]}, "val_images has 0 images, but must have at least 1"),
            ({"val_images": images[:9, 1:]}, "of 20x14 and of 19x14 pixels"),
            (
                {"train_images": images.astype(str)},
                r"is <U\d+ of shape \[200, 20, 14\], but must contain whole numbers",
            ),
            ({"train_images": images[:, :0]}, r"of shape \[200, 0, 14\]"),
            ({"train_images": images[:99]}, "train_images has 99 images, but must have at least 100"),
            ({"train_images": images // 2}, "no pixel of its train_images is above 127"),
            ({"test_images": own_images(100, 20, 20)}, "of 20x14 and of 20x20 pixels"),
            ({"train_labels": np.arange(200)}, "labels for only some of its parts"),
            ({"train_labels": np.arange(9), "test_labels": test_labels}, r"train_labels is int64 of shape \[9\]"),
            ({"train_labels": np.ones(200), "test_labels": test_labels}, "train_labels is float64"),
            (
                {"train_labels": np.arange(200) - 1, "test_labels": test_labels},
                "train_labels has values from -1 to 198",
            ),
            ({"train_images": np.array([object()] * 200)}, "is not an .npz file of plain arrays"),
        ]:
            with self.subTest(words), self.assertRaisesRegex(DataError, words) as caught:
                load_file(str(write_npz(self.folder, **arrays)))
            self.assertNotIn("\n", str(caught.exception))

    def test_unambiguous_arrays_are_converted_with_a_description(self):
        """Examples are MedMNIST's files, Keras' mnist.npz, images with one channel or colours, bool and floats."""
        images, classes = own_images(200), np.arange(200) % 3
        plain, labels = load_file(str(write_npz(self.folder))), dict(train_labels=classes, test_labels=classes[:100])
        keras = dict(x_train=images, y_train=classes, x_test=own_images(100), y_test=classes[:100])
        black = (images > 127).astype(np.uint8) * 255
        for arrays, expected, description in [
            ({"train_images": images[..., None], "test_images": own_images(100)[:, None]}, images, ""),
            ({"train_images": np.stack([images] * 3, axis=-1)}, images, ", RGB converted to grey"),
            ({"train_images": np.stack([images] * 3, axis=1)}, images, ", RGB converted to grey"),
            ({"train_images": images > 127}, black, ", bool read as black and white"),
            ({"train_images": images / 255}, images, ", floats from 0 to 1 read as intensities"),
            ({"train_images": images.astype(np.float64)}, images, ""),
            ({"train_images": images.astype(np.int64)}, images, ""),
            ({name: label[:, None] for name, label in labels.items()}, images, ""),
            ({name: np.stack([label] * 2, 1) for name, label in labels.items()}, images, ", several labels per image"),
            ({"train_images": None, "test_images": None, **keras}, images, ""),
        ]:
            with self.subTest(description, arrays=[*arrays]):
                found = load_file(str(write_npz(self.folder, **arrays)))
                self.assertTrue(torch.equal(found.train_images, torch.from_numpy(expected)))
                self.assertTrue(torch.equal(found.test_images, plain.test_images))
                self.assertEqual(
                    (found.num_val, found.description[: len(description)], bool(description)),
                    (None, description, bool(found.description)),
                )
                is_labelled = {"train_labels", "y_train"} & arrays.keys() and "several" not in description
                self.assertEqual(found.train_labels.tolist(), classes.tolist() if is_labelled else [-1] * 200)

    def test_arrays_that_are_not_used_are_named(self):
        """The names are cut off after some characters. Labels without validation images are not used, either."""
        for arrays, description in [
            (dict(mean=np.zeros(3), val_labels=np.array(["a"])), " (arrays not used: mean, val_labels)"),
            (
                {"a\nb": np.zeros(3), "train_images": own_images(200) > 127},
                ", bool read as black and white (arrays not used: a?b)",
            ),
            (dict.fromkeys(["x" * 50, "y" * 50], np.zeros(3)), f" (arrays not used: {'x' * 50}, {'y' * 8}...)"),
        ]:
            with self.subTest(description):
                self.assertEqual(load_file(str(write_npz(self.folder, **arrays))).description, description)

    def test_validation_images_of_the_file_are_the_last_training_images(self):
        val, classes = own_images(250)[200:], np.arange(200) % 3
        labels = dict(train_labels=classes, val_labels=classes[:50, None], test_labels=classes[:100])
        found = load_file(str(write_npz(self.folder, val_images=val, **labels)))
        self.assertEqual((found.num_val, len(found.train_images)), (50, 250))
        self.assertTrue(torch.equal(found.train_images[200:], torch.from_numpy(val)))
        self.assertTrue(torch.equal(found.train_labels[200:], torch.from_numpy(classes[:50])))

    def test_damaged_files_are_errors(self):
        path = write_npz(self.folder)
        content = path.read_bytes()
        middle = len(content) // 2
        for name, broken in {
            "empty": b"",
            "first half": content[:middle],
            "second half": content[middle:],
            "zeros in the middle": content[:middle] + bytes(100) + content[middle + 100 :],
            "an .npy file's beginning": b"\x93NUMPY" + content,
        }.items():
            path.write_bytes(broken)
            with self.subTest(name), self.assertRaisesRegex(DataError, "own.npz is not an .npz file of plain arrays"):
                load_file(str(path))
        for member in [b"", b"text", b"\x93NUMPY\1\0\x76\0{'descr': 'uint8'}", b"\x93NUMPY\1\0\x76\0" + bytes(118)]:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("train_images.npy", member)
            with self.subTest(member), self.assertRaisesRegex(DataError, "own.npz is (not an .npz file|invalid)"):
                load_file(str(path))

    def test_a_file_that_has_changed_is_an_error(self):
        """A run computes the checksum before it loads the images."""
        path = write_npz(self.folder)
        with open_dataset_file(path) as file:
            sha256 = checksum(file)
        load_file(str(path), sha256)
        write_npz(self.folder, test_images=own_images(101))
        with self.assertRaisesRegex(DataError, "own.npz has changed since the command began: give the same"):
            load_file(str(path), sha256)

    def test_running_out_of_memory_is_an_error(self):
        path = write_npz(self.folder)
        error = self.assertRaisesRegex(
            DataError, "out of memory while reading .*own.npz, or the file is damaged .*Unable to"
        )
        with mock.patch.object(np, "ascontiguousarray", side_effect=MemoryError("Unable to allocate 9 GiB")), error:
            load_file(str(path))

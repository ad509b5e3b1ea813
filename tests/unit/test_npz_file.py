"""Tests of sources/npz_file.py: `python -m unittest tests/unit/test_npz_file.py`."""

import zipfile
from unittest import mock

import numpy as np
import torch

from harness.errors import DataError
from sources.npz_file import checksum, load_file, opened
from tests.helpers import SeededTest
from tests.helpers.fake_data import own_images, write_npz


class TestLoadFile(SeededTest):
    def test_images_and_labels_are_loaded(self):
        path = write_npz(self.folder, train_labels=np.arange(200) % 7, test_labels=np.arange(100, dtype=np.uint8))
        train_images, train_labels, test_images, test_labels = load_file(str(path))
        torch.testing.assert_close(train_images, torch.from_numpy(own_images(200)))
        torch.testing.assert_close(test_images, torch.from_numpy(own_images(100)))
        torch.testing.assert_close(train_labels, torch.arange(200) % 7)
        torch.testing.assert_close(test_labels, torch.arange(100))

    def test_arrays_in_any_layout(self):
        """The tensors are contiguous: SampledImages samples its pixels in place. Missing labels are -1."""
        path = self.folder / "own.npz"
        np.savez_compressed(path, train_images=np.asfortranarray(own_images(200)), test_images=own_images(100)[::-1])
        train_images, train_labels, test_images, _ = load_file(str(path))
        self.assertTrue(torch.equal(train_images, torch.from_numpy(own_images(200))))
        self.assertTrue(torch.equal(test_images, torch.from_numpy(own_images(100)).flip(0)))
        self.assertTrue(train_images.is_contiguous())
        self.assertEqual((train_labels.unique().tolist(), len(train_labels)), ([-1], 200))

    def test_invalid_arrays_are_errors_of_one_line(self):
        images, test_labels = own_images(200), np.arange(100)
        for arrays, words in [
            ({"train_images": None}, "it lacks train_images"),
            ({"train_images": images.astype(np.float32)}, "train_images is float32"),
            ({"train_images": images[..., None]}, r"train_images is uint8 of shape \[200, 20, 14, 1\]"),
            ({"train_images": images[:, :0]}, r"of shape \[200, 0, 14\]"),
            ({"train_images": images[:99]}, "train_images has 99 images, and must have 100 or more"),
            ({"train_images": images // 2}, "no pixel of its train_images is above 127"),
            ({"test_images": own_images(100, 20, 20)}, "of 20x14 and of 20x20 pixels"),
            ({"train_labels": np.arange(200)}, "labels of one part alone"),
            ({"train_labels": np.arange(9), "test_labels": test_labels}, r"train_labels is int64 of shape \[9\]"),
            ({"train_labels": np.ones(200), "test_labels": test_labels}, "train_labels is float64"),
            ({"train_labels": np.arange(200) - 1, "test_labels": test_labels}, "train_labels goes from -1 to 198"),
            ({"train_images": np.array([object()] * 200)}, "is no .npz file of plain arrays"),
        ]:
            with self.subTest(words), self.assertRaisesRegex(DataError, words) as caught:
                load_file(str(write_npz(self.folder, **arrays)))
            self.assertNotIn("\n", str(caught.exception))

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
            with self.subTest(name), self.assertRaisesRegex(DataError, "own.npz is no .npz file of plain arrays"):
                load_file(str(path))
        for member in [b"", b"text", b"\x93NUMPY\1\0\x76\0{'descr': 'uint8'}", b"\x93NUMPY\1\0\x76\0" + bytes(118)]:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("train_images.npy", member)
            with self.subTest(member), self.assertRaisesRegex(DataError, "own.npz is (no .npz file|invalid)"):
                load_file(str(path))

    def test_a_file_that_has_changed_is_an_error(self):
        """The run has kept its checksum before it loads the images."""
        path = write_npz(self.folder)
        with opened(path) as file:
            sha256 = checksum(file)
        load_file(str(path), sha256)
        write_npz(self.folder, test_images=own_images(101))
        with self.assertRaisesRegex(DataError, "own.npz has changed since the command began: give the same"):
            load_file(str(path), sha256)

    def test_too_little_memory_is_an_error(self):
        path = write_npz(self.folder)
        error = self.assertRaisesRegex(DataError, "memory is too small for .*own.npz, or it is damaged .*Unable to")
        with mock.patch.object(np, "ascontiguousarray", side_effect=MemoryError("Unable to allocate 9 GiB")), error:
            load_file(str(path))

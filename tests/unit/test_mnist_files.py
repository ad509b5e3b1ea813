"""Tests of sources/mnist_files.py: `python -m unittest tests/unit/test_mnist_files.py`."""

import contextlib
import errno
import gzip
import io
import os
import shutil
import socket
from pathlib import Path
from unittest import mock

import torch

from harness.errors import DataError
from sources import mnist_files
from sources.mnist_files import KINDS, load_mnist
from tests.helpers import SeededTest
from tests.helpers.fake_data import idx, known_files, known_resources, mirror, small_mnist

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = mnist_files.FILES


class FilesTest(SeededTest):
    """Base class of tests with a small mock of MNIST, or of a relative: 60 training images and 10 test images."""

    kind = "mnist"

    def setUp(self):
        self.raw = self.folder / KINDS[self.kind].__name__ / "raw"
        self.content, self.packed, self.images, self.labels = small_mnist()
        self.enter(mock.patch.object(mnist_files, "FILES", known_files(self.content)))
        for kind in KINDS.values():
            self.enter(mock.patch.object(kind, "mirrors", []))  # no test connects to the real ones

    def parts(self):
        """Returns the four tensors that load_mnist should return."""
        return [self.images[:60], self.labels[:60], self.images[60:], self.labels[60:]]

    def write(self, changes=()):
        """Writes the four files; `changes` is a dict from name to another content."""
        self.raw.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.content, **dict(changes)}.items():
            (self.raw / name).write_bytes(content)

    @contextlib.contextmanager
    def mirror(self, write=None, packed=None):
        """Context manager that runs a mock mirror, which may have wrong files. Yields the names of requested files."""
        known = known_resources(self.packed)
        with (
            mirror(packed or self.packed, write) as (address, requests),
            mock.patch.multiple(KINDS[self.kind], mirrors=[address], resources=known),
        ):
            yield requests

    def load(self, root=None, download=True):
        """Returns the four tensors, and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            return load_mnist(root or self.folder, download, self.kind), output.getvalue()

    def error(self, root=None, download=False):
        """Returns the message of the expected error."""
        with self.assertRaises(DataError) as caught:
            self.load(root, download)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def assert_loaded(self, tensors):
        """Checks that the tensors are those of the mock."""
        self.assertEqual([tensor.dtype for tensor in tensors], [tensor.dtype for tensor in self.parts()])
        self.assertTrue(all(map(torch.equal, tensors, self.parts())))

    def assert_complete(self):
        """Checks that the folder contains only the four files."""
        left = {path.name: path.read_bytes() for path in self.raw.iterdir() if path.name != ".lock"}
        self.assertEqual(left, self.content)

    def change_directory(self):
        """Makes the folder of the files the working directory until the test ends."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.raw)


class TestReading(FilesTest):
    def test_any_mixture_of_packed_and_unpacked_files_is_read(self):
        """A file may also have the wrong extension, or be next to a damaged file. Nothing is written."""
        images, labels, test_images, test_labels = self.content.values()
        in_parts = gzip.compress(test_labels[:9]) + gzip.compress(test_labels[9:])
        for files in [
            {f"{name}.gz": gzip.compress(content, 1, mtime=7) for name, content in self.content.items()},
            {IMAGES: gzip.compress(images), f"{LABELS}.gz": labels, TEST_IMAGES: test_images}
            | {f"{TEST_LABELS}.gz": in_parts},
            {**self.content, IMAGES: images[:99], f"{IMAGES}.gz": gzip.compress(images)},
            {**self.content, f"{IMAGES}.gz": b"<html>"},
        ]:
            with self.subTest(files.keys()), self.mirror() as requests:
                self.raw.mkdir(parents=True)
                for name, content in files.items():
                    (self.raw / name).write_bytes(content)
                tensors, output = self.load()
                self.assert_loaded(tensors)
                self.assertEqual((requests, output), ([], ""))
                self.assertEqual({path.name: path.read_bytes() for path in self.raw.iterdir()}, files)
            shutil.rmtree(self.raw)

    def test_the_data_directory_may_be_given_in_several_ways(self):
        self.write()
        self.change_directory()
        home = str(self.folder.parent)
        with mock.patch.dict(os.environ, HOME=home, USERPROFILE=home):
            for root in [self.folder, str(self.folder), "../..", f"~/{self.folder.name}"]:
                with self.subTest(root):
                    self.assert_loaded(self.load(root, download=False)[0])

    def test_damaged_files_are_errors_that_name_the_file_and_the_reason(self):
        """Nothing is downloaded to replace them."""
        good, labels, twin, test_labels = self.content.values()
        for problem, changes in [
            ("bytes instead of 47,056 (truncated?)", {IMAGES: good[:-100]}),
            ("begins with the number 2049 instead of 2051", {IMAGES: b"\0\0\x08\x01" + good[4:]}),
            ("cannot be unpacked", {IMAGES: b"\x1f\x8b" + good[2:]}),
            ("MD5 checksum is", {IMAGES: good[:-1] + b"\x01"}),
            (f"contains {TEST_IMAGES} of MNIST (files swapped?)", {IMAGES: twin}),
            (f"contains {TEST_LABELS} of MNIST (files swapped?)", {LABELS: test_labels, TEST_LABELS: labels}),
        ]:
            with self.subTest(problem), self.mirror() as requests:
                self.write(changes)
                error = self.error(download=True)
                self.assertIn(f"{self.raw / next(iter(changes))} is not a valid file of MNIST: ", error)
                self.assertIn(problem, error)
                self.assertIn("Delete or move this file, and it is downloaded again", error)
                self.assertEqual(requests, [])

    def test_a_file_that_cannot_be_read_is_an_error(self):
        self.write()
        denied = PermissionError(errno.EACCES, "Permission denied")
        with mock.patch.object(Path, "read_bytes", side_effect=denied), self.mirror() as requests:
            self.assertIn(
                "is not a valid file of MNIST: it cannot be read (Permission denied)", self.error(download=True)
            )
        self.assertEqual(requests, [])

    def test_missing_files_are_an_error_that_says_what_to_do(self):
        """Nothing is downloaded or written if download is False."""
        with self.mirror() as requests:
            error = self.error()
        for part in [f"not complete in {self.raw}", *self.content, "download is switched off", "--dataset rendered"]:
            self.assertIn(part, error)
        self.assertEqual((requests, self.raw.exists()), ([], False))
        self.write()
        (self.raw / TEST_LABELS).unlink()
        # The download fails, because there is no mirror
        self.assertIn(f"missing files: 1 of 4 ({TEST_LABELS})", self.error(download=True))


class TestHints(FilesTest):
    """Tests that errors list the files that were found but not used, with the reasons."""

    def test_files_with_the_right_name_are_listed_with_what_is_wrong(self):
        """They do not prevent a download."""
        self.raw.mkdir(parents=True)
        (self.raw / f"{IMAGES}.gz").write_bytes(b"\n<!DOCTYPE html>\n<html>")
        (self.raw / f"{LABELS}.gz").write_bytes(self.packed[f"{LABELS}.gz"][:-20])
        (self.raw / TEST_IMAGES).symlink_to(self.folder / "gone")
        (self.raw / f"{TEST_LABELS}.gz").mkdir()
        error = self.error()
        for part in [
            f"{IMAGES}.gz (it is a text file that begins with '<!DOCTYPE html> <html>'",
            f"{LABELS}.gz (it cannot be unpacked",
            f"{TEST_IMAGES} (it cannot be read (No such file or directory))",
            f"{TEST_LABELS}.gz (it is a folder (move the file in it up one level))",
        ]:
            self.assertIn(part, error)
        with self.mirror():
            self.assert_loaded(self.load()[0])

    def test_files_with_other_names_are_listed_with_the_right_name(self):
        """They are found by their content, packed or not. Files to be renamed are listed first."""
        self.raw.mkdir(parents=True)
        (self.raw / "train-images-idx3-ubyte(1).gz").write_bytes(self.packed[f"{IMAGES}.gz"])
        (self.raw / "labels").write_bytes(self.content[LABELS])
        for number in range(20):
            (self.raw / f"{number}.txt").touch()
        error = self.error()
        self.assertIn(f"train-images-idx3-ubyte(1).gz (rename it to {IMAGES})", error)
        self.assertIn(f"labels (rename it to {LABELS})", error)
        self.assertIn(" and 18 more. Run", error)

    def test_a_folder_with_the_name_of_a_file_is_an_error(self):
        """Kaggle's archive contains such folders. A download cannot replace a folder."""
        for name in self.content:
            (self.raw / name).mkdir(parents=True)
        with self.mirror() as requests:
            self.assertIn(
                f"{self.raw / IMAGES} is not a valid file of MNIST: it is a folder (move the file in it up one level)",
                self.error(download=True),
            )
        self.assertEqual(requests, [])

    def test_archives_are_listed_with_the_hint_to_unpack_them(self):
        self.raw.mkdir(parents=True)
        for path in [self.folder / "MNIST.zip", self.folder / "mnist.tar.gz"]:
            path.write_bytes(b"PK")
            self.assertIn(f"Found but not used: {path.name} (unpack it)", self.error())
            path.unlink()

    def test_a_data_directory_that_is_too_deep_is_an_error(self):
        """MNIST and MNIST/raw are not data directories. Nothing is downloaded into them."""
        self.write()
        self.change_directory()
        parent = Path(os.getcwd()).parents[1]
        with self.mirror() as requests:
            for root in [self.raw, f"{self.raw.parent}/", ".", Path(".."), "../raw"]:
                with self.subTest(root):
                    self.assertRegex(self.error(root, download=True), f"MNIST/raw below .*: give --data_dir {parent}$")
        self.assertEqual(requests, [])


class TestDownload(FilesTest):
    def test_only_missing_files_are_downloaded(self):
        """The files are then complete. A broken link is replaced."""
        with self.mirror() as requests:
            tensors, output = self.load()
            self.assert_loaded(tensors)
            self.assertEqual((set(requests), output), ({*self.packed}, f"Downloading MNIST to {self.raw}\n"))
            self.assert_complete()
            requests.clear()
            self.assertEqual(self.load()[1], "")
            (self.raw / TEST_LABELS).unlink()
            (self.raw / TEST_LABELS).symlink_to(self.folder / "gone")
            self.load()
        self.assertEqual(set(requests), {f"{TEST_LABELS}.gz"})
        self.assert_complete()

    def test_a_mirror_that_never_answers_is_an_error(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch.object(mnist_files, "TIMEOUT", 0.2):
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            with mock.patch.object(KINDS["mnist"], "mirrors", [address]):
                self.assertIn("timed out", self.error(download=True))
        self.assertIsNone(socket.getdefaulttimeout())

    def test_a_failed_download_leaves_no_files(self):
        login = {**self.packed, f"{IMAGES}.gz": b"<html>\n<title>Log in"}
        no_space = mock.patch.object(os, "replace", side_effect=OSError(errno.ENOSPC, "No space left"))
        for words, server, context in [
            ("could not be downloaded (", self.mirror(lambda name, content, answer: answer.write(content[:50])), None),
            (
                f"{IMAGES}.gz: it is a text file that begins with '<html> <title>Log in'",
                self.mirror(packed=login),
                None,
            ),
            ("could not be downloaded ([Errno 28] No space left)", self.mirror(), no_space),
        ]:
            with self.subTest(words), server, context or contextlib.nullcontext():
                self.assertIn(words, self.error(download=True))
                self.assertEqual([path.name for path in self.raw.iterdir()], [".lock"])

    def test_files_are_downloaded_on_a_file_system_without_locks(self):
        """Without a lock, another process may be downloading at the same time: its unfinished files are kept."""
        unfinished = self.raw / ".download_of_another"
        self.enter(mock.patch.object(mnist_files, "PATIENCE", 0.2))
        for number, is_locked in [
            (errno.ENOLCK, True),
            (errno.EACCES, False),
        ]:  # a file replaces the lock, or nothing does
            unfinished.mkdir(parents=True)
            flock = mock.patch("fcntl.flock", side_effect=OSError(number, "No locks available"))
            with self.subTest(errno.errorcode[number]), self.mirror(), flock:
                self.assert_loaded(self.load()[0])
                self.assertEqual(unfinished.exists(), not is_locked)
            shutil.rmtree(self.raw)


class TestRelatives(FilesTest):
    """Tests of Fashion-MNIST: its files have MNIST's names and sizes; only the MD5 of the packed files is known."""

    kind = "fashion"

    def setUp(self):
        super().setUp()
        self.mnist = self.content
        self.images, self.labels = 255 - self.images, 9 - self.labels
        self.content = dict(zip(mnist_files.FILES, map(idx, self.parts())))
        self.packed = {f"{name}.gz": gzip.compress(content) for name, content in self.content.items()}

    def test_fashion_mnist_is_downloaded_and_verified(self):
        self.assertRegex(self.error(), "^FashionMNIST is not complete in .*bmnist.py --dataset fashion")
        damaged = {**self.packed, f"{TEST_LABELS}.gz": gzip.compress(self.mnist[TEST_LABELS], 1)}
        with self.mirror(packed=damaged):
            self.assertRegex(self.error(download=True), f"{TEST_LABELS}.*could not be downloaded")
        with self.mirror() as requests:
            tensors, output = self.load()
        self.assert_loaded(tensors)
        self.assertEqual((output, set(requests)), (f"Downloading FashionMNIST to {self.raw}\n", set(self.packed)))
        self.assert_complete()
        self.assert_loaded(self.load(download=False)[0])
        self.assertFalse((self.folder / "MNIST").exists())

    def test_invalid_files_are_errors(self):
        images, labels = self.content[IMAGES], self.content[TEST_LABELS]
        for problem, changes in [
            ("it has .* bytes instead of .*truncated", {IMAGES: images[:-9]}),
            (f"it contains {IMAGES} of MNIST", {IMAGES: self.mnist[IMAGES]}),
            ("it contains a label above 9", {TEST_LABELS: labels[:-1] + b"\x0a"}),
        ]:
            with self.subTest(problem):
                self.write(changes)
                self.assertRegex(
                    self.error(), f"{next(iter(changes))} is not a valid file of FashionMNIST: .*{problem}"
                )

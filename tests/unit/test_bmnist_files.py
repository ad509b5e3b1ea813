"""Tests of how bmnist.py finds, fetches and checks its files: `python -m unittest tests/unit/test_bmnist_files.py`."""

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from unittest import mock

import torch
from torchvision.datasets import MNIST

import bmnist
from tests.helpers import SeededTest, known_files, mirror, small_mnist

REAL_FILES = bmnist.FILES


class TestFiles(SeededTest):
    """On a small stand-in for MNIST: 60 training images and 10 test images."""

    def setUp(self):
        self.raw = self.folder / "MNIST" / "raw"
        self.content, self.packed, self.images, self.labels = small_mnist()
        for patch in [
            mock.patch.object(bmnist, "FILES", known_files(self.content)),
            mock.patch.object(MNIST, "mirrors", []),  # no test ever asks the real ones
        ]:
            patch.start()
            self.addCleanup(patch.stop)

    def write(self, **changes):
        """Writes the four files, with changes by the beginning of their names (_ for -)."""
        self.raw.mkdir(parents=True, exist_ok=True)
        for name, content in self.content.items():
            (self.raw / name).write_bytes(changes.get(name[: name.index("-idx")].replace("-", "_"), content))

    @contextlib.contextmanager
    def mirror(self, write=None):
        """The stand-in's mirror; the list of the names that it was asked for."""
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in self.packed.items()]
        with (
            mirror(self.packed, write) as (address, requests),
            mock.patch.multiple(MNIST, mirrors=[address], resources=resources),
        ):
            yield requests

    def load(self, **options):
        """The loaders, and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            loaders = bmnist.bmnist(self.folder, **options)
        return loaders, output.getvalue()

    def error(self, download=False, root=None):
        """The line that tells what is wrong."""
        with self.assertRaises(bmnist.DataError) as caught, contextlib.redirect_stdout(io.StringIO()):
            bmnist.bmnist(root or self.folder, download=download)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def assert_complete(self):
        left = {path.name: path.read_bytes() for path in self.raw.iterdir() if path.name != ".lock"}
        self.assertEqual(left, self.content)

    def test_files_of_mnist(self):
        expected = {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        }
        self.assertEqual({name: md5 for name, (md5, _) in REAL_FILES.items()}, expected)

    def test_reads_what_is_there(self):
        self.write()
        for root in [self.folder, str(self.folder)]:
            loaders = bmnist.bmnist(root, batch_size=7)
            train, test = loaders[0].dataset, loaders[2].dataset
            self.assertTrue(torch.equal(train.images, self.images[:60]))
            self.assertTrue(torch.equal(train.labels, self.labels[:60]))
            self.assertTrue(torch.equal(test.images, self.images[60:]))
            self.assertTrue(torch.equal(test.labels, self.labels[60:]))
            self.assertEqual([loader.batch_size for loader in loaders], [7] * 3)

    def test_workers_change_nothing(self):
        self.write()
        batches = []
        for num_workers in [0, 2]:
            torch.manual_seed(3)
            (train_loader, _, _), _ = self.load(batch_size=25, num_workers=num_workers)
            batches.append([imgs for _ in range(2) for imgs, _ in train_loader] + [torch.rand(3)])
        self.assertEqual([len(imgs) for imgs in batches[0]], [25, 25, 10, 25, 25, 10, 3])
        self.assertTrue(all(map(torch.equal, *batches)))

    def test_missing(self):
        for download in [False, True]:
            error = self.error(download)
            for part in [str(self.raw), *bmnist.FILES, "--dataset rendered", "download"]:
                self.assertIn(part, error)
        self.write()
        (self.raw / "t10k-labels-idx1-ubyte").unlink()
        self.assertIn("1 are missing", self.error())

    def test_no_download_where_it_is_switched_off(self):
        with self.mirror() as requests:
            self.assertIn("download is switched off", self.error(download=False))
        self.assertEqual((requests, self.raw.exists()), ([], False))

    def test_errors_are_of_the_world_outside(self):
        """harness.errors.exit_on_error ends a program on them in one line, as on full disks."""
        self.assertTrue(issubclass(bmnist.DataError, OSError))

    def test_damaged_files(self):
        good = self.content["train-images-idx3-ubyte"]
        twin = self.content["t10k-images-idx3-ubyte"]
        for problem, bad in [
            ("truncated", good[:-100]),
            ("truncated", good[:200]),
            ("number", b""),
            ("number", b"\x1f\x8b" + good[2:]),
            ("number", b"\0\0\x08\x01" + good[4:]),
            ("MD5", good[:-1] + b"\x01"),
            ("files swapped", twin),
        ]:
            self.write(train_images=bad)
            error = self.error(download=True)
            self.assertIn(str(self.raw / "train-images-idx3-ubyte"), error)
            self.assertIn(problem, error)
        train_labels, t10k_labels = (self.content[f"{split}-labels-idx1-ubyte"] for split in ["train", "t10k"])
        self.write(train_labels=t10k_labels, t10k_labels=train_labels)
        self.assertIn("train-labels-idx1-ubyte", self.error())

    def test_download(self):
        with self.mirror() as requests:
            _, output = self.load()
            self.assertEqual(len(set(requests)), 4)
            del requests[:]
            self.assertEqual(self.load()[1], "")
            self.assertEqual(requests, [])
        self.assertEqual(output, f"Downloading MNIST to {self.raw}\n")
        self.assert_complete()

    def test_broken_download_leaves_nothing_behind(self):
        with self.mirror(lambda name, content, answer: answer.write(content[:50])):
            self.assertIn("could not be downloaded", self.error(download=True))
        self.assertEqual([path.name for path in self.raw.iterdir()], [".lock"])
        with self.mirror():
            self.load()
        self.assert_complete()

    def test_download_after_a_process_was_killed(self):
        staged = self.raw / ".download" / "MNIST" / "raw"
        staged.mkdir(parents=True)
        for name, content in self.content.items():
            (staged / name).write_bytes(content[:99])
        with self.mirror():
            self.load()
        self.assert_complete()

    def test_mirror_that_never_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch.object(bmnist, "TIMEOUT", 0.2):
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            with mock.patch.object(MNIST, "mirrors", [address]):
                self.assertIn("timed out", self.error(download=True))
        self.assertIsNone(socket.getdefaulttimeout())

    def test_only_missing_files_are_downloaded(self):
        self.write()
        (self.raw / "t10k-labels-idx1-ubyte").unlink()
        (self.raw / "t10k-labels-idx1-ubyte").symlink_to(self.folder / "gone")
        with self.mirror() as requests:
            self.load()
        self.assertEqual(set(requests), {"t10k-labels-idx1-ubyte.gz"})
        self.assert_complete()

    def test_login_page_in_the_place_of_a_download(self):
        self.packed["train-images-idx3-ubyte.gz"] = b"<html>\n<title>Log in"
        with self.mirror(), mock.patch.object(MNIST, "resources", [("train-images-idx3-ubyte.gz", "0" * 32)]):
            error = self.error(download=True)
        self.assertIn("train-images-idx3-ubyte.gz: it is a text that begins with '<html> <title>Log in'", error)
        self.assertEqual([path.name for path in self.raw.iterdir()], [".lock"])

    def test_full_disk(self):
        with self.mirror(), mock.patch.object(os, "replace", side_effect=OSError(errno.ENOSPC, "No space left")):
            self.assertIn("could not be downloaded ([Errno 28] No space left)", self.error(download=True))
        self.assertEqual([path.name for path in self.raw.iterdir()], [".lock"])

    def test_any_mixture_brought_along(self):
        """Packed by whoever, not packed, under the name of the other kind, beside a damaged one; nothing is written."""
        names = list(self.content)
        images, labels, test_images, test_labels = self.content.values()
        for files in [
            {f"{name}.gz": gzip.compress(content, 1, mtime=7) for name, content in self.content.items()},
            {names[0]: images, f"{names[1]}.gz": self.packed[f"{names[1]}.gz"], names[2]: test_images}
            | {f"{names[3]}.gz": gzip.compress(test_labels[:9]) + gzip.compress(test_labels[9:])},
            {names[0]: gzip.compress(images), f"{names[1]}.gz": labels, names[2]: test_images, names[3]: test_labels},
            {**self.content, names[0]: images[:99], f"{names[0]}.gz": gzip.compress(images)},
            {**self.content, f"{names[0]}.gz": b"<html>"},
        ]:
            with self.subTest(files.keys()), self.mirror() as requests:
                self.raw.mkdir(parents=True)
                for name, content in files.items():
                    (self.raw / name).write_bytes(content)
                (train_loader, _, test_loader), output = self.load()
                self.assertTrue(torch.equal(train_loader.dataset.images, self.images[:60]))
                self.assertTrue(torch.equal(test_loader.dataset.labels, self.labels[60:]))
                self.assertEqual((requests, output), ([], ""))
                self.assertEqual({path.name: path.read_bytes() for path in self.raw.iterdir()}, files)
            for path in self.raw.iterdir():
                path.unlink()
            self.raw.rmdir()

    def test_found_and_not_taken(self):
        """It is named with its reason, and does not hinder a download."""
        self.raw.mkdir(parents=True)
        images, labels, test_images, test_labels = bmnist.FILES
        (self.raw / f"{images}.gz").write_bytes(b"\n<!DOCTYPE html>\n<html>")
        (self.raw / f"{labels}.gz").write_bytes(self.packed[f"{labels}.gz"][:-20])
        (self.raw / test_images).symlink_to(self.folder / "gone")
        (self.raw / f"{test_labels}.gz").mkdir()
        error = self.error()
        for part in [
            f"{images}.gz (it is a text that begins with '<!DOCTYPE html> <html>'",
            f"{labels}.gz (it cannot be unpacked",
            f"{test_images} (it is a link to {self.folder / 'gone'}, where there is nothing)",
            f"{test_labels}.gz (it is a folder)",
        ]:
            self.assertIn(part, error)
        with self.mirror():
            self.load()

    def test_archives(self):
        for name in ["MNIST.zip", "mnist.tar.gz"]:
            (self.folder / name).write_bytes(b"PK")
            self.assertIn(f"{name} (unpack it)", self.error())

    def test_files_that_cannot_be_read(self):
        self.write()
        path, read = self.raw / "t10k-labels-idx1-ubyte", Path.read_bytes

        def read_bytes(self):
            if self.name == path.name:
                raise PermissionError(errno.EACCES, "Permission denied")
            return read(self)

        with mock.patch.object(Path, "read_bytes", read_bytes), self.mirror() as requests:
            self.assertIn(f"{path} is not MNIST's: it cannot be read (Permission denied)", self.error(download=True))
            (self.raw / f"{path.name}.gz").write_bytes(self.packed[f"{path.name}.gz"])
            self.load()
        self.assertEqual(requests, [])

    def test_names_of_other_sites(self):
        """As Kaggle has them, found by their content, packed or not; the most useful hints come first."""
        for name, content in self.content.items():
            (self.raw / name).mkdir(parents=True)
            (self.raw / name / name.replace("-idx", ".idx")).write_bytes(content)
        with self.mirror() as requests:
            error = self.error(download=True)
        self.assertEqual(requests, [])  # it could not get its place
        self.assertRegex(error, "train-images-idx3-ubyte is not MNIST's: it is a folder. Mend that or move it away")
        for name in self.content:
            place = self.raw / name / name.replace("-idx", ".idx")
            self.assertIn(f"{place} (move it to {self.raw / name})", error)
            place.rename(self.raw / place.name)
            (self.raw / name).rmdir()
        packed = self.raw / "train-images-idx3-ubyte(1).gz"
        packed.write_bytes(self.packed["train-images-idx3-ubyte.gz"])
        (self.raw / "train-images.idx3-ubyte").unlink()
        for number in range(20):
            (self.raw / f"{number}.txt").touch()
        error = self.error()
        self.assertIn(f"{packed.name} (rename it to train-images-idx3-ubyte)", error)
        self.assertIn("t10k-labels.idx1-ubyte (rename it to t10k-labels-idx1-ubyte) and 20 more. Run", error)
        self.assertLess(len(error), 1_500)

    def test_files_in_another_place(self):
        for place in [self.folder, self.folder / "mnist", self.folder / "raw"]:
            place.mkdir(exist_ok=True)
            for name, content in self.packed.items():
                (place / name).write_bytes(content)
            error = self.error()
            for name in self.content:
                self.assertIn(f"{place / name}.gz (move it to {self.raw / name})", error)
                (place / f"{name}.gz").unlink()

    def test_data_dir_too_deep(self):
        self.write()
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.raw)
        with self.mirror() as requests:
            for root in [self.raw, f"{self.raw.parent}/", ".", Path(".."), "../raw"]:
                self.assertIn(
                    f": give --data_dir {os.path.dirname(os.path.dirname(os.getcwd()))}", self.error(True, root)
                )
            bmnist.bmnist("../..")
            with mock.patch.dict(os.environ, HOME=str(self.folder.parent), USERPROFILE=str(self.folder.parent)):
                bmnist.bmnist(f"~/{self.folder.name}")
        self.assertEqual(requests, [])

    def test_file_system_without_locks(self):
        """Each process downloads by itself, at the same time, and the result is the same."""
        both_ask = threading.Barrier(2, timeout=60)
        asked = []

        def write(name, content, answer):
            asked.append(name)
            if asked.count(name) <= 2 and "train-images" in name:
                both_ask.wait()
            answer.write(content)

        for number in [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524]:
            asked.clear()
            with self.mirror(write), mock.patch("fcntl.flock", side_effect=OSError(number, "No locks available")):
                self.load_in_processes(2)
            self.assert_complete()
            for path in self.raw.iterdir():
                path.unlink()

    def test_eight_processes_at_once(self):
        with self.mirror() as requests:
            self.load_in_processes(8)
        self.assertEqual({requests.count(name) for name in requests}, {requests.count(requests[0])})
        self.assertLess(len(requests), 9)  # one process asked (twice per file: torchvision looks for redirections)
        self.assert_complete()

    def load_in_processes(self, number):
        """Loads in so many processes at once."""
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=self.load_in_a_process) for _ in range(number)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        self.assertEqual([process.exitcode for process in processes], [0] * number)

    def load_in_a_process(self):
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        (train_loader, _, _), _ = self.load()
        if not torch.equal(train_loader.dataset.images, self.images[:60]):
            sys.exit(3)

    def command(self, folder, **loads):
        """What `python bmnist.py` printed on a terminal that knows ASCII alone, and its exit code or last line."""
        before, output = signal.getsignal(signal.SIGTERM), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        load = functools.partial(bmnist.bmnist, train_size=50)
        with (
            mock.patch.object(sys, "argv", ["bmnist.py", "--data_dir", str(folder)]),
            mock.patch.multiple(
                bmnist, TRAIN_SIZES=[50], NUM_VAL=10, bmnist=mock.Mock(**{"side_effect": load, **loads})
            ),
            contextlib.redirect_stdout(output),
        ):
            code = None
            try:
                bmnist.main()
            except SystemExit as end:
                code = end.code
            finally:
                signal.signal(signal.SIGTERM, before)
        output.flush()
        return output.buffer.getvalue().decode(), code

    def test_command(self):
        self.write()
        other = self.folder / "здесь 数据"
        other.mkdir()
        self.raw.parent.rename(other / "MNIST")
        output, code = self.command(other)
        ink = (self.images[:50] > 127).float().mean().item()
        self.assertRegex(output, rf"\\u0437.*verified\ntrain +50 images +ink {ink:.2%}\nvalidation +10 images")
        self.assertIsNone(code)
        (other / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"nonsense")
        self.assertIn("t10k-images-idx3-ubyte is not MNIST", self.command(other)[1])

    def test_command_interrupted(self):
        self.assertEqual(self.command(self.folder, side_effect=KeyboardInterrupt), ("", "bmnist.py: interrupted"))

        def terminate(root, kind):
            signal.raise_signal(signal.SIGTERM)

        with mock.patch.object(sys, "__stderr__", io.StringIO()) as stderr:
            self.assertEqual(self.command(self.folder, side_effect=terminate), ("", 128 + signal.SIGTERM))
        self.assertEqual(stderr.getvalue(), "bmnist.py: terminated\n")

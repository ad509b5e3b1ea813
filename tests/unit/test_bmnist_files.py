"""Tests of how bmnist.py finds, fetches and checks its files: `python -m unittest tests/unit/test_bmnist_files.py`."""

import contextlib
import functools
import hashlib
import io
import multiprocessing
import socket
import sys
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

    def error(self, download=False):
        with self.assertRaises(bmnist.DataError) as caught:
            self.load(download=download)
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
        """harness.program.ending ends a program on them in one line, as on full disks."""
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

    def test_packed_files_brought_along(self):
        self.raw.mkdir(parents=True)
        with self.mirror() as requests:
            for name, content in self.packed.items():
                (self.raw / name).write_bytes(content)
            self.load()
        self.assertEqual(requests, [])

    def test_eight_processes_at_once(self):
        context = multiprocessing.get_context("fork")
        with self.mirror() as requests:
            processes = [context.Process(target=self.load_in_a_process) for _ in range(8)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
                process.kill()
        self.assertEqual([process.exitcode for process in processes], [0] * 8)
        self.assertEqual({requests.count(name) for name in requests}, {requests.count(requests[0])})
        self.assertLess(len(requests), 9)  # one process asked (twice per file: torchvision looks for redirections)
        self.assert_complete()

    def load_in_a_process(self):
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
        (train_loader, _, _), _ = self.load()
        if not torch.equal(train_loader.dataset.images, self.images[:60]):
            sys.exit(3)

    def test_command(self):
        self.write()
        with (
            mock.patch.object(sys, "argv", ["bmnist.py", "--data_dir", str(self.folder)]),
            mock.patch.multiple(
                bmnist, TRAIN_SIZES=[50], NUM_VAL=10, bmnist=functools.partial(bmnist.bmnist, train_size=50)
            ),
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            bmnist.main()
        ink = (self.images[:50] > 127).float().mean().item()
        self.assertRegex(output.getvalue(), rf"verified\ntrain +50 images +ink {ink:.2%}\nvalidation +10 images")
        self.write(t10k_images=b"nonsense")
        with (
            self.assertRaises(SystemExit) as caught,
            mock.patch.object(sys, "argv", ["x", f"--data_dir={self.folder}"]),
        ):
            bmnist.main()
        self.assertIn("t10k-images-idx3-ubyte is not MNIST", caught.exception.code)

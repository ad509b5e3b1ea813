"""Tests of bmnist.py and of downloads by several processes: `python -m unittest tests/programs/test_download.py`."""

import contextlib
import threading

import numpy as np
from PIL import Image

from sources import mnist_files
from tests.helpers import REPOSITORY, CommandTest
from tests.helpers.fake_data import (
    known_files,
    known_resources,
    mirror,
    mock_mnist_code,
    own_images,
    small_mnist,
    write_npz,
)


class TestDownload(CommandTest):
    def setUp(self):
        self.content, packed, _, _ = small_mnist()
        self.stalled, self.go_on = threading.Event(), threading.Event()
        server = contextlib.ExitStack()
        self.addCleanup(server.close)
        address, _ = server.enter_context(mirror(packed, self.write))
        code = mock_mnist_code(address, known_resources(packed), known_files(self.content))
        self.program = f"{code}print(len(bmnist.bmnist('data')[0].dataset))"

    def write(self, name, content, file):
        """Sends a file. In the middle of the test labels, waits until `go_on` is set."""
        half = len(content) // 2  # the labels have fewer than 40 bytes
        file.write(content[:half])
        if "t10k-labels" in name:
            self.stalled.set()
            self.go_on.wait(60)
        with contextlib.suppress(ConnectionError):  # the client was killed
            file.write(content[half:])

    def start_program(self):
        """Starts a process that downloads the mock of MNIST."""
        return self.start("-c", self.program, PYTHONPATH=str(REPOSITORY))

    def assert_complete(self):
        """Asserts that the folder contains the four files and nothing else."""
        folder = self.folder / "data" / "MNIST" / "raw"
        left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        self.assertEqual(left, self.content)

    def test_one_of_several_processes_downloads(self):
        """The other processes wait for the download."""
        self.go_on.set()
        processes = [self.start_program() for _ in range(4)]
        outputs = [process.communicate(timeout=300) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * 4, outputs)
        self.assertEqual(sum("Downloading" in stdout for stdout, _ in outputs), 1)
        self.assert_complete()

    def test_a_killed_download_leaves_no_file(self):
        """The next process downloads all files, and removes the unfinished ones."""
        process = self.start_program()
        self.assertTrue(self.stalled.wait(60))
        process.kill()
        process.communicate()
        self.go_on.set()
        self.assertEqual([name for name in mnist_files.FILES if (self.folder / "data/MNIST/raw" / name).exists()], [])
        stdout, stderr = self.start_program().communicate(timeout=120)
        self.assertEqual((stdout.splitlines()[-1], stderr), ("60", ""))
        self.assert_complete()


class TestCheck(CommandTest):
    def check(self, dataset):
        """Runs bmnist.py. Returns its exit code, stdout and stderr."""
        return self.run_command("bmnist.py", "--dataset", dataset)

    def files(self):
        """Returns the names of the files in the test's folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def test_your_own_file_is_checked_and_shown(self):
        """A second check replaces the picture."""
        labels = dict(train_labels=np.arange(200) // 50, test_labels=np.arange(100) % 4)
        write_npz(self.folder, train_images=np.stack([own_images(200)] * 3, axis=-1), **labels)
        for _ in range(2):
            code, stdout, stderr = self.check("own.npz")
            self.assertEqual((code, stderr), (0, ""))
            head, train, val, test, classes, picture = stdout.splitlines()
            reading = "180 training images of 20x14, validation set: the next 20 images, RGB converted to grey"
            self.assertEqual(head, f"own.npz, {reading}")
            self.assertRegex(train, r"^train          180 images  \d+\.\d\d% of the pixels are 1$")
            self.assertRegex(val, r"^validation      20 images  \d+\.\d\d% of the pixels are 1$")
            self.assertRegex(test, r"^test           100 images  \d+\.\d\d% of the pixels are 1$")
            self.assertEqual(classes, "labels      4 classes, from 0 to 3")
            self.assertTrue(picture.endswith(": own_grid.png"), picture)
            self.assertEqual(self.files(), ["own.npz", "own_grid.png"])
            with Image.open(self.folder / "own_grid.png") as grid:
                self.assertEqual((grid.format, grid.size), ("PNG", (8 * 16 + 2, 8 * 22 + 2)))

    def test_an_error_is_one_line_and_leaves_no_file(self):
        write_npz(self.folder, "few.npz", train_images=own_images(9))
        write_npz(self.folder)
        (self.folder / "own_grid.png").mkdir()
        before = self.files()
        for dataset, code, words in [
            ("cifar", 2, "--dataset must be one of mnist, fashion, kmnist, rendered, or the path of an .npz file"),
            ("few.npz", 1, "few.npz is invalid: its train_images has 9 images"),
            ("nothing.npz", 1, "nothing.npz cannot be read (No such file or directory): give"),
            ("own.npz", 1, "cannot write own_grid.png"),
        ]:
            with self.subTest(dataset):
                self.assert_one_line(self.check(dataset), code, "bmnist.py: error: ", words)
                self.assertEqual(self.files(), before)

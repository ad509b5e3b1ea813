"""Several processes that download a stand-in for MNIST: `python -m unittest tests/programs/test_download.py`."""

import contextlib
import threading

from sources import mnist_files
from tests.helpers import REPOSITORY, CommandTest
from tests.helpers.fake_data import known_files, known_resources, mirror, small_mnist, stand_in_code


class TestDownload(CommandTest):
    def setUp(self):
        self.content, packed, _, _ = small_mnist()
        self.stalled, self.go_on = threading.Event(), threading.Event()
        server = contextlib.ExitStack()
        self.addCleanup(server.close)
        address, _ = server.enter_context(mirror(packed, self.write))
        code = stand_in_code(address, known_resources(packed), known_files(self.content))
        self.program = f"{code}print(len(bmnist.bmnist('data')[0].dataset))"

    def write(self, name, content, file):
        """Stops in the middle of the test labels, until the mirror may go on."""
        half = len(content) // 2  # the labels are fewer than 40 bytes
        file.write(content[:half])
        if "t10k-labels" in name:
            self.stalled.set()
            self.go_on.wait(60)
        with contextlib.suppress(ConnectionError):  # the client was killed
            file.write(content[half:])

    def start_program(self):
        """Starts a process that downloads."""
        return self.start("-c", self.program, PYTHONPATH=str(REPOSITORY))

    def assert_complete(self):
        """The folder has the four files and nothing else."""
        folder = self.folder / "data" / "MNIST" / "raw"
        left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        self.assertEqual(left, self.content)

    def test_one_of_several_processes_downloads(self):
        """The others wait for it."""
        self.go_on.set()
        processes = [self.start_program() for _ in range(4)]
        outputs = [process.communicate(timeout=300) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * 4, outputs)
        self.assertEqual(sum("Downloading" in stdout for stdout, _ in outputs), 1)
        self.assert_complete()

    def test_a_killed_download_leaves_no_file(self):
        """The next process downloads all files, and removes what the first one left."""
        process = self.start_program()
        self.assertTrue(self.stalled.wait(60))
        process.kill()
        process.communicate()
        self.go_on.set()
        self.assertEqual([name for name in mnist_files.FILES if (self.folder / "data/MNIST/raw" / name).exists()], [])
        stdout, stderr = self.start_program().communicate(timeout=120)
        self.assertEqual((stdout.splitlines()[-1], stderr), ("60", ""))
        self.assert_complete()

"""
Processes that download a small stand-in for MNIST from a local server: `python -m unittest
tests/programs/test_download.py`.
"""

import contextlib
import hashlib
import threading
import unittest

import bmnist
from tests.helpers import REPOSITORY, CommandTest, known_files, mirror, small_mnist, stand_in_code


class TestDownload(CommandTest):
    def setUp(self):
        self.content, packed, _, _ = small_mnist()
        self.stalled, self.go_on = threading.Event(), threading.Event()
        server = contextlib.ExitStack()
        self.addCleanup(server.close)
        address, _ = server.enter_context(mirror(packed, self.write))
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
        self.program = (
            stand_in_code(address, resources, known_files(self.content))
            + "print(len(bmnist.bmnist('data')[0].dataset))"
        )

    def write(self, name, content, file):
        """The mirror stops in the middle of the test labels, until it may go on."""
        half = len(content) // 2  # the labels are fewer than 40 bytes
        file.write(content[:half])
        if "t10k-labels" in name:
            self.stalled.set()
            self.go_on.wait(60)
        with contextlib.suppress(ConnectionError):  # the client was killed
            file.write(content[half:])

    def start_program(self):
        """A process that downloads."""
        return self.start("-c", self.program, PYTHONPATH=str(REPOSITORY))

    def assert_complete(self):
        folder = self.folder / "data" / "MNIST" / "raw"
        left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        self.assertEqual(left, self.content)

    def test_eight_processes_at_once(self):
        self.go_on.set()
        processes = [self.start_program() for _ in range(8)]
        outputs = [process.communicate(timeout=300) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * 8, outputs)
        self.assertEqual(sum("Downloading" in stdout for stdout, _ in outputs), 1)
        self.assert_complete()

    def test_killed_while_it_downloads(self):
        process = self.start_program()
        self.assertTrue(self.stalled.wait(60))
        process.kill()
        process.communicate()
        self.go_on.set()
        self.assertEqual([name for name in bmnist.FILES if (self.folder / "data/MNIST/raw" / name).exists()], [])
        stdout, stderr = self.start_program().communicate(timeout=120)
        self.assertEqual((stdout.splitlines()[-1], stderr), ("60", ""))
        self.assert_complete()


if __name__ == "__main__":
    unittest.main()

"""Tests of harness/files.py: `python -m unittest tests/unit/test_files.py`."""

import contextlib
import errno
import io
import json
import os
from pathlib import Path
from unittest import mock

from harness.errors import FREE_SPACE_HINT, DiskFullError, Terminated, UserError
from harness.files import LOCK, LOCKS_UNSUPPORTED, UNFINISHED, atomic_write, folder_lock, read_results
from tests.helpers import Killed, SeededTest


class TestAtomicWrite(SeededTest):
    def setUp(self):
        super().setUp()
        self.path, self.before = self.folder / "file", self.folder / "before"
        self.path.write_text("old")

    def contents(self):
        """Returns a dict from the name of each file in the folder to its content."""
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def write(self, text, **options):
        """Writes the file atomically."""
        with atomic_write(self.path, **options) as unfinished:
            Path(unfinished).write_text(text)

    def test_a_file_is_renamed_once_it_is_complete(self):
        for path in [self.path, str(self.folder / "new")]:
            before = self.contents()
            with atomic_write(path) as unfinished:
                Path(unfinished).write_text("new")
                self.assertEqual(self.contents(), {**before, f"{os.path.basename(path)}{UNFINISHED}": "new"})
        self.assertEqual(self.contents(), {"file": "new", "new": "new"})

    def test_after_an_error_or_a_kill_the_previous_file_remains(self):
        """After an error, Ctrl-C or SIGTERM, the unfinished file is removed at once; after a kill, by the next run."""
        for raised, expected in [
            (OSError(5, "No disk"), UserError),
            *((kind(), kind) for kind in [ValueError, KeyboardInterrupt, Terminated, Killed]),
        ]:
            with self.subTest(repr(raised)):
                with self.assertRaises(expected), atomic_write(self.path, keep_as=self.before) as unfinished:
                    Path(unfinished).write_text("hal")
                    raise raised
                left = {} if not isinstance(raised, Killed) else {f"file{UNFINISHED}": "hal"}
                self.assertEqual(self.contents(), {"file": "old", **left})
        self.write("new")  # replaces the unfinished file of the killed process
        self.assertEqual(self.contents(), {"file": "new"})

    def test_an_error_message_names_the_file_and_the_reason(self):
        full = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]
        for number in [*full, errno.EIO]:
            with self.subTest(os.strerror(number)):
                with self.assertRaises(UserError) as caught, atomic_write(self.path):
                    raise OSError(number, os.strerror(number))
                message = f"cannot write {self.path} ({os.strerror(number)})"
                self.assertEqual(str(caught.exception), f"{message}; {FREE_SPACE_HINT}" if number in full else message)
                self.assertEqual(isinstance(caught.exception, DiskFullError), number in full)

    def test_the_previous_file_can_be_kept_under_another_name(self):
        for text in ["new", "newer"]:
            self.write(text, keep_as=self.before)
        self.assertEqual(self.contents(), {"file": "newer", "before": "new"})
        self.path.unlink()
        self.write("newest", keep_as=self.before)  # there is no previous file
        self.assertEqual(self.contents(), {"file": "newest", "before": "new"})

    def test_a_process_killed_between_the_two_renamings_leaves_both_contents(self):
        replace = os.replace

        def die_before_the_second(source, target):
            if target == self.path:
                raise Killed
            replace(source, target)

        with mock.patch.object(os, "replace", die_before_the_second), self.assertRaises(Killed):
            self.write("new", keep_as=self.before)
        self.assertEqual(self.contents(), {"before": "old", f"file{UNFINISHED}": "new"})

    def test_with_sync_the_file_is_on_the_disk_before_it_is_renamed(self):
        synced, fsync = [], os.fsync

        def remember_and_sync(number):
            synced.append((os.fstat(number).st_size, self.path.read_text()))
            fsync(number)

        with mock.patch.object(os, "fsync", remember_and_sync):
            for sync, text in [(False, "new"), (True, "123456")]:
                self.write(text, sync=sync)
                self.assertEqual(self.contents(), {"file": text})
        self.assertEqual(synced, [(6, "new")])


class TestReadResults(SeededTest):
    def test_only_the_results_of_a_finished_run_are_read(self):
        path, good = self.folder / "results.json", {"test_f1": 0.5, "best_val_f1": 1, "hyperparameters": {}}
        self.assertRaises(FileNotFoundError, read_results, self.folder, "f1")
        path.write_text(json.dumps(good))
        self.assertEqual(read_results(self.folder, "f1"), good)
        self.assertRaises(ValueError, read_results, self.folder, "bpd")
        others = [{**good, name: value} for name in ["test_f1", "best_val_f1"] for value in [None, "1", [1], True]]
        others += [{**good, "test_f1": float("nan")}, {**good, "hyperparameters": None}, {"score": 1}, [], {}, 3, None]
        for bad in [b"", bytes(50), b'{"test_f1": 0.1', b"\xff\xfe", b"[" * 100_000, *map(json.dumps, others)]:
            with self.subTest(bad[:60]):
                path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
                self.assertRaises(ValueError, read_results, self.folder, "f1")


class TestFolderLock(SeededTest):
    def test_a_folder_is_used_by_one_process_at_a_time(self):
        message = f"^{self.folder} is in use by another process: wait for it, or choose another --run_name"
        for _ in range(2):
            with folder_lock(self.folder, 0):
                with self.assertRaisesRegex(UserError, message), folder_lock(self.folder, 0.01):
                    self.fail("both have it")
                self.assertEqual([path.name for path in self.folder.iterdir()], [LOCK])

    def test_on_a_file_system_without_locks_a_file_reserves_the_folder(self):
        """Examples are NFS without its lock service, and Lustre without flock."""
        for number in LOCKS_UNSUPPORTED:
            folder = self.folder / str(number)
            folder.mkdir()
            soft = folder / f"{LOCK}.soft"
            with (
                self.subTest(os.strerror(number)),
                mock.patch("fcntl.flock", side_effect=OSError(number, "No locks")),
                contextlib.redirect_stderr(io.StringIO()) as output,
            ):
                message = f"in use by another process: .* delete {soft} if that process has ended"
                for _ in range(2):
                    with folder_lock(folder, 1):
                        self.assertIn(str(os.getpid()), soft.read_text())
                        with self.assertRaisesRegex(UserError, message), folder_lock(folder, 0.01):
                            self.fail("both have it")
                    self.assertFalse(soft.exists())
                line = f"note: {folder} is on a file system without locks: {soft} reserves it for this process instead"
                self.assertEqual(output.getvalue().splitlines(), [line] * 4)

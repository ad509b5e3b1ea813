"""Tests of harness/files.py: `python -m unittest tests/unit/test_files.py`."""

import errno
import os
from pathlib import Path
from unittest import mock

from harness.errors import DiskFullError, UserError
from harness.files import UNFINISHED, atomic_write, write_text
from tests.helpers import Killed, SeededTest


class TestWrittenWhole(SeededTest):
    def setUp(self):
        self.path, self.before = self.folder / "file", self.folder / "before"
        self.path.write_text("old")

    def contents(self):
        """What each file in the folder holds."""
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def test_name_of_its_own_at_the_end(self):
        for path in [self.path, str(self.folder / "new")]:
            with atomic_write(path) as unfinished:
                self.assertEqual(unfinished, f"{path}{UNFINISHED}")
                Path(unfinished).write_text("new")
                self.assertEqual(self.path.read_text(), "old" if path == self.path else "new")
        self.assertEqual(self.contents(), {"file": "new", "new": "new"})

    def test_whole_or_not_at_all(self):
        """After an error half a file goes at once; where the process ends, it goes when the run is continued."""
        for error in [OSError, ValueError, KeyboardInterrupt, Killed]:
            with self.assertRaises(error), atomic_write(self.path, keep_as=self.before) as unfinished:
                Path(unfinished).write_text("hal")
                raise error
            left = {} if issubclass(error, Exception) else {f"file{UNFINISHED}": "hal"}
            self.assertEqual(self.contents(), {"file": "old", **left})
        write_text(self.path, "new")  # in the place of what was left unfinished
        self.assertEqual(self.contents(), {"file": "new"})

    def test_no_room(self):
        """On a full disk, over quota, or above the largest size of a file."""
        for number in [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]:
            with (
                self.assertRaisesRegex(
                    DiskFullError, f"^cannot write {self.path} .{os.strerror(number)}.; make room and"
                ),
                atomic_write(self.path),
            ):
                raise OSError(number, os.strerror(number))

    def test_keep_as(self):
        for text in ["new", "newer"]:
            with atomic_write(self.path, keep_as=self.before) as unfinished:
                Path(unfinished).write_text(text)
        self.assertEqual(self.contents(), {"file": "newer", "before": "new"})
        self.path.unlink()
        with atomic_write(self.path, keep_as=self.before) as unfinished:  # there is none to keep
            Path(unfinished).write_text("newest")
        self.assertEqual(self.contents(), {"file": "newest", "before": "new"})

    def test_killed_between_the_two_names(self):
        """The file that was there before is there by its new name, and the unfinished one is whole."""
        replace, calls = os.replace, []

        def die_the_second_time(source, target):
            calls.append(source)
            if len(calls) == 2:
                raise Killed
            replace(source, target)

        with (
            mock.patch.object(os, "replace", die_the_second_time),
            self.assertRaises(Killed),
            atomic_write(self.path, keep_as=self.before) as unfinished,
        ):
            Path(unfinished).write_text("new")
        self.assertEqual(self.contents(), {"before": "old", f"file{UNFINISHED}": "new"})

    def test_sync(self):
        """All that was written is on the disk before the file gets its name."""
        for sync in [False, True]:
            self.path.write_text("old")
            synced = []

            def fsync(number, synced=synced):
                synced.append((os.fstat(number).st_size, self.path.read_text()))

            with mock.patch.object(os, "fsync", fsync), atomic_write(self.path, sync=sync) as unfinished:
                Path(unfinished).write_text("123456")
            self.assertEqual(synced, [(6, "old")] * sync)
            self.assertEqual(self.contents(), {"file": "123456"})

    def test_sync_does_reach_the_disk(self):
        with atomic_write(self.path, sync=True) as unfinished:
            Path(unfinished).write_text("new")
        self.assertEqual(self.contents(), {"file": "new"})


class TestWriteText(SeededTest):
    def test_text_as_it_is(self):
        path = self.folder / "file"
        for text in ["a,b\r\n1,2\r\n", "a\nb\n", ""]:
            write_text(path, text)
            self.assertEqual(path.read_bytes(), text.encode())
        self.assertEqual([file.name for file in self.folder.iterdir()], ["file"])

    def test_whole_or_not_at_all(self):
        path = self.folder / "file"
        write_text(path, "old")
        with self.assertRaises(TypeError):
            write_text(path, b"no text")
        with self.assertRaisesRegex(UserError, "^cannot write .*no folder/file .No such file or directory.$"):
            write_text(self.folder / "no folder" / "file", "text")
        self.assertEqual(path.read_text(), "old")

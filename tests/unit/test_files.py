"""Tests of harness/files.py: `python -m unittest tests/unit/test_files.py`."""

import contextlib
import errno
import io
import os
from pathlib import Path
from unittest import mock

from harness.errors import MAKE_ROOM, DiskFullError, UserError
from harness.files import LOCK, NO_LOCKS, UNFINISHED, atomic_write, folder_lock, write_text
from tests.helpers import Killed, SeededTest


class TestAtomicWrite(SeededTest):
    def setUp(self):
        super().setUp()
        self.path, self.before = self.folder / "file", self.folder / "before"
        self.path.write_text("old")

    def contents(self):
        """What each file in the folder contains."""
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def test_a_file_gets_its_name_once_it_is_complete(self):
        for path in [self.path, str(self.folder / "new")]:
            before = self.contents()
            with atomic_write(path) as unfinished:
                Path(unfinished).write_text("new")
                self.assertEqual(self.contents(), {**before, f"{os.path.basename(path)}{UNFINISHED}": "new"})
        self.assertEqual(self.contents(), {"file": "new", "new": "new"})

    def test_an_error_or_the_end_of_the_process_leaves_the_file_that_was_there(self):
        """After an error the unfinished file is removed at once; after a kill, when the run resumes."""
        for raised, expected in [(OSError(5, "No disk"), UserError), *((kind(), kind) for kind in [ValueError, Killed])]:
            with self.subTest(repr(raised)):
                with self.assertRaises(expected), atomic_write(self.path, keep_as=self.before) as unfinished:
                    Path(unfinished).write_text("hal")
                    raise raised
                left = {} if isinstance(raised, Exception) else {f"file{UNFINISHED}": "hal"}
                self.assertEqual(self.contents(), {"file": "old", **left})
        write_text(self.path, "new")  # over what was left unfinished
        self.assertEqual(self.contents(), {"file": "new"})

    def test_an_error_says_which_file_cannot_be_written_and_why(self):
        for number, kind, hint in [
            *((number, DiskFullError, f"; {MAKE_ROOM}") for number in [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]),
            *((number, UserError, "") for number in [errno.EIO, errno.EACCES]),
        ]:
            with self.subTest(os.strerror(number)):
                with self.assertRaises(UserError) as caught, atomic_write(self.path):
                    raise OSError(number, os.strerror(number))
                message = f"cannot write {self.path} ({os.strerror(number)}){hint}"
                self.assertEqual((type(caught.exception), str(caught.exception)), (kind, message))

    def test_the_file_of_before_can_be_kept_under_another_name(self):
        for text in ["new", "newer"]:
            with atomic_write(self.path, keep_as=self.before) as unfinished:
                Path(unfinished).write_text(text)
        self.assertEqual(self.contents(), {"file": "newer", "before": "new"})
        self.path.unlink()
        with atomic_write(self.path, keep_as=self.before) as unfinished:  # there is none to keep
            Path(unfinished).write_text("newest")
        self.assertEqual(self.contents(), {"file": "newest", "before": "new"})

    def test_a_process_killed_between_the_two_names_leaves_both_contents(self):
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

    def test_what_is_synced_is_on_the_disk_before_the_file_gets_its_name(self):
        synced, fsync = [], os.fsync

        def remember_and_sync(number):
            synced.append((os.fstat(number).st_size, self.path.read_text()))
            fsync(number)

        with mock.patch.object(os, "fsync", remember_and_sync):
            for sync, text in [(False, "new"), (True, "123456")]:
                with atomic_write(self.path, sync=sync) as unfinished:
                    Path(unfinished).write_text(text)
                self.assertEqual(self.contents(), {"file": text})
        self.assertEqual(synced, [(6, "new")])

    def test_a_text_is_written_as_it_is(self):
        for text in ["a,b\r\n1,2\r\n", "a\nb\n", "ä", ""]:
            write_text(self.path, text)
            self.assertEqual(self.path.read_bytes(), text.encode())
        with self.assertRaisesRegex(UserError, "^cannot write .*no folder/file .No such file or directory.$"):
            write_text(self.folder / "no folder" / "file", "text")
        self.assertEqual(self.contents(), {"file": ""})


class TestFolderLock(SeededTest):
    def test_a_folder_is_one_processs_at_a_time(self):
        for _ in range(2):
            with folder_lock(self.folder, 0):
                with (
                    self.assertRaisesRegex(UserError, f"^{self.folder} is in use by another process: wait for it, or"),
                    folder_lock(self.folder, 0.01),
                ):
                    self.fail("both have it")
                self.assertEqual([path.name for path in self.folder.iterdir()], [LOCK])

    def test_a_folder_that_cannot_be_locked_for_another_reason_is_an_oserror(self):
        with (
            mock.patch("fcntl.flock", side_effect=OSError(errno.EIO, "Input/output error")),
            self.assertRaisesRegex(OSError, "Input/output error"),
            folder_lock(self.folder, 0),
        ):
            self.fail("it is locked")

    def test_on_a_file_system_without_locks_a_file_keeps_the_folder_instead(self):
        """As on NFS without its lock service, on Lustre without flock, and others."""
        for number in NO_LOCKS:
            folder = self.folder / str(number)
            folder.mkdir()
            soft = folder / f"{LOCK}.soft"
            with (
                self.subTest(os.strerror(number)),
                mock.patch("fcntl.flock", side_effect=OSError(number, "No locks")),
                contextlib.redirect_stderr(io.StringIO()) as output,
            ):
                for _ in range(2):
                    with folder_lock(folder, 1):
                        self.assertIn(str(os.getpid()), soft.read_text())
                        with (
                            self.assertRaisesRegex(UserError, f"in use by another process: .* delete {soft} if"),
                            folder_lock(folder, 0.01),
                        ):
                            self.fail("both have it")
                    self.assertFalse(soft.exists())
                line = f"{folder} is on a file system without locks: {soft} keeps it to this process instead"
                self.assertEqual(output.getvalue().splitlines(), [line] * 4)

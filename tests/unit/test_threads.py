"""Tests of harness/threads.py, on cores that are made up: `python -m unittest tests/unit/test_threads.py`."""

import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from harness import threads


class CoresTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.busy = dict.fromkeys(range(4), 0.0)  # seconds, of each core, of all processes
        self.seconds = 100.0
        names = ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"]
        self.enterContext(mock.patch.dict(os.environ))
        for name in names:
            os.environ.pop(name, None)
        for target, name, value in [
            (threads, "STATISTICS", self.folder / "stat"),
            (threads, "PROCESS", self.folder / "self"),
            (threads, "CGROUPS", self.folder / "cgroups"),
            (threads.Cores, "mine", staticmethod(lambda: {0, 1, 3})),
            (threads.time, "monotonic", lambda: self.seconds),
            (threads.os, "times", lambda: (self.seconds - 100, 0.0, 0.0, 0.0, self.seconds)),  # it uses one core
            (torch, "get_num_threads", lambda: 3),
        ]:
            self.enterContext(mock.patch.object(target, name, value))
        self.note = self.enterContext(mock.patch.object(threads, "note"))

    def enterContext(self, context):  # of newer versions of unittest
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def pick(self, seconds, busy, before=None, wanted="auto"):
        """The number of threads after some seconds, in which each core was busy for some of them."""
        self.write_busy(dict.fromkeys(busy, 0.0))
        cores = threads.Cores()
        self.seconds += seconds
        self.write_busy(busy)
        return threads.pick_threads(wanted, before, cores)

    def write_busy(self, busy):
        """Linux's file: user, nice, system, idle, waiting, interrupts, soft ones, stolen, guests."""
        lines = ["cpu  1 2 3 4 5 6 7 8 9 10"]
        ticks = os.sysconf("SC_CLK_TCK")
        lines += [f"cpu{core} {int(busy[core] * ticks)} 0 0 999 99 0 0 0 0 0" for core in sorted(busy)]
        (self.folder / "stat").write_text("\n".join(lines) + "\n")

    def test_idle_cores(self):
        """Of those that the process may run on; it keeps one busy by itself."""
        for busy, idle in [
            ({0: 4, 1: 0, 2: 4, 3: 0}, 3),
            ({0: 4, 1: 4, 2: 0, 3: 0.4}, 2),
            ({0: 2, 1: 2, 2: 0, 3: 1.9}, 3),
            ({0: 4, 1: 4, 2: 4, 3: 4}, 1),
        ]:
            self.note.reset_mock()
            self.assertEqual(self.pick(4, busy), idle, busy)
            expected = [mock.call(f"other programs are busy on {3 - idle} of 3 cores: training with --threads {idle}")]
            self.assertEqual(self.note.mock_calls, expected if idle < 3 else [])

    def test_what_the_user_says(self):
        busy = {0: 4, 1: 4, 2: 4, 3: 4}
        self.assertEqual(self.pick(4, busy, wanted=5), 5)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="3"):
            self.assertEqual(self.pick(4, busy), 3)
        self.assertEqual(self.pick(4, busy, before="cpu, 2 threads"), 2)
        self.assertEqual(self.pick(4, busy, before="cpu, 16 threads"), 3)
        self.assertEqual(self.pick(4, busy, before="NVIDIA H200"), 1)
        with mock.patch.object(torch, "get_num_threads", lambda: 1):  # set in a notebook
            self.assertEqual(self.pick(4, dict.fromkeys(busy, 0.0)), 1)

    def test_many_cores(self):
        busy = dict.fromkeys(range(64), 0.0)
        with (
            mock.patch.object(threads.Cores, "mine", staticmethod(lambda: set(busy))),
            mock.patch.object(torch, "get_num_threads", lambda: 64),
        ):
            self.assertEqual(self.pick(4, {**busy, 5: 4.0}), 8)
            self.assertEqual(self.note.mock_calls, [])

    def test_a_short_look_or_none(self):
        self.assertEqual(self.pick(0.01, {0: 0.01, 1: 0.01, 3: 0.01}), 3)
        (self.folder / "stat").unlink()
        cores = threads.Cores()
        self.seconds += 10
        self.assertEqual(cores.idle(), 3)

    def test_share(self):
        """Of a job, of a container: its group's, or of a group around that; of both versions of control groups."""
        idle = dict.fromkeys(range(4), 0.0)
        for name in ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"]:
            with mock.patch.dict(os.environ, {name: "2"}):
                self.assertEqual(self.pick(4, idle), 2)
        (self.folder / "self").mkdir()
        for text, files, expected in [
            ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 3),
            ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
            ("0::/hidden", {"cpu.max": "50000 100000"}, 1),
            (
                "4:memory:/x\n3:cpu,cpuacct:/x",
                {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000"},
                2,
            ),
            ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
            ("nonsense", {}, 3),
        ]:
            shutil.rmtree(self.folder / "cgroups", ignore_errors=True)
            (self.folder / "self" / "cgroup").write_text(text + "\n")
            for name, content in files.items():
                path = self.folder / "cgroups" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content + "\n")
            self.assertEqual(self.pick(4, idle), expected, text)

    def test_the_number_is_restored(self):
        set_threads = self.enterContext(mock.patch.object(torch, "set_num_threads"))
        with self.assertRaises(ZeroDivisionError), threads.threads_of_run(2, None, None):
            raise ZeroDivisionError
        self.assertEqual(set_threads.mock_calls, [mock.call(2), mock.call(3)])


if __name__ == "__main__":
    unittest.main()

"""Runs the programs of the repository in separate processes."""

import concurrent.futures
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from unittest import mock

import torch

from tests.helpers.common import REPOSITORY, SeededTest
from tests.helpers.runs import results


class CommandTest(SeededTest):
    """Test case that runs programs of the repository in the test's folder."""

    def start(self, *command, **variables):
        """Starts a Python process whose stdout and stderr are pipes."""
        # With several threads, a run may warn of CPU contention on stderr.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        options = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.folder, env=environment, **options)

    def run_command(self, program, *flags, **variables):
        """Runs a program. Returns its exit code, stdout and stderr."""
        process = self.start(REPOSITORY / program, *flags, **variables)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    def run_forked(self, program, *flags, setup=None, **variables):
        """Runs a program in a forked process, which saves the time of the imports. Returns the same as run_command."""
        process = Forked(program, *flags, cwd=self.folder, setup=setup, **variables)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    def train(self, *flags, run=None, **variables):
        """Trains one epoch on rendered digits unless the flags say otherwise. Returns the run's folder and results."""
        flags = ["--dataset", "rendered", "--epochs", "1", *flags]
        code, stdout, stderr = (run or self.run_forked)("train_pl.py", *flags, **variables)
        self.assertEqual((code, stderr), (0, ""))
        folder = self.folder / stdout.splitlines()[-1].removeprefix("run folder ")
        return folder, results(folder)

    def assert_one_line(self, result, code, *parts):
        """Asserts that a command failed with this exit code and one line on stderr, which contains all parts."""
        self.assertEqual((result[0], result[2].count("\n")), (code, 1), result)
        for part in parts:
            self.assertIn(str(part), result[2])


class Forked:
    """
    A program of the repository in a process that is forked from a process with all imports. It has the methods of a
    subprocess.Popen with pipes. The process uses one thread, changes to the folder `cwd`, sets the environment
    `variables`, calls `setup` (a function of a module), and runs the program. Runs with several processes cannot be
    forked, because Lightning starts their processes.
    """

    def __init__(self, program, *flags, cwd, setup=None, **variables):
        context = multiprocessing.get_context("forkserver")
        with mock.patch.dict(os.environ, PYTHONPATH=str(REPOSITORY)):
            context.set_forkserver_preload(["tests.helpers", "train_pl", "evaluate", "pictures.figures"])
            pipes = [context.Pipe(duplex=False) for _ in range(2)]
            writers = [writer for _, writer in pipes]
            words = [program, *map(str, flags)]
            self.process = context.Process(target=run_program, args=(words, str(cwd), setup, variables, *writers))
            self.process.start()
        for writer in writers:
            writer.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes)

    @property
    def returncode(self):
        """Exit code, or minus the number of the signal that ended the process."""
        return self.process.exitcode

    def kill(self):
        """Sends SIGKILL."""
        self.process.kill()

    def communicate(self, timeout=600):
        """Waits for the process, and kills it after `timeout` seconds. Returns the rest of stdout and stderr."""
        killer = threading.Timer(timeout, self.kill)
        killer.daemon = True
        killer.start()
        with self.stdout, self.stderr, concurrent.futures.ThreadPoolExecutor(1) as thread:
            errors = thread.submit(self.stderr.read)
            output = self.stdout.read()
            self.process.join()
        killer.cancel()
        return output, errors.result()


def run_program(words, cwd, setup, variables, stdout, stderr):
    """Runs in a Forked process, and has the effect of `python PROGRAM FLAGS`."""
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in [1, 2])
    os.chdir(cwd)
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # the start method of this process is forkserver
    torch.set_num_threads(1)
    if setup:
        setup()
    sys.argv = [str(REPOSITORY / words[0]), *words[1:]]
    importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main()

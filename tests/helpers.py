"""What several tests share: small data, short runs, what a run leaves, programs in processes of their own."""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import unittest
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)] * (str(REPOSITORY) not in sys.path)

from harness.program import RUNTIME_FLAGS  # noqa: E402

import bmnist  # noqa: E402
import train_pl  # noqa: E402
from harness import graphs, run  # noqa: E402
from sources.rendered_digits import rendered_digits  # noqa: E402

MNIST_DIR = next(
    (path for path in [REPOSITORY.parent / "shared" / "data", REPOSITORY.parent / "data"] if (path / "MNIST").is_dir()),
    None,
)
NO_MNIST = "there is no MNIST in ../shared/data or ../data"
NO_NETWORK = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")  # nobody listens there


torch.set_num_threads(1)  # for so little data a second thread saves nothing, and beside other work it costs a lot


class Killed(BaseException):
    """In the place of SIGKILL; no code of ours or Lightning's goes on after it, but for its clean-up."""


@contextlib.contextmanager
def printed_lines():
    """A context whose output is caught; what it yields is the list of the lines at its end."""
    lines = []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        yield lines
    lines += output.getvalue().splitlines()


class SeededTest(unittest.TestCase):
    """A test that draws the same random numbers, alone or after others, and has a folder of its own."""

    def run(self, result=None):
        torch.manual_seed(0)
        return super().run(result)

    @property
    def folder(self):
        """Path of a folder that is gone after the test."""
        if not hasattr(self, "_folder"):
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            self._folder = Path(folder.name)
        return self._folder


def small_loaders(args, download=True, sampler=None, sizes=(300, 50, 50)):
    """Loaders of rendered digits, as load_data returns them: 300 to train on, 50 to validate, 50 to test."""
    num_train, num_val, num_test = sizes
    images, labels = rendered_digits(sum(sizes))
    test = slice(num_train + num_val, None)
    num_processes = getattr(args, "devices", 1) * getattr(args, "num_nodes", 1)
    with mock.patch.multiple(bmnist, TRAIN_SIZES=[num_train], NUM_VAL=num_val):
        return bmnist.data_loaders(
            *(images, labels, images[test], labels[test]),
            batch_size=args.batch_size // num_processes,
            num_workers=getattr(args, "num_workers", 0),
            binarization=getattr(args, "binarization", "threshold"),
            train_size=num_train,
            sampler=sampler,
        )


def leave_empty_figures(run, test_bpd):
    """In the place of Run.draw_figures, which takes longer than the few epochs of a test."""
    for name in ["bpd_curves.png", "samples_over_training.png"]:
        if not (Path(run.folder) / name).exists():
            (Path(run.folder) / name).touch()


def use_few_digits(sizes=(300, 50, 50)):
    """Makes the programs of this process train on few digits: a setup of a Forked one."""
    import evaluate

    train_pl.load_data = evaluate.load_data = functools.partial(small_loaders, sizes=sizes)


def few_digits(folder, sizes=(300, 50, 50)):
    """Variables of the environment with which a process of Python trains on few digits, and finds the repository."""
    num_train, num_val, num_test = sizes
    (folder / "sitecustomize.py").write_text(  # Python runs it first of all
        "import bmnist, rendered_digits\n"
        "rendered_mnist = rendered_digits.rendered_mnist\n"
        f"rendered_digits.rendered_mnist = lambda num_train: rendered_mnist(num_train, {num_test})\n"
        f"bmnist.TRAIN_SIZES, bmnist.NUM_VAL = [{num_train}], {num_val}\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}


def hold(folder, epoch):
    """Makes the first process of few_digits wait, once it has trained so many epochs, until its folder has `go_on`."""
    with open(folder / "sitecustomize.py", "a") as file:
        file.write(
            "import os, time\n"
            "from harness import report\n"
            "begin_epoch = report.EpochReport.begin_epoch\n"
            "def begin_late(self, trainer):\n"
            f"    while trainer.is_global_zero and trainer.current_epoch == {epoch} and not os.path.exists('go_on'):\n"
            "        time.sleep(0.01)\n"
            "    begin_epoch(self, trainer)\n"
            "report.EpochReport.begin_epoch = begin_late\n"
        )


class TrainingTest(SeededTest):
    """A test that trains on few digits."""

    draws_figures = False  # whether each run draws its figures at the end

    def setUp(self):
        patches = [
            mock.patch.object(train_pl, "load_data", small_loaders),
            mock.patch.object(pywrap_tensorflow, "crc32c", zlib.crc32),  # TensorBoard's, in Python, takes its time
        ]
        if not self.draws_figures:
            patches.append(mock.patch.object(run.Run, "draw_figures", leave_empty_figures))
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def namespace(self, **flags):
        """The flags of the assignment's template and no other."""
        template = dict(model="MLP", z_dim=2, hidden_dims=[16], num_filters=4, lr=1e-3, batch_size=128, epochs=6)
        template.update(seed=42, num_workers=0, log_dir=str(self.folder), progress_bar=False)
        return argparse.Namespace(**{**template, **flags})

    def train(self, **flags):
        """Trains on the CPU, whose results repeat bit for bit; returns the run's folder and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            train_pl.train_vae(self.namespace(**{"accelerator": "cpu", **flags}))
        return self.run_folder(), output.getvalue()

    def run_folder(self):
        """Folder of the newest of the numbered runs."""
        return max((self.folder / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))

    def main(self, *flags):
        """Exit code and the error message of a command."""
        error = io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["train_pl.py", *flags]),
            self.assertRaises(SystemExit) as caught,
            contextlib.redirect_stderr(error),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train_pl.main()
        code = caught.exception.code
        return (1, code) if isinstance(code, str) else (code, error.getvalue())


class GraphTest(TrainingTest):
    """A test that trains by a stand-in for graphs, on a CPU, in Lightning batches of at most 2 minibatches."""

    def setUp(self):
        super().setUp()
        self.captures, self.replays = [], []  # the number of images of each minibatch
        for name, value in [
            ("MINIBATCHES", 2),
            ("has_graphs", lambda device: True),
            ("side_stream", lambda device: contextlib.nullcontext()),
            ("capture", self.capture),
        ]:
            patch = mock.patch.object(graphs, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def capture(self, function, previous):
        """
        In place of graphs.capture, runs a step and undoes what it did to tensors and random numbers, since capturing
        runs nothing. A replay runs it again.
        """
        steps = function.__self__
        model, optimizer = steps.model, steps.trainer.optimizers[0]
        tensors = [*model.parameters(), *model.buffers(), model.train_means.sums]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        tensors = [tensor for tensor in tensors if tensor is not None]
        kept, random_numbers = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
        try:
            function()
        finally:
            torch.set_rng_state(random_numbers)
            with torch.no_grad():
                for tensor, value in zip(tensors, kept):
                    tensor.copy_(value)
        self.captures.append(len(steps.indices))

        def replay():
            self.replays.append(len(steps.indices))
            function()

        return argparse.Namespace(replay=replay)


class NamedRunTest(TrainingTest):
    """A test of the run called `run`, which may stop and be given again."""

    def namespace(self, **flags):
        return super().namespace(**{"run_name": "run", "z_dim": 3, **flags})  # no manifold, which takes its time

    def run_folder(self):
        return self.folder / "run"

    def stop_at(self, owner, name, epoch, **flags):
        """Trains until a method is called while the number of epochs trained is `epoch`, and ends the process there."""
        original, make_trainer, trainers = getattr(owner, name), run.make_trainer, []

        def method(*args, **kwargs):
            if trainers[0].current_epoch == epoch:
                raise Killed
            return original(*args, **kwargs)

        def remember(*args):
            trainers.append(make_trainer(*args))
            return trainers[0]

        with (
            mock.patch.object(owner, name, method),
            mock.patch.object(run, "make_trainer", remember),
            self.assertRaises(Killed),
        ):
            self.train(**flags)

    def contents(self):
        """All files of the run and when they were changed; the lock may be taken and given back."""
        return {
            path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
            for path in [self.run_folder(), *self.run_folder().rglob("*")]
            if path.name != ".lock"
        }


def metrics(folder):
    """The rows of a run's metrics.csv, without the seconds."""
    with open(folder / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def results(folder):
    """What a run's results.json holds."""
    return json.loads((folder / "results.json").read_text())


def load(folder, name):
    """A run's checkpoint `best`, `last` or `previous`."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def summaries(folder):
    """(step, summary) of all that a run's event files hold."""
    events = (event for path in folder.glob("events.out*") for event in EventFileLoader(str(path)).Load())
    return [(event.step, summary) for event in events for summary in event.summary.value]


def scalars_and_images(folder):
    """How often each (tag, step, value) is in a run's event files."""
    return Counter(
        (summary.tag, step, summary.tensor.SerializeToString())
        for step, summary in summaries(folder)
        if summary.metadata.plugin_data.plugin_name in ("scalars", "images")
    )


def what_a_run_left(folder):
    """Everything that must not depend on whether a run was interrupted, by name."""
    left = {
        "metrics.csv": metrics(folder),
        "TensorBoard": scalars_and_images(folder),
        "results.json": {name: value for name, value in results(folder).items() if "seconds" not in name},
        "files": sorted(path.name for path in folder.rglob("*") if "tfevents" not in path.name),
    }
    flags = left["results.json"]["hyperparameters"]
    left["results.json"]["hyperparameters"] = {name: flags[name] for name in flags.keys() - RUNTIME_FLAGS}
    for name in ["best", "last"]:
        checkpoint = load(folder, name)
        adam = [list(state.values()) for state in checkpoint["optimizer_states"][0]["state"].values()]
        state = {**checkpoint["state_dict"], "epoch": checkpoint["epoch"], "step": checkpoint["global_step"]}
        left[name] = {**state, "adam": adam}
    for path in folder.glob("epoch_*.png"):
        left[path.name] = path.read_bytes()
    return left


def assert_left_the_same(test, folder, other, but_for=()):
    """Two runs left the same, to the bit."""
    left, other_left = map(what_a_run_left, [folder, other])
    test.assertEqual(left.keys(), other_left.keys())
    for name in left.keys() - set(but_for):
        if name in ["best", "last"]:
            torch.testing.assert_close(left[name], other_left[name], rtol=0, atol=0)
        else:
            test.assertEqual(left[name], other_left[name], name)


def idx(tensor):
    """The bytes of an IDX file, MNIST's format, of a uint8 tensor."""
    head = (0x0800 + tensor.dim()).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return head + tensor.to(torch.uint8).numpy().tobytes()


def small_mnist(num_train=60, num_test=10):
    """A small stand-in for MNIST: its four files, unpacked, by name; the same packed; and the images and labels."""
    images, labels = rendered_digits(num_train + num_test)
    parts = [images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]]
    content = dict(zip(bmnist.FILES, map(idx, parts)))
    # packed once: gzip writes the time into its header
    packed = {f"{name}.gz": gzip.compress(data) for name, data in content.items()}
    return content, packed, images, labels


def known_files(content):
    """What bmnist.FILES is for a stand-in: MD5 and size by name."""
    return {name: (hashlib.md5(data).hexdigest(), len(data)) for name, data in content.items()}


@contextlib.contextmanager
def mirror(packed, write=None):
    """
    A local HTTP server as MNIST's only mirror.
    Inputs:
        packed - Dict from name to content of the files that it has.
        write - Function of (name, content, file to write the answer to); the default writes all of it.
    Outputs:
        address, requests - Its URL, and the list of the names that it was asked for.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            content = packed.get(name, b"")
            requests.append(name)
            self.send_response(200 if name in packed else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if write:
                write(name, content, self.wfile)
            else:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # sees shutdown at once
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


def use_stand_in(bmnist, address, resources, files, **constants):
    """Makes a bmnist module take a stand-in for MNIST; for a test's process and for others, which load it anew."""
    bmnist.MNIST.mirrors = [address]
    bmnist.MNIST.resources = resources
    bmnist.FILES = files
    vars(bmnist).update(constants)


def stand_in_code(*args, **constants):
    """Lines of Python that import bmnist and make it take the stand-in of use_stand_in: for a process of its own."""
    return f"{inspect.getsource(use_stand_in)}import bmnist\nuse_stand_in(bmnist, *{args}, **{constants})\n"


class CommandTest(SeededTest):
    """A test that runs programs of the repository, in the test's folder."""

    def start(self, *command, **variables):
        """A process of Python; its stdout and stderr are pipes."""
        # With several threads, a run would say on stderr if other programs kept it waiting.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        words = [sys.executable, *map(str, command)]
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run_command(self, program, *flags, **variables):
        """Exit code, stdout and stderr of a program."""
        process = self.start(REPOSITORY / program, *flags, **variables)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    def run_forked(self, program, *flags, setup=None, **variables):
        """The same of a program whose process need not import everything first, which saves seconds."""
        process = Forked(program, *flags, cwd=self.folder, setup=setup, **variables)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    def train(self, *flags, run=None, **variables):
        """Trains one epoch on rendered digits, or what the flags print_line, and returns the run's folder and its results."""
        flags = ["--dataset", "rendered", "--epochs", "1", *flags]
        code, stdout, stderr = (run or self.run_forked)("train_pl.py", *flags, **variables)
        self.assertEqual((code, stderr), (0, ""))
        folder = self.folder / stdout.splitlines()[-1].removeprefix("run folder ")
        return folder, results(folder)

    def assert_one_line(self, result, code, *parts):
        """The command failed with this exit code, and its only line on stderr has all the parts."""
        self.assertEqual((result[0], result[2].count("\n")), (code, 1), result)
        for part in parts:
            self.assertIn(str(part), result[2])


class Forked:
    """
    A program of the repository in a process that is forked from one that has imported everything, like a
    subprocess.Popen with pipes. It computes with one thread. Not for several processes of one run, which Lightning
    starts by itself.
    Inputs:
        program, flags - As on the command line.
        cwd - Folder in which it runs.
        setup - Function that it calls first, or None; of a module, since it is sent by its name.
        variables - What it finds in its environment beside what is there.
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
        """The exit code, or minus the number of the signal that ended it."""
        return self.process.exitcode

    def send_signal(self, number):
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def kill(self):
        """Sends SIGKILL."""
        self.process.kill()

    def communicate(self, timeout=600):
        """What is left of stdout and stderr, once it has ended; it is killed after so many seconds."""
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
    """What a Forked process does: `python PROGRAM FLAGS`."""
    import importlib

    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in [1, 2])
    os.chdir(cwd)
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # that of this process was forkserver
    torch.set_num_threads(1)
    if setup:
        setup()
    sys.argv = [str(REPOSITORY / words[0]), *words[1:]]
    importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main()

"""Tests of harness/settings.py: `python -m unittest tests/unit/test_settings.py`."""

import contextlib
import gc
import io
import logging
import os
import random
import signal
import threading
import warnings
import weakref
from unittest import mock

import numpy as np
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

import train_pl
from harness import run, slurm
from harness.errors import UserError
from harness.settings import QUIET_LOGGERS, process_settings
from tests.helpers import NamedRunTest
from train_pl import VAE

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # signals that our code or Lightning handles


def settings():
    """Returns a dict from a description to the value of a setting of this process."""
    return {
        "tiny numbers": (torch.tensor(1e-40) * 1).item(),
        "threads": torch.get_num_threads(),
        "TensorBoard's threads": [
            thread for thread in threading.enumerate() if "tensorboard" in type(thread).__module__
        ],
        "cuDNN": torch.backends.cudnn.deterministic,
        "warnings": list(warnings.filters),
        "loggers": {name: logging.getLogger(name).level for name in QUIET_LOGGERS},
        "errors of threads": threading.excepthook,
        "environment": dict(os.environ),
        "random numbers": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
    }


def change_settings(flag):
    """Changes all of these settings except for the number of threads, as any program may do."""
    torch.set_flush_denormal(flag)
    torch.backends.cudnn.deterministic = flag
    warnings.simplefilter("always")
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = print
    del os.environ["OF_THE_USER"]
    os.environ.update(ADDED="1", CHANGED="new")
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class TestSettings(NamedRunTest):
    """Tests in a process whose user has changed the settings of Python and torch."""

    def setUp(self):
        super().setUp()
        self.enter(warnings.catch_warnings())
        warnings.filterwarnings("error", message="of the user")
        self.enter(mock.patch.dict(os.environ, OF_THE_USER="1", CHANGED="old"))
        self.errors = []
        self.enter(mock.patch.object(threading, "excepthook", lambda args: self.errors.append(args.exc_type)))
        self.addCleanup(setattr, torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
        self.addCleanup(torch.set_flush_denormal, False)
        for name in QUIET_LOGGERS:
            self.addCleanup(logging.getLogger(name).setLevel, logging.getLogger(name).level)
            logging.getLogger(name).setLevel(logging.DEBUG)
        for number in SIGNALS:
            self.addCleanup(signal.signal, number, signal.signal(number, lambda *_: None))

    def test_all_settings_are_restored_even_if_the_block_changes_them_or_raises_an_error(self):
        for flag in [False, True]:
            torch.set_flush_denormal(flag)
            torch.backends.cudnn.deterministic = flag
            before = settings()
            for error in [None, ZeroDivisionError, KeyboardInterrupt]:
                with self.subTest(error=error, flag=flag):
                    with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt), process_settings():
                        change_settings(not flag)
                        within = settings()
                        if error:
                            raise error
                    self.assertEqual(
                        {name for name in before if within[name] == before[name]},
                        {"threads", "TensorBoard's threads", "random numbers"},
                    )
                    self.assertEqual(settings(), before)

    def test_within_the_block_results_are_deterministic_and_libraries_are_quiet(self):
        warnings.simplefilter("error")
        with process_settings():
            self.assertEqual((settings()["tiny numbers"], settings()["cuDNN"]), (0, True))
            for name in QUIET_LOGGERS:
                self.assertFalse(logging.getLogger(name).isEnabledFor(logging.INFO), name)
            warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck.", stacklevel=2)
            with self.assertRaisesRegex(UserWarning, "of the user"):
                warnings.warn("of the user", stacklevel=2)

    def test_an_error_in_tensorboards_thread_is_raised_by_the_next_log_and_not_printed(self):
        others = threading.enumerate()
        with process_settings(), contextlib.redirect_stderr(io.StringIO()) as output:
            threading.Thread(target=lambda: 1 / 0).start()
            writer, broken = SummaryWriter(str(self.folder)), OSError(5, "Input/output error")
            with mock.patch.object(RecordWriter, "write", side_effect=broken), self.assertRaises(OSError):
                for _ in range(1000):
                    writer.add_scalar("val_bpd", 1.0)
                    writer.flush()
            for thread in {*threading.enumerate()}.difference(others):
                thread.join()
        self.assertEqual((self.errors, output.getvalue()), ([ZeroDivisionError], ""))

    def test_many_runs_in_one_process_need_no_more_memory_than_one_run(self):
        """Images and Trainer of a run refer to each other. They are freed without Python's own garbage collection."""
        images, load_data = [], train_pl.load_data

        def remember(*args, **options):
            loaders = load_data(*args, **options)
            images.append(weakref.ref(loaders[0].dataset))
            return loaders

        self.addCleanup(gc.enable)
        self.enter(mock.patch("harness.settings.COLLECT_AFTER", 0))
        gc.disable()
        with mock.patch.object(train_pl, "load_data", remember), mock.patch.object(run.Run, "make_figures"):
            for number in range(3):
                self.train(epochs=1, run_name=f"run {number}")
                self.assertEqual([image() for image in images[:-1]], [None] * number)

    def test_a_run_restores_all_settings_after_it_has_failed_finished_or_been_refused(self):
        """This is also true for a batch job, which has its own signal handlers while it trains."""
        self.enter(mock.patch.object(slurm, "is_interactive", return_value=False))
        for name, job in [("run", {}), ("run of a job", dict(SLURM_JOB_ID="7", SLURM_NTASKS="1", SLURM_PROCID="0"))]:
            self.enter(mock.patch.dict(os.environ, job))
            before, handlers, run = settings(), [], dict(epochs=1, run_name=name)

            def fail(model, handlers=handlers):
                handlers += map(signal.getsignal, SIGNALS[1:])
                raise ZeroDivisionError

            with mock.patch.object(VAE, "on_train_epoch_end", fail):
                self.assertRaises(ZeroDivisionError, self.train, **run)
            self.assertEqual(settings(), before)
            with mock.patch.object(VAE, "__init__", side_effect=ZeroDivisionError):
                self.assertRaises(ZeroDivisionError, self.train, epochs=1, run_name=f"no {name}")
            self.assertEqual(settings(), before)
            self.assertEqual([handler.__module__ == slurm.__name__ for handler in handlers], [bool(job)] * 2)
            for _ in range(2):  # the second time, the run is finished already
                self.train(**run)
                self.assertEqual(settings(), before)
            self.assertRaises(UserError, self.train, z_dim=4, **run)
            self.assertEqual(settings(), before)

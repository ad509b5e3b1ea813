"""Settings of the whole process during a run or an evaluation, which are restored afterwards."""

import contextlib
import gc
import logging
import os
import signal
import threading
import time
import warnings

import torch

QUIET_LOGGERS = {  # hides start-up notes and tips, and matplotlib's messages about its font cache
    **dict.fromkeys(["pytorch_lightning", "lightning_fabric"], logging.WARNING),
    "matplotlib": logging.ERROR,
}
IGNORED_WARNINGS = [
    ".*does not have many workers.*",  # the images are in memory
    "Checkpoint directory .* exists and is not empty",  # if a run resumes
    "The `srun` command is available",  # also shown on a login node
    "The value of the smallest subnormal",  # NumPy's: subnormal numbers are flushed to 0
    "The AccumulateGrad node's stream",  # DDP's, which does this on purpose
    "Please use the new API settings to control TF32",  # caused by torch itself
    "Synchronization debug mode is a prototype",  # see graphs.py
    "GPU available but not used",  # --accelerator cpu asks for this
]
# Trainers, figures and data refer to each other, so they stay in memory until Python's garbage collection. After a run
# or an evaluation of more than COLLECT_AFTER seconds, the next one starts with a collection, which takes 0.2 s.
COLLECT_AFTER, LAST_DURATION = 1, {"seconds": 0}
SIGNALS = [getattr(signal, name) for name in ["SIGINT", "SIGTERM", "SIGUSR1"] if hasattr(signal, name)]


@contextlib.contextmanager
def process_settings():
    """
    Context manager for a training or an evaluation. In it, subnormal numbers are flushed to 0, results on a GPU are
    bit-identical for the same seed, and libraries print only errors and relevant warnings. At the end, these settings,
    the environment variables, the signal handlers and threading.excepthook are restored, even if the block changed
    them.
    """
    if LAST_DURATION["seconds"] > COLLECT_AFTER:
        gc.collect()
    LAST_DURATION["start"] = time.perf_counter()
    cudnn, levels = torch.backends.cudnn, {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    deterministic, flushed = cudnn.deterministic, (torch.tensor(1e-40) * 1).item() == 0
    environment, excepthook, num_threads = dict(os.environ), threading.excepthook, torch.get_num_threads()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if in_main_thread}

    def report_error_of_thread(args):
        """Reports the error of a thread. Ignores TensorBoard's thread: its error is raised again by the next log."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            excepthook(args)

    try:
        with warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            # Lightning uses names that newer versions of torch deprecate.
            warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning|lightning_fabric")
            for name, level in QUIET_LOGGERS.items():
                logging.getLogger(name).setLevel(level)
            threading.excepthook = report_error_of_thread
            cudnn.deterministic = True
            # For pixels that are rarely 1, Adam's moment estimates become subnormal numbers, which are slow on a CPU.
            torch.set_flush_denormal(True)
            yield
    finally:
        LAST_DURATION["seconds"] = time.perf_counter() - LAST_DURATION["start"]
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(num_threads)  # Lightning changes it if there are several processes
        cudnn.deterministic, threading.excepthook = deterministic, excepthook
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None means set by C code
                signal.signal(number, handler)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)

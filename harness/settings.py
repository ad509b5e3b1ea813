"""Settings of the whole process, during a run or an evaluation; afterwards everything is as it was."""

import contextlib
import gc
import logging
import os
import signal
import threading
import time
import warnings

import torch

QUIET_LOGGERS = {  # start-up notes and tips; how matplotlib is getting on with its font cache
    **dict.fromkeys(["pytorch_lightning", "lightning_fabric"], logging.WARNING),
    "matplotlib": logging.ERROR,
}
IGNORED_WARNINGS = [
    ".*does not have many workers.*",  # the images are in memory
    "Checkpoint directory .* exists and is not empty",  # of a run that resumes
    "The `srun` command is available",  # on a login node, too
    "The value of the smallest subnormal",  # NumPy's: they are switched off
    "The AccumulateGrad node's stream",  # of DDP, which means it so
    "Please use the new API settings to control TF32",  # torch's own
    "Synchronization debug mode is a prototype",  # see graphs.py
    "GPU available but not used",  # --accelerator cpu means it so
]
# Trainers, figures and data refer to each other and wait for Python's garbage collection. After a run or an evaluation
# that took longer than this, in seconds, the next one collects them, which takes 0.2 s.
COLLECT_AFTER, LAST = 1, {"seconds": 0}
SIGNALS = [getattr(signal, name) for name in ["SIGINT", "SIGTERM", "SIGUSR1"] if hasattr(signal, name)]


@contextlib.contextmanager
def process_settings():
    """
    A context in which a program trains or evaluates: tiny numbers are 0, a seed repeats itself bit for bit on a GPU,
    libraries print errors and real warnings only. At its end these settings, the environment, the handlers of signals
    and threading.excepthook are as before, whatever the code within did to them.
    """
    if LAST["seconds"] > COLLECT_AFTER:
        gc.collect()
    LAST["start"] = time.perf_counter()
    cudnn, levels = torch.backends.cudnn, {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    deterministic, flushed = cudnn.deterministic, (torch.tensor(1e-40) * 1).item() == 0
    environment, excepthook, num_threads = dict(os.environ), threading.excepthook, torch.get_num_threads()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if in_main_thread}

    def report_error_of_thread(args):
        """An error of TensorBoard's thread is raised again where something is logged."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            excepthook(args)

    try:
        with warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            # Names that Lightning uses and newer versions of torch call old.
            warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning|lightning_fabric")
            for name, level in QUIET_LOGGERS.items():
                logging.getLogger(name).setLevel(level)
            threading.excepthook = report_error_of_thread
            cudnn.deterministic = True
            torch.set_flush_denormal(True)  # tiny moments of Adam, of pixels that are hardly ever set, slow a CPU down
            yield
    finally:
        LAST["seconds"] = time.perf_counter() - LAST["start"]
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(num_threads)  # Lightning sets it for several processes
        cudnn.deterministic, threading.excepthook = deterministic, excepthook
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: set by C code
                signal.signal(number, handler)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)

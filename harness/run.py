"""A training run: started or resumed in its folder, trained by its Trainer, finished with its results."""

import contextlib
import dataclasses
import functools
import glob
import json
import os
import platform
import re
import shlex
import time
import warnings
from argparse import Namespace
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.seed import isolate_rng

from harness import checkpoints, devices, graphs, processes, report, slurm
from harness.errors import (
    FREE_SPACE_HINT,
    DiskFullError,
    UserError,
    best_effort,
    is_disk_full,
    is_out_of_memory,
    location_of,
    one_line,
    print_line,
    sigterm_raises,
)
from harness.files import write_text
from harness.flags import CHECKSUM
from harness.folder import RunError, finished_results, open_folder
from harness.settings import process_settings
from harness.tensorboard import EpochLogger
from harness.trainer import NO_WORKERS_HINT, check_shared_memory, check_validation_size, has_progress_bar, make_trainer

WORKERS_FAILED = r"DataLoader worker \(pid|shared memory|\bshm|[Tt]oo many open files|ancdata"  # in torch's messages


@dataclasses.dataclass
class Experiment:
    """
    The facts about a training that a Run needs.
    Attributes:
        metric - Name of the metric that selects the best checkpoint. The module logs it as train_METRIC, val_METRIC and
            test_METRIC, and the epoch with the lowest val_METRIC is the best. If training_step returns a dict with the
            key METRIC, the value of the first step is kept as first_step_METRIC.
        metric_label - Name of the metric in the printed lines.
        describe - Function of the loaders of training, validation and test set. It returns a line about model and data.
        quantities - Dict from the names of the main quantities, logged as train_NAME and val_NAME, to charts' titles.
        identifying - Names of the flags that identify a run in TensorBoard's table of runs.
        figures - Dict from the name of a PNG file to a function of (path, run) that saves it once the run is finished.
        keep - Function of the run's folder. It returns a dict of further values for each checkpoint.
        if_not_finite - What to do if the metric is no longer finite.
        memory_flags - Names of numeric flags; smaller values need less memory.
        fixed_epochs - If not empty, why a run cannot be resumed with another number of epochs: "because ...".
    """

    metric: str
    metric_label: str
    describe: Callable[..., str]
    quantities: dict[str, str]
    identifying: tuple[str, ...] = ()
    figures: dict[str, Callable] = dataclasses.field(default_factory=dict)
    keep: Callable[[str], dict] = lambda folder: {}
    if_not_finite: str = "try a smaller learning rate"
    memory_flags: tuple[str, ...] = ("batch_size",)
    fixed_epochs: str = ""


class Run:
    """
    A training run. It is a context manager that connects the run's processes and locks its folder:

        with Run(args, defaults, experiment, callbacks) as run:
            if not run.is_finished:
                train_loader, val_loader, test_loader = run.start(load_data)
                run.fit(model, train_loader, val_loader)
                run.finish(run.trainer.test(best_model, test_loader))

    Inputs:
        args - Namespace of all flags: those of flags.run_flags, and epochs, batch_size and seed.
        defaults - Dict from every flag to its default, which is used if a run of an older version lacks the flag.
        experiment - An Experiment.
        callbacks - The module's own callbacks for the Trainer.
    Attributes:
        trainer - The Trainer, with all callbacks; its logger is TensorBoard's once the run is started.
        is_finished, test_result - Whether the run was finished before, and what trainer.test returned then.
        is_new - False if the run resumes.
        folder, best_checkpoint - Paths of the run's folder, and of the checkpoint with the lowest validation metric.
        results - The content of results.json, once the run is finished.
    Raises:
        UserError - if the run cannot be started or resumed; in this case nothing is changed.
    """

    def __init__(self, args: Namespace, defaults: dict, experiment: Experiment, callbacks: list[pl.Callback]):
        self.started_at = time.perf_counter()
        self.args, self.flags, self.defaults = args, vars(args), defaults
        self.experiment, self.metric, self.callbacks = experiment, experiment.metric, callbacks
        self.log_dir = os.path.expanduser(args.log_dir)
        self.name = args.run_name or slurm.run_name()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(process_settings())
            random_numbers = isolate_rng()  # of Python, NumPy and torch; restored unless there is an error
            random_numbers.__enter__()
            stack.callback(random_numbers.__exit__, None, None, None)
            requeue = [slurm.RequeueOnTimeLimit()] if slurm.job_id() else []
            stack.enter_context(sigterm_raises())
            self.report = report.EpochReport(self.experiment, self.flags, print_lines=not has_progress_bar(self.args))
            callbacks = [*requeue, self.report, *self.callbacks, checkpoints.BestAndLastCheckpoint(self.report)]
            root_dir = os.path.join(self.log_dir, self.name or "")
            self.trainer = make_trainer(self.args, root_dir, callbacks)
            stack.enter_context(processes.process_group(self.trainer))
            if not self.trainer.is_global_zero:
                warnings.simplefilter("ignore")  # rank 0 prints the same warnings
            stack.push(self.kill_child_processes)
            self.find_results()
            self.stack = stack.pop_all()
        return self

    def find_results(self):
        """Sets is_finished. If the run is finished, says so and makes the figures that a killed process left out."""
        self.results = None
        if self.name:
            self.folder = os.path.join(self.log_dir, self.name)
            about = self.folder, self.flags, self.defaults, self.experiment
            self.results = processes.on_rank_zero(self.trainer, finished_results, *about)
        self.is_finished = self.results is not None
        if self.is_finished:
            value = self.results[f"test_{self.metric}"]
            self.print(f"{self.folder} is finished: test {self.experiment.metric_label} {value:.4f}")
            self.test_result = [{f"test_{self.metric}": value}]
            self.make_figures()

    def kill_child_processes(self, kind, error, traceback):
        """Kills the processes that this process has started, if an error ends it."""
        launcher = self.trainer.strategy.launcher
        if error is not None and hasattr(launcher, "procs"):
            others = launcher.procs.copy()
            launcher.procs.clear()  # else Lightning, which watches them, kills this process before it prints the error
            for other in others:
                other.kill()

    def __exit__(self, kind, error, traceback):
        self.stack.__exit__(kind, error, traceback)
        if problem := self.explain_error(error):
            raise problem from error

    def explain_error(self, error):
        """Returns a UserError that says what to do about an error, or None."""
        if isinstance(error, UserError):
            return None
        may_be_of_workers = isinstance(error, (RuntimeError, OSError)) and not isinstance(error, FileNotFoundError)
        is_of_workers = may_be_of_workers and re.search(WORKERS_FAILED, str(error))
        if is_of_workers and self.flags.get("num_workers"):
            reason = f"{one_line(error)}{location_of(error)}"
            return RunError(f"the worker processes that load the images failed ({reason}): {NO_WORKERS_HINT}")
        if is_out_of_memory(error):
            sizes = {name: self.flags[name] for name in self.experiment.memory_flags if self.flags[name] > 1}
            what = " and ".join(["this model", *(f"--{name} {size}" for name, size in sizes.items())])
            return RunError(
                f"out of memory for {what} ({one_line(error)}{location_of(error)}): make one of them smaller"
            )
        if is_disk_full(error):
            return DiskFullError(
                f"cannot write to {error.filename or self.log_dir} ({error.strerror}); {FREE_SPACE_HINT}"
            )
        return None

    def print(self, text):
        """Prints text only in rank 0, and flushes it."""
        if self.trainer.is_global_zero:
            print_line(text)

    def start(self, load_data: Callable):
        """
        Loads the data, then creates the run's folder or resets it to the epoch from which the run resumes.
        Inputs:
            load_data - Function of (args, download, sampler) that returns the loaders of training, validation and test
                set. `download` is True only in rank 0. `sampler` is a function of (dataset, shuffle) that returns the
                sampler of this process, see processes.sampler.
        Outputs:
            train_loader, val_loader, test_loader - The loaders that load_data returned.
        """
        sampler = functools.partial(processes.sampler, trainer=self.trainer, seed=self.args.seed)
        with processes.rank_zero_first(self.trainer):  # rank 0 may download the data
            loaders = load_data(self.args, download=self.trainer.is_global_zero, sampler=sampler)
        if not hasattr(loaders[0].sampler, "set_epoch"):  # a resumed run would get another order of the images
            raise RunError("load_data must create the training loader's sampler with its argument `sampler`")
        # A Trainer starts the first pass over the loader before its epoch begins, and later passes after. If the loader
        # used the global random numbers, the epochs of a resumed run would differ from those of an uninterrupted run.
        loaders[0].generator = torch.Generator()
        for name in [name for name in self.flags if name.endswith(CHECKSUM)]:
            if self.flags[name] != processes.broadcast_or_exit(self.trainer, self.flags[name]):
                flag = name.removesuffix(CHECKSUM)
                raise RunError(
                    f"--{flag} {self.flags[flag]} is a different file in this process than in rank 0: give a path "
                    "that leads to the same file on every node"
                )
        processes.on_rank_zero(self.trainer, check_validation_size, len(loaders[1].dataset), self.trainer.world_size)
        if self.flags.get("num_workers"):
            check_shared_memory(self.args.num_workers, loaders[0])
        # Only now, after all checks: an error must not change the folder.
        self.state = processes.on_rank_zero(self.trainer, self.open_folder)
        self.folder, self.is_new = self.state.folder, not self.state.checkpoint
        if self.args.threads != "auto" or (self.device.type == "cpu" and self.trainer.world_size == 1):
            torch.set_num_threads(devices.pick_threads(self.args.threads, self.state.device))
        if self.trainer.world_size > 1:
            self.stack.enter_context(processes.SharedNoise(self.trainer.global_rank, self.trainer.world_size))
        self.report.device = self.device_name
        for callback in self.callbacks:  # so that they cannot replace the run's own checkpoints
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(self.folder, "more_checkpoints")
        self.trainer.logger = EpochLogger(self.folder, first_epoch=0 if self.is_new else self.state.epoch + 1)
        self.stack.callback(self.trainer.logger.close)  # else its thread would keep running after an error before fit
        self.trainer.logger.set_up_dashboard(self.flags, self.experiment)
        processes_of_run = f" x {self.trainer.world_size}" if self.trainer.world_size > 1 else ""
        resumed = "" if self.is_new else f", resumed after epoch {self.state.epoch}"
        what = self.experiment.describe(loaders)
        self.print(f"{what}, on {self.device}{processes_of_run}, in {self.folder}{resumed}")
        if self.state.device not in [None, self.device_name]:
            self.print(
                f"note: the previous epochs were trained on {self.state.device}, the next ones on {self.device_name}: "
                "from here on the results differ slightly from those of an uninterrupted run"
            )
        return loaders

    def open_folder(self):
        """Creates or resumes the run's folder, which is locked for this process until the context manager ends."""
        state, checkpoint = self.stack.enter_context(
            open_folder(self.log_dir, self.name, self.flags, self.defaults, self.experiment)
        )
        if checkpoint:
            self.trainer.strategy.checkpoint_io.preloaded[state.checkpoint] = checkpoint
        return state

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        return self.trainer.strategy.root_device

    @property
    def device_name(self) -> str:
        """Name of the device that trains and, on a CPU, its number of threads: the results depend on them."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    @property
    def best_checkpoint(self) -> str:
        """Path of the checkpoint with the lowest validation metric."""
        return os.path.join(self.folder, "checkpoints", checkpoints.BEST)

    def prepare(self, model: pl.LightningModule) -> pl.LightningModule:
        """Gives the weights of a module the fastest memory layout for the device. Returns the module."""
        return devices.use_fast_layout(model) if self.device.type == "cpu" else model

    def fit(self, model: pl.LightningModule, train_loader, val_loader):
        """Trains a model, starting from the epoch that the run has reached."""
        trainer = self.trainer
        # Lightning calls set_epoch only after it has begun to read the loader.
        train_loader.sampler.set_epoch(self.state.epoch)
        loaders = train_loader, val_loader
        fit_start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")  # TF32
            if graphs.has_graphs(self.device) and not self.args.no_cuda_graph and trainer.world_size == 1:
                loaders = stack.enter_context(graphs.cuda_graphs(trainer, model, *loaders))
            trainer.log_every_n_steps = len(loaders[0])
            trainer.fit(model, *loaders, ckpt_path=self.state.checkpoint)
        trainer.strategy.barrier()  # until rank 0 has written the checkpoints, which all ranks read
        if trainer.interrupted:
            raise RunError("training was interrupted: to resume the run, give the same command with its --run_name")
        if trainer.should_stop and (epoch := self.report.history[-1]["epoch"]) < trainer.max_epochs:
            self.print(f"note: stopped early after {epoch} of {trainer.max_epochs} epochs")
        self.fit_seconds = time.perf_counter() - fit_start

    def finish(self, test_result):
        """
        Writes results.json, which marks the run as finished, then makes the figures. `test_result` is the return value
        of trainer.test for the best checkpoint.
        """
        self.test_result, test_value = test_result, test_result[0][f"test_{self.metric}"]
        self.results = self.collect_results(test_value)
        if self.trainer.is_global_zero:
            for name in self.experiment.figures:
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(self.folder, name))  # a figure of fewer epochs
            text = json.dumps(self.results, indent=2) + "\n"
            write_text(os.path.join(self.folder, "results.json"), text, sync=True)
            for path in glob.glob(os.path.join(glob.escape(self.folder), "results_[0-9]*.json")):
                with contextlib.suppress(OSError):
                    os.remove(path)  # results of fewer epochs
        self.print(
            f"test {self.experiment.metric_label} {test_value:.4f}\n"
            f"curves and pictures: tensorboard --logdir {shlex.quote(self.log_dir)} --samples_per_plugin images=1000\n"
            f"run folder {self.folder}"
        )
        self.make_figures()

    def make_figures(self):
        """Makes the figures that a finished run lacks. Their errors become warnings: the results are already saved."""
        for name, make_figure in self.experiment.figures.items():
            path = os.path.join(self.folder, name)
            if self.trainer.is_global_zero and not os.path.exists(path):
                with best_effort(f"saving {path}"):
                    make_figure(path, self)

    def curve(self, name: str) -> dict:
        """Returns a dict from epoch to the value of a metric, for the epochs that have it; also for a finished run."""
        if not self.report.history:
            path = os.path.join(self.folder, "checkpoints", checkpoints.LAST)
            self.report.on_load_checkpoint(None, None, checkpoints.read_checkpoint(path))
        return {row["epoch"]: row[name] for row in self.report.history if name in row}

    def collect_results(self, test_value):
        """Returns the content of results.json. The seconds of a resumed run include those of the epochs before."""
        values = self.curve(f"val_{self.metric}")
        values.pop(0, None)  # the untrained model
        best_epoch = min(values, key=values.get)
        return {
            f"test_{self.metric}": test_value,
            f"best_val_{self.metric}": values[best_epoch],
            "best_epoch": best_epoch,
            "epochs": self.report.history[-1]["epoch"],
            f"final_train_{self.metric}": self.report.history[-1].get(f"train_{self.metric}"),
            f"first_step_{self.metric}": self.report.first_step,
            **{name: self.flags[name] for name in ["dataset", "seed"] if name in self.flags},
            "hyperparameters": self.flags,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch_lightning": pl.__version__,
            },
            "device": self.device_name,
            "fit_seconds": round(self.state.seconds + self.fit_seconds, 1),
            "seconds": round(self.state.seconds + time.perf_counter() - self.started_at, 1),
        }

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

WORKERS_FAILED = r"DataLoader worker \(pid|shared memory|\bshm|[Tt]oo many open files|ancdata"  # what torch says then


@dataclasses.dataclass
class Experiment:
    """
    What a Run needs to know about what it trains.
    Attributes:
        metric - Name of the metric that chooses the best checkpoint: the module logs it as train_METRIC, val_METRIC and
            test_METRIC, and the epoch of the lowest val_METRIC is the best. If training_step returns a dict with
            METRIC in it, the first one is kept as first_step_METRIC.
        metric_label - What people call it.
        describe - Function of the loaders of training, validation and test set that returns what is trained on what.
        quantities - Dict from the names of the main quantities, logged as train_NAME and val_NAME, to charts' titles.
        identifying - Names of the flags that identify a run in TensorBoard's table of runs.
        figures - Dict from the name of a PNG file to a function of (path, run) that makes it once the run is finished.
        keep - Function of the run's folder that returns a dict of what else each checkpoint keeps of the run.
        if_not_finite - What to do if the metric is no longer finite.
        memory_flags - Names of the flags, numbers, whose smaller values need less memory.
        fixed_epochs - If not empty, why a finished run cannot be given more epochs.
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
    A training run, and a context in which its processes are connected and its folder is theirs alone:

        with Run(args, defaults, experiment, callbacks) as run:
            if not run.is_finished:
                train_loader, val_loader, test_loader = run.start(load_data)
                run.fit(model, train_loader, val_loader)
                run.finish(run.trainer.test(best_model, test_loader))

    Inputs:
        args - Namespace of every flag: those of flags.run_flags, and epochs, batch_size and seed.
        defaults - Dict of every flag's default, which a run of an older version was trained with if it lacks a flag.
        experiment - An Experiment.
        callbacks - The module's own callbacks for the Trainer.
    Attributes:
        trainer - The Trainer, with all callbacks; its logger is TensorBoard's once the run is started.
        is_finished, test_result - Whether there is nothing to train, and what trainer.test gave at the time.
        is_new - False if the run resumes.
        folder, best_checkpoint - Paths of the run's folder, and of the checkpoint with the lowest validation metric.
        results - What results.json contains, once the run is finished.
    Raises:
        UserError - if the run cannot be started or resumed; nothing is changed then.
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
            random_numbers = isolate_rng()  # Python's, NumPy's and torch's, which it restores unless there is an error
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
                warnings.simplefilter("ignore")  # rank 0 prints the same ones
            stack.push(self.kill_child_processes)
            self.find_results()
            self.stack = stack.pop_all()
        return self

    def find_results(self):
        """Sets is_finished and, if it is so, prints it and makes the figures that a killed process left out."""
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
        """Kills the processes that this one has started, if an error ends it."""
        launcher = self.trainer.strategy.launcher
        if error is not None and hasattr(launcher, "procs"):
            others = launcher.procs.copy()
            launcher.procs.clear()  # Lightning watches them: it would kill this process, too, before it says why
            for other in others:
                other.kill()

    def __exit__(self, kind, error, traceback):
        self.stack.__exit__(kind, error, traceback)
        if problem := self.explain_error(error):
            raise problem from error

    def explain_error(self, error):
        """The UserError that says what to do about an error, or None."""
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
                f"the memory is too small for {what} ({one_line(error)}{location_of(error)}): make one of them smaller"
            )
        if is_disk_full(error):
            return DiskFullError(
                f"cannot write to {error.filename or self.log_dir} ({error.strerror}); {FREE_SPACE_HINT}"
            )
        return None

    def print(self, text):
        """Prints in rank 0 alone, and at once."""
        if self.trainer.is_global_zero:
            print_line(text)

    def start(self, load_data: Callable):
        """
        Loads the data, then makes the run's folder, or makes it that of the epoch to resume from.
        Inputs:
            load_data - Function of (args, download, sampler) that returns the loaders of training, validation and test
                set. `download` is True in rank 0 alone; `sampler` is a function of (dataset, shuffle) that returns a
                sampler of this process's share, see processes.sampler.
        Outputs:
            train_loader, val_loader, test_loader - What load_data returned.
        """
        sampler = functools.partial(processes.sampler, trainer=self.trainer, seed=self.args.seed)
        with processes.rank_zero_first(self.trainer):  # which may download them
            loaders = load_data(self.args, download=self.trainer.is_global_zero, sampler=sampler)
        if not hasattr(loaders[0].sampler, "set_epoch"):  # a run that resumes could not go on from where it was
            raise RunError(
                "load_data must make the training loader's sampler by the function `sampler` that it is given"
            )
        # The first pass of a Trainer begins before its epoch does, the others after: if they used the global random
        # numbers, an epoch would differ between a run that was interrupted and one that was not.
        loaders[0].generator = torch.Generator()
        for name in [name for name in self.flags if name.endswith(CHECKSUM)]:
            if self.flags[name] != processes.broadcast_or_exit(self.trainer, self.flags[name]):
                flag = name.removesuffix(CHECKSUM)
                raise RunError(f"--{flag} {self.flags[flag]} is another file here than in the first process")
        processes.on_rank_zero(self.trainer, check_validation_size, len(loaders[1].dataset), self.trainer.world_size)
        if self.flags.get("num_workers"):
            check_shared_memory(self.args.num_workers, loaders[0])
        # Only now that nothing else can be wrong.
        self.place = processes.on_rank_zero(self.trainer, self.open_folder)
        self.folder, self.is_new = self.place.folder, not self.place.checkpoint
        if self.args.threads != "auto" or (self.device.type == "cpu" and self.trainer.world_size == 1):
            torch.set_num_threads(devices.pick_threads(self.args.threads, self.place.device))
        if self.trainer.world_size > 1:
            self.stack.enter_context(processes.SharedNoise(self.trainer.global_rank, self.trainer.world_size))
        self.report.device = self.device_name
        for callback in self.callbacks:  # where they cannot replace the run's own checkpoints
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(self.folder, "more_checkpoints")
        self.trainer.logger = EpochLogger(self.folder, first_epoch=0 if self.is_new else self.place.epoch + 1)
        self.stack.callback(self.trainer.logger.close)  # its thread would live on after an error ahead of fit
        self.trainer.logger.set_up_dashboard(self.flags, self.experiment)
        processes_of_run = f" x {self.trainer.world_size}" if self.trainer.world_size > 1 else ""
        resumed = "" if self.is_new else f", continued after epoch {self.place.epoch}"
        what = self.experiment.describe(loaders)
        self.print(f"{what}, on {self.device}{processes_of_run}, in {self.folder}{resumed}")
        if self.place.device not in [None, self.device_name]:
            self.print(
                f"The epochs before were trained on {self.place.device}, the next ones are on {self.device_name}: "
                "from here on the numbers are those of a run that never stopped but for their rounding"
            )
        return loaders

    def open_folder(self):
        """Makes or finds the run's folder, which is this process's alone until the context is left."""
        place, checkpoint = self.stack.enter_context(
            open_folder(self.log_dir, self.name, self.flags, self.defaults, self.experiment)
        )
        if checkpoint:
            self.trainer.strategy.checkpoint_io.read[place.checkpoint] = checkpoint
        return place

    @property
    def device(self) -> torch.device:
        """What trains."""
        return self.trainer.strategy.root_device

    @property
    def device_name(self) -> str:
        """What trains, as far as the numbers depend on it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    @property
    def best_checkpoint(self) -> str:
        """Path of the checkpoint with the lowest validation metric."""
        return os.path.join(self.folder, "checkpoints", checkpoints.BEST)

    def prepare(self, model: pl.LightningModule) -> pl.LightningModule:
        """Lays the weights of a module out as the device computes fastest. Returns the module."""
        return devices.use_fast_layout(model) if self.device.type == "cpu" else model

    def fit(self, model: pl.LightningModule, train_loader, val_loader):
        """Trains a model, from the epoch on that the run has reached."""
        trainer = self.trainer
        train_loader.sampler.set_epoch(self.place.epoch)  # Lightning does so once it has begun to read
        loaders = train_loader, val_loader
        fit_start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")  # TF32
            if graphs.has_graphs(self.device) and not self.args.no_cuda_graph and trainer.world_size == 1:
                loaders = stack.enter_context(graphs.cuda_graphs(trainer, model, *loaders))
            trainer.log_every_n_steps = len(loaders[0])
            trainer.fit(model, *loaders, ckpt_path=self.place.checkpoint)
        trainer.strategy.barrier()  # rank 0 has written the checkpoints that all read
        if trainer.interrupted:
            raise RunError("training was interrupted")
        if trainer.should_stop and (epoch := self.report.history[-1]["epoch"]) < trainer.max_epochs:
            self.print(f"stopped early, after {epoch} of {trainer.max_epochs} epochs")
        self.fit_seconds = time.perf_counter() - fit_start

    def finish(self, test_result):
        """
        Writes results.json, which says that the run is finished, then makes the figures. `test_result` is what
        trainer.test returned for the best checkpoint.
        """
        self.test_result, test_value = test_result, test_result[0][f"test_{self.metric}"]
        self.results = self.collect_results(test_value)
        if self.trainer.is_global_zero:
            for name in self.experiment.figures:
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(self.folder, name))  # of fewer epochs
            text = json.dumps(self.results, indent=2) + "\n"
            write_text(os.path.join(self.folder, "results.json"), text, sync=True)
            for path in glob.glob(os.path.join(glob.escape(self.folder), "results_[0-9]*.json")):
                with contextlib.suppress(OSError):
                    os.remove(path)  # of fewer epochs, too
        self.print(
            f"test {self.experiment.metric_label} {test_value:.4f}\n"
            f"curves and pictures: tensorboard --logdir {shlex.quote(self.log_dir)} --samples_per_plugin images=1000\n"
            f"run folder {self.folder}"
        )
        self.make_figures()

    def make_figures(self):
        """Makes the figures that a finished run lacks. None of them can cost it its results any more."""
        for name, make_figure in self.experiment.figures.items():
            path = os.path.join(self.folder, name)
            if self.trainer.is_global_zero and not os.path.exists(path):
                with best_effort(f"drawing {path}"):
                    make_figure(path, self)

    def curve(self, name: str) -> dict:
        """Dict from epoch to the value of a metric, for the epochs that have it; of a finished run, too."""
        if not self.report.history:
            path = os.path.join(self.folder, "checkpoints", checkpoints.LAST)
            self.report.on_load_checkpoint(None, None, checkpoints.read_checkpoint(path))
        return {row["epoch"]: row[name] for row in self.report.history if name in row}

    def collect_results(self, test_value):
        """What results.json contains. Its seconds begin, in a run that resumed, with those of the epochs before."""
        values = self.curve(f"val_{self.metric}")
        values.pop(0, None)  # untrained
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
            "fit_seconds": round(self.place.seconds + self.fit_seconds, 1),
            "seconds": round(self.place.seconds + time.perf_counter() - self.started_at, 1),
        }

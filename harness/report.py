"""Reports each epoch of a run: prints a line, writes metrics.csv, logs to TensorBoard, adds to each checkpoint."""

import csv
import io
import math
import os
import sys
import time

import torch
from pytorch_lightning.callbacks import Checkpoint

from harness.checkpoints import LAST, RUN
from harness.errors import Terminated, UserError, print_line, warn
from harness.files import write_text
from harness.tensorboard import STAGES

# If the training thread ran on a CPU for less than this share of an epoch, other processes probably used the CPU.
CONTENTION = 0.7


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


class EpochReport(Checkpoint):
    """
    Callback that keeps the metrics of every epoch in `history` (a list of dicts) and in the run's metrics.csv, logs
    them to TensorBoard, and prints a line for each epoch. Epoch 0 is the untrained model: call `trainer.validate`
    before `trainer.fit`. If the loss is no longer finite, stops the run before this epoch's weights replace the last
    good checkpoint.

    The class is a Checkpoint because Lightning calls Checkpoints after all other callbacks. By then, everything that
    the module logs at the end of an epoch exists. In the list of callbacks, it must come before the callbacks that
    write checkpoints.
    Inputs:
        experiment - The run's Experiment.
        flags - Dict of all flags. Each checkpoint contains them, so that it says how it was trained.
        print_lines - If False, no line is printed for an epoch.
    """

    def __init__(self, experiment, flags, print_lines=True):
        super().__init__()
        self.metric, self.experiment = experiment.metric, experiment
        self.flags = flags
        self.print_lines = print_lines
        self.device = None  # the device that trains, as in results.json
        self.history = []
        self.first_step = None  # the metric of the first minibatch of training, before any update
        self.should_stop = False  # whether a callback, such as EarlyStopping, has stopped the run that is resumed

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint[RUN] = {
            "flags": self.flags,
            "history": self.history,
            f"first_step_{self.metric}": self.first_step,
            "device": self.device,
            "should_stop": trainer.should_stop,
            **self.experiment.keep(trainer.logger.log_dir),
        }

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.history, self.first_step = checkpoint[RUN]["history"], checkpoint[RUN].get(f"first_step_{self.metric}")
        self.should_stop = checkpoint[RUN].get("should_stop", False)

    def on_fit_start(self, trainer, pl_module):
        trainer.should_stop = self.should_stop  # Lightning does not restore it
        trainer.logger.epoch = self.history[-1]["epoch"] if self.history else 0

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.begin_epoch(trainer)
        elif trainer.current_epoch == self.first_epoch:
            self.warn_of_contention(trainer)

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.report(trainer, epoch=0)

    def on_train_start(self, trainer, pl_module):
        self.first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer, pl_module):
        self.begin_epoch(trainer)
        trainer.logger.epoch = trainer.current_epoch + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == batch_idx == 0 and isinstance(outputs, dict) and self.metric in outputs:
            self.first_step = trainer.strategy.reduce(outputs[self.metric].detach()).item()

    def on_train_epoch_end(self, trainer, pl_module):
        epoch, metrics = trainer.current_epoch + 1, trainer.callback_metrics
        for name in [name for name in self.names if name in metrics]:
            value = metrics[name].item()
            if not math.isfinite(value):
                if not trainer.is_global_zero:
                    sys.exit(1)
                kept = f"the checkpoints of the epochs before are in {trainer.logger.log_dir}"
                raise TrainingDiverged(
                    f"{name} became {value} in epoch {epoch}: {self.experiment.if_not_finite} "
                    f"({kept if epoch > 1 else 'no checkpoint was written yet'})"
                )
        self.report(trainer, epoch)

    @property
    def names(self):
        """Dict from the names of the metric in training and validation to their labels in the epochs' lines."""
        return {f"{stage}_{self.metric}": f"{stage} {self.experiment.metric_label}" for stage in STAGES}

    def begin_epoch(self, trainer):
        """Starts the clock, and remembers the metrics of earlier epochs that the trainer still has."""
        self.start, self.cpu_start = time.perf_counter(), time.thread_time()
        self.earlier = dict(trainer.callback_metrics)

    def report(self, trainer, epoch):
        """Adds an epoch to the history, with the metrics that the trainer did not have before this epoch."""
        metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name in metric_names(trainer.callback_metrics) and value is not self.earlier.get(name)
        }
        self.history.append({"epoch": epoch, **metrics, "seconds": round(time.perf_counter() - self.start, 3)})
        if not trainer.is_global_zero:
            return
        write_metrics(trainer.logger.log_dir, self.history, self.experiment.quantities)
        trainer.logger.log_metrics(metrics)  # Lightning would do so after this epoch's checkpoint
        trainer.logger.flush()
        if self.print_lines:
            values = [
                f"{label} {metrics[name]:.4f}" if name in metrics else " " * (len(label) + 7)
                for name, label in self.names.items()
            ]
            seconds = self.history[-1]["seconds"]
            print_line(f"epoch {epoch:3}/{trainer.max_epochs}  {'  '.join(values)}  {seconds:.1f} s")

    def warn_of_contention(self, trainer):
        """Warns once per run, and suggests --threads 1, if other processes seem to use the CPU."""
        threads, wall = torch.get_num_threads(), time.perf_counter() - self.start
        share = (time.thread_time() - self.cpu_start) / max(wall, 1e-9)
        on_cpu = trainer.is_global_zero and (self.device or "").startswith("cpu")
        waits_for_workers = self.flags.get("num_workers")  # the thread waits for its data loader
        if share < CONTENTION and wall > 1 and threads > 1 and on_cpu and not waits_for_workers:
            warn(
                f"warning: the training thread had a CPU for only {share:.0%} of epoch {trainer.logger.epoch}, perhaps "
                "because other processes use the CPU. If this continues, stop the run and resume it with --threads 1"
            )

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, (KeyboardInterrupt, Terminated)) and trainer.is_global_zero:
            exception.already_reported = True
            epoch, folder = trainer.logger.epoch, trainer.logger.log_dir
            is_there = os.path.exists(os.path.join(folder, "checkpoints", LAST))
            checkpoints = (
                "and the checkpoints of the best and of the last complete epoch"
                if is_there
                else "but no checkpoint yet"
            )
            name = os.path.relpath(folder, trainer.default_root_dir)  # '.' if --run_name was given
            print_line(
                f"\nnote: interrupted in epoch {epoch}. {folder} contains the metrics, curves and pictures of the "
                f"previous epochs, {checkpoints}. To resume the run, give the same command"
                f"{'' if name == '.' else f' with --run_name {name}'}"
            )


def metric_names(names):
    """Returns the names that begin with a stage, such as train_loss."""
    return [name for name in names if name.startswith(tuple(f"{stage}_" for stage in STAGES))]


def write_metrics(folder, history, quantities):
    """
    Writes metrics.csv, with a row for each epoch. Its columns are the quantities of training and validation, then the
    other quantities that were logged as train_NAME or val_NAME, then the seconds.
    """
    columns = ["epoch", *(f"{stage}_{name}" for stage in STAGES for name in quantities)]
    others = {name for row in history for name in metric_names(row)} - set(columns)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *sorted(others), "seconds"])
    writer.writeheader()
    writer.writerows(history)
    write_text(os.path.join(folder, "metrics.csv"), text.getvalue())

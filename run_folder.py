"""
Where a run lives, whether it goes on from there, and what it leaves: its folder, checkpoints, the lines and figures of
each epoch, results.json.
"""
import contextlib
import csv
import glob
import io
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
import warnings
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from checkpoints import BEST, LAST, PREVIOUS, CheckpointError, read_checkpoint

# Flags that say where and how a run is computed, not what: they may change when it is continued.
NEUTRAL = {"run_name", "log_dir", "data_dir", "num_workers", "progress_bar", "accelerator", "devices", "num_nodes",
           "plain"}
LOCK_TIMEOUT = 10  # seconds; data loader workers of a process that was killed hold its lock until they notice


class RunFolderError(RuntimeError):
    """The run's folder cannot be made or continued; the message is one line that says what to do."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class Run(NamedTuple):
    folder: str
    checkpoint: str | None  # the checkpoint to continue from
    epoch: int  # its number of epochs, 0 without one
    seconds: float  # that these epochs took


def finished_results(log_dir, name, flags, defaults):
    """
    The results of a finished run; None where it is unfinished or new. Changes nothing.
    Inputs:
        log_dir, name - Directory of all runs, and the run's folder in it.
        flags - Dict of every flag.
        defaults - Dict of their defaults, which a run of an older version was trained with where it lacks a flag.
    Raises:
        RunFolderError - where the folder is another one's: other hyperparameters, or no run at all.
    """
    folder = os.path.join(os.path.expanduser(log_dir), name)
    if not os.path.isdir(folder) or set(os.listdir(folder)) <= {".lock", "hparams.yaml.tmp"}:
        return None  # new, or it was killed at once
    try:
        with open(os.path.join(folder, "hparams.yaml")) as file:
            there = {**defaults, **yaml.safe_load(file)}
    except FileNotFoundError:
        raise RunFolderError(f"{folder} is there already, but holds no run: choose another --run_name") from None
    flags = as_plain_values(flags)
    differences = [f"--{flag} was {there[flag]}, is {flags[flag]}" for flag in flags
                   if flag in there and flag not in NEUTRAL and there[flag] != flags[flag]]
    if differences:
        raise RunFolderError(f"{folder} holds a run with other hyperparameters ({'; '.join(differences)}): "
                             "give the same ones to continue it, or choose another --run_name")
    path = os.path.join(folder, "results.json")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


@contextlib.contextmanager
def open_run(log_dir, name, flags, defaults):
    """
    Makes the folder of a run, or finds where to continue it, and keeps it to this process while the context lasts.
    Inputs:
        log_dir - Directory of all runs.
        name - The run's folder in it; if None, `lightning_logs/version_N` with the next free N, as Lightning does.
        flags, defaults - Dicts of every flag and of its default; their values are plain ones.
    Outputs:
        run - A Run. What its folder holds is that of the epochs up to its checkpoint.
    Raises:
        RunFolderError - where the folder cannot be made, is in use, or is another one's (see finished_results).
    """
    log_dir = os.path.expanduser(log_dir)
    try:
        folder = os.path.join(log_dir, name) if name else numbered_folder(log_dir)
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, ".lock"), timeout=LOCK_TIMEOUT)
        lock.acquire()
    except Timeout:
        raise RunFolderError(f"{folder} is in use by another process: wait for it, or choose another --run_name "
                             "for this one") from None
    except OSError as error:
        raise RunFolderError(f"cannot write to the log directory {log_dir} ({error.strerror}); "
                             "choose another one with --log_dir") from error
    with lock:
        if finished_results(log_dir, os.path.relpath(folder, log_dir), flags, defaults):
            raise RunFolderError(f"{folder} was finished by another process just now")
        path, checkpoint = newest_checkpoint(os.path.join(folder, "checkpoints"))
        write_whole(os.path.join(folder, "hparams.yaml"), yaml.safe_dump(as_plain_values(flags)))
        try:
            history = checkpoint["callbacks"]["EpochReport"]["history"] if checkpoint else []
        except LookupError:
            raise RunFolderError(f"{path} is of an older version, whose runs cannot be continued: choose another "
                                 "--run_name") from None
        go_back(folder, history)
        yield Run(folder, path, max(len(history) - 1, 0), sum(row["seconds"] for row in history))


def numbered_folder(log_dir):
    """Makes the next free folder `<log_dir>/lightning_logs/version_N`, for this process alone."""
    version = TensorBoardLogger(log_dir).version
    while True:
        folder = os.path.join(log_dir, "lightning_logs", f"version_{version}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            version += 1  # another process was faster


def newest_checkpoint(folder):
    """
    Finds the checkpoint of the latest epoch in a folder, and makes it last.ckpt if it has another name: where last.ckpt
    is damaged, or where the process was killed after it had written another one.
    Outputs:
        path, checkpoint - Where it is, and what it holds; None, None if there is no checkpoint.
    Raises:
        RunFolderError - where there are checkpoints, but all of them damaged.
    """
    checkpoints, damages = {}, []
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(FileNotFoundError):
            try:
                checkpoints[name] = read_checkpoint(os.path.join(folder, name))
            except CheckpointError as error:
                damages.append(str(error))
    if not checkpoints and damages:
        raise RunFolderError(f"{'; '.join(damages)}: delete {os.path.dirname(folder)} to start over, or choose "
                             "another --run_name")
    if not checkpoints:
        return None, None
    newest = max(checkpoints, key=lambda name: checkpoints[name]["epoch"])
    for damage in damages:
        print(f"{damage}; continuing from {newest}, epoch {checkpoints[newest]['epoch'] + 1}", file=sys.stderr)
    last = os.path.join(folder, LAST)
    if newest != LAST:
        shutil.copyfile(os.path.join(folder, newest), f"{last}.tmp")
        os.replace(f"{last}.tmp", last)
    return last, checkpoints[newest]


def go_back(folder, history):
    """
    Makes a run's folder that of an epoch: metrics.csv and what TensorBoard shows, without what was logged later. Of
    the epoch itself the scalars are dropped, too, since not all of them may be there: EpochReport logs them again.
    """
    epoch = len(history) - 1
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.tmp"), recursive=True):
        os.remove(path)  # half-written by a process that was killed
    for path in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        if not history:
            os.remove(path)
            continue
        with open(f"{path}.tmp", "wb") as file:
            writer = RecordWriter(file)
            for record in RawEventFileLoader(path).Load():
                event = Event.FromString(record)
                if event.step < epoch or event.step == epoch and any(v.HasField("image") for v in event.summary.value):
                    writer.write(record)
        os.replace(f"{path}.tmp", path)
    metrics = io.StringIO(newline="")
    writer = csv.DictWriter(metrics, EpochReport.columns)
    writer.writeheader()
    writer.writerows(history)
    write_whole(os.path.join(folder, "metrics.csv"), metrics.getvalue())


def write_whole(path, text):
    """Writes a text file, all or nothing."""
    with open(f"{path}.tmp", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def as_plain_values(flags):
    """Flags as they come back from a file: tuples as lists."""
    return json.loads(json.dumps(flags))


class EpochLogger(TensorBoardLogger):
    """
    TensorBoard logger of a run's folder, whose x axis is the number of epochs trained, so that the curves of training,
    validation and test share one axis. EpochReport sets `epoch`; it is 0 until training begins.
    """

    epoch = 0

    def __init__(self, folder):
        super().__init__(folder, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def set_up_dashboard(self, flags):
        """
        Tells TensorBoard the run's flags, for a row of its table of hyperparameters with the test bpd, and to draw
        training and validation in one chart (its tab Custom Scalars).
        """
        flags = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in flags.items()}
        for summary in hparams(flags, {"test_bpd": None}):
            self.experiment.file_writer.add_summary(summary)
        quantities = {"bits per dimension": "bpd", "negative ELBO, nats": "ELBO",
                      "reconstruction loss, nats": "reconstruction_loss",
                      "regularization loss (KL divergence), nats": "regularization_loss"}
        self.experiment.add_custom_scalars({"Training and validation": {
            title: ["Multiline", [f"train_{name}", f"val_{name}"]] for title, name in quantities.items()}})

    @property
    def log_dir(self):
        return self.save_dir

    def log_metrics(self, metrics, step=None):
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, self.epoch)


def quiet_libraries():
    """Leaves the output to the epoch lines: errors and real warnings still come through."""
    for name in ["pytorch_lightning", "lightning_fabric"]:  # start-up notes and tips
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # how it is getting on with its font cache
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the images are in memory
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a continued run's
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # on a login node, too
    # Names that Lightning uses and newer versions of torch call old.
    warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning|lightning_fabric")


class EpochReport(pl.Callback):
    """
    Keeps the metrics of every epoch, in `history` (a list of dicts) and in the run's metrics.csv, and prints a line
    for each. Epoch 0 is the untrained model: `trainer.validate` before `trainer.fit`.
    Stops a run whose loss is no longer finite, before that epoch's weights replace the last good checkpoint.
    """

    columns = ["epoch", *(f"{stage}_{name}" for stage in ["train", "val"]
                          for name in ["reconstruction_loss", "regularization_loss", "ELBO", "bpd"]), "seconds"]

    def __init__(self, flags, print_lines=True):
        super().__init__()
        self.flags = as_plain_values(flags)  # for whoever finds the checkpoint
        self.print_lines = print_lines
        self.history = []
        self.first_step_bpd = None  # the very first minibatch of training, before any update

    def state_dict(self):
        return {"flags": self.flags, "history": self.history, "first_step_bpd": self.first_step_bpd}

    def load_state_dict(self, state_dict):
        self.history, self.first_step_bpd = state_dict["history"], state_dict["first_step_bpd"]

    def on_fit_start(self, trainer, pl_module):
        trainer.logger.epoch = len(self.history) - 1
        if trainer.logger.epoch > 0:  # it continues: see go_back
            trainer.logger.log_metrics({name: value for name, value in self.history[-1].items() if name != "seconds"})

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.report(trainer, epoch=0)

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = time.perf_counter()
        trainer.logger.epoch = trainer.current_epoch + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.first_step_bpd is None:
            self.first_step_bpd = trainer.strategy.reduce(outputs["loss"].detach()).item()

    def on_train_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch + 1
        for name in ["train_bpd", "val_bpd"]:
            value = trainer.callback_metrics[name].item()
            if not math.isfinite(value):
                if not trainer.is_global_zero:
                    sys.exit(1)
                kept = f"the checkpoints of the epochs before are kept in {trainer.logger.log_dir}"
                raise TrainingDiverged(
                    f"{name} became {value} in epoch {epoch}: try a lower --lr than {pl_module.hparams.lr:g} "
                    f"({kept if epoch > 1 else 'no checkpoint was written yet'})")
        self.report(trainer, epoch)

    def report(self, trainer, epoch):
        """Adds the metrics that the trainer holds as an epoch to the history, which goes to metrics.csv, and prints."""
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name in self.columns}
        self.history.append({"epoch": epoch, **metrics, "seconds": round(time.perf_counter() - self.start, 3)})
        if not trainer.is_global_zero:
            return
        with open(os.path.join(trainer.logger.log_dir, "metrics.csv"), "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(self.history[-1])
        trainer.logger.experiment.flush()  # what was logged so far is on disk ahead of this epoch's checkpoint
        if self.print_lines:
            bpds = "  ".join(f"{stage} bpd {metrics[f'{stage}_bpd']:.4f}" if f"{stage}_bpd" in metrics else " " * 16
                             for stage in ["train", "val"])
            print(f"epoch {epoch:3}/{trainer.max_epochs}  {bpds}  {self.history[-1]['seconds']:.1f} s", flush=True)

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            epoch, folder = trainer.logger.epoch, trainer.logger.log_dir
            checkpoints = "checkpoints of the best and the last complete one" if epoch > 1 else "no checkpoint yet"
            name = os.path.relpath(folder, trainer.default_root_dir)  # '.' if it was given
            print(f"\nInterrupted in epoch {epoch}. {folder} stays usable: metrics, curves and pictures of the epochs "
                  f"before, {checkpoints}. The same command{'' if name == '.' else f' and --run_name {name}'} "
                  "continues it", flush=True)

    def curve(self, name):
        """Dict from epoch to the value of a metric, for the epochs that have it."""
        return {row["epoch"]: row[name] for row in self.history if name in row}


def write_results(folder, args, report, test_bpd, device, fit_seconds, seconds):
    """
    Writes results.json, all or nothing.
    Inputs:
        folder - The run's folder.
        args - Dict of every flag.
        report - The run's EpochReport.
        test_bpd - Test bpd of the checkpoint with the lowest validation bpd.
        device - torch.device that trained.
        fit_seconds - Wall time of trainer.fit; that of a continued run begins with the seconds of the epochs before.
        seconds - Wall time of the run, from the reading of the data to the test; the same.
    """
    val_bpd = report.curve("val_bpd")
    del val_bpd[0]  # untrained
    best_epoch = min(val_bpd, key=val_bpd.get)
    is_gpu = device.type == "cuda"
    results = {
        "test_bpd": test_bpd,
        "best_val_bpd": val_bpd[best_epoch],
        "best_epoch": best_epoch,
        "final_train_bpd": report.history[-1]["train_bpd"],
        "first_step_bpd": report.first_step_bpd,
        "dataset": args["dataset"],
        "seed": args["seed"],
        "hyperparameters": args,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "pytorch_lightning": pl.__version__},
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {torch.get_num_threads()} threads",
        "fit_seconds": round(fit_seconds, 1),
        "seconds": round(seconds, 1),
    }
    write_whole(os.path.join(folder, "results.json"), json.dumps(results, indent=2) + "\n")

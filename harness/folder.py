"""The folder of a run: made or found, distinguished from what is somebody else's, and used by one process at a time."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import yaml
from pytorch_lightning.loggers import TensorBoardLogger

from harness import checkpoints, report
from harness.errors import UserError, is_disk_full, warn
from harness.files import UNFINISHED, folder_lock, read_results, write_text
from harness.flags import CHECKSUM, RUNTIME_FLAGS

LOCK_TIMEOUT = 10  # seconds; data loader workers of a process that was killed hold its lock until they notice
IDENTIFYING_FLAGS = {"epochs", "run_name", "log_dir"}  # distinguish the hparams.yaml of a run from others
LOGS = (".log", ".out", ".err", ".txt")  # what a shell or SLURM may write into a run's folder, ahead of the run


class RunError(UserError):
    """The run cannot be started or continued."""


class RunState(NamedTuple):
    """Where a run is, and how far it has come."""

    folder: str
    checkpoint: str | None  # the checkpoint to resume from
    epoch: int  # its number of epochs, 0 without one
    seconds: float  # that these epochs took
    device: str | None  # what trained them, as in results.json


@contextlib.contextmanager
def folder_errors(folder):
    """A context in which an OSError, in the folder of a run, becomes a RunError."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        problem = f"cannot write to {folder} ({error.strerror})"
        raise RunError(f"{problem}; choose another --log_dir or --run_name") from error


def finished_results(folder, flags, defaults, experiment, report_line=None):
    """
    What the results.json of a finished run contains; None if the run is unfinished or new. Changes nothing. Raises a
    RunError if the folder is another one's: other hyperparameters, or no run at all.
    Inputs:
        folder - The run's folder.
        flags, defaults, experiment - See Run.
        report_line - Function of a line, which is called for what is damaged; None: nothing is said of it.
    """
    with folder_errors(folder):
        existing = read_flags(folder, report_line)
    if existing is None:
        return None
    existing = {**defaults, **existing}
    shared = [name for name in flags if name in existing and name not in RUNTIME_FLAGS | {"epochs"}]
    files = {name.removesuffix(CHECKSUM) for name in shared if name.endswith(CHECKSUM)}  # wherever they are now
    differences = [
        f"--{name} was {existing[name]}, is {flags[name]}"
        if not name.endswith(CHECKSUM)
        else f"what the file --{name.removesuffix(CHECKSUM)} holds"
        for name in shared
        if name not in files and existing[name] != flags[name]
    ]
    if differences:
        raise RunError(
            f"{folder} holds a run with other hyperparameters ({'; '.join(differences)}): "
            "give the same ones to continue it, or choose another --run_name"
        )
    if existing["epochs"] != flags["epochs"] and experiment.fixed_epochs:
        raise RunError(
            f"{folder} holds a run with --epochs {existing['epochs']}, {experiment.fixed_epochs}: it cannot be "
            f"one with --epochs {flags['epochs']}. Give the same number, or choose another --run_name"
        )
    with folder_errors(folder):
        try:
            results = read_results(folder, experiment.metric)
        except FileNotFoundError:
            return None
        except ValueError:
            if report_line:
                path = os.path.join(folder, "results.json")
                report_line(f"warning: {path} is damaged; it is regenerated from the run's checkpoints")
            return None
    return results if results["hyperparameters"].get("epochs") == flags["epochs"] else None  # of fewer, it goes on


def read_flags(folder, report_line):
    """
    The flags of the run in a folder, as its hparams.yaml or, if that is damaged, its checkpoints have them; None
    if the folder is not there or can be used. Raises a RunError if it is another one's.
    """
    if not os.path.isdir(folder):
        return None
    path = os.path.join(folder, "hparams.yaml")
    problem = f"{folder} holds a run of another program: choose another --run_name"
    try:
        with open(path, encoding="utf-8") as file:
            flags = yaml.safe_load(file)
    except FileNotFoundError:
        if all(map(is_allowed_in_new_folder, os.scandir(folder))):
            return None
        flags = None
        problem = f"{folder} is there already, but holds no run: choose another --run_name"
    except (yaml.YAMLError, UnicodeDecodeError):
        flags = None
    if isinstance(flags, dict) and flags.keys() >= IDENTIFYING_FLAGS:
        return flags
    kept = checkpoints.flags_in_checkpoints(os.path.join(folder, "checkpoints"))
    if kept is not None:
        if report_line:
            report_line(f"warning: {path} is damaged or gone; it is regenerated from the run's checkpoints")
        return kept
    if not isinstance(flags, dict) and os.path.exists(path):
        problem = (
            f"{path} is damaged, and no checkpoint says what the run is: delete {folder} to start over, or choose "
            "another --run_name"
        )
    raise RunError(problem)


def is_allowed_in_new_folder(entry):
    """Whether a folder can become a run's that has this os.DirEntry: a log, something hidden, an empty folder."""
    if entry.is_dir():
        return entry.name.startswith(".") or not os.listdir(entry)
    return entry.name.startswith(".") or entry.name.endswith((*LOGS, UNFINISHED))


@contextlib.contextmanager
def open_folder(log_dir, name, flags, defaults, experiment):
    """
    Makes the folder of a run, or makes it that of the epoch to resume from, and keeps it to this process while the
    context lasts. Raises a UserError if the folder cannot be made, is in use, or is another one's.
    Inputs:
        log_dir - Directory of all runs.
        name - The run's folder in it; if None, `lightning_logs/version_N` with the next free N, as Lightning does.
        flags, defaults, experiment - See Run.
    Outputs:
        state, checkpoint - A RunState, and the checkpoint to resume from or None.
    """
    with contextlib.ExitStack() as stack:
        with folder_errors(os.path.join(log_dir, name or "lightning_logs")):
            folder = os.path.join(log_dir, name) if name else numbered_folder(log_dir)
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(folder_lock(folder, LOCK_TIMEOUT))
            if finished_results(folder, flags, defaults, experiment, report_line=warn):
                raise RunError(f"{folder} was finished by another process just now")
            path, checkpoint = checkpoints.newest_checkpoint(os.path.join(folder, "checkpoints"), experiment.metric)
            kept = checkpoint[checkpoints.RUN] if checkpoint else {"history": []}
            history = kept["history"]
            epoch = history[-1]["epoch"] if history else 0
            if epoch > flags["epochs"]:
                raise RunError(
                    f"{folder} holds a run that has trained {epoch} epochs, more than --epochs {flags['epochs']}: give "
                    f"--epochs {epoch} or more, or choose another --run_name"
                )
            set_aside_results(folder, epoch, experiment.metric)
            for unfinished in Path(folder).rglob(f"*{UNFINISHED}"):
                unfinished.unlink()  # left by a process that was killed
            write_text(os.path.join(folder, "hparams.yaml"), yaml.safe_dump(flags), sync=True)
            report.write_metrics(folder, history, experiment.quantities)
        yield RunState(folder, path, epoch, sum(row["seconds"] for row in history), kept.get("device")), checkpoint


def set_aside_results(folder, epoch, metric):
    """
    Renames the results of fewer epochs, which say that the run is finished, until it is. Raises a RunError if `epoch`,
    that of the checkpoint to resume from, is before theirs: they would be lost.
    """
    try:
        results = read_results(folder, metric)
        epochs = results.get("epochs", results["hyperparameters"].get("epochs", 0))  # fewer if it stopped early
    except (FileNotFoundError, ValueError):
        return
    if epoch < epochs:
        raise RunError(
            f"{folder} holds the results of {epochs} epochs, but no checkpoint of them to go on from: choose another "
            "--run_name"
        )
    os.replace(os.path.join(folder, "results.json"), os.path.join(folder, f"results_{epochs}.json"))


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

"""The folder of a run: created or resumed, distinguished from other folders, and used by one process at a time."""

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

LOCK_TIMEOUT = 10  # seconds; data loader workers keep the lock of a killed process until they notice its end
KEYS_OF_EVERY_RUN = {"epochs", "run_name", "log_dir"}  # keys that the hparams.yaml of every run has
LOGS = (".log", ".out", ".err", ".txt")  # files that a shell or SLURM may write into a folder before the run starts


class RunError(UserError):
    """The run cannot be started or resumed."""


class RunState(NamedTuple):
    """Folder and progress of a run."""

    folder: str
    checkpoint: str | None  # the checkpoint to resume from
    epoch: int  # number of epochs that are trained; 0 without a checkpoint
    seconds: float  # duration of these epochs
    device: str | None  # the device that trained them, as in results.json


@contextlib.contextmanager
def folder_errors(folder):
    """Context manager that turns an OSError in a run's folder into a RunError."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        problem = f"cannot write to {folder} ({error.strerror})"
        raise RunError(f"{problem}; choose another --log_dir or --run_name") from error


def finished_results(folder, flags, defaults, experiment, report_line=None):
    """
    Returns the content of a finished run's results.json, or None if the run is unfinished or new. Changes nothing.
    Raises a RunError if the folder contains a run with other hyperparameters, or files that are not a run's.
    Inputs:
        folder - The run's folder.
        flags, defaults, experiment - See Run.
        report_line - Function that is called with a message for each damaged file, or None.
    """
    with folder_errors(folder):
        existing = read_flags(folder, report_line)
    if existing is None:
        return None
    existing = {**defaults, **existing}
    shared = [name for name in flags if name in existing and name not in RUNTIME_FLAGS | {"epochs"}]
    files = {name.removesuffix(CHECKSUM) for name in shared if name.endswith(CHECKSUM)}  # compared by checksum only
    differences = [
        f"--{name} was {existing[name]}, is {flags[name]}"
        if not name.endswith(CHECKSUM)
        else f"the file of --{name.removesuffix(CHECKSUM)} has different content"
        for name in shared
        if name not in files and existing[name] != flags[name]
    ]
    if differences:
        raise RunError(
            f"{folder} contains a run with other hyperparameters ({'; '.join(differences)}): "
            "give the same hyperparameters to resume it, or choose another --run_name"
        )
    if existing["epochs"] != flags["epochs"] and experiment.fixed_epochs:
        raise RunError(
            f"{folder} contains a run that cannot be resumed with --epochs {flags['epochs']}, "
            f"{experiment.fixed_epochs}: give --epochs {existing['epochs']}, or choose another --run_name"
        )
    with folder_errors(folder):
        try:
            results = read_results(folder, experiment.metric)
        except FileNotFoundError:
            return None
        except ValueError:
            if report_line:
                path = os.path.join(folder, "results.json")
                report_line(f"warning: {path} is damaged and is regenerated from the run's checkpoints")
            return None
    # Results of another number of epochs: the run is not finished.
    return results if results["hyperparameters"].get("epochs") == flags["epochs"] else None


def read_flags(folder, report_line):
    """
    Reads the flags of the run in a folder, from hparams.yaml or, if this file is damaged, from the checkpoints. Returns
    None if the folder does not exist or is free for a new run. Raises a RunError if it contains something else.
    """
    if not os.path.isdir(folder):
        return None
    path = os.path.join(folder, "hparams.yaml")
    problem = f"{folder} contains a run of another program: choose another --run_name"
    try:
        with open(path, encoding="utf-8") as file:
            flags = yaml.safe_load(file)
    except FileNotFoundError:
        if all(map(is_allowed_in_new_folder, os.scandir(folder))):
            return None
        flags = None
        problem = f"{folder} exists already but contains no run: choose another --run_name"
    except (yaml.YAMLError, UnicodeDecodeError):
        flags = None
    if isinstance(flags, dict) and flags.keys() >= KEYS_OF_EVERY_RUN:
        return flags
    flags_from_checkpoint = checkpoints.flags_in_checkpoints(os.path.join(folder, "checkpoints"))
    if flags_from_checkpoint is not None:
        if report_line:
            report_line(f"warning: {path} is damaged or missing and is regenerated from the run's checkpoints")
        return flags_from_checkpoint
    if not isinstance(flags, dict) and os.path.exists(path):
        problem = (
            f"{path} is damaged, and no checkpoint contains the run's flags: delete {folder} to start over, or "
            "choose another --run_name"
        )
    raise RunError(problem)


def is_allowed_in_new_folder(entry):
    """Returns whether the folder of a new run may contain this os.DirEntry (a log, a hidden file, an empty folder)."""
    if entry.is_dir():
        return entry.name.startswith(".") or not os.listdir(entry)
    return entry.name.startswith(".") or entry.name.endswith((*LOGS, UNFINISHED))


@contextlib.contextmanager
def open_folder(log_dir, name, flags, defaults, experiment):
    """
    Context manager that creates the folder of a run, or resets it to the epoch from which the run resumes, and locks it
    for this process. Raises a UserError if the folder cannot be created, is in use, or contains something else.
    Inputs:
        log_dir - Directory of all runs.
        name - Name of the run's folder in log_dir; if None, `lightning_logs/version_N` with the next free N.
        flags, defaults, experiment - See Run.
    Outputs:
        state, checkpoint - A RunState, and the checkpoint from which the run resumes, or None.
    """
    with contextlib.ExitStack() as stack:
        with folder_errors(os.path.join(log_dir, name or "lightning_logs")):
            folder = os.path.join(log_dir, name) if name else numbered_folder(log_dir)
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(folder_lock(folder, LOCK_TIMEOUT))
            if finished_results(folder, flags, defaults, experiment, report_line=warn):
                raise RunError(
                    f"the run in {folder} was just finished by another process: give the same command again to see its "
                    "result, or choose another --run_name"
                )
            path, checkpoint = checkpoints.newest_checkpoint(os.path.join(folder, "checkpoints"), experiment.metric)
            run_data = checkpoint[checkpoints.RUN] if checkpoint else {"history": []}
            history = run_data["history"]
            epoch = history[-1]["epoch"] if history else 0
            if epoch > flags["epochs"]:
                raise RunError(
                    f"{folder} contains a run that has trained {epoch} epochs, more than --epochs {flags['epochs']}: "
                    f"give --epochs {epoch} or more, or choose another --run_name"
                )
            set_aside_results(folder, epoch, experiment.metric)
            for unfinished in Path(folder).rglob(f"*{UNFINISHED}"):
                unfinished.unlink()  # left by a process that was killed
            write_text(os.path.join(folder, "hparams.yaml"), yaml.safe_dump(flags), sync=True)
            report.write_metrics(folder, history, experiment.quantities)
        yield RunState(folder, path, epoch, sum(row["seconds"] for row in history), run_data.get("device")), checkpoint


def set_aside_results(folder, epoch, metric):
    """
    Renames the results of fewer epochs, because results.json marks a run as finished. `epoch` is the epoch from which
    the run resumes. Raises a RunError if it is earlier than the epoch of these results, which would be lost.
    """
    try:
        results = read_results(folder, metric)
        # "epochs" is smaller after early stopping
        epochs = results.get("epochs", results["hyperparameters"].get("epochs", 0))
    except (FileNotFoundError, ValueError):
        return
    if epoch < epochs:
        raise RunError(
            f"{folder} contains the results of {epochs} epochs, but no checkpoint of them to resume from: choose "
            "another --run_name"
        )
    os.replace(os.path.join(folder, "results.json"), os.path.join(folder, f"results_{epochs}.json"))


def numbered_folder(log_dir):
    """Creates the next free folder `<log_dir>/lightning_logs/version_N`, which no other process gets."""
    version = TensorBoardLogger(log_dir).version
    while True:
        folder = os.path.join(log_dir, "lightning_logs", f"version_{version}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            version += 1  # another process has just created it

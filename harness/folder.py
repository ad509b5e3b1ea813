"""The folder of a run: made or found, told from what is somebody else's, and kept to one process."""

import contextlib
import os
from typing import NamedTuple

import yaml
from pytorch_lightning.loggers import TensorBoardLogger

from harness import checkpoints, report
from harness.files import UNFINISHED, folder_lock, read_results, write_text
from harness.program import CHECKSUM, RUNTIME_FLAGS, UserError, note

LOCK_TIMEOUT = 10  # seconds; data loader workers of a process that was killed hold its lock until they notice
OUR_FLAGS = {"model", "epochs", "run_name", "log_dir"}  # by which the hparams.yaml of a run is told from others
LOGS = (".log", ".out", ".err", ".txt")  # what a shell or SLURM may write into a run's folder, ahead of the run


class RunError(UserError):
    """The run cannot be started or continued."""


class Place(NamedTuple):
    """Where a run is, and how far it has come."""

    folder: str
    checkpoint: str | None  # the checkpoint to continue from
    epoch: int  # its number of epochs, 0 without one
    seconds: float  # that these epochs took
    device: str | None  # what trained them, as in results.json


def finished_results(folder, flags, defaults, tell=None):
    """
    The results of a finished run. Changes nothing.
    Inputs:
        folder - The run's folder.
        flags, defaults - Dicts of every flag, and of its default, see Run.
        tell - Function of a line, which is called for what is damaged; None: nothing is said of it.
    Outputs:
        results - What results.json holds; None where the run is unfinished or new.
    Raises:
        RunError - where the folder is another one's: other hyperparameters, or no run at all.
    """
    there = flags_of_run(folder, tell)
    if there is None:
        return None
    there = {**defaults, **there}
    own_file = {flag: there[flag] for flag in [CHECKSUM] if flag in flags and flag in there}  # wherever it is now
    differences = [
        f"--{flag} was {there[flag]}, is {flags[flag]}" if flag != CHECKSUM else "what the file --dataset holds"
        for flag in flags
        if flag in there
        and flag not in RUNTIME_FLAGS | {"epochs"} | ({"dataset"} if own_file else set())
        and there[flag] != flags[flag]
    ]
    if differences:
        raise RunError(
            f"{folder} holds a run with other hyperparameters ({'; '.join(differences)}): "
            "give the same ones to continue it, or choose another --run_name"
        )
    if there["epochs"] != flags["epochs"] and flags["lr_schedule"] != "constant":
        raise RunError(
            f"{folder} holds a run with --epochs {there['epochs']}, over which its learning rate falls: it cannot be "
            f"one with --epochs {flags['epochs']}. Give the same number, or choose another --run_name"
        )
    try:
        results = read_results(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        if tell:
            tell(f"{os.path.join(folder, 'results.json')} is damaged; it is made anew from the run's checkpoints")
        return None
    return results if results["hyperparameters"].get("epochs") == flags["epochs"] else None  # of fewer, it goes on


def flags_of_run(folder, tell):
    """
    The flags of the run in a folder, as its hparams.yaml or, where that is damaged, its checkpoints have them; None
    where the folder is not there or can be used. Raises a RunError where it is another one's.
    """
    if not os.path.isdir(folder):
        return None
    path = os.path.join(folder, "hparams.yaml")
    problem = f"{folder} holds a run of another program: choose another --run_name"
    try:
        with open(path, encoding="utf-8") as file:
            flags = yaml.safe_load(file)
    except FileNotFoundError:
        if all(map(may_be_there, os.scandir(folder))):
            return None
        flags = None
        problem = f"{folder} is there already, but holds no run: choose another --run_name"
    except (yaml.YAMLError, UnicodeDecodeError):
        flags = None
    if isinstance(flags, dict) and flags.keys() >= OUR_FLAGS:
        return flags
    kept = checkpoints.flags_of_run(os.path.join(folder, "checkpoints"))
    if kept is not None:
        if tell:
            tell(f"{path} is damaged or gone; it is made anew from the run's checkpoints")
        return kept
    if not isinstance(flags, dict) and os.path.exists(path):
        problem = (
            f"{path} is damaged, and no checkpoint says what the run is: delete {folder} to start over, or choose "
            "another --run_name"
        )
    raise RunError(problem)


def may_be_there(entry):
    """Whether a folder can become a run's that has this os.DirEntry: a log, something hidden, an empty folder."""
    if entry.is_dir():
        return entry.name.startswith(".") or not os.listdir(entry)
    return entry.name.startswith(".") or entry.name.endswith((*LOGS, UNFINISHED))


@contextlib.contextmanager
def open_folder(log_dir, name, flags, defaults, quantities):
    """
    Makes the folder of a run, or finds where to continue it, and keeps it to this process while the context lasts.
    Inputs:
        log_dir - Directory of all runs.
        name - The run's folder in it; if None, `lightning_logs/version_N` with the next free N, as Lightning does.
        flags, defaults, quantities - See Run; the values of the flags are plain ones.
    Outputs:
        place - A Place. What its folder holds is that of the epochs up to its checkpoint.
    Raises:
        RunError - where the folder cannot be made, is in use, or is another one's (see finished_results).
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = os.path.join(log_dir, name) if name else numbered_folder(log_dir)
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(folder_lock(folder, LOCK_TIMEOUT))
        except UserError as error:  # it is in use
            raise RunError(str(error)) from None
        except OSError as error:
            raise RunError(
                f"cannot write to {os.path.join(log_dir, name or 'lightning_logs')} ({error.strerror}); choose another "
                "--log_dir or --run_name"
            ) from error
        if finished_results(folder, flags, defaults, tell=warn):
            raise RunError(f"{folder} was finished by another process just now")
        path, checkpoint = checkpoints.newest_checkpoint(os.path.join(folder, "checkpoints"))
        kept = checkpoint[checkpoints.RUN] if checkpoint else {"history": []}
        history = kept["history"]
        epoch = max(len(history) - 1, 0)
        if epoch > flags["epochs"]:
            raise RunError(
                f"{folder} holds a run that has trained {epoch} epochs, more than --epochs {flags['epochs']}: give "
                f"--epochs {epoch} or more, or choose another --run_name"
            )
        set_aside_results(folder, epoch)
        write_text(os.path.join(folder, "hparams.yaml"), yaml.safe_dump(flags), sync=True)
        report.return_to_epoch(folder, history, quantities)
        yield Place(folder, path, epoch, sum(row["seconds"] for row in history), kept.get("device"))


def set_aside_results(folder, epoch):
    """
    Renames the results of fewer epochs, which say that the run is finished, until it is.
    Inputs:
        folder - The run's folder.
        epoch - Number of epochs of the checkpoint that it goes on from.
    Raises:
        RunError - where there is no checkpoint of theirs, and they would be lost.
    """
    try:
        epochs = read_results(folder)["hyperparameters"].get("epochs", 0)
    except (OSError, ValueError):
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

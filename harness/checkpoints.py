"""Checkpoints are data: written whole or not at all, and read without running anything that a file may bring along."""

import contextlib
import os
import pickle
import shutil
import sys
import zipfile

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from harness.files import written_whole
from harness.program import UserError

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# Where report.EpochReport keeps what belongs to the run; older checkpoints have it as the state of a callback.
RUN, OLD_CALLBACK = "run", "EpochReport"


class CheckpointError(UserError):
    """A file is not a checkpoint that can be used."""


def read_checkpoint(path):
    """
    Reads a checkpoint of train_pl.py: tensors, on the CPU, and plain values. Nothing else is loaded, so nothing in the
    file can run (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
    Inputs:
        path - Path of the checkpoint.
    Outputs:
        checkpoint - The dict that Lightning has written; what EpochReport keeps is under RUN, if it is there.
    Raises:
        CheckpointError - where the file is no checkpoint, damaged, of another program, or brings code along.
        OSError - where it cannot be read.
    """
    with open(path, "rb"):
        pass  # what cannot be read is no damage
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice a flipped bit
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and could run code when it is loaded "
            f"({one_line(error)})"
        ) from error
    except Exception as error:  # damage becomes anything: of zipfile even an OSError, where it leads to a bad offset
        raise CheckpointError(f"{path} is no checkpoint, or a damaged one ({one_line(error)})") from error
    parts = {"epoch": int, "state_dict": dict, "hyper_parameters": dict, "callbacks": dict}
    if not (
        isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(part), kind) for part, kind in parts.items())
    ):
        raise CheckpointError(f"{path} is a file of another program, not a checkpoint of train_pl.py")
    if OLD_CALLBACK in checkpoint["callbacks"]:
        checkpoint[RUN] = checkpoint["callbacks"].pop(OLD_CALLBACK)
    return checkpoint


def one_line(error):
    """An error in one line: of torch's explanations the one that names what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if "GLOBAL" in line or "size mismatch" in line), lines[0]).rstrip(".:")


def load_model(model_class, path, **hyperparameters):
    """
    Builds the module that a checkpoint holds, on the CPU.
    Inputs:
        model_class - Class of the module.
        path - Path of the checkpoint.
        hyperparameters - Arguments of the class that replace the checkpoint's.
    Outputs:
        model - The module, with the checkpoint's weights.
    Raises:
        CheckpointError - as read_checkpoint, and where the weights do not fit the module.
        OSError - where the file cannot be read.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = model_class(**{**checkpoint["hyper_parameters"], **hyperparameters})
        model.load_state_dict(checkpoint["state_dict"])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"{path} does not fit {model_class.__name__} of train_pl.py ({one_line(error)})"
        ) from error
    return model


def newest_checkpoint(folder):
    """
    Finds the checkpoint of the latest epoch in a folder, and makes it last.ckpt if it has another name: where last.ckpt
    is damaged, or where the process was killed after it had written another one.
    Inputs:
        folder - The folder of a run's checkpoints.
    Outputs:
        path, checkpoint - Where it is, and what it holds; None, None if there is no checkpoint.
    Raises:
        CheckpointError - where there are checkpoints, but all of them damaged.
    """
    checkpoints, damages = {}, []
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(FileNotFoundError):
            try:
                checkpoints[name] = read_checkpoint(os.path.join(folder, name))
            except CheckpointError as error:
                damages.append(str(error))
    if not checkpoints and damages:
        raise CheckpointError(
            f"{'; '.join(damages)}: delete {os.path.dirname(folder)} to start over, or choose another --run_name"
        )
    if not checkpoints:
        return None, None
    newest = max(checkpoints, key=lambda name: checkpoints[name]["epoch"])
    for damage in damages:
        print(f"{damage}; continuing from {newest}, epoch {checkpoints[newest]['epoch'] + 1}", file=sys.stderr)
    last = os.path.join(folder, LAST)
    if newest != LAST:
        with written_whole(last) as unfinished:
            shutil.copyfile(os.path.join(folder, newest), unfinished)
    return last, checkpoints[newest]


class CheckpointFiles(TorchCheckpointIO):
    """Writes each checkpoint whole, keeps the last but one, and reads without running anything."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        keep_as = os.path.join(folder, PREVIOUS) if name == LAST else None
        with written_whole(path, keep_as, sync=True) as unfinished:
            torch.save(checkpoint, unfinished)  # by name: Ctrl-C in a Python file's write would become a RuntimeError

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        checkpoint = read_checkpoint(path)
        folder = os.path.dirname(path)
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:  # a ModelCheckpoint's, whose folder may have been moved since
                for name in ["best_model_path", "kth_best_model_path"]:
                    state[name] = os.path.join(folder, os.path.basename(state[name])) if state[name] else ""
                state["best_k_models"] = {
                    os.path.join(folder, os.path.basename(path)): score
                    for path, score in state["best_k_models"].items()
                }
                state["dirpath"] = folder
        return checkpoint

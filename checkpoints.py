"""Checkpoints are data: written whole or not at all, and read without running anything that a file may bring along."""
import os
import pickle
import zipfile

import torch
from lightning_fabric.plugins import TorchCheckpointIO

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class CheckpointError(RuntimeError):
    """A file is not a checkpoint that can be used; the message is one line that says why."""


def read_checkpoint(path):
    """
    What a checkpoint of train_pl.py holds: tensors, on the CPU, and plain values. Nothing else is loaded, so nothing
    in the file can run (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
    Raises:
        CheckpointError - where the file is no checkpoint, damaged, of another program, or brings code along.
        OSError - where it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice a flipped bit
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: it holds more than tensors and plain values, and could run code "
                              f"when it is loaded ({reason(error)})") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or a damaged one ({reason(error)})") from error
    parts = {"epoch": int, "state_dict": dict, "hyper_parameters": dict, "callbacks": dict}
    if not (isinstance(checkpoint, dict)
            and all(isinstance(checkpoint.get(part), kind) for part, kind in parts.items())):
        raise CheckpointError(f"{path} is a file of another program, not a checkpoint of train_pl.py")
    return checkpoint


def reason(error):
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
    Raises: CheckpointError, OSError - see read_checkpoint; the former, too, where the weights do not fit the module.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = model_class(**{**checkpoint["hyper_parameters"], **hyperparameters})
        model.load_state_dict(checkpoint["state_dict"])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} does not fit {model_class.__name__} of train_pl.py ({reason(error)})") from error
    return model


class CheckpointFiles(TorchCheckpointIO):
    """Writes each checkpoint under another name first, so that it is whole or not there; keeps the last but one."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        torch.save(checkpoint, f"{path}.tmp")  # by name: Ctrl-C in a Python file's write would become a RuntimeError
        with open(f"{path}.tmp", "rb") as file:
            os.fsync(file.fileno())
        if name == LAST and os.path.exists(path):
            os.replace(path, os.path.join(folder, PREVIOUS))
        os.replace(f"{path}.tmp", path)

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        checkpoint = read_checkpoint(path)
        folder = os.path.dirname(path)
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:  # a ModelCheckpoint's, whose folder may have been moved since
                for name in ["best_model_path", "kth_best_model_path"]:
                    state[name] = os.path.join(folder, os.path.basename(state[name])) if state[name] else ""
                state["best_k_models"] = {os.path.join(folder, os.path.basename(path)): score
                                          for path, score in state["best_k_models"].items()}
                state["dirpath"] = folder
        return checkpoint

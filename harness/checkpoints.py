"""Checkpoints are data: written whole or not at all, and read without running anything that a file may bring along."""

import argparse
import contextlib
import inspect
import io
import itertools
import os
import pathlib
import pickle
import re
import shutil
import textwrap
import types
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import yaml
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from pytorch_lightning.utilities import rank_zero_warn

from harness.errors import UserError, warn
from harness.files import atomic_write

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# Where report.EpochReport keeps what belongs to the run; older checkpoints have it as the state of a callback.
RUN, OLD_CALLBACK = "run", "EpochReport"
# What a run continues from; checkpoints of other programs may lack any of them.
PARTS_OF_A_RUN = {"epoch": int, "loops": dict, "callbacks": dict, "optimizer_states": list, RUN: dict}


class CheckpointError(UserError):
    """A file is not a checkpoint that can be used."""


class NumpyType:
    """In the place of a numpy.dtype, of numbers and text alone: NumPy trusts what a pickle says of its types."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.name = state[1] + self.name  # the order of the bytes

    def values(self, data):
        """The array of the values that are in some bytes."""
        if not re.fullmatch(r"[<>|=][biufU]\d+", self.name):
            raise pickle.UnpicklingError(f"NumPy's type {self.name} is neither numbers nor text")
        return np.frombuffer(data, self.name)


class NumpyArray(list):
    """In the place of a numpy.ndarray."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        self[:] = dtype.values(data).reshape(shape, order="F" if by_columns else "C").tolist()


def numpy_scalar(dtype, data):
    """In the place of NumPy's function of that name: a plain number or text."""
    return dtype.values(data)[0].item()


# What the hyperparameters of a user's own Trainer may hold beside tensors and plain values: what is called for a name
# in the file. It takes values and keeps them, and calls nothing.
HARMLESS = [
    (NumpyType, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ["core", "_core"]),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ["core", "_core"]),
    *(
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{pure}{system}Path")
        for module, pure, system in itertools.product(["pathlib", "pathlib._local"], ["", "Pure"], ["Posix", "Windows"])
    ),
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
]


def read_checkpoint(path, map_location="cpu"):
    """
    Reads a checkpoint of a module: tensors, plain values, and what is HARMLESS. Nothing else is loaded, so nothing in
    the file can run (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
    Inputs:
        path - Path of the checkpoint, or a file that is open for reading bytes.
        map_location - Where its tensors go, see torch.load.
    Outputs:
        checkpoint - The dict that Lightning has written; what EpochReport keeps is under RUN, if it is there. Of a file
            that holds nothing but a state_dict, a dict of that.
    Raises:
        CheckpointError - where the file is no checkpoint, damaged, of another program, or brings code along.
        OSError - where it cannot be read.
    """
    if hasattr(path, "read"):
        data, path = path.read(), getattr(path, "name", "the open file")
    else:
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, no checkpoint; that of a run is RUN/checkpoints/{BEST}")
        with open(path, "rb") as file:
            data = file.read()  # what cannot be read is no damage; from here on, all depends on these bytes alone
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load would not notice a flipped bit
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = load_tensors(data, "cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and could run code when it is loaded "
            f"({telling_line(error)})"
        ) from error
    except Exception as error:  # damage becomes anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's is a RuntimeError
            raise
        raise CheckpointError(f"{path} is no checkpoint, or a damaged one ({telling_line(error)})") from error
    if map_location != "cpu":
        checkpoint = load_tensors(data, map_location)
    if isinstance(checkpoint, dict) and checkpoint and all(torch.is_tensor(value) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(part, missing), dict)
        for part, missing in [("state_dict", None), ("hyper_parameters", {}), ("callbacks", {})]
    ):
        raise CheckpointError(f"{path} is a file of another program, not a checkpoint of train_pl.py or of Lightning")
    if OLD_CALLBACK in checkpoint.get("callbacks", {}):
        checkpoint[RUN] = checkpoint["callbacks"].pop(OLD_CALLBACK)
    return checkpoint


def load_tensors(data, map_location):
    """What torch.load makes of the bytes of a file without running any of it."""
    others = torch.serialization.get_safe_globals()  # what the user allows, where it is not of the same name

    def name(entry):
        return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"

    names = set(map(name, HARMLESS))
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([*HARMLESS, *(entry for entry in others if name(entry) not in names)])
        return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def telling_line(error):
    """An error in one line: of torch's explanations the one that names what is wrong."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    telling = (line for line in lines if "size mismatch" in line or "key(s) in state_dict" in line)
    return textwrap.shorten(next(telling, lines[0]), 400, placeholder=" ...").rstrip(".:")


def load_model(
    model_class,
    checkpoint_path,
    map_location=None,
    hparams_file=None,
    strict=None,
    weights_only=None,
    **hyperparameters,
):
    """
    Builds the module that a checkpoint holds, as Lightning's load_from_checkpoint does, but that it runs no code of a
    file, and loads to the CPU by default.
    Inputs:
        model_class - Class of the module.
        checkpoint_path - As in read_checkpoint.
        map_location - Where its tensors go, see torch.load; by default all on the CPU.
        hparams_file - File (.yaml or .csv) of hyperparameters that replace or complete the checkpoint's, or None.
        strict - Whether the weights must be those of the module, no more and no less; by default as the module says.
        weights_only - Without effect: nothing but weights and plain values is ever read.
        hyperparameters - Arguments of the class that replace or complete both.
    Outputs:
        model - The module, with the checkpoint's weights.
    Raises:
        CheckpointError - as read_checkpoint, where hyperparameters are missing or of no use, and where the weights do
            not fit the module.
        OSError - where a file cannot be read.
    """
    checkpoint = read_checkpoint(checkpoint_path, map_location or "cpu")
    state_dict = checkpoint["state_dict"]
    given = {**checkpoint.get("hyper_parameters", {}), **read_hyperparameters(hparams_file), **hyperparameters}
    arguments = inspect.signature(model_class).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        given = {name: value for name, value in given.items() if name in arguments}
    by_name = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
    required = [name for name, item in arguments.items() if item.default is item.empty and item.kind in by_name]
    if missing := [name for name in required if name not in given]:
        what = "is a bare state_dict" if set(checkpoint) == {"state_dict"} else "holds weights"
        raise CheckpointError(
            f"{checkpoint_path} {what} without the hyperparameters {', '.join(missing)}: give them to "
            f"{model_class.__name__}.load_from_checkpoint by name, as in {missing[-1]}=..."
        )
    try:
        model = model_class(**given)
        model.on_load_checkpoint(checkpoint)
        keys = model.load_state_dict(state_dict, strict=model.strict_loading if strict is None else strict)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"{checkpoint_path} does not fit {model_class.__name__} of train_pl.py ({telling_line(error)})"
        ) from error
    for kind, names in zip(["lacks", "has too many"], keys):
        if names:
            rank_zero_warn(f"of the module's weights, {checkpoint_path} {kind}: {', '.join(names)}")
    return model.to(next((value.device for value in state_dict.values() if torch.is_tensor(value)), "cpu"))


def read_hyperparameters(path):
    """The hyperparameters in a file (.yaml or .csv), as a dict. Raises a CheckpointError where there are none."""
    if path is None:
        return {}
    with open(path, "rb"):
        pass  # Lightning would only warn
    try:
        if str(path).lower().endswith(".csv"):
            return load_hparams_from_tags_csv(path)
        return {**load_hparams_from_yaml(path, use_omegaconf=False)}
    except (yaml.YAMLError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} holds no hyperparameters ({telling_line(error)})") from error


def read_run_checkpoint(path):
    """read_checkpoint of a checkpoint from which a run can be continued. Raises a CheckpointError for others, too."""
    checkpoint = read_checkpoint(path)
    lacking = [part for part, kind in PARTS_OF_A_RUN.items() if not isinstance(checkpoint.get(part), kind)]
    if lacking:
        raise CheckpointError(
            f"{path} is no checkpoint to continue a run from: it lacks {', '.join(lacking)} (it is of another program, "
            "or of an older version)"
        )
    return checkpoint


def newest_checkpoint(folder):
    """
    Finds the checkpoint of the latest epoch in a folder, and makes it last.ckpt if it has another name: where last.ckpt
    is damaged, or where the process was killed after it had written another one. So it does for best.ckpt.
    Inputs:
        folder - The folder of a run's checkpoints.
    Outputs:
        path, checkpoint - Where it is, and what it holds; None, None if there is no checkpoint.
    Raises:
        CheckpointError - where there are checkpoints, but none to continue from.
    """
    checkpoints, damages = {}, []
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(FileNotFoundError):
            try:
                checkpoints[name] = read_run_checkpoint(os.path.join(folder, name))
            except CheckpointError as error:
                damages.append(str(error))
    if not checkpoints and damages:
        raise CheckpointError(
            f"{'; '.join(damages)}: delete {os.path.dirname(folder)} to start over, or choose another --run_name"
        )
    if not checkpoints:
        return None, None
    newest = max(checkpoints, key=lambda name: checkpoints[name]["epoch"])
    best = name_of_best(folder, checkpoints, newest)
    for damage in damages:
        warn(f"{damage}; continuing from {newest}, epoch {checkpoints[newest]['epoch'] + 1}")
    for name, source in [(BEST, best), (LAST, newest)]:
        if name != source:
            with atomic_write(os.path.join(folder, name)) as unfinished:
                shutil.copyfile(os.path.join(folder, source), unfinished)
    return os.path.join(folder, LAST), checkpoints[newest]


def name_of_best(folder, checkpoints, newest):
    """
    Which checkpoint is that of the best epoch, if best.ckpt is gone or damaged; a run has no results without it.
    Inputs:
        folder - The folder of a run's checkpoints.
        checkpoints - Dict from name to content of those that can be read.
        newest - The name of the one that the run continues from.
    Outputs:
        name - The name of a checkpoint.
    Raises:
        CheckpointError - where none of them is of that epoch.
    """
    val_bpds = [row["val_bpd"] for row in checkpoints[newest][RUN].get("history", [])[1:]]  # after the untrained one
    if BEST in checkpoints or not val_bpds:
        return BEST
    best_epoch = val_bpds.index(min(val_bpds))
    for name, checkpoint in checkpoints.items():
        if checkpoint["epoch"] == best_epoch:
            return name
    raise CheckpointError(
        f"{os.path.join(folder, BEST)}, of epoch {best_epoch + 1}, is damaged or gone, and so is any copy of it: "
        f"delete {os.path.dirname(folder)} to start over, or choose another --run_name"
    )


def flags_of_run(folder):
    """The flags of the run whose checkpoints are in a folder, or None where none of them can be read."""
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(OSError):
            return read_run_checkpoint(os.path.join(folder, name))[RUN].get("flags")
    return None


class BestAndLast(ModelCheckpoint):
    """Keeps best.ckpt, that of the lowest value of a metric, and last.ckpt, that of the last epoch."""

    def __init__(self, monitor):
        super().__init__(filename="best", monitor=monitor, mode="min", enable_version_counter=False)
        # Under the name of older runs; kept, since Lightning asks for it several times in each step.
        self.key = super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @property
    def state_key(self):
        return self.key

    def on_train_epoch_end(self, trainer, pl_module):
        before, last = self.best_model_score, os.path.join(self.dirpath, LAST)
        super().on_train_epoch_end(trainer, pl_module)
        if self.best_model_score is before:
            trainer.save_checkpoint(last)
        elif trainer.is_global_zero:  # this epoch is the best one: the file has been written
            trainer.strategy.checkpoint_io.copy(self.best_model_path, last)


class CheckpointFiles(TorchCheckpointIO):
    """
    Writes each checkpoint atomically, in the background, keeps the last but one, and reads without running anything.

    A checkpoint is copied into the CPU's memory at once, and written to disk while training goes on, up to the time
    when the same file is to be written again. An error of the writing is raised by the next one, or at the end.
    """

    def __init__(self):
        self.thread = None
        self.jobs = {}  # by path

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path = os.fspath(path)
        self.wait_for(path)
        self.submit(path, write_checkpoint, copied(checkpoint), path)

    def copy(self, source, path):
        """Writes the copy of a checkpoint that was just saved."""
        self.wait_for(path)
        self.submit(path, copy_checkpoint, source, path, self.jobs[source])

    def wait_for(self, path):
        """Waits until a checkpoint is written. Raises the errors of all jobs that are done."""
        for other, job in self.jobs.items():
            if other == path or job.done():
                job.result()

    def submit(self, path, *job):
        """Has the thread call a function, with arguments."""
        self.thread = self.thread or ThreadPoolExecutor(max_workers=1)
        self.jobs[path] = self.thread.submit(*job)

    def teardown(self):
        if self.thread is not None:
            self.thread.shutdown()
        jobs, self.thread, self.jobs = self.jobs, None, {}
        for job in jobs.values():
            job.result()

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        self.wait_for(os.fspath(path))
        checkpoint = read_run_checkpoint(path)
        folder = os.path.dirname(path)
        states = checkpoint["callbacks"]
        for key, state in list(states.items()):
            path_of_last = state.get("monitor", True) is None and os.path.basename(state["best_model_path"])
            if path_of_last in ["", LAST]:  # the second ModelCheckpoint that older versions had, for last.ckpt
                del states[key]
        for state in states.values():
            if "dirpath" in state:  # a ModelCheckpoint's, whose folder may have been moved since
                for name in ["best_model_path", "kth_best_model_path"]:
                    state[name] = os.path.join(folder, os.path.basename(state[name])) if state[name] else ""
                state["best_k_models"] = {
                    os.path.join(folder, os.path.basename(path)): score
                    for path, score in state["best_k_models"].items()
                }
                state["dirpath"] = folder
        return checkpoint


def write_checkpoint(checkpoint, path):
    """Writes a checkpoint atomically; the last.ckpt of before is kept as previous.ckpt."""
    with place_for(path) as unfinished:
        try:
            torch.save(checkpoint, unfinished)  # by name: Ctrl-C in a Python file's write would be a RuntimeError
        except RuntimeError:
            with open(unfinished, "ab") as file:  # torch does not tell why; on a full disk this does
                file.write(bytes(2**26))
            raise


def copy_checkpoint(source, path, after):
    """
    Writes the copy of a checkpoint as write_checkpoint does, unless the job that wrote it, `after`, has failed. It is
    no link, so that damage to one of the files leaves the other.
    """
    after.result()
    with place_for(path) as unfinished:
        shutil.copyfile(source, unfinished)


def place_for(path):
    """The context in which a checkpoint is written, see atomic_write."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    return atomic_write(path, os.path.join(folder, PREVIOUS) if name == LAST else None, sync=True)


def copied(value):
    """
    What a checkpoint holds, tensors on the CPU, in dicts and lists of its own, which training does not change.
    (Lightning's apply_to_collection would take three times as long, 2 to 4 ms more in each epoch.)
    """
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if type(value) in [dict, OrderedDict]:
        return type(value)((name, copied(part)) for name, part in value.items())
    if type(value) in [list, tuple]:
        return type(value)(map(copied, value))
    return value

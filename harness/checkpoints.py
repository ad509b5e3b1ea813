"""Checkpoints: written atomically, and loaded without running code from the file."""

import contextlib
import inspect
import io
import math
import os
import pickle
import re
import shutil
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils._pytree import tree_map_only

from harness.errors import UserError, is_out_of_memory, location_of, warn
from harness.files import atomic_write

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# Key of a checkpoint under which EpochReport keeps the run's data; in older checkpoints they are a callback's state.
RUN, LEGACY_CALLBACK = "run", "EpochReport"
# Keys, and types of their values, that a run needs to resume; checkpoints of other programs may lack some of them.
REQUIRED_PARTS = {"epoch": int, "loops": dict, "callbacks": dict, "optimizer_states": list, RUN: dict}
# Prefixes that torch.compile, DistributedDataParallel, Fabric and FullyShardedDataParallel add to the names of weights.
WRAPPER_PREFIXES = r"\b(_orig_mod|module|_forward_module|_fsdp_wrapped_module)\."


class CheckpointError(UserError):
    """The file is not a usable checkpoint."""


def read_checkpoint(path, map_location="cpu") -> dict:
    """
    Reads a checkpoint of a module. Loads only tensors, plain values, and the types that
    torch.serialization.add_safe_globals allows, so no code in the file can run
    (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
    Inputs:
        path - Path of the checkpoint, or a file that is open for reading in binary mode.
        map_location - Device of the loaded tensors, see torch.load.
    Outputs:
        checkpoint - The dict that Lightning wrote. The data of EpochReport, if there are any, are under RUN. If the
            file contains only a state_dict, a dict with the state_dict under "state_dict".
    Raises:
        CheckpointError - if the file is not a checkpoint, is damaged, is another program's, or contains code.
        UserError - if the file cannot be read.
    """
    if hasattr(path, "read"):
        data, path = path.read(), getattr(path, "name", "the open file")
    else:
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, not a checkpoint; the checkpoint of a run is RUN/checkpoints/{BEST}")
        try:
            with open(path, "rb") as file:
                data = file.read()  # read once, because another process may replace the file
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load would not notice a flipped bit
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it contains more than tensors and plain values, and could run code when it is loaded "
            f"({short_reason(error)}): save model.state_dict() instead"
        ) from error
    except Exception as error:  # a damaged file can cause any kind of error
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({short_reason(error)})") from error
    if map_location != "cpu":
        checkpoint = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        found = [part for part in [checkpoint, *checkpoint.values()] if is_state_dict(part)]
        checkpoint = {"state_dict": found[0]} if len(found) == 1 else checkpoint  # as plain loops save it
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(part, missing), dict)
        for part, missing in [("state_dict", None), ("hyper_parameters", {}), ("callbacks", {})]
    ):
        keys = f", with the keys {', '.join(map(str, checkpoint))}" if isinstance(checkpoint, dict) else ""
        problem = f"is not a checkpoint of train_pl.py or of Lightning, but a file of another program{keys[:200]}"
        raise CheckpointError(f"{path} {problem}: save model.state_dict() instead")
    if LEGACY_CALLBACK in checkpoint.get("callbacks", {}):
        checkpoint[RUN] = checkpoint["callbacks"].pop(LEGACY_CALLBACK)
    return checkpoint


def is_state_dict(value):
    """Returns whether a value is a non-empty dict of tensors."""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def short_reason(error):
    """Returns an error as one line. Of torch's long messages, it keeps the first two lines that name the problem."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    naming = [line for line in lines if "size mismatch" in line or "key(s) in state_dict" in line]
    return textwrap.shorten((" ".join(naming[:2]) or lines[0]).rstrip(".:"), 400, placeholder=" ...")


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
    Builds the module of a checkpoint, like Lightning's load_from_checkpoint, but runs no code from the file and loads
    to the CPU by default.
    Inputs:
        model_class - Class of the module.
        checkpoint_path - Path of the checkpoint, or a file that is open for reading in binary mode.
        map_location - Device of the loaded tensors, see torch.load; by default the CPU.
        hparams_file - YAML file of hyperparameters, or None. They replace or complete those in the checkpoint.
        strict - Whether the names of the weights must be exactly the module's; by default the module's strict_loading.
        weights_only - Ignored: only tensors and plain values are ever loaded.
        hyperparameters - Arguments of the class. They replace or complete those of the checkpoint and the YAML file.
    Outputs:
        model - The module, with the checkpoint's weights.
    Raises:
        UserError - if the files cannot be used, see read_checkpoint and build_model.
    """
    if hparams_file is not None:
        try:
            hyperparameters = {**yaml.safe_load(Path(hparams_file).read_text(encoding="utf-8")), **hyperparameters}
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"hparams_file {hparams_file} cannot be read or contains no hyperparameters ({short_reason(error)}): "
                "give the hparams.yaml of a run"
            ) from error
    checkpoint = read_checkpoint(checkpoint_path, map_location or "cpu")
    return build_model(model_class, checkpoint, checkpoint_path, strict, **hyperparameters)


def strip_wrapper_prefixes(state_dict: dict, names) -> dict:
    """
    Renames the weights of a state_dict to a module's own names. Removes the prefixes that torch.compile and others add.
    If the module was saved as a part of a larger module, removes the part's name and drops the other parts.
    """

    def own_name(name):
        while name not in names and (wrapper := re.search(WRAPPER_PREFIXES, name)):
            name = name[: wrapper.start()] + name[wrapper.end() :]
        return name

    renamed = {own_name(name): value for name, value in state_dict.items()}
    if renamed.keys() == {*names, "n_averaged"}:  # the counter of torch.optim.swa_utils.AveragedModel
        del renamed["n_averaged"]
    if all(name in renamed for name in names):
        return renamed
    first = next(iter(names))
    prefixes = [name.removesuffix(first) for name in renamed if name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in renamed for name in names)]
    if len(prefixes) > 1:
        raise ValueError(
            f"it contains the model's weights several times, as {', '.join(prefixes)}: save only one of them"
        )
    return {name: renamed[prefixes[0] + name] for name in names} if prefixes else renamed


def build_model(model_class: type, checkpoint: dict, path, strict: bool | None = None, **hyperparameters):
    """
    Builds the module of a checkpoint that read_checkpoint has returned. Raises a CheckpointError if hyperparameters are
    missing or invalid, or if the weights cannot be loaded into the module.
    Inputs:
        model_class, checkpoint - Class of the module, and the checkpoint.
        path - Path of the file, for messages.
        strict, hyperparameters - See load_model.
    """
    state_dict, given = checkpoint["state_dict"], {**checkpoint.get("hyper_parameters", {}), **hyperparameters}
    arguments = inspect.signature(model_class).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        given = {name: value for name, value in given.items() if name in arguments}
    by_name = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
    required = [name for name, item in arguments.items() if item.default is item.empty and item.kind in by_name]
    if missing := [name for name in required if name not in given]:
        what = "is a bare state_dict" if set(checkpoint) == {"state_dict"} else "contains weights"
        raise CheckpointError(
            f"{path} {what} without the hyperparameters {', '.join(missing)}: pass them to "
            f"{model_class.__name__}.load_from_checkpoint as keyword arguments, such as {missing[-1]}=..."
        )
    try:
        model = model_class(**given)
        model.on_load_checkpoint(checkpoint)
        weights = strip_wrapper_prefixes(state_dict, model.state_dict())
        keys = model.load_state_dict(weights, strict=model.strict_loading if strict is None else strict)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = f"{short_reason(error)}{location_of(error)}"  # the error may be in the class, not in the file
        own = checkpoint.get("hyper_parameters", {})
        changed = [f"{name} {own[name]}" for name in hyperparameters if name in own and own[name] != given[name]]
        own = f"; it was trained with {', '.join(changed)}" if changed else ""
        raise CheckpointError(f"{path} cannot be loaded into {model_class.__name__} ({reason}){own}") from error
    for kind, names in zip(["lacks weights of the module", "contains weights that the module lacks"], keys):
        if names:
            rank_zero_warn(f"{path} {kind}: {', '.join(names)}")
    return model.to(next((value.device for value in state_dict.values() if torch.is_tensor(value)), "cpu"))


def read_run_checkpoint(path):
    """Reads a checkpoint, and raises a CheckpointError if a run cannot resume from it."""
    checkpoint = read_checkpoint(path)
    lacking = [part for part, kind in REQUIRED_PARTS.items() if not isinstance(checkpoint.get(part), kind)]
    if lacking:
        raise CheckpointError(
            f"{path} is not a checkpoint that a run can resume from: it lacks {', '.join(lacking)} (it was written by "
            "another program or by an older version)"
        )
    return checkpoint


def newest_checkpoint(folder, metric):
    """
    Returns the path and the content of the latest epoch's checkpoint in a folder, or None, None if there is none.
    Raises a CheckpointError if there are checkpoints, but a run cannot resume from them.

    If last.ckpt is damaged, or if the process was killed before it was written, last.ckpt becomes a copy of the latest
    epoch's checkpoint. In the same way, best.ckpt becomes a copy of the checkpoint with the lowest val_METRIC.
    """
    checkpoints, damages = {}, []
    for name in [LAST, BEST, PREVIOUS]:
        path = os.path.join(folder, name)
        if os.path.exists(path) and len(checkpoints) < 2:  # two of the three are enough
            try:
                checkpoints[name] = read_run_checkpoint(path)
            except CheckpointError as error:
                damages.append(str(error))
    remedy = f"delete {os.path.dirname(folder)} to start over, or choose another --run_name"
    if not checkpoints and damages:
        raise CheckpointError(f"{'; '.join(damages)}: {remedy}")
    if not checkpoints:
        return None, None
    newest = max(checkpoints, key=lambda name: checkpoints[name]["epoch"])
    values = [row[f"val_{metric}"] for row in checkpoints[newest][RUN]["history"] if row["epoch"]]
    best_epoch, best = values.index(min(values)) if values else 0, BEST
    if values and BEST not in checkpoints:  # without best.ckpt, a run has no results
        best = next((name for name in checkpoints if checkpoints[name]["epoch"] == best_epoch), None)
    if best is None:
        raise CheckpointError(
            f"{os.path.join(folder, BEST)}, of epoch {best_epoch + 1}, is damaged or missing, and so is every copy "
            f"of it: {remedy}"
        )
    for damage in damages:
        warn(f"warning: {damage}; resuming from {newest}, epoch {checkpoints[newest]['epoch'] + 1}")
    for name, source in [(BEST, best), (LAST, newest)]:
        if name != source:
            with atomic_write(os.path.join(folder, name)) as unfinished:
                shutil.copyfile(os.path.join(folder, source), unfinished)
    return os.path.join(folder, LAST), checkpoints[newest]


def flags_in_checkpoints(folder):
    """Returns the flags of the run whose checkpoints are in a folder, or None if no checkpoint can be read."""
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(UserError):
            return read_run_checkpoint(os.path.join(folder, name))[RUN].get("flags")
    return None


class BestAndLastCheckpoint(Checkpoint):
    """
    Callback that writes best.ckpt, the checkpoint of the lowest validation metric, and last.ckpt, that of the last
    epoch.
    Inputs:
        report - The EpochReport, whose history says which epoch is the best. It must come before this callback.
    """

    def __init__(self, report):
        self.report = report

    def on_train_epoch_end(self, trainer, pl_module):
        best, last = (os.path.join(trainer.logger.log_dir, "checkpoints", name) for name in [BEST, LAST])
        *before, value = (row[f"val_{self.report.metric}"] for row in self.report.history if row["epoch"])
        if value >= min(before, default=math.inf):
            trainer.save_checkpoint(last)
            return
        trainer.save_checkpoint(best)
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.copy(best, last)


class BackgroundCheckpointIO(TorchCheckpointIO):
    """
    Writes checkpoints atomically in the background, keeps the previous last.ckpt, and loads without running code.

    A checkpoint is copied to the CPU's memory at once, and written to the disk while training continues. Saving to the
    same path again waits until the first file is written. An error of the writing is raised by the next save, or at the
    end.
    """

    def __init__(self):
        self.thread = None
        self.jobs = {}  # dict from a path to the job that writes the file
        self.preloaded = {}  # dict from a path to a checkpoint that has been read already: the run resumes from it

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path = os.fspath(path)
        self.wait_for(path)
        self.submit(path, write_checkpoint, copy_to_cpu(checkpoint), path)

    def copy(self, source, path):
        """Copies a checkpoint that was just saved to another path, in the background."""
        self.wait_for(path)
        self.submit(path, copy_checkpoint, source, path, self.jobs[source])

    def wait_for(self, path):
        """Waits until the checkpoint at a path is written. Raises the errors of all finished jobs."""
        for other, job in self.jobs.items():
            if other == path or job.done():
                job.result()

    def submit(self, path, *job):
        """Calls a function with its arguments in the background thread."""
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
        checkpoint = self.preloaded.pop(path, None) or read_run_checkpoint(path)
        states = checkpoint["callbacks"]
        if "should_stop" not in checkpoint[RUN]:  # written by an older version, which used ModelCheckpoints
            own = [key for key, state in states.items() if "best_model_path" in state]
            for key in [key for key in own if os.path.basename(states[key]["best_model_path"]) in ["", BEST, LAST]]:
                del states[key]
        return checkpoint


def write_checkpoint(checkpoint, path):
    """Writes a checkpoint atomically. An existing last.ckpt is kept as previous.ckpt."""
    with atomic_checkpoint(path) as unfinished:
        try:
            # A path, not an open file: if Ctrl-C interrupts a Python file's write(), torch raises a RuntimeError.
            torch.save(checkpoint, unfinished)
        except RuntimeError:
            # torch's RuntimeError does not say whether the disk is full. If it is full, this write raises an OSError.
            with open(unfinished, "ab") as file:
                file.write(bytes(2**26))
            raise


def copy_checkpoint(source, path, after):
    """
    Copies a checkpoint atomically, see write_checkpoint, unless the job that wrote it, `after`, has failed. The copy is
    not a link, so damage to one of the files does not affect the other.
    """
    after.result()
    with atomic_checkpoint(path) as unfinished:
        shutil.copyfile(source, unfinished)


def atomic_checkpoint(path):
    """Returns the context manager in which a checkpoint is written, see atomic_write."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): check the permissions and the disk space of its folder"
        ) from error
    return atomic_write(path, os.path.join(folder, PREVIOUS) if name == LAST else None, sync=True)


def copy_to_cpu(checkpoint):
    """Copies a checkpoint, so that training does not change it, and moves its tensors to the CPU."""
    # Lightning's apply_to_collection would take three times as long, 2 to 4 ms more in each epoch.
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu", copy=True), checkpoint)

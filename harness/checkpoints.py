"""Checkpoints are data: written atomically, and read without running anything that a file may bring along."""

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
# Where EpochReport keeps what belongs to the run; older checkpoints have it as the state of a callback.
RUN, LEGACY_CALLBACK = "run", "EpochReport"
# What a run resumes from; checkpoints of other programs may lack any of them.
REQUIRED_PARTS = {"epoch": int, "loops": dict, "callbacks": dict, "optimizer_states": list, RUN: dict}
# What torch.compile, DistributedDataParallel, Fabric and FullyShardedDataParallel put before the names of weights.
WRAPPER_PREFIXES = r"\b(_orig_mod|module|_forward_module|_fsdp_wrapped_module)\."


class CheckpointError(UserError):
    """A file is not a checkpoint that can be used."""


def read_checkpoint(path, map_location="cpu") -> dict:
    """
    Reads a checkpoint of a module: tensors and plain values, and what torch.serialization.add_safe_globals allows. As
    nothing else is loaded, nothing in the file can run
    (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
    Inputs:
        path - Path of the checkpoint, or a file that is open for reading bytes.
        map_location - Where its tensors go, see torch.load.
    Outputs:
        checkpoint - The dict that Lightning has written; what EpochReport keeps is under RUN, if it is there. Of a file
            that contains nothing but a state_dict, a dict of that.
    Raises:
        CheckpointError - if the file is not a checkpoint, is damaged, of another program, or brings code along.
        UserError - if it cannot be read.
    """
    if hasattr(path, "read"):
        data, path = path.read(), getattr(path, "name", "the open file")
    else:
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, no checkpoint; that of a run is RUN/checkpoints/{BEST}")
        try:
            with open(path, "rb") as file:
                data = file.read()  # from here on, all depends on these bytes alone
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load would not notice a flipped bit
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and could run code when it is loaded "
            f"({short_reason(error)})"
        ) from error
    except Exception as error:  # damage becomes anything
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} is no checkpoint, or a damaged one ({short_reason(error)})") from error
    if map_location != "cpu":
        checkpoint = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    if isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        found = [part for part in [checkpoint, *checkpoint.values()] if is_state_dict(part)]
        checkpoint = {"state_dict": found[0]} if len(found) == 1 else checkpoint  # as of other programs' plain loops
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(part, missing), dict)
        for part, missing in [("state_dict", None), ("hyper_parameters", {}), ("callbacks", {})]
    ):
        keys = f", with the keys {', '.join(map(str, checkpoint))}" if isinstance(checkpoint, dict) else ""
        problem = f"is a file of another program{keys[:200]}, not a checkpoint of train_pl.py or of Lightning"
        raise CheckpointError(f"{path} {problem}: save model.state_dict()")
    if LEGACY_CALLBACK in checkpoint.get("callbacks", {}):
        checkpoint[RUN] = checkpoint["callbacks"].pop(LEGACY_CALLBACK)
    return checkpoint


def is_state_dict(value):
    """Whether a value is a dict of tensors, and not an empty one."""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def short_reason(error):
    """An error in one line: of torch's explanations the first two lines that name what is wrong."""
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
    Builds the module of a checkpoint, as Lightning's load_from_checkpoint does, but runs no code of a file, and loads
    to the CPU by default.
    Inputs:
        model_class - Class of the module.
        checkpoint_path - As in read_checkpoint.
        map_location - Where its tensors go, see torch.load; by default all on the CPU.
        hparams_file - YAML file of hyperparameters that replace or complete the checkpoint's, or None.
        strict - Whether the weights must be those of the module, no more and no less; by default as the module says.
        weights_only - Without effect: nothing but weights and plain values is ever read.
        hyperparameters - Arguments of the class that replace or complete both.
    Outputs:
        model - The module, with the checkpoint's weights.
    Raises:
        UserError - as read_checkpoint and build_model.
    """
    if hparams_file is not None:
        try:
            hyperparameters = {**yaml.safe_load(Path(hparams_file).read_text(encoding="utf-8")), **hyperparameters}
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise CheckpointError(f"{hparams_file} holds no hyperparameters ({short_reason(error)})") from error
    checkpoint = read_checkpoint(checkpoint_path, map_location or "cpu")
    return build_model(model_class, checkpoint, checkpoint_path, strict, **hyperparameters)


def strip_wrapper_prefixes(state_dict: dict, names) -> dict:
    """
    A state_dict by a module's own names of its weights: without the prefixes that torch.compile and others add, and,
    if it was saved as part of a larger module, without that part's name and the other parts.
    """

    def own_name(name):
        while name not in names and (wrapper := re.search(WRAPPER_PREFIXES, name)):
            name = name[: wrapper.start()] + name[wrapper.end() :]
        return name

    renamed = {own_name(name): value for name, value in state_dict.items()}
    if renamed.keys() == {*names, "n_averaged"}:  # of torch.optim.swa_utils.AveragedModel
        del renamed["n_averaged"]
    if all(name in renamed for name in names):
        return renamed
    first = next(iter(names))
    prefixes = [name.removesuffix(first) for name in renamed if name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in renamed for name in names)]
    if len(prefixes) > 1:
        raise ValueError(f"it has the model's weights several times, as {', '.join(prefixes)}: save one of them alone")
    return {name: renamed[prefixes[0] + name] for name in names} if prefixes else renamed


def build_model(model_class: type, checkpoint: dict, path, strict: bool | None = None, **hyperparameters):
    """
    Builds the module of a checkpoint that has been read. Raises a CheckpointError if hyperparameters are missing or
    invalid, or if the weights do not fit the module.
    Inputs:
        model_class, checkpoint - Class of the module, and what read_checkpoint returned.
        path - Path of the file, for messages.
        strict, hyperparameters - As in load_model.
    """
    state_dict, given = checkpoint["state_dict"], {**checkpoint.get("hyper_parameters", {}), **hyperparameters}
    arguments = inspect.signature(model_class).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        given = {name: value for name, value in given.items() if name in arguments}
    by_name = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
    required = [name for name, item in arguments.items() if item.default is item.empty and item.kind in by_name]
    if missing := [name for name in required if name not in given]:
        what = "is a bare state_dict" if set(checkpoint) == {"state_dict"} else "holds weights"
        raise CheckpointError(
            f"{path} {what} without the hyperparameters {', '.join(missing)}: give them to "
            f"{model_class.__name__}.load_from_checkpoint by name, as in {missing[-1]}=..."
        )
    try:
        model = model_class(**given)
        model.on_load_checkpoint(checkpoint)
        weights = strip_wrapper_prefixes(state_dict, model.state_dict())
        keys = model.load_state_dict(weights, strict=model.strict_loading if strict is None else strict)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = f"{short_reason(error)}{location_of(error)}"  # it may be the class that is wrong, not the file
        own = checkpoint.get("hyper_parameters", {})
        changed = [f"{name} {own[name]}" for name in hyperparameters if name in own and own[name] != given[name]]
        own = f"; it was trained with {', '.join(changed)}" if changed else ""
        raise CheckpointError(f"{path} does not fit {model_class.__name__} ({reason}){own}") from error
    for kind, names in zip(["lacks", "has too many"], keys):
        if names:
            rank_zero_warn(f"of the module's weights, {path} {kind}: {', '.join(names)}")
    return model.to(next((value.device for value in state_dict.values() if torch.is_tensor(value)), "cpu"))


def read_run_checkpoint(path):
    """Reads a checkpoint that a run can resume from. Raises a CheckpointError for others, too."""
    checkpoint = read_checkpoint(path)
    lacking = [part for part, kind in REQUIRED_PARTS.items() if not isinstance(checkpoint.get(part), kind)]
    if lacking:
        raise CheckpointError(
            f"{path} is no checkpoint to continue a run from: it lacks {', '.join(lacking)} (it is of another program, "
            "or of an older version)"
        )
    return checkpoint


def newest_checkpoint(folder, metric):
    """
    The path and the content of the latest epoch's checkpoint in a folder; None, None if there is none. It becomes
    last.ckpt if it has another name: if last.ckpt is damaged, or if the process was killed before it was written. The
    same holds for best.ckpt, that of the lowest val_METRIC. Raises a CheckpointError if there are checkpoints, but none
    to resume from.
    """
    checkpoints, damages = {}, []
    for name in [LAST, BEST, PREVIOUS]:
        path = os.path.join(folder, name)
        if os.path.exists(path) and len(checkpoints) < 2:  # of three, two will do
            try:
                checkpoints[name] = read_run_checkpoint(path)
            except CheckpointError as error:
                damages.append(str(error))
    elsewise = f"delete {os.path.dirname(folder)} to start over, or choose another --run_name"
    if not checkpoints and damages:
        raise CheckpointError(f"{'; '.join(damages)}: {elsewise}")
    if not checkpoints:
        return None, None
    newest = max(checkpoints, key=lambda name: checkpoints[name]["epoch"])
    values = [row[f"val_{metric}"] for row in checkpoints[newest][RUN]["history"] if row["epoch"]]
    best_epoch, best = values.index(min(values)) if values else 0, BEST
    if values and BEST not in checkpoints:  # without it, a run has no results
        best = next((name for name in checkpoints if checkpoints[name]["epoch"] == best_epoch), None)
    if best is None:
        raise CheckpointError(
            f"{os.path.join(folder, BEST)}, of epoch {best_epoch + 1}, is damaged or gone, and so is any copy of it: "
            f"{elsewise}"
        )
    for damage in damages:
        warn(f"warning: {damage}; continuing from {newest}, epoch {checkpoints[newest]['epoch'] + 1}")
    for name, source in [(BEST, best), (LAST, newest)]:
        if name != source:
            with atomic_write(os.path.join(folder, name)) as unfinished:
                shutil.copyfile(os.path.join(folder, source), unfinished)
    return os.path.join(folder, LAST), checkpoints[newest]


def flags_in_checkpoints(folder):
    """The flags of the run whose checkpoints are in a folder, or None if none of them can be read."""
    for name in [LAST, PREVIOUS, BEST]:
        with contextlib.suppress(UserError):
            return read_run_checkpoint(os.path.join(folder, name))[RUN].get("flags")
    return None


class BestAndLastCheckpoint(Checkpoint):
    """
    Writes best.ckpt, that of the lowest validation metric, and last.ckpt, that of the last epoch.
    Inputs:
        report - The EpochReport, whose history says which epoch is the best. It comes before this callback.
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
    Writes each checkpoint atomically, in the background, keeps the last but one, and reads without running anything.

    A checkpoint is copied into the CPU's memory at once, and written to disk while training goes on, up to the time
    when the same file is to be written again. An error of the writing is raised by the next one, or at the end.
    """

    def __init__(self):
        self.thread = None
        self.jobs = {}  # by path
        self.read = {}  # by path: the checkpoint that a run resumes from has been read already

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path = os.fspath(path)
        self.wait_for(path)
        self.submit(path, write_checkpoint, copy_to_cpu(checkpoint), path)

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
        checkpoint = self.read.pop(path, None) or read_run_checkpoint(path)
        states = checkpoint["callbacks"]
        if "should_stop" not in checkpoint[RUN]:  # of an older version, which had ModelCheckpoints of its own
            own = [key for key, state in states.items() if "best_model_path" in state]
            for key in [key for key in own if os.path.basename(states[key]["best_model_path"]) in ["", BEST, LAST]]:
                del states[key]
        return checkpoint


def write_checkpoint(checkpoint, path):
    """Writes a checkpoint atomically; the last.ckpt of before is kept as previous.ckpt."""
    with atomic_checkpoint(path) as unfinished:
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
    with atomic_checkpoint(path) as unfinished:
        shutil.copyfile(source, unfinished)


def atomic_checkpoint(path):
    """The context in which a checkpoint is written, see atomic_write."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error
    return atomic_write(path, os.path.join(folder, PREVIOUS) if name == LAST else None, sync=True)


def copy_to_cpu(checkpoint):
    """A checkpoint in dicts and lists of its own, which training does not change; its tensors are on the CPU."""
    # Lightning's apply_to_collection would take three times as long, 2 to 4 ms more in each epoch.
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu", copy=True), checkpoint)

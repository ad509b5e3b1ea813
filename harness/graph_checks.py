"""What a CUDA graph does not follow, and how it is found: hooks, settings, and what a step does in Python."""

import pickle
import random
import re
import types
from collections import deque

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities.model_helpers import is_overridden

# fmt: off
STEP_HOOKS = [  # Lightning's within an epoch, which would not be called for each minibatch
    "on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step",
    "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
]
SETTINGS = {  # of the Trainer; in the precisions no step is left out, as a scaler of gradients does
    "accumulate_grad_batches": [1], "gradient_clip_val": [None], "max_steps": [-1], "limit_train_batches": [1.0],
    "limit_val_batches": [1.0], "overfit_batches": [0.0], "val_check_interval": [1.0],
    "precision": ["32-true", "bf16-mixed"],
}
# fmt: on
_TORCH = "forward_pre forward backward_pre backward post_accumulate_grad optimizer_step_pre optimizer_step_post"
TORCH_HOOKS = [f"_{name}_hooks" for name in _TORCH.split()]  # of modules, parameters and optimizers
# Modules whose hooks are as right for many minibatches at once.
TRUSTED_MODULES = (
    "harness.",
    *(f"pytorch_lightning.callbacks.{name}" for name in ["model_checkpoint", "progress", "timer"]),
)
STEP_CHANGING_CALLBACKS = (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    LearningRateFinder,
    BatchSizeFinder,
)
PLAIN = (bool, int, float, str, bytes)  # may be another object each time, if it is equal
RANDOM_NUMBERS = (random.Random, np.random.Generator, np.random.RandomState)
# Changes by itself, or in place, as a graph changes it.
OPAQUE = (type, types.FunctionType, types.MethodType, types.ModuleType, pl.Trainer, torch.optim.Optimizer)
RANDOM = "training_step draws random numbers that are not the GPU's"


class CaptureError(RuntimeError):
    """The training does something that a CUDA graph cannot hold; the message says what."""


def check_training(trainer, model, train_loader, val_loader):
    """Raises a CaptureError if graphs would not do all that ordinary training does."""
    for name, possible in SETTINGS.items():
        found = getattr(trainer, name)
        if not any(found == value and type(found) is type(value) for value in possible):  # 1 is one minibatch, 1.0 all
            raise CaptureError(f"the Trainer's {name} is {found}; graphs need {' or '.join(map(str, possible))}")
    for part in [model, *trainer.callbacks]:
        if isinstance(part, STEP_CHANGING_CALLBACKS):
            raise CaptureError(f"{type(part).__name__} changes how the steps are made")
        for hook in step_hooks(part):
            raise CaptureError(f"{type(part).__name__} has {hook}, which is called for every minibatch")
    for loader, name in [(train_loader, "training"), (val_loader, "validation")]:
        if not getattr(loader, "indexes_at_once", False):
            raise CaptureError(f"the {name} loader does more than to index its images")
    if not model.automatic_optimization or is_overridden("configure_callbacks", model):
        raise CaptureError("the module has an optimisation or callbacks (configure_callbacks) of its own")
    model.trainer = trainer  # as in fit
    if not isinstance(model.configure_optimizers(), torch.optim.Optimizer):
        raise CaptureError("configure_optimizers returns more than an optimizer, such as learning-rate schedulers")


def step_hooks(part):
    """Names of the hooks within an epoch that a module or a callback has, unless they are TRUSTED_MODULES."""
    parent = pl.LightningModule if isinstance(part, pl.LightningModule) else pl.Callback
    hooks = [hook for hook in STEP_HOOKS if hasattr(parent, hook) and is_overridden(hook, part)]
    if getattr(part, "_every_n_train_steps", 0) or getattr(part, "_train_time_interval", None):  # of ModelCheckpoint
        return hooks
    return [hook for hook in hooks if not getattr(getattr(part, hook), "__module__", "").startswith(TRUSTED_MODULES)]


def check_modules(model, optimizer):
    """Raises a CaptureError if a graph cannot hold what a module and its optimizer are made of at this moment."""
    for part in [*model.modules(), *model.parameters(), optimizer]:
        if any(getattr(part, name, None) for name in TORCH_HOOKS):
            raise CaptureError("the module, its parts or its optimizer have hooks, which a graph would not call")
    if not all("capturable" in group for group in optimizer.param_groups):
        raise CaptureError(f"{type(optimizer).__name__} has no option `capturable`, as Adam has")


def python_state(model):
    """
    What a step may change and a replay would not: a dict from name to content, of the random numbers and of all that
    the attributes of a module and of its parts hold, down to the items of lists and the attributes of objects.
    """
    on_cpu = torch.get_rng_state().numpy().tobytes() if model.device.type != "cpu" else None
    found = {RANDOM: repr((random.getstate(), np.random.get_state(legacy=False), on_cpu))}
    seen, todo = set(), [("self", model)]
    while todo:
        name, value = todo.pop()
        found[name] = value  # which keeps it alive, so that nothing else gets its identity
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu" != model.device.type and not value.is_inference():
                found[f"{name} on the CPU"] = value._version
        elif isinstance(value, (torch.Generator, np.ndarray)):
            found[name] = (value if isinstance(value, np.ndarray) else value.get_state().numpy()).tobytes()
        elif isinstance(value, RANDOM_NUMBERS):
            found[name] = pickle.dumps(value)
        elif hasattr(value, "__next__"):
            raise CaptureError(f"{name} is an iterator, which a step may advance")
        elif id(value) not in seen and not isinstance(value, OPAQUE) and not getattr(value, "updates_in_place", False):
            seen.add(id(value))
            if isinstance(value, (list, tuple, set, deque)):
                value = dict(enumerate(value))
            parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            todo += [(f"{name}[{key!r}]" if parts is value else f"{name}.{key}", part) for key, part in parts.items()]
    return found


def describe_changes(before, after):
    """What has changed from one python_state to the next: reasons against a graph."""
    for name in {**before, **after}:
        old, new = before.get(name, before), after.get(name, after)
        # Of tuples the items are looked at.
        if old is not new and not (
            type(old) is type(new) and (type(new) is tuple or type(new) in PLAIN and old == new)
        ):
            name = re.sub(r"\._(?:modules|parameters|buffers)\['(.*?)'\]", r".\1", name)
            yield name if name == RANDOM else f"training_step changes {name} in Python, which a graph would not do"


class Forbidden:
    """A stand-in, during a capture, for what a graph does not follow: each use of it is a CaptureError."""

    def __init__(self, name):
        vars(self)["refused"] = name

    def refuse(self, *args):
        raise CaptureError(f"training_step uses {vars(self)['refused']}, which a graph would not follow")

    __getattr__ = refuse  # and all that a number may be used for, see below


_OPERATORS = {f"__{name}__" for name in ["eq", "ne", "lt", "le", "gt", "ge", "hash", "str", "len", "iter", "call"]}
for _name in _OPERATORS | ({*dir(int)} - {*dir(object)}):
    setattr(Forbidden, _name, Forbidden.refuse)
FORBIDDEN_TRAINER, FORBIDDEN_BATCH_IDX = (
    Forbidden("self.trainer, as self.log and self.current_epoch do"),
    Forbidden("batch_idx"),
)

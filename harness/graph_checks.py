"""Finds what a CUDA graph cannot repeat: hooks, settings of the Trainer, and what a step does in Python."""

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
STEP_HOOKS = [  # Lightning's hooks within an epoch; with graphs, they would not be called for each minibatch
    "on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step",
    "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
]
# The Trainer's settings with the values that graphs support; float16 would need a gradient scaler, which skips steps.
SETTINGS = {
    "accumulate_grad_batches": [1], "gradient_clip_val": [None], "max_steps": [-1], "limit_train_batches": [1.0],
    "limit_val_batches": [1.0], "overfit_batches": [0.0], "val_check_interval": [1.0],
    "precision": ["32-true", "bf16-mixed"],
}
# fmt: on
_TORCH = "forward_pre forward backward_pre backward post_accumulate_grad optimizer_step_pre optimizer_step_post"
TORCH_HOOKS = [f"_{name}_hooks" for name in _TORCH.split()]  # of modules, parameters and optimizers
# Modules whose hooks stay correct when they are called once for a block of minibatches.
_LIGHTNING = [f"pytorch_lightning.callbacks.{name}" for name in ["model_checkpoint", "progress", "timer"]]
TRUSTED_MODULES = ("harness.", *_LIGHTNING)
STEP_CHANGING_CALLBACKS = (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    LearningRateFinder,
    BatchSizeFinder,
)
PLAIN = (bool, int, float, str, bytes)  # compared by value; other types by identity
RANDOM_NUMBERS = (random.Random, np.random.Generator, np.random.RandomState)
# Not inspected: the Trainer always changes, and a graph changes the state of an optimiser in place.
OPAQUE = (type, types.FunctionType, types.MethodType, types.ModuleType, pl.Trainer, torch.optim.Optimizer)
RANDOM = "training_step uses random numbers that are not generated on the GPU"


class CaptureError(RuntimeError):
    """The training does something that a CUDA graph cannot repeat; the message names it."""


def check_training(trainer, model, train_loader, val_loader):
    """Raises a CaptureError if training with graphs would differ from ordinary training."""
    for name, possible in SETTINGS.items():
        found = getattr(trainer, name)
        # The type counts, too: 1 means one minibatch, 1.0 means all.
        if not any(found == value and type(found) is type(value) for value in possible):
            raise CaptureError(
                f"the Trainer's {name} is {found}, but CUDA graphs need {' or '.join(map(str, possible))}"
            )
    for part in [model, *trainer.callbacks]:
        if isinstance(part, STEP_CHANGING_CALLBACKS):
            raise CaptureError(f"{type(part).__name__} changes the training steps")
        for hook in step_hooks(part):
            raise CaptureError(f"{type(part).__name__} overrides {hook}, which is called for every minibatch")
    for loader, name in [(train_loader, "training"), (val_loader, "validation")]:
        if not getattr(loader, "indexes_at_once", False):
            raise CaptureError(f"the {name} loader does more than index its images")
    if not model.automatic_optimization or is_overridden("configure_callbacks", model):
        raise CaptureError("the module uses manual optimisation or configure_callbacks")
    model.trainer = trainer  # fit sets it too
    if not isinstance(model.configure_optimizers(), torch.optim.Optimizer):
        raise CaptureError(
            "configure_optimizers returns more than a single optimizer, such as learning-rate schedulers"
        )


def step_hooks(part):
    """Returns the names of the STEP_HOOKS that a module or a callback overrides, without those of TRUSTED_MODULES."""
    parent = pl.LightningModule if isinstance(part, pl.LightningModule) else pl.Callback
    hooks = [hook for hook in STEP_HOOKS if hasattr(parent, hook) and is_overridden(hook, part)]
    if getattr(part, "_every_n_train_steps", 0) or getattr(part, "_train_time_interval", None):  # ModelCheckpoint's
        return hooks
    return [hook for hook in hooks if not getattr(getattr(part, hook), "__module__", "").startswith(TRUSTED_MODULES)]


def check_modules(model, optimizer):
    """Raises a CaptureError if a graph cannot repeat the hooks of a module or the steps of its optimiser."""
    for part in [*model.modules(), *model.parameters(), optimizer]:
        if any(getattr(part, name, None) for name in TORCH_HOOKS):
            raise CaptureError("the module, its parts or its optimizer have hooks, which a CUDA graph does not call")
    if not all("capturable" in group for group in optimizer.param_groups):
        raise CaptureError(f"{type(optimizer).__name__} has no option `capturable` (Adam has it)")


def python_state(model):
    """
    Collects the Python state that a step may change, but a replay does not. Returns a dict from name to value: the
    states of random number generators, and the attributes of a module and of its parts, down to the items of lists and
    the attributes of objects.
    """
    on_cpu = torch.get_rng_state().numpy().tobytes() if model.device.type != "cpu" else None
    found = {RANDOM: repr((random.getstate(), np.random.get_state(legacy=False), on_cpu))}
    seen, todo = set(), [("self", model)]
    while todo:
        name, value = todo.pop()
        found[name] = value  # keeps the object alive, so that no other object gets its id
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
    """Yields a message for each difference between two python_states. It says why no graph can be used."""
    for name in {**before, **after}:
        old, new = before.get(name, before), after.get(name, after)
        # Of tuples, only the items are compared; they have their own names.
        if old is not new and not (
            type(old) is type(new) and (type(new) is tuple or type(new) in PLAIN and old == new)
        ):
            name = re.sub(r"\._(?:modules|parameters|buffers)\['(.*?)'\]", r".\1", name)
            yield (
                name
                if name == RANDOM
                else f"training_step changes {name} in Python, which a CUDA graph does not repeat"
            )


class Forbidden:
    """Replaces, during a capture, a value that is constant in a graph. Each use raises a CaptureError."""

    def __init__(self, name):
        vars(self)["refused"] = name

    def refuse(self, *args):
        raise CaptureError(f"training_step uses {vars(self)['refused']}, which is constant in a CUDA graph")

    __getattr__ = refuse  # and all operators of numbers, see below


_OPERATORS = {f"__{name}__" for name in ["eq", "ne", "lt", "le", "gt", "ge", "hash", "str", "len", "iter", "call"]}
for _name in _OPERATORS | ({*dir(int)} - {*dir(object)}):
    setattr(Forbidden, _name, Forbidden.refuse)
FORBIDDEN_TRAINER = Forbidden("self.trainer (as self.log and self.current_epoch do)")
FORBIDDEN_BATCH_IDX = Forbidden("batch_idx")

"""
The fast path of a single process: a Lightning batch is a chunk of many minibatches, whose training steps on a GPU are
captured once and replayed as one CUDA graph.

A training step of a small network is some sixty kernels of a few microseconds each. Launched from Python, one step per
Lightning batch, they keep a GPU waiting; and on a CPU, what the Trainer does around a step takes a twentieth of its
time. Here the images live on the device, and the Trainer has work once per chunk, which on a GPU is one launch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Its callbacks, logs and checkpoints stay the same,
and so do the minibatches and the number of steps.

A graph replays kernels and runs no Python. So the fast path is taken only where nothing in Python would be missed: not
where there are hooks within an epoch, and not if two steps of a copy of the module, before the training, use or change
what a graph does not follow. Whatever else fails later, the training goes on step by step, and one line says why. On a
CPU the steps are Python's as ever; there it is only what they would ask the Trainer in which a chunk differs.
"""

import contextlib
import copy
import gc
import itertools
import math
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from harness.cuda_graph import NO_TRAINER, CaptureError, Steps, explain
from harness.program import note

CHUNK = 8192  # images at most, unless a single minibatch has more
PIXELS = CHUNK * 28 * 28  # at most of a chunk that validates, whose images are all decoded at once
MAX_STEPS = 64  # in a graph, whatever the size of a minibatch
STEPS_ON_CPU = 16  # in a chunk: so many that the Trainer hardly counts, so few that a progress bar moves
BYTES_PER_STEP = 3 * 2**20  # of the GPU's memory that a graph keeps for a step's kernels, at most; by estimate
# Hooks of modules and callbacks within an epoch, which the fast path would not call, or not as often.
# fmt: off
STEP_HOOKS = [
    "on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step",
    "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
]
# fmt: on
# Where those are written to which a chunk is as good as a minibatch; others have the decorator `knows_chunks`.
PLACES = ("harness.", *(f"pytorch_lightning.callbacks.{name}" for name in ["model_checkpoint", "progress", "timer"]))
PRECISIONS = ["32-true", "bf16-mixed"]  # those that have no scaler of gradients, whose steps may be left out
# What the Trainer must be like.
SETTINGS = {
    "world_size": 1,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
}


def has_graphs(device):
    """Whether training steps can be captured on a torch.device."""
    return device.type == "cuda"


def has_chunks(device):
    """Whether the fast path is for a torch.device."""
    return device.type == "cpu" or has_graphs(device)


@contextlib.contextmanager
def fast_path(trainer, model, train_loader, val_loader):
    """
    A context in which a Trainer and its module train chunk by chunk, if they can.
    Inputs:
        trainer - The Trainer.
        model - The LightningModule. Its training_step is captured: it takes a batch (images, labels) and returns the
            loss, or a dict of tensors that has it as "loss". What it keeps, it adds to a tensor in place; what it logs,
            other hooks log.
        train_loader, val_loader - DataLoaders of data sets that offer len, indexing with a tensor of indices, and
            to(device). The sampler and the batch size of train_loader make the minibatches, as in plain training.
    Outputs:
        train_loader, val_loader - What to give to trainer.fit.
    """
    loaders, why_not = (train_loader, val_loader), None
    with contextlib.ExitStack() as undo:
        with isolate_rng():  # which restores nothing after an error
            try:
                check(trainer, model, train_loader, val_loader)
                rehearse(trainer, model, train_loader)
                loaders = train_in_chunks(trainer, model, train_loader, val_loader, undo)
            except Exception as error:
                why_not = explain(error)
        if why_not:
            undo.close()
            if trainer.is_global_zero and has_graphs(trainer.strategy.root_device):  # a CPU loses next to nothing
                note(f"step by step: {why_not}")
        yield loaders


def check(trainer, model, train_loader, val_loader):
    """Raises a CaptureError where the fast path would not do all that plain training does."""
    for name, value in SETTINGS.items():
        found = getattr(trainer, name)
        if found != value or type(found) is not type(value):  # 1 is one minibatch, 1.0 all of them
            raise CaptureError(f"the Trainer's {name} is {found}; captured steps need {value}")
    if not model.automatic_optimization or "training_step" in vars(model):
        raise CaptureError("the module optimises by itself, or its training_step was replaced after it was made")
    if trainer.precision not in PRECISIONS:
        raise CaptureError(f"the Trainer's precision is {trainer.precision}; chunks need one of {PRECISIONS}")
    for part in trainer.callbacks:
        if isinstance(part, (GradientAccumulationScheduler, StochasticWeightAveraging)):
            raise CaptureError(f"{type(part).__name__} changes how the steps are made")
    if is_overridden("configure_callbacks", model):
        raise CaptureError("the module has configure_callbacks, whose callbacks come when the training begins")
    for part in [model, *trainer.callbacks]:
        for hook in hooks_of_steps(part):
            raise CaptureError(f"{type(part).__name__} has {hook}, which plain training calls for every minibatch")
    check_loader(train_loader, "training")
    check_loader(val_loader, "validation")
    if list(val_loader.sampler) != list(range(len(val_loader.dataset))):
        raise CaptureError("the validation loader takes its images in another order, or not all of them")
    if has_graphs(trainer.strategy.root_device):
        check_memory(trainer.strategy.root_device, train_loader, val_loader)
    elif train_loader.num_workers:
        raise CaptureError("the training loader has worker processes, which a chunk has no use for")


def check_memory(device, train_loader, val_loader):
    """Raises a CaptureError where a GPU has too little memory for images and graphs."""
    images = [loader.dataset.images.nbytes for loader in [train_loader, val_loader]]
    needed = sum(images) + 2 * MAX_STEPS * BYTES_PER_STEP
    free = free_memory(device)
    if needed > free / 2:
        raise CaptureError(
            f"the GPU has {free / 2**20:,.0f} MiB of memory free, and images and graphs may take "
            f"{needed / 2**20:,.0f} MiB, which is more than half of it"
        )


def check_loader(loader, name):
    """Raises a CaptureError where a DataLoader's minibatches are not those of its sampler, batch size and data set."""
    if loader.batch_size is None or loader.drop_last:
        raise CaptureError(f"the {name} loader makes minibatches of another kind, or leaves images out")
    if type(loader).__iter__ is not DataLoader.__iter__ and not hasattr(loader, "redraw"):
        raise CaptureError(f"the {name} loader has an __iter__ of its own")
    batch = next(iter(DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)))
    if not all(map(torch.equal, batch, loader.dataset[torch.arange(len(batch[0]))])):
        raise CaptureError(f"the {name} loader changes the images of its data set")


def hooks_of_steps(part):
    """Names of the hooks within an epoch that a module or a callback has, and that do not know of chunks."""
    parent = LightningModule if isinstance(part, LightningModule) else Callback
    hooks = [hook for hook in STEP_HOOKS if hasattr(parent, hook) and is_overridden(hook, part)]
    if getattr(part, "_every_n_train_steps", 0) or getattr(part, "_train_time_interval", None):  # of ModelCheckpoint
        return hooks
    return [hook for hook in hooks if not is_marked(getattr(part, hook))]


def knows_chunks(hook):
    """Marks a hook of minibatches as right, too, where it is called once for many of them, a chunk."""
    hook.knows_chunks = True
    return hook


def is_marked(hook):
    """Whether a hook knows of chunks."""
    return getattr(hook, "knows_chunks", False) or getattr(hook, "__module__", "").startswith(PLACES)


def free_memory(device):
    """Free memory of a CUDA device, in bytes, with what torch holds of it and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def rehearse(trainer, model, train_loader):
    """
    Captures two training steps of a copy of a module, to see whether a graph can hold them; on a CPU, makes one.
    Raises:
        CaptureError - where they use or change what a graph, or on a CPU a chunk, does not follow.
        Exception - whatever else they raise.
    """
    device, batch_size = trainer.strategy.root_device, train_loader.batch_size
    twin = copy.deepcopy(model).to(device)
    twin.trainer = trainer
    optimizer = twin.configure_optimizers()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CaptureError("configure_optimizers returns more than an optimizer, such as learning-rate schedulers")
    train_set = copy.copy(train_loader.dataset).to(device)  # its tensors are not the loader's
    steps = Steps(twin, optimizer, train_set, batch_size, trainer.precision_plugin)
    images = torch.arange(len(train_set))
    if has_graphs(device):
        steps.capture(images[: 2 * batch_size])
    else:
        twin.trainer = NO_TRAINER
        steps.run(images[:batch_size], [0])


def train_in_chunks(trainer, model, train_loader, val_loader, undo):
    """
    Changes a Trainer and its module so that they train chunk by chunk. Inputs and outputs as of fast_path; undo is an
    ExitStack, which gets what makes them as they were.
    """
    strategy = trainer.strategy
    device, on_gpu = strategy.root_device, strategy.root_device.type == "cuda"
    by_graph = has_graphs(device)
    torch.empty(1, pin_memory=on_gpu)  # an error where that cannot be
    for data_set in [train_loader.dataset, val_loader.dataset]:
        undo.callback(data_set.to, data_set.images.device)
        data_set.to(device)
    steps = ChunkedSteps(trainer, model, train_loader.dataset, train_loader.batch_size, by_graph)
    strategy.training_step = steps.training_step  # the module keeps its own, and can be copied as ever
    undo.callback(delattr, strategy, "training_step")
    checkpoint_io = strategy.checkpoint_io
    for owner, name, value in [
        (strategy, "checkpoint_io", BackgroundCheckpointIO(checkpoint_io)),
        (trainer, "log_every_n_steps", 1),  # in chunks; a module that logs once per epoch does not notice
        (model, "automatic_optimization", False),
    ]:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
    num_images = val_loader.batch_size
    if by_graph:
        num_images = max(num_images, min(CHUNK, PIXELS // val_loader.dataset.images[0].numel()))
    in_order = torch.arange(len(val_loader.dataset)).split(num_images)
    return (
        IndexChunks(train_loader, pin_memory=on_gpu, max_steps=MAX_STEPS if by_graph else STEPS_ON_CPU),
        DataLoader(val_loader.dataset, batch_size=None, sampler=in_order),
    )


class IndexChunks:
    """
    The minibatches of a DataLoader, many at a time: tensors int64 [N] of the indices of their images. What else it is
    asked for, such as its sampler and its dataset, is the DataLoader's.
    """

    def __init__(self, loader, pin_memory, max_steps):
        self.loader = loader
        self.pin_memory = pin_memory  # so that copying the indices waits for nothing
        self.chunk = min(max(CHUNK // loader.batch_size, 1), max_steps) * loader.batch_size

    def __getattr__(self, name):
        if name == "loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self):
        return math.ceil(len(self.sampler) / self.chunk)

    def __iter__(self):
        if hasattr(self.loader, "redraw"):
            self.loader.redraw()
        for indices in torch.tensor(list(self.sampler)).split(self.chunk):
            yield indices.pin_memory() if self.pin_memory else indices


class ChunkedSteps:
    """Trains a module on a chunk of minibatches as if it were a single Lightning batch, by manual optimisation."""

    def __init__(self, trainer, model, train_set, batch_size, use_graphs):
        self.trainer = trainer
        self.model = model
        self.train_set = train_set
        self.batch_size = batch_size
        self.use_graphs = use_graphs
        self.steps = None  # once there is an optimizer
        self.num_steps = 0  # in this epoch

    def training_step(self, indices, batch_idx):
        """Trains on the images at indices int64 [N]. Returns what the module's step did for the first minibatch."""
        if batch_idx == 0:
            self.num_steps = 0
        optimizer = self.trainer.optimizers[0]
        if self.steps is None or self.steps.optimizer is not optimizer:
            precision = self.trainer.precision_plugin
            self.steps = Steps(self.model, optimizer, self.train_set, self.batch_size, precision)
        output = self.by_graph(indices, batch_idx) if self.use_graphs else None
        if output is None:
            output = self.steps.run(indices, itertools.count(self.num_steps))
        num_steps = math.ceil(len(indices) / self.batch_size)
        self.num_steps += num_steps
        self.count_steps(num_steps)
        return output

    def by_graph(self, indices, batch_idx):
        """As training_step; or None, where that failed, and everything is as if it had not been tried."""
        steps, restore = self.steps, None
        try:
            if batch_idx == 0:
                steps.drop_old_graphs()
            if len(indices) in steps.graphs:
                restore = random_numbers(self.model.device)
                return steps.replay(indices)
            restore = snapshot(self.model, steps.optimizer)
            return steps.capture(indices)
        except Exception as error:
            why = explain(error)
        # Now that the error is gone, and with it what it held of the GPU's memory.
        self.use_graphs = False
        steps.graphs.clear()
        gc.collect()
        if restore:
            restore()
        note(f"step by step: {why}")

    def count_steps(self, num_steps):
        """
        Adds to Lightning's global step, for which it has no hook where no step runs in Python. It counts manual and
        automatic optimisation apart; both counts are kept here, so that a checkpoint can be continued either way.
        """
        loop = self.trainer.fit_loop.epoch_loop
        automatic = loop.automatic_optimization.optim_progress.optimizer.step.total
        automatic.ready += num_steps
        automatic.completed += num_steps
        manual = loop.manual_optimization.optim_step_progress.total
        manual.ready, manual.completed = automatic.ready, automatic.completed


def random_numbers(device):
    """A function that makes a device's random numbers go on as they would now."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        return lambda: torch.cuda.set_rng_state(state, device)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)


def snapshot(model, optimizer):
    """A function that makes a module, its optimizer and its random numbers what they are now."""
    places = [place for part in model.modules() for place in [vars(part), part._parameters, part._buffers]]
    attributes = [dict(place) for place in places]
    tensors = [value for place in places for value in place.values() if isinstance(value, torch.Tensor)]
    copies = [tensor.detach().clone() for tensor in tensors]
    groups = optimizer.param_groups
    optimizer_state, restore_random_numbers = copy.deepcopy(optimizer.state_dict()), random_numbers(model.device)

    @torch.no_grad()
    def restore():
        for place, kept in zip(places, attributes):
            place.clear()
            place.update(kept)
        for tensor, kept in zip(tensors, copies):
            if not torch.equal(tensor, kept):  # some tensors cannot be written to
                tensor.copy_(kept)
        optimizer.load_state_dict(optimizer_state)
        for group, kept in zip(groups, optimizer.param_groups):  # others may hold the dicts
            group.update(kept)
        optimizer.param_groups = groups
        restore_random_numbers()

    return restore


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """
    Copies a checkpoint to the CPU's memory at once, and writes it to disk while training goes on, up to the time when
    the same file is to be written again. An error of the writing is raised by the next one, or at the end.
    """

    def __init__(self, checkpoint_io):
        super().__init__(checkpoint_io)
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.jobs = {}  # by path

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        for earlier, job in self.jobs.items():
            if earlier == path or job.done():
                job.result()
        self.jobs[path] = self.executor.submit(self.checkpoint_io.save_checkpoint, copied(checkpoint), path)

    def teardown(self):
        self.executor.shutdown()
        jobs, self.jobs = self.jobs, {}
        for job in jobs.values():
            job.result()


def copied(value):
    """What a checkpoint holds, tensors on the CPU, in dicts and lists of its own, which training does not change."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if type(value) in [dict, OrderedDict]:
        return type(value)((name, copied(part)) for name, part in value.items())
    if type(value) in [list, tuple]:
        return type(value)(map(copied, value))
    return value

"""
The fast path on a single GPU: the training steps of many minibatches, captured once and replayed as one CUDA graph.

A training step of a small network is some sixty kernels of a few microseconds each. Launched from Python, one step per
Lightning batch, they keep the GPU waiting. Here the images live on the GPU, a Lightning batch is a chunk of many
minibatches, and a chunk is one launch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). The Trainer,
its callbacks, logs and checkpoints stay the same, and so do the minibatches and the number of steps.
"""

import contextlib
import math

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from harness.program import UserError

CHUNK = 8192  # images at most, unless a single minibatch has more
STEP_HOOKS = ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]


class CaptureError(UserError):
    """The training step does something that a CUDA graph cannot hold."""


def can_capture(trainer, model, train_loader):
    """
    Whether the fast path can train a module: on a single CUDA device that has room for the training images, and where
    neither the module nor a callback has one of Lightning's hooks within a training step, which a graph does not call.
    """
    device = trainer.strategy.root_device
    return (
        device.type == "cuda"
        and trainer.world_size == 1
        and train_loader.dataset.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        and not any(is_overridden(hook, part) for hook in STEP_HOOKS for part in [model, *trainer.callbacks])
    )


def train_in_chunks(trainer, model, train_loader, val_loader):
    """
    Changes a Trainer and its module, before trainer.fit, so that they train chunk by chunk. On a CPU the chunks are
    there too, but not the graph: plain training to the bit.
    Inputs:
        trainer - The Trainer.
        model - A LightningModule with one optimizer and no scheduler. Its training_step is captured: it takes a batch
            (images, labels), does nothing but tensor operations and returns the loss, or a dict of tensors that has
            it as "loss". What it keeps, it adds to a tensor in place; what it logs, other hooks log.
        train_loader, val_loader - DataLoaders of data sets that offer len, indexing with a tensor of indices, and
            to(device). The sampler and the batch size of train_loader make the minibatches, as in plain training.
    Outputs:
        train_loader, val_loader - What to give to trainer.fit instead.
    """
    device = trainer.strategy.root_device
    train_set, val_set = train_loader.dataset.to(device), val_loader.dataset.to(device)
    model.automatic_optimization = False
    model.training_step = ChunkedSteps(trainer, model, train_set, train_loader.batch_size).training_step
    trainer.log_every_n_steps = 1  # in chunks; a module that logs once per epoch does not notice
    if device.type == "cuda":
        trainer.strategy.checkpoint_io = BackgroundCheckpointIO(trainer.strategy.checkpoint_io)
    return (
        IndexChunks(train_loader, pin_memory=device.type == "cuda"),
        DataLoader(val_set, batch_size=None, sampler=torch.arange(len(val_set)).split(CHUNK)),
    )


class IndexChunks:
    """The minibatches of a DataLoader, many at a time: tensors int64 [N] of the indices of their images."""

    def __init__(self, loader, pin_memory):
        self.loader = loader
        self.sampler = loader.sampler  # Lightning tells it the epoch
        self.pin_memory = pin_memory  # so that copying the indices waits for nothing
        self.chunk = max(CHUNK // loader.batch_size, 1) * loader.batch_size

    def __len__(self):
        return math.ceil(len(self.sampler) / self.chunk)

    def __iter__(self):
        if hasattr(self.loader, "redraw"):
            self.loader.redraw()
        for indices in torch.tensor(list(self.sampler)).split(self.chunk):
            yield indices.pin_memory() if self.pin_memory else indices


class ChunkedSteps:
    """Trains a module on a chunk of minibatches as if it were a single Lightning batch, by manual optimisation."""

    def __init__(self, trainer, model, train_set, batch_size):
        self.trainer = trainer
        self.model = model
        self.minibatch_step = model.training_step
        self.train_set = train_set
        self.batch_size = batch_size
        self.graphs = {}  # from the images in a chunk to (where the graph reads indices, replay, first output)
        self.lrs = []  # where the graphs read the learning rate of each parameter group

    def training_step(self, indices, batch_idx):
        """Trains on the images at indices int64 [N]. Returns what the module's step did for the first minibatch."""
        if not self.use_graph:
            first_output = self.steps(indices)
        elif len(indices) not in self.graphs:
            first_output = self.steps_and_capture(indices)
        else:
            graph_indices, replay, first_output = self.graphs[len(indices)]
            graph_indices.copy_(indices)
            for group, lr in zip(self.optimizer.param_groups, self.lrs):
                lr.fill_(group["lr"])
            replay()
        self.count_steps(math.ceil(len(indices) / self.batch_size))
        return first_output

    def steps(self, indices):
        """One training step per minibatch; this is what is captured."""
        imgs, labels = self.train_set[indices]
        outputs = []
        for batch_idx, batch in enumerate(zip(imgs.split(self.batch_size), labels.split(self.batch_size))):
            self.optimizer.zero_grad()
            output = self.minibatch_step(batch, batch_idx)
            loss = output["loss"] if isinstance(output, dict) else output
            loss.backward()
            self.optimizer.step()
            outputs.append(apply_to_collection(output, torch.Tensor, torch.Tensor.detach))
        return outputs[0]

    def steps_and_capture(self, indices):
        """Trains on the first chunk of its size, and captures the graph for the chunks to come."""
        if self.trainer.lr_scheduler_configs:
            raise CaptureError("a CUDA graph does not step learning-rate schedulers: train with --plain")
        graph_indices = indices.clone()
        with self.settings_of_a_graph():
            first_output, *replay = run_and_capture(self.steps, graph_indices)
        self.graphs[len(indices)] = graph_indices, *replay
        return first_output

    @contextlib.contextmanager
    def settings_of_a_graph(self):
        """What a captured step needs; everything else, checkpoints too, has the settings of plain training."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        self.lrs = self.lrs or [torch.tensor(lr, device=self.model.device) for lr, _ in before]
        precision = torch.get_float32_matmul_precision()
        self.model.log = refuse_to_log
        try:
            for group, lr in zip(groups, self.lrs):
                group["lr"], group["capturable"] = lr, True  # a graph reads the rate from a tensor
            torch.set_float32_matmul_precision("high")  # TF32
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for group, (lr, capturable) in zip(groups, before):
                group["lr"], group["capturable"] = lr, capturable
            del self.model.log

    @property
    def optimizer(self):
        """The module's only optimizer."""
        return self.trainer.optimizers[0]

    @property
    def use_graph(self):
        """Whether chunks are replayed, or run step by step."""
        return self.model.device.type == "cuda"

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


def refuse_to_log(*args, **kwargs):
    """In the place of self.log while a graph is captured."""
    raise CaptureError(
        "training_step runs inside a CUDA graph, where self.log would record nothing: "
        "log in another hook (as VAE.on_train_batch_end does) or train with --plain"
    )


def run_and_capture(function, tensor):
    """
    Runs a function of a CUDA tensor, which lets libraries and optimizer allocate what they keep, then captures it as a
    graph. Capturing runs nothing.
    Outputs:
        result - What the function returned.
        replay - Function that does the same work again, on what the tensor holds by then.
        replay_result - The tensor in which a replay leaves its result.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function(tensor)
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            replay_result = function(tensor)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CaptureError(
            f"training_step cannot be captured as a CUDA graph ({reason}): it must not "
            "wait for the GPU, as .item() and print do; train with --plain"
        ) from error
    return result, graph.replay, replay_result


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """
    Copies a checkpoint to the CPU's memory at once, and writes it to disk while training goes on, up to the time when
    the same file is to be written again.
    """

    def __init__(self, checkpoint_io):
        super().__init__(checkpoint_io)
        self.written = {}  # from path to a job that follows its writing

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if path in self.written:
            self.written[path].result()
        checkpoint = apply_to_collection(checkpoint, torch.Tensor, torch.Tensor.to, "cpu", copy=True)
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written[path] = self._executor.submit(int)

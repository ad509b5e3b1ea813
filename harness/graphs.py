"""
Training by CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), on a single GPU. Without
them Python launches some sixty kernels per step one by one, and with a small network the GPU waits for that. An epoch's
first minibatch is an ordinary step. Then a step is captured, which runs no kernel: if that fails, training goes on with
ordinary steps. For each further full minibatch the captured step is replayed. The next epoch captures again, so
whatever changes between epochs is followed. A replay runs no Python: if a step uses it, there is no graph.
"""

import contextlib
import gc
import math
import re

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from harness.errors import one_line, warn
from harness.graph_checks import (
    FORBIDDEN_BATCH_IDX,
    FORBIDDEN_TRAINER,
    CaptureError,
    check_modules,
    check_training,
    describe_changes,
    python_state,
)

MINIBATCHES_PER_BLOCK = (
    64  # in a Lightning batch: many, so that the Trainer costs little, but a progress bar still moves
)
VAL_PIXELS = 8192 * 28 * 28  # the most in a validation minibatch, whose images are all decoded at once
FAILED_GRAPHS = []  # graphs whose capture failed, kept alive: torch's allocator of pinned memory may still use them


def has_graphs(device):
    """Whether training steps can be captured on a torch.device."""
    return device.type == "cuda"


@contextlib.contextmanager
def cuda_graphs(trainer, model, train_loader, val_loader):
    """
    A context in which a Trainer trains a module by CUDA graphs, if it can; if not, a line says why. Yields what to give
    to trainer.fit instead of the loaders, which are such as bmnist.ImageLoader. The module's training_step returns the
    loss, or a dict that has it as "loss".
    """
    loaders, device = (train_loader, val_loader), trainer.strategy.root_device
    with contextlib.ExitStack() as undo:
        try:
            check_training(trainer, model, *loaders)
            undo.enter_context(side_stream(device))
            for loader in loaders:
                undo.callback(loader.dataset.to, loader.dataset.images.device)
                loader.dataset.to(device)
        except Exception as error:
            undo.close()
            warn(f"note: training without CUDA graphs: {explain_error(error)}")
        else:
            steps, size = GraphedSteps(trainer, model, train_loader), val_loader.dataset.images[0].numel()
            large = max(val_loader.batch_size, VAL_PIXELS // size)
            trainer.strategy.training_step, model.automatic_optimization = steps.training_step, False
            undo.callback(delattr, trainer.strategy, "training_step")
            undo.callback(setattr, model, "automatic_optimization", True)
            options = {name: getattr(val_loader, name) for name in ["sampler", "resamples", "generator"]}
            val_loader = type(val_loader)(val_loader.dataset, large, **options)
            loaders = IndexBlockLoader(train_loader), val_loader
        yield loaders


class IndexBlockLoader:
    """
    A loader of images whose batches are indices, int64 [N]: those of the first minibatch, then of many at a time. All
    else that it is asked for, such as its sampler, is the loader's.
    """

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(vars(self)["loader"], name)

    def __len__(self):
        return 1 + math.ceil((len(self.loader) - 1) / MINIBATCHES_PER_BLOCK)

    def __iter__(self):
        self.loader.resample()
        first, *others = self.loader.order().split(self.batch_size)
        return iter(
            [
                first,
                *(
                    torch.cat(others[i : i + MINIBATCHES_PER_BLOCK])
                    for i in range(0, len(others), MINIBATCHES_PER_BLOCK)
                ),
            ]
        )


class GraphedSteps:
    """The steps of a training, for the batches of an IndexBlockLoader."""

    def __init__(self, trainer, model, loader):
        self.trainer, self.model, self.data_set, self.batch_size = trainer, model, loader.dataset, loader.batch_size
        self.use_graphs = True
        self.graph = self.indices = None  # that of the epoch, and where it reads the indices of a minibatch

    def training_step(self, indices, batch_idx):
        """In place of the strategy's, for a Lightning batch. Returns what an epoch's first step returned, or None."""
        if batch_idx == 0:
            self.num_steps = 0
            return self.begin_epoch(indices)
        for minibatch in indices.split(self.batch_size):
            if self.use_graphs and len(minibatch) == self.batch_size:
                self.indices.copy_(minibatch)
                self.graph.replay()
                self.count_step()
            else:
                self.ordinary_step(minibatch)

    def begin_epoch(self, indices):
        """Trains on the first minibatch, then captures a step. Returns what the module's step returned."""
        if not self.use_graphs:
            return self.ordinary_step(indices)
        why, before = None, None
        try:
            before = python_state(self.model)
        except Exception as error:
            why = explain_error(error)
        output = self.ordinary_step(indices)
        try:
            why = why or next(describe_changes(before, python_state(self.model)), None)
            why or self.capture(indices)
        except Exception as error:
            why = explain_error(error)
        if why:  # by now the error is gone, and with it what it held of the GPU's memory
            self.use_graphs, self.graph = False, None
            gc.collect()
            warn(f"note: training without CUDA graphs: {why}")
        return output

    def ordinary_step(self, indices):
        """A step as Lightning makes it."""
        batch = self.data_set[indices]
        self.trainer._logger_connector.on_batch_start(batch)  # whose size weighs what the step logs
        output = self.step(batch, self.num_steps)
        self.count_step()
        return apply_to_collection(output, torch.Tensor, torch.Tensor.detach)

    def step(self, batch, batch_idx):
        """Forward, backward and update, in Lightning's order. Returns what the module's training_step returned."""
        optimizer = self.trainer.optimizers[0]
        with self.trainer.precision_plugin.train_step_context():
            output = self.model.training_step(batch, batch_idx)
        loss = output["loss"] if isinstance(output, dict) else output
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        optimizer.step()
        return output

    def capture(self, indices):
        """Captures a step as the epoch's graph. Raises an error, of any kind, if that cannot be."""
        optimizer, trainer = self.trainer.optimizers[0], self.trainer
        check_modules(self.model, optimizer)
        self.indices, before = indices.clone(), [group["capturable"] for group in optimizer.param_groups]
        try:
            self.model.trainer = FORBIDDEN_TRAINER
            for group in optimizer.param_groups:
                group["capturable"] = True
            # The new graph takes over the memory of the one before, which lives until then.
            self.graph = capture(self.graph_step, self.graph)
        finally:
            self.model.trainer = trainer
            for group, capturable in zip(optimizer.param_groups, before):
                group["capturable"] = capturable

    def graph_step(self):
        """The step that is captured."""
        self.step(self.data_set[self.indices], FORBIDDEN_BATCH_IDX)

    def count_step(self):
        """
        Counts a step where Lightning reads its global step from, by each of its ways to optimise, so that a checkpoint
        continues either way. It has no documented way to count a step that it did not make.
        """
        self.num_steps += 1
        loop = self.trainer.fit_loop.epoch_loop
        automatic = loop.automatic_optimization.optim_progress.optimizer.step.total
        automatic.ready = automatic.completed = automatic.completed + 1
        manual = loop.manual_optimization.optim_step_progress.total
        manual.ready = manual.completed = automatic.completed


@contextlib.contextmanager
def side_stream(device):
    """A context in which a CUDA device works on a stream of its own: on the default one nothing can be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def capture(function, previous):
    """
    Captures what a function does on the GPU, without doing it. The graph takes over the memory of a previous one, which
    is not replayed any more, or None. (torch.cuda.graph would also empty torch's cache of memory.)
    """
    device, mode = torch.cuda.current_device(), torch.cuda.get_sync_debug_mode()
    graph, pool = torch.cuda.CUDAGraph(), previous.pool() if previous else torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    random_numbers = generator.clone_state()
    torch.cuda.synchronize()
    gc.disable()  # a graph or a tensor of another stream that dies in the midst of the capture would spoil it
    try:
        graph.capture_begin(pool)
        try:
            torch.cuda.set_sync_debug_mode("error")  # ahead of CUDA's own error, which would leave it in a bad state
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            graph.capture_end()
    except BaseException:  # Ctrl-C, too
        # After an error of CUDA's, the random numbers and the allocator of memory still wait for the capture's end, and
        # torch 2.6 to 2.14 have no public function for the latter.
        generator.graphsafe_set_state(random_numbers)
        names = ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]  # of newer and of older ones
        for end in [getattr(torch._C, name) for name in names if hasattr(torch._C, name)][:1]:
            with contextlib.suppress(RuntimeError):  # it has come to its end, after all
                end(device, pool)
                torch._C._cuda_releasePool(device, pool)
                FAILED_GRAPHS.append(graph)
        raise
    finally:
        gc.enable()
    return graph


def explain_error(error):
    """Why there is no graph, in a few words."""
    while error.__context__ is not None:  # what ends a capture after an error raises one of its own
        error = error.__context__
    if isinstance(error, RuntimeError) and re.search("synchronizing CUDA|stream is captur", str(error)):
        return f"training_step waits for the GPU, as .item() and print do ({one_line(error)})"
    return str(error) if isinstance(error, CaptureError) else one_line(error)

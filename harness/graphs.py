"""
Training with CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) on a single GPU. Without
graphs, Python launches about sixty kernels per step one by one, and with a small network the GPU waits for Python. The
first minibatch of an epoch is an ordinary step. Then a step is captured, which runs no kernel. For each further full
minibatch, the captured step is replayed. If the capture fails, training continues with ordinary steps. The next epoch
captures again, so changes between epochs take effect. A replay runs no Python code: if a step depends on Python code,
training uses no graph.
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

# Minibatches in a Lightning batch: many, so that the Trainer takes little time, but a progress bar still moves.
MINIBATCHES_PER_BLOCK = 64
VAL_PIXELS = 8192 * 28 * 28  # the most in a validation minibatch, whose images are all decoded at once
FAILED_GRAPHS = []  # kept alive after a failed capture: torch's allocator of pinned memory may still use them


def has_graphs(device):
    """Returns whether training steps can be captured on a torch.device."""
    return device.type == "cuda"


@contextlib.contextmanager
def cuda_graphs(trainer, model, train_loader, val_loader):
    """
    Context manager in which a Trainer trains a module with CUDA graphs. If this is impossible, it prints the reason. It
    yields the loaders for trainer.fit. The given loaders must work like bmnist.ImageLoader, and the module's
    training_step must return the loss, or a dict with the loss under "loss".
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
    Loader whose batches are indices of images, int64 [N]: first those of one minibatch, then those of blocks of many
    minibatches. Its other attributes, such as the sampler, are those of the wrapped loader.
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
    """The training steps for the batches of an IndexBlockLoader."""

    def __init__(self, trainer, model, loader):
        self.trainer, self.model, self.data_set, self.batch_size = trainer, model, loader.dataset, loader.batch_size
        self.use_graphs = True
        self.graph = self.indices = None  # the epoch's graph, and the tensor from which it reads a minibatch's indices

    def training_step(self, indices, batch_idx):
        """Replaces the strategy's training_step. Returns the output of an epoch's first step, and None for others."""
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
        """Trains on the first minibatch, then captures a step. Returns the output of the module's training_step."""
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
        if why:  # not in the except clause: there, the error would keep memory of the GPU in use
            self.use_graphs, self.graph = False, None
            gc.collect()
            warn(f"note: training without CUDA graphs: {why}")
        return output

    def ordinary_step(self, indices):
        """Performs a step as Lightning does."""
        batch = self.data_set[indices]
        self.trainer._logger_connector.on_batch_start(batch)  # its size is the weight of logged values
        output = self.step(batch, self.num_steps)
        self.count_step()
        return apply_to_collection(output, torch.Tensor, torch.Tensor.detach)

    def step(self, batch, batch_idx):
        """Forward, backward and update, in Lightning's order. Returns the output of the module's training_step."""
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
        """Captures a step as the epoch's graph. Raises an error of any kind if the capture fails."""
        optimizer, trainer = self.trainer.optimizers[0], self.trainer
        check_modules(self.model, optimizer)
        self.indices, before = indices.clone(), [group["capturable"] for group in optimizer.param_groups]
        try:
            self.model.trainer = FORBIDDEN_TRAINER
            for group in optimizer.param_groups:
                group["capturable"] = True
            # The new graph reuses the memory of the previous graph, which must exist until then.
            self.graph = capture(self.graph_step, self.graph)
        finally:
            self.model.trainer = trainer
            for group, capturable in zip(optimizer.param_groups, before):
                group["capturable"] = capturable

    def graph_step(self):
        """Performs the step that is captured."""
        self.step(self.data_set[self.indices], FORBIDDEN_BATCH_IDX)

    def count_step(self):
        """
        Adds a step to Lightning's counters for automatic and for manual optimisation, so that a run can resume from a
        checkpoint with and without graphs. Lightning has no documented way to count a step that it did not perform.
        """
        self.num_steps += 1
        loop = self.trainer.fit_loop.epoch_loop
        automatic = loop.automatic_optimization.optim_progress.optimizer.step.total
        automatic.ready = automatic.completed = automatic.completed + 1
        manual = loop.manual_optimization.optim_step_progress.total
        manual.ready = manual.completed = automatic.completed


@contextlib.contextmanager
def side_stream(device):
    """Context manager in which a CUDA device uses a separate stream. The default stream allows no capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def capture(function, previous):
    """
    Captures the work of a function on the GPU without executing it. Returns the graph, which reuses the memory of the
    previous graph; `previous` may be None, and is not replayed again. (torch.cuda.graph would also empty torch's memory
    cache.)
    """
    device, mode = torch.cuda.current_device(), torch.cuda.get_sync_debug_mode()
    graph, pool = torch.cuda.CUDAGraph(), previous.pool() if previous else torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    random_numbers = generator.clone_state()
    torch.cuda.synchronize()
    gc.disable()  # a capture fails if a graph or a tensor of another stream is freed during it
    try:
        graph.capture_begin(pool)
        try:
            torch.cuda.set_sync_debug_mode("error")  # raises before CUDA does: CUDA's error would leave a bad state
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            graph.capture_end()
    except BaseException:  # also Ctrl-C
        # After a CUDA error, the random number generator and the memory allocator are still in capture mode. torch 2.6
        # to 2.14 have no public function that ends it for the allocator.
        generator.graphsafe_set_state(random_numbers)
        names = ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]  # of newer and older versions
        for end in [getattr(torch._C, name) for name in names if hasattr(torch._C, name)][:1]:
            with contextlib.suppress(RuntimeError):  # the capture has ended already
                end(device, pool)
                torch._C._cuda_releasePool(device, pool)
                FAILED_GRAPHS.append(graph)
        raise
    finally:
        gc.enable()
    return graph


def explain_error(error):
    """Returns the reason why no graph is used, in a few words."""
    while error.__context__ is not None:  # ending a capture after an error raises another error
        error = error.__context__
    if isinstance(error, RuntimeError) and re.search("synchronizing CUDA|stream is captur", str(error)):
        return f"training_step waits for the GPU, as .item() and print do ({one_line(error)})"
    return str(error) if isinstance(error, CaptureError) else one_line(error)

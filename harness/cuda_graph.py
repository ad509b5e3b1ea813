"""
Training steps as a CUDA graph: captured once, then replayed on other images.

A graph replays kernels and runs no Python. While it is captured, what Python would read anew in each step refuses to be
read: see Refusal.
"""

import contextlib
import gc
import io
import itertools
import pickle
import random
import re
import types

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Trainer

from harness.program import one_line

FAILED = []  # graphs whose capture ended with an error


class CaptureError(RuntimeError):
    """The training does something that a CUDA graph cannot hold; the message says what."""


def explain(error):
    """Why there is no graph, in a few words."""
    while error.__context__ is not None:  # what ends a capture after an error raises one of its own
        error = error.__context__
    if isinstance(error, CaptureError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has too little memory for graphs ({one_line(error)})"
    if isinstance(error, RuntimeError) and re.search("synchronizing CUDA|captur", str(error)):
        return f"training_step waits for the GPU, as .item() and print do ({one_line(error)})"
    return one_line(error)


class Steps:
    """The training steps of a chunk of minibatches: one by one, or as a graph."""

    def __init__(self, model, optimizer, train_set, batch_size, precision):
        self.model = model
        self.optimizer = optimizer
        self.train_set = train_set
        self.batch_size = batch_size
        self.precision = precision  # Lightning's plugin
        self.graphs = {}  # from the images in a chunk to (where the graph reads indices, replay, first output)
        self.lrs = []  # where the graphs read the learning rate of each parameter group
        self.captured = None  # what is fixed in the graphs

    def run(self, indices, numbers):
        """
        One step per minibatch.
        Inputs:
            indices - int64 tensor [N] of the images, on any device.
            numbers - Iterable of the minibatches' numbers in the epoch, for training_step.
        Outputs:
            first_output - What training_step returned for the first one.
        """
        first_output = None
        for batch_idx, batch in zip(numbers, self.minibatches(indices)):
            with self.precision.train_step_context():  # one for each step: it keeps casts of weights for its time
                output = self.model.training_step(batch, batch_idx)
            loss = output["loss"] if isinstance(output, dict) else output
            self.optimizer.zero_grad()  # in Lightning's order
            loss.backward()
            self.optimizer.step()
            if first_output is None:
                first_output = apply_to_collection(output, torch.Tensor, torch.Tensor.detach)
        return first_output

    def minibatches(self, indices):
        """The minibatches (images, labels), on a GPU indexed at once, on a CPU, whose caches hold few, one by one."""
        if self.model.device.type == "cpu":
            return map(self.train_set.__getitem__, indices.split(self.batch_size))
        return zip(*(tensor.split(self.batch_size) for tensor in self.train_set[indices]))

    def capture(self, indices):
        """
        As run, and captures the graph for the chunks to come.
        Raises:
            CaptureError - where the steps use or change what a graph does not follow.
            Exception - whatever else they raise.
        """
        device, groups = self.model.device, self.optimizer.param_groups
        if any(map(has_hooks, [*self.model.modules(), *self.model.parameters(), self.optimizer])):
            raise CaptureError("the module, its parts or its optimizer have hooks, which a graph does not call")
        self.drop_old_graphs()
        gc.collect()  # an old graph that dies in the midst of the capture would spoil it
        if not self.graphs:
            self.lrs = [torch.tensor(float(group["lr"]), device=device) for group in groups]
        self.set_lrs()
        graph_indices = indices.to(device, copy=True)
        numbers = itertools.repeat(Refusal("batch_idx"))
        before, before_draws = self.fixed(), random_states(device)
        with self.settings_of_a_graph():
            first_output, *replay = run_and_capture(lambda indices: self.run(indices, numbers), graph_indices)
        self.captured = self.fixed()
        changed = [name for name in {**before, **self.captured} if before.get(name) != self.captured.get(name)]
        if changed:
            raise CaptureError(
                f"training_step sets {changed[0]} anew; what it changes must be a tensor changed in place"
            )
        if before_draws != random_states(device):
            raise CaptureError("training_step draws random numbers that are not the GPU's")
        self.graphs[len(indices)] = graph_indices, *replay
        return first_output

    def drop_old_graphs(self):
        """Drops the graphs where what is fixed in them has changed."""
        if self.graphs and self.fixed() != self.captured:
            self.graphs.clear()

    def fixed(self):
        """
        What a graph takes as it is when it is captured, as a dict from names to bytes: all attributes of the module, of
        its parts and of the training set, see Contents, and the settings of the optimizer but for the learning rate.
        """
        parts = {id(part) for part in self.model.modules()}
        found = {}
        for path, part in [*self.model.named_modules(), ("the training set", self.train_set)]:
            values = dict(vars(part))
            for kind in ["_parameters", "_buffers"]:
                values.update(values.pop(kind, {}))
            for name, value in values.items():
                name = ".".join(filter(None, ["self", path, name]))
                found[name] = Contents(parts, self.model.device).of(value, name)
        for number, group in enumerate(self.optimizer.param_groups):
            settings = {name: value for name, value in group.items() if name not in ["lr", "capturable"]}
            name = f"optimizer.param_groups[{number}]"
            found[name] = Contents(parts, self.model.device).of(settings, name)
        return found

    def replay(self, indices):
        """As run, by a graph."""
        graph_indices, replay, first_output = self.graphs[len(indices)]
        graph_indices.copy_(indices)
        self.set_lrs()
        replay()
        return first_output

    def set_lrs(self):
        """Takes the learning rates over into the graphs."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            lr.fill_(group["lr"])

    @contextlib.contextmanager
    def settings_of_a_graph(self):
        """What a captured step needs; everything else, checkpoints too, has the settings of plain training."""
        groups = self.optimizer.param_groups
        if not all("capturable" in group for group in groups):
            raise CaptureError(f"{type(self.optimizer).__name__} has no option `capturable`, as Adam has")
        before = [(group["lr"], group["capturable"]) for group in groups]
        precision, trainer = torch.get_float32_matmul_precision(), self.model.trainer
        try:
            self.model.trainer = NO_TRAINER
            for group, lr in zip(groups, self.lrs):
                group["lr"], group["capturable"] = lr, True  # a graph reads the rate from a tensor
            torch.set_float32_matmul_precision("high")  # TF32
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for group, (lr, capturable) in zip(groups, before):
                group["lr"], group["capturable"] = lr, capturable
            self.model.trainer = trainer


class Contents(pickle.Pickler):
    """
    What an attribute holds, as bytes to compare: of a tensor where it is (and, of one on the CPU that a graph on a GPU
    would not read again, which change of it), of functions, classes, modules and optimizers which ones, of all others,
    down to the last item of a list, what pickle keeps.
    """

    def __init__(self, parts, device):
        self.parts = parts  # the id of each part of the module; these are looked at in turn
        self.device = device
        self.file = io.BytesIO()
        super().__init__(self.file)

    def of(self, value, name):
        """The bytes. Raises a CaptureError where pickle cannot keep the value."""
        try:
            self.dump(value)
            return self.file.getvalue()
        except Exception as error:
            why = one_line(error)
        raise CaptureError(f"what {name} holds cannot be compared ({why})")

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            change = value._version if value.device.type == "cpu" != self.device.type else None
            return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad, change
        if isinstance(value, torch.Generator):
            return bytes(value.get_state().tolist())
        if isinstance(value, types.MethodType):
            return id(value.__func__), id(value.__self__)
        kinds = (type, types.FunctionType, types.BuiltinFunctionType, torch.optim.Optimizer, Trainer)
        if isinstance(value, kinds) or id(value) in self.parts:
            return id(value)
        return None


def random_states(device):
    """The states of the random numbers that a graph on a device does not draw."""
    on_cpu = torch.get_rng_state().tolist() if device.type != "cpu" else None
    return pickle.dumps([random.getstate(), np.random.get_state(), on_cpu])


def has_hooks(part):
    """Whether torch calls functions along with those of a module, a parameter or an optimizer."""
    names = ["_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"]
    names += ["_post_accumulate_grad_hooks", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"]
    replaced = isinstance(part, torch.optim.Optimizer) and "step" in vars(part)
    return replaced or any(getattr(part, name, None) for name in names)


class Refusal:
    """In the place of what a graph does not follow, while it is captured: each use of it is a CaptureError."""

    def __init__(self, name):
        vars(self)["refused"] = name

    def refuse(self, *args):
        raise CaptureError(f"training_step uses {vars(self)['refused']}, which a graph would not follow")

    __getattr__ = refuse  # and all that a number may be used for, see below


_COMPARISONS = {f"__{name}__" for name in ["eq", "ne", "lt", "le", "gt", "ge"]}
for _name in {*dir(int), "__len__", "__iter__", "__call__"} - {*dir(object)} | _COMPARISONS | {"__hash__", "__str__"}:
    setattr(Refusal, _name, Refusal.refuse)
NO_TRAINER = Refusal("self.trainer, as self.log and self.current_epoch do")


def run_and_capture(function, tensor):
    """
    Runs a function of a CUDA tensor, which lets libraries and optimizer allocate what they keep, then captures it as a
    graph. Capturing runs nothing.
    Outputs:
        result - What the function returned.
        replay - Function that does the same work again, on what the tensor holds by then.
        replay_result - The tensor in which a replay leaves its result.
    """
    with torch.cuda.device_of(tensor):  # another one than the first may be current before the training
        return run_and_capture_here(function, tensor)


def run_and_capture_here(function, tensor):
    """As run_and_capture, on the current device."""
    stream, graph, pool = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream), no_waiting():
            result = function(tensor)
    finally:  # after an error, too, what is restored waits for the steps before it
        torch.cuda.current_stream().wait_stream(stream)
    with cleaned_up(graph, pool), torch.cuda.graph(graph, pool, stream):
        replay_result = function(tensor)
    return result, graph.replay, replay_result


@contextlib.contextmanager
def no_waiting():
    """A context in which waiting for the GPU is an error: within a capture, it would leave CUDA in a bad state."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def cleaned_up(graph, pool):
    """
    A context for the capture of a graph, after whose error torch is as before. By itself it would stay on the stream of
    the capture, and both its random numbers and its allocator of memory would wait for the capture's end.
    """
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[device]
    random_numbers = generator.clone_state()
    try:
        yield
    except BaseException:  # Ctrl-C, too
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random_numbers)
        with contextlib.suppress(RuntimeError):  # the capture has come to its end, after all
            end_allocation(device, pool)
            torch._C._cuda_releasePool(device, pool)
            FAILED.append(graph)  # the allocator of pinned memory may still ask it
        raise


def end_allocation(device, pool):
    """Ends the allocation of memory to a graph, as the end of a capture does; torch has no public function for it."""
    names = ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]  # of newer and of older ones
    next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))(device, pool)

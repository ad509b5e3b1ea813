"""The device that computes: a GPU where there is one that this torch can use, else the CPU; and its settings."""

import contextlib
import ctypes
import os
import warnings
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from harness.errors import UserError, warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, see malloc.h
CPU_INFO = Path("/proc/cpuinfo")
GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each


def pick_device(accelerator, num_processes=1):
    """
    The kind of device that computes. Where a GPU is passed over, a line says why.
    Inputs:
        accelerator - "auto", "cpu" or "gpu", the flag.
        num_processes - Number of processes, of which each has a GPU of its own.
    Outputs:
        kind - "cpu", "cuda", or "mps", which is Apple's GPU.
    Raises:
        UserError - where a GPU is asked for, and there is none that this torch can use.
    """
    if accelerator == "cpu":
        return "cpu"
    if torch.backends.mps.is_available():
        return "mps"
    problem = problem_of_cuda(local_rank() if num_processes > 1 else 0)
    if problem is None:
        return "cuda"
    if accelerator == "gpu":
        raise UserError(f"--accelerator gpu: {problem or 'there is no GPU here'}; use auto or cpu")
    if problem and rank_zero_only.rank == 0:
        warn(f"on the CPU: {problem}")
    return "cpu"


def local_rank():
    """Number of this process among those of its node."""
    return next((int(os.environ[name]) for name in ["LOCAL_RANK", "SLURM_LOCALID"] if os.environ.get(name)), 0)


def problem_of_cuda(number):
    """
    Why this torch cannot use an NVIDIA GPU, which it tries.
    Inputs:
        number - The GPU's number.
    Outputs:
        problem - One line; empty where there is no GPU at all, None where it can be used.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        reason = "it is built without CUDA" if torch.version.cuda is None else "for CUDA " + torch.version.cuda
        reason = str(caught[0].message).splitlines()[0] if caught else reason
        return "".join(f"torch {torch.__version__} cannot use {name} ({reason})" for name in names_of_gpus()[:1])
    number %= num_gpus
    try:
        with warnings.catch_warnings():  # that it is too old, in more lines
            warnings.simplefilter("ignore")
            torch.ones(1, device=torch.device("cuda", number)).add(1).item()
    except (RuntimeError, AssertionError) as error:
        major, minor = torch.cuda.get_device_capability(number)
        return (
            f"torch {torch.__version__} cannot use {torch.cuda.get_device_name(number)}, of compute capability "
            f"{major}.{minor}; it supports {', '.join(torch.cuda.get_arch_list())} ({str(error).splitlines()[0]})"
        )
    return None


def names_of_gpus():
    """The names of NVIDIA's GPUs in this machine, from its driver; none where there is no driver for Linux."""
    names = []
    for path in sorted(GPUS_OF_THE_DRIVER.glob("*/information")):
        lines = [line.partition(":") for line in path.read_text().splitlines()]
        names += [value.strip() for name, _, value in lines if name == "Model"]
    return names


def has_bf16(kind):
    """Whether a device of a kind, see pick_device, computes with bfloat16 by itself, as far as it can be told."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        words = set(CPU_INFO.read_text().split())
    except OSError:  # of another system than Linux
        return True
    return kind != "cpu" or bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def prepare_cpu():
    """Settings of this process with which a CPU trains faster."""
    # Tiny moments of Adam, of pixels that are hardly ever set, would slow it down.
    torch.set_flush_denormal(True)
    # Memory that a step frees is kept for the next one. glibc would give it back, and Linux would clear it each time.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # of other systems and of other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes; the most that older versions take
        mallopt(M_TRIM_THRESHOLD, 2**30)


def use_fast_layout(model):
    """Lays the weights of a module's convolutions out as its device computes fastest. Returns the module."""
    for param in model.parameters():
        if param.device.type == "cpu" and param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    return model


@contextlib.contextmanager
def matmul_precision(precision):
    """A context in which torch.set_float32_matmul_precision has set a precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def match_layout(optimizers):
    """
    Lays the state of optimizers out in memory as their parameters are: fused Adam takes both in the order of the
    memory, and a checkpoint may have another one.
    """
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

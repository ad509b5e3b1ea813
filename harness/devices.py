"""The device that computes: a GPU if there is one that this torch can use, else the CPU; its threads and layouts."""

import contextlib
import math
import os
import re
import warnings
from pathlib import Path

import torch

from harness.errors import UserError, warn

CPU_INFO = Path("/proc/cpuinfo")
GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each
CGROUP_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux
HIDDEN_ON_PURPOSE = ("", "-1")  # values of CUDA_VISIBLE_DEVICES by which people choose the CPU
DEFAULT_THREADS = 8  # at most; small networks gain nothing from more


def pick_device(accelerator: str, num_processes: int = 1) -> str:
    """
    The kind of device that computes. If a GPU is passed over, a line says why, unless the user has hidden it.
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
    problem = why_cuda_is_unusable(local_rank() if num_processes > 1 else 0)
    if problem is None:
        return "cuda"
    if accelerator == "gpu":
        raise UserError(f"--accelerator gpu: {problem or 'there is no GPU here'}; use auto or cpu")
    if problem and os.environ.get("CUDA_VISIBLE_DEVICES") not in HIDDEN_ON_PURPOSE:
        warn(f"warning: on the CPU: {problem}", num_processes)
    return "cpu"


def local_rank():
    """Number of this process among those of its node."""
    return next((int(os.environ[name]) for name in ["LOCAL_RANK", "SLURM_LOCALID"] if os.environ.get(name)), 0)


def why_cuda_is_unusable(number):
    """
    Why this torch cannot use the NVIDIA GPU of that number, which it tries: one line; empty if there is no GPU at all,
    None if it can be used.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        reason = str(caught[0].message).splitlines()[0] if caught else ""
        reason = "it is built without CUDA" if torch.version.cuda is None else reason
        has_driver = "Found no NVIDIA driver" not in reason
        problem = f"({reason})" if reason and has_driver else ""
        return "".join(
            f"torch {torch.__version__} cannot use {name} {problem}"
            if problem
            else f"this machine has {name}, but no GPU is visible to this process: {gpu_visibility_hint(has_driver)}"
            for name in nvidia_gpu_names()[:1]
        )
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


def gpu_visibility_hint(has_driver):
    """What to do if this machine has GPUs, but this process sees none; has_driver is False if torch found no driver."""
    visible, granted = (
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        {"SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"} & os.environ.keys(),
    )
    if has_driver and "SLURM_JOB_ID" in os.environ and not granted and visible not in HIDDEN_ON_PURPOSE:
        return "ask SLURM for one with --gpus=1"
    if has_driver and visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, unset it"
    return "start the container with --gpus all (Docker) or --nv (Apptainer)"


def check_number_of_gpus(devices, per_task):
    """
    Raises a UserError if this process sees fewer GPUs than the --devices of its node; per_task is the number of tasks
    per node that srun has started, 1 without srun.
    """
    visible = torch.cuda.device_count()
    if visible < devices:
        remedy = f"give --devices {visible}, or make more GPUs visible to this process (CUDA_VISIBLE_DEVICES)"
        if per_task > 1:
            remedy = f"give srun --gpus-per-node={devices} instead of --gpus-per-task, or add --gpu-bind=none"
        raise UserError(f"--devices {devices} needs as many GPUs, and this process sees {visible}: {remedy}")


def nvidia_gpu_names():
    """The names of NVIDIA's GPUs in this machine, from its driver for Linux."""
    names = []
    for path in sorted(GPUS_OF_THE_DRIVER.glob("*/information")):
        lines = [line.partition(":") for line in path.read_text().splitlines()]
        names += [value.strip() for name, _, value in lines if name == "Model"]
    return names


def has_bf16(kind: str) -> bool:
    """Whether a device of a kind, see pick_device, computes with bfloat16 by itself, as far as it can be told."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        words = set(CPU_INFO.read_text().split())
    except OSError:  # of another system than Linux
        return True
    return kind != "cpu" or bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def pick_threads(threads: str | int, before: str | None) -> int:
    """
    How many threads a single process computes with on a CPU, the same every time on a machine.
    Inputs:
        threads - "auto", or a number, the flag.
        before - What trained the run that resumes, as "cpu, 2 threads"; None for a new one.
    Outputs:
        threads - The number. With "auto", the number of the run that resumes, on which the last bits of its numbers
            depend; for a new one, as many as torch has (as OMP_NUM_THREADS says) and allowed_cpus, but at most 8.
    """
    if threads != "auto":
        return threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    most = min(torch.get_num_threads(), allowed_cpus())
    number = re.fullmatch(r"cpu, (\d+) threads", before or "")
    return min(int(number[1]) if number else DEFAULT_THREADS, most)


def allowed_cpus() -> int:
    """How many cores this process may use: those it may run on, and what its job or container is granted."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"]:
        if os.environ.get(name, "").isdecimal():
            cpus = min(cpus, int(os.environ[name]))
    return max(1, int(min(cpus, cgroup_quota())))


def cgroup_quota():
    """How many cores' time the control groups of a container or a job grant this process; infinite without a limit."""
    quotas = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in CGROUP_OF_PROCESS.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "cpu" not in controllers.split(","):
                continue
            root = CGROUPS if number == "0" else CGROUPS / "cpu"  # of version 2, of version 1
            names = ["cpu.max"] if number == "0" else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            folder = root / path.strip("/")
            # If the namespace of the container hides the path, its own group is the root.
            for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]:
                with contextlib.suppress(OSError):
                    granted, period = " ".join((place / name).read_text() for name in names).split()
                    if granted != "max" and int(granted) > 0:
                        quotas.append(int(granted) / int(period))
    return min(quotas)


def use_fast_layout(model: torch.nn.Module) -> torch.nn.Module:
    """Lays the weights of a module's convolutions out as its device computes fastest. Returns the module."""
    for param in model.parameters():
        if param.device.type == "cpu" and param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    return model


def match_optimizer_layout(optimizers):
    """Lays the state of optimizers out in memory as their parameters are: fused Adam takes both in that order."""
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

"""The device of a run: a GPU if torch can use one, else the CPU; its number of threads; memory layouts."""

import contextlib
import math
import os
import re
import warnings
from pathlib import Path

import torch

from harness.errors import UserError, warn

CPU_INFO = Path("/proc/cpuinfo")
GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")  # has a folder for each GPU
CGROUP_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # Linux only
HIDDEN_ON_PURPOSE = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which people choose the CPU
OTHER_TORCH = "install a version of torch that supports this GPU and its driver"
DEFAULT_THREADS = 8  # the most by default: small networks gain nothing from more


def pick_device(accelerator: str, num_processes: int = 1) -> str:
    """
    Chooses the kind of device that computes. Warns if there is a GPU that cannot be used, unless the user has hidden
    it.
    Inputs:
        accelerator - The flag: "auto", "cpu" or "gpu".
        num_processes - Number of processes; each has its own GPU.
    Outputs:
        kind - "cpu", "cuda", or "mps" (Apple's GPU).
    Raises:
        UserError - if accelerator is "gpu", but this torch cannot use a GPU.
    """
    if accelerator == "cpu":
        return "cpu"
    if torch.backends.mps.is_available():
        return "mps"
    problem = why_cuda_is_unusable(local_rank() if num_processes > 1 else 0)
    if problem is None:
        return "cuda"
    if accelerator == "gpu":
        raise UserError(f"--accelerator gpu: {problem or 'this machine has no GPU'}; use auto or cpu")
    if problem and os.environ.get("CUDA_VISIBLE_DEVICES") not in HIDDEN_ON_PURPOSE:
        warn(f"warning: using the CPU: {problem}", num_processes)
    return "cpu"


def local_rank():
    """Returns the rank of this process among the processes of its node."""
    return next((int(os.environ[name]) for name in ["LOCAL_RANK", "SLURM_LOCALID"] if os.environ.get(name)), 0)


def why_cuda_is_unusable(number):
    """
    Tries the NVIDIA GPU with this number. Returns None if torch can use it, an empty string if the machine has no
    NVIDIA GPU, otherwise the problem in one line.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        reason = str(caught[0].message).splitlines()[0] if caught else ""
        reason = "this torch is built without CUDA" if torch.version.cuda is None else reason
        has_driver = "Found no NVIDIA driver" not in reason
        problem = f"({reason})" if reason and has_driver else ""
        return "".join(
            f"torch {torch.__version__} cannot use {name} {problem}: {OTHER_TORCH}"
            if problem
            else f"this machine has {name}, but no GPU is visible to this process: {gpu_visibility_hint(has_driver)}"
            for name in nvidia_gpu_names()[:1]
        )
    number %= num_gpus
    try:
        with warnings.catch_warnings():  # torch also warns, in several lines, that a GPU is too old
            warnings.simplefilter("ignore")
            torch.ones(1, device=torch.device("cuda", number)).add(1).item()
    except (RuntimeError, AssertionError) as error:
        major, minor = torch.cuda.get_device_capability(number)
        return (
            f"torch {torch.__version__} cannot use {torch.cuda.get_device_name(number)}, compute capability "
            f"{major}.{minor}; it supports {', '.join(torch.cuda.get_arch_list())} ({str(error).splitlines()[0]}): "
            f"{OTHER_TORCH}"
        )
    return None


def gpu_visibility_hint(has_driver):
    """Returns what to do if a process sees none of the machine's GPUs; has_driver says whether torch found a driver."""
    visible, granted = (
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        {"SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"} & os.environ.keys(),
    )
    if has_driver and "SLURM_JOB_ID" in os.environ and not granted and visible not in HIDDEN_ON_PURPOSE:
        return "request a GPU from SLURM with --gpus=1"
    if has_driver and visible is not None:
        return f"unset CUDA_VISIBLE_DEVICES, which is {visible!r}"
    return "start the container with --gpus all (Docker) or --nv (Apptainer)"


def check_number_of_gpus(devices, per_task):
    """
    Raises a UserError if this process sees fewer GPUs than --devices. `per_task` is the number of tasks that srun has
    started on each node; 1 without srun.
    """
    visible = torch.cuda.device_count()
    if visible < devices:
        remedy = f"give --devices {visible}, or make more GPUs visible to this process (CUDA_VISIBLE_DEVICES)"
        if per_task > 1:
            remedy = f"give srun --gpus-per-node={devices} instead of --gpus-per-task, or add --gpu-bind=none"
        raise UserError(f"--devices {devices} needs as many GPUs, but this process sees {visible}: {remedy}")


def nvidia_gpu_names():
    """Returns the names of this machine's NVIDIA GPUs, from its Linux driver."""
    names = []
    for path in sorted(GPUS_OF_THE_DRIVER.glob("*/information")):
        lines = [line.partition(":") for line in path.read_text().splitlines()]
        names += [value.strip() for name, _, value in lines if name == "Model"]
    return names


def has_bf16(kind: str) -> bool:
    """Returns whether a kind of device, see pick_device, has native bfloat16; True if this cannot be found out."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        words = set(CPU_INFO.read_text().split())
    except OSError:  # not on Linux
        return True
    return kind != "cpu" or bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # "bf16" is ARM's


def pick_threads(threads: str | int, before: str | None) -> int:
    """
    Chooses the number of CPU threads of a run in a single process. It is always the same on the same machine.
    Inputs:
        threads - The flag: "auto", or a number.
        before - The device that trained the epochs before, such as "cpu, 2 threads"; None for a new run.
    Outputs:
        threads - The number of threads. With "auto": torch's number if OMP_NUM_THREADS is set. Otherwise a resumed run
            keeps its number, because the last bits of its results depend on it, and a new run gets 8. Neither gets more
            than torch's number or allowed_cpus.
    """
    if threads != "auto":
        return threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    most = min(torch.get_num_threads(), allowed_cpus())
    number = re.fullmatch(r"cpu, (\d+) threads", before or "")
    return min(int(number[1]) if number else DEFAULT_THREADS, most)


def allowed_cpus() -> int:
    """Returns how many cores this process may use, according to its CPU affinity, its SLURM job and its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"]:
        if os.environ.get(name, "").isdecimal():
            cpus = min(cpus, int(os.environ[name]))
    return max(1, int(min(cpus, cgroup_quota())))


def cgroup_quota():
    """Returns how many cores the control groups (cgroups) grant this process; infinity if they set no limit."""
    quotas = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in CGROUP_OF_PROCESS.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "cpu" not in controllers.split(","):
                continue
            root = CGROUPS if number == "0" else CGROUPS / "cpu"  # cgroup version 2 or 1
            names = ["cpu.max"] if number == "0" else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            folder = root / path.strip("/")
            # If the container's namespace hides this path, the root is the container's own group.
            for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]:
                with contextlib.suppress(OSError):
                    granted, period = " ".join((place / name).read_text() for name in names).split()
                    if granted != "max" and int(granted) > 0:
                        quotas.append(int(granted) / int(period))
    return min(quotas)


def use_fast_layout(model: torch.nn.Module) -> torch.nn.Module:
    """Gives the weights of a module's convolutions the fastest memory layout for its device. Returns the module."""
    for param in model.parameters():
        if param.device.type == "cpu" and param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    return model


def match_optimizer_layout(optimizers):
    """Gives the state of optimisers the memory layout of their parameters: fused Adam reads both in memory order."""
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

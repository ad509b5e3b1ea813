"""The processes of a run: their start, their shares of each minibatch and of its noise, their seeds, SIGTERM."""

import contextlib
import math
import os
import signal
import threading

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.overrides import TorchFunctionMode
from torch.utils.data.distributed import DistributedSampler

from harness import slurm
from harness.devices import match_optimizer_layout

# Environment variables that torchrun sets in each process, and those that Lightning sets in the processes that it
# starts. Users who start the processes by hand set the latter, too
# (https://lightning.ai/docs/pytorch/stable/clouds/cluster_intermediate_1.html).
TORCHRUN = {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"}
RENDEZVOUS_VARS = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
STALE_VARS = RENDEZVOUS_VARS | {"LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"}


def cluster_environment(devices, num_nodes, run_name):
    """
    Returns Lightning's ClusterEnvironment for the launcher that starts the run's processes. Ignores environment
    variables that an old shell or an interactive allocation has left behind. Raises a ValueError, which says what flags
    to give, if the number of started processes does not match the run.
    Inputs:
        devices, num_nodes - Number of processes per node, and of nodes.
        run_name - The run's name, or None.
    """
    launcher, started, kind = "torchrun", torchrun_processes(), TorchElasticEnvironment
    if started == (1, 1):
        launcher, started, kind = "srun", slurm.srun_tasks(), slurm.cluster_environment
    is_one_process = (num_nodes, devices) == (1, 1)
    # Several tasks of srun, with a run name each, may also be separate runs.
    if started != (1, 1) and not (is_one_process and launcher == "srun" and run_name):
        check_started(launcher, *started, wanted=(num_nodes, devices))
        return kind()
    if is_one_process:
        environment = LightningEnvironment()
        environment.set_global_rank(0)  # when Lightning was imported, it read the rank from such variables
        return environment
    if num_nodes == 1 and not {*RENDEZVOUS_VARS, "LOCAL_RANK"} <= os.environ.keys():  # Lightning starts them
        for name in STALE_VARS:
            os.environ.pop(name, None)
    check_variables(devices, num_nodes)
    return LightningEnvironment()


def torchrun_processes():
    """Returns the number of nodes, and of processes per node, that torchrun has started; 1, 1 without torchrun."""
    if not os.environ.keys() >= TORCHRUN:
        return 1, 1
    try:
        num_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // num_per_node, num_per_node
    except (ValueError, ZeroDivisionError):
        return 1, 1


def check_started(launcher, num_nodes, num_per_node, wanted):
    """Raises a ValueError unless a launcher has started the wanted number of nodes and of processes per node."""
    if not num_per_node:
        raise ValueError("srun must start the same number of tasks on each node: give srun --ntasks-per-node")
    if (num_nodes, num_per_node) != wanted:
        other = {
            "srun": "a different --run_name to each process for several runs",
            "torchrun": "unset TORCHELASTIC_RUN_ID if it is left from another session",
        }
        raise ValueError(
            f"{launcher} has started {num_nodes * num_per_node} processes: give --devices {num_per_node} "
            f"--num_nodes {num_nodes} for one run in all of them, or {other[launcher]}"
        )


def check_variables(devices, num_nodes):
    """Checks the environment variables with which a run's processes find each other, if no launcher has set them."""
    missing = RENDEZVOUS_VARS - os.environ.keys()
    if num_nodes > 1 and missing:
        raise ValueError(
            f"--num_nodes {num_nodes} needs srun or torchrun to start the processes, or on each node the environment "
            f"variables {', '.join(sorted(missing))}"
        )
    for name, possible in [
        ("LOCAL_RANK", range(devices)),
        ("NODE_RANK", range(num_nodes)),
        ("WORLD_SIZE", [devices * num_nodes]),
    ]:
        if name in os.environ and os.environ[name] not in map(str, possible):
            raise ValueError(
                f"{name}={os.environ[name]} in the environment is invalid for --devices {devices} --num_nodes "
                f"{num_nodes}: give matching flags, or unset LOCAL_RANK if it is left from another session"
            )


@contextlib.contextmanager
def process_group(trainer):
    """
    Context manager that starts and connects a Trainer's processes. Lightning would start them only in fit, validate or
    test, and would not disconnect them: if gloo's threads still run when Python exits, they sometimes abort it.
    """
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment)
    yield
    disconnect()  # not after an error: a process may be in the middle of a collective operation


def disconnect():
    """Closes the connection to the other processes, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_rank_zero(trainer, function, *args):
    """Calls a function only in rank 0; all ranks return its result. An error is raised in rank 0 and ends all ranks."""
    result = error = None
    if trainer.is_global_zero:
        try:
            result = function(*args)
        except Exception as caught:  # the other ranks must not wait for a rank that has failed
            error = caught
    return broadcast_or_exit(trainer, result, error)


@contextlib.contextmanager
def rank_zero_first(trainer):
    """Context manager: rank 0 runs the block first, then the other ranks. An error in rank 0 ends all ranks."""
    error = None
    if trainer.is_global_zero:
        try:
            yield
        except Exception as caught:
            error = caught
    broadcast_or_exit(trainer, None, error)
    if not trainer.is_global_zero:
        yield


def broadcast_or_exit(trainer, result, error=None):
    """Returns the result of rank 0 in all ranks. If rank 0 has an error instead, raises it there and ends all ranks."""
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        disconnect()
        raise error if trainer.is_global_zero else SystemExit(1)
    return result


def sampler(dataset, shuffle, trainer, seed):
    """
    Creates the sampler of a data set for this process. With W processes, each gets every W-th image of every minibatch.
    If W does not divide the number of images: with shuffling, up to W - 1 images come twice; without shuffling, the
    shares differ in length and each image comes once.
    Inputs:
        dataset - The data set.
        shuffle - If True, the order is random and changes with each epoch; it depends only on seed and epoch.
        trainer - The Trainer, inside its process_group.
        seed - The run's seed.
    """
    if shuffle:
        seed = derive_seed(seed, dtype=np.uint32)
        return EpochSampler(dataset, trainer.world_size, trainer.global_rank, seed=seed)
    return range(trainer.global_rank, len(dataset), trainer.world_size)


class EpochSampler(DistributedSampler):
    """Sampler whose order, and whose seed for sampled images, depend only on seed and epoch; see set_epoch."""

    def order(self):
        """Returns the indices of the epoch, int64 tensor [N]."""
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        repeats = math.ceil(self.total_size / len(order))  # 2 if the number of processes does not divide N, else 1
        return order.repeat(repeats)[self.rank : self.total_size : self.num_replicas]

    def __iter__(self):
        return iter(self.order().tolist())

    def resampling_seed(self):
        """Returns the seed of this epoch's images, for a data set that samples its images again in each epoch."""
        return derive_seed(self.seed, self.epoch)


def derive_seed(*numbers, dtype=np.uint64):
    """Derives a seed from several numbers; different numbers, even close ones, lead to unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, dtype)[0])


class RunHooks(pl.Callback):
    """
    Callback for the start of training, validation and test:

    - Every epoch, the validation before the first epoch, and the test start with random numbers that depend only on
      seed and epoch. So a run that resumes from an epoch's checkpoint continues as if it had never stopped.
    - SIGTERM keeps its previous handler, such as slurm's: Lightning's handler would end the training with exit code 0.
    - The optimiser's state gets the memory layout of the weights, see devices.match_optimizer_layout.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        self.handler = signal.getsignal(signal.SIGTERM)

    def restore_handler(self):
        """Restores the previous handler of SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    def on_train_start(self, trainer, pl_module):
        self.restore_handler()
        match_optimizer_layout(trainer.optimizers)

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(derive_seed(self.seed, trainer.current_epoch + 1))

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_test_start(self, trainer, pl_module):
        self.restore_handler()
        torch.manual_seed(derive_seed(self.seed))


class SharedNoise(TorchFunctionMode):
    """
    Context manager for one of several processes. In it, torch.randn_like samples the noise of the whole minibatch and
    returns the share of this process: every world_size-th image, starting at image `rank`. So the number of processes
    changes only the rounding.
    """

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.randn_like:
            return function(*args, **(kwargs or {}))
        share = args[0]
        shape = len(share) * self.world_size, *share.shape[1:]
        return torch.randn(shape, dtype=share.dtype, device=share.device)[self.rank :: self.world_size]

"""The processes of a run: their start, their shares of each minibatch and its noise, the seeds, SIGTERM."""

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

# What torchrun sets in each process, besides what Lightning sets in those that it starts, as does who starts them by
# hand (https://lightning.ai/docs/pytorch/stable/clouds/cluster_intermediate_1.html).
TORCHRUN = {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"}
RENDEZVOUS_VARS = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
STALE_VARS = RENDEZVOUS_VARS | {"LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"}


def cluster_environment(devices, num_nodes, run_name):
    """
    Lightning's ClusterEnvironment for a run, by who starts its processes. Variables that others have left in the
    environment, an old shell or an interactive allocation, change nothing. Raises a ValueError that says what to give
    if the processes that were started cannot be those of the run.
    Inputs:
        devices, num_nodes - Number of processes per node, and of nodes.
        run_name - The run's own name, or None.
    """
    launcher, started, kind = "torchrun", torchrun_processes(), TorchElasticEnvironment
    if started == (1, 1):
        launcher, started, kind = "srun", slurm.srun_tasks(), slurm.cluster_environment
    is_one_process = (num_nodes, devices) == (1, 1)
    if started != (1, 1) and not (is_one_process and launcher == "srun" and run_name):  # each task is a run of its own
        check_started(launcher, *started, wanted=(num_nodes, devices))
        return kind()
    if is_one_process:
        environment = LightningEnvironment()
        environment.set_global_rank(0)  # Lightning took another one from such variables when it was imported
        return environment
    if num_nodes == 1 and not {*RENDEZVOUS_VARS, "LOCAL_RANK"} <= os.environ.keys():  # Lightning starts them, here
        for name in STALE_VARS:
            os.environ.pop(name, None)
    check_variables(devices, num_nodes)
    return LightningEnvironment()


def torchrun_processes():
    """Number of nodes, and of processes on each, that torchrun has started; 1, 1 if it has not started this one."""
    if not os.environ.keys() >= TORCHRUN:
        return 1, 1
    try:
        num_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // num_per_node, num_per_node
    except (ValueError, ZeroDivisionError):
        return 1, 1


def check_started(launcher, num_nodes, num_per_node, wanted):
    """Checks that a launcher has started what is wanted: number of nodes, and of processes on each."""
    if not num_per_node:
        raise ValueError("srun has not started as many tasks on each node: give it --ntasks-per-node")
    if (num_nodes, num_per_node) != wanted:
        other = {
            "srun": "a --run_name of its own to each for several runs",
            "torchrun": "unset TORCHELASTIC_RUN_ID if it is left from another time",
        }
        raise ValueError(
            f"{launcher} has started {num_nodes * num_per_node} processes: give --devices {num_per_node} "
            f"--num_nodes {num_nodes} for one run of them all, or {other[launcher]}"
        )


def check_variables(devices, num_nodes):
    """Checks the variables by which the processes of a run find each other, if no launcher has set them."""
    missing = RENDEZVOUS_VARS - os.environ.keys()
    if num_nodes > 1 and missing:
        raise ValueError(
            f"--num_nodes {num_nodes} needs srun or torchrun, which start its processes, or on each node in the "
            f"environment {', '.join(sorted(missing))}"
        )
    for name, possible in [
        ("LOCAL_RANK", range(devices)),
        ("NODE_RANK", range(num_nodes)),
        ("WORLD_SIZE", [devices * num_nodes]),
    ]:
        if name in os.environ and os.environ[name] not in map(str, possible):
            raise ValueError(
                f"{name}={os.environ[name]} in the environment does not fit --devices {devices} --num_nodes "
                f"{num_nodes}: give those that do, or unset LOCAL_RANK if it is left from another time"
            )


@contextlib.contextmanager
def process_group(trainer):
    """
    A context in which a Trainer's processes run and are connected. Lightning would start them only in fit, validate or
    test. It would not disconnect them, and gloo's threads, if they still run when Python ends, at times abort it.
    """
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment)
    yield
    disconnect()  # not after an error, when a process may be in the middle of an exchange


def disconnect():
    """Takes the connection to other processes down, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_rank_zero(trainer, function, *args):
    """Calls a function in rank 0 alone; all ranks return its result. An error is raised there, and ends all of them."""
    result = error = None
    if trainer.is_global_zero:
        try:
            result = function(*args)
        except Exception as caught:  # the others must not wait for a process that has given up
            error = caught
    return broadcast_or_exit(trainer, result, error)


@contextlib.contextmanager
def rank_zero_first(trainer):
    """Rank 0 runs the block first, then the other ranks; an error in rank 0 is raised there, and ends all of them."""
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
    """Sends the result of rank 0 to all ranks, which return it. If rank 0 has an error instead, all of them end."""
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        disconnect()
        raise error if trainer.is_global_zero else SystemExit(1)
    return result


def sampler(dataset, shuffle, trainer, seed):
    """
    The order of a data set's images, and which of them belong to this process: every W-th image of every minibatch,
    with W processes. If it is shuffled and W does not divide the number of images, up to W - 1 come twice; if it is
    not, the shares differ in length and each image comes once.
    Inputs:
        dataset - The data set.
        shuffle - If True, the order is random, and another one for each epoch; it depends on seed and epoch alone.
        trainer - The Trainer, once it is in its process_group.
        seed - The run's seed.
    """
    if shuffle:
        seed = derive_seed(seed, dtype=np.uint32)
        return EpochSampler(dataset, trainer.world_size, trainer.global_rank, seed=seed)
    return range(trainer.global_rank, len(dataset), trainer.world_size)


class EpochSampler(DistributedSampler):
    """A sampler whose order, and the seed for sampled images, depend on seed and epoch alone; see set_epoch."""

    def order(self):
        """The indices of the epoch, int64 tensor [N]."""
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        repeats = math.ceil(self.total_size / len(order))  # 2 if the number of processes does not divide N, else 1
        return order.repeat(repeats)[self.rank : self.total_size : self.num_replicas]

    def __iter__(self):
        return iter(self.order().tolist())

    def resampling_seed(self):
        """Seed of the images of this epoch, for a data set that samples them again for each."""
        return derive_seed(self.seed, self.epoch)


def derive_seed(*numbers, dtype=np.uint64):
    """A seed from several numbers; other numbers, however close, give an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, dtype)[0])


class RunHooks(pl.Callback):
    """
    What a run does when its training, its validation or its test begins:

    - Every epoch, the validation before the first one, and the test begin with random numbers that depend on seed and
      epoch alone. So a run that continues from an epoch's checkpoint goes on as if it had never stopped.
    - SIGTERM is left to the handler that it had before, slurm's too: Lightning's would end the training with code 0.
    - The optimizer's state gets the layout of the weights, see devices.match_optimizer_layout.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        self.handler = signal.getsignal(signal.SIGTERM)

    def restore_handler(self):
        """Gives SIGTERM its handler back."""
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
    A context in which torch.randn_like, in each of several processes, samples the noise of the whole minibatch and
    takes the process's share: every world_size-th image, from number `rank` on. So the number of processes changes
    nothing but the rounding.
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

"""The processes of a run, one or several: their start, their shares of each minibatch and its noise, the seeds."""
import contextlib

import numpy as np
import pytorch_lightning as pl
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler


@contextlib.contextmanager
def connected(trainer):
    """
    A context in which a Trainer's processes run and are connected. Lightning would start them only in fit, validate or
    test. It would not disconnect them, and gloo's threads, if they still run when Python ends, at times abort it.
    """
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(trainer.strategy.setup_environment)
    yield
    disconnect()  # not after an error, when a process may be in the middle of an exchange


def disconnect():
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_rank_zero(trainer, function):
    """Calls a function in the first process alone; all return its result. Its error is raised there, and ends all."""
    result = error = None
    if trainer.is_global_zero:
        try:
            result = function()
        except Exception as caught:  # the others must not wait for a process that has given up
            error = caught
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        disconnect()
        raise error if trainer.is_global_zero else SystemExit(1)
    return result


def share_out(loader, trainer, seed):
    """
    The share of a data loader that belongs to this process.
    Inputs:
        loader - DataLoader; its batch size is that of the minibatch over all processes, which must divide it.
        trainer - The Trainer, once it is `connected`.
        seed - Seed of the order, where the loader shuffles; it changes with each epoch that Lightning begins.
    Outputs:
        loader - DataLoader of every W-th image of every minibatch, with W processes. The order depends on nothing but
            seed and epoch. Where it is shuffled and W does not divide the number of images, up to W - 1 come twice;
            where it is not, the shares differ in length and each image comes once.
    """
    dataset, world_size, rank = loader.dataset, trainer.world_size, trainer.global_rank
    if isinstance(loader.sampler, RandomSampler):
        sampler = EpochSampler(dataset, world_size, rank, seed=derived_seed(seed, dtype=np.uint32))
    else:
        sampler = range(rank, len(dataset), world_size)
    return DataLoader(dataset, loader.batch_size // world_size, sampler=sampler, num_workers=loader.num_workers,
                      collate_fn=loader.collate_fn)


def derived_seed(*numbers, dtype=np.uint64):
    """A seed from several numbers; other numbers, however close, give an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, dtype)[0])


class EpochSampler(DistributedSampler):
    """Draws with each epoch's order also the images anew, where they are drawn (bmnist.SampledImages)."""

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        if hasattr(self.dataset, "redraw"):
            self.dataset.redraw(derived_seed(self.seed, epoch))


class SeedEpochs(pl.Callback):
    """
    Begins every epoch, the validation before the first one, and the test with random numbers that depend on seed and
    epoch alone. So a run that continues from an epoch's checkpoint goes on as if it had never stopped.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:  # only now, since the data loader has drawn a number, in the first epoch of a fit earlier
            torch.manual_seed(derived_seed(self.seed, trainer.current_epoch + 1))  # than in others

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            torch.manual_seed(derived_seed(self.seed))

    def on_test_start(self, trainer, pl_module):
        torch.manual_seed(derived_seed(self.seed))


class SharedNoise(TorchFunctionMode):
    """
    With several processes, a context in which torch.randn_like of a process's share of a minibatch gives its rows of
    the noise that a single process would draw for the whole one. So their number changes nothing but the rounding.
    """

    def __init__(self, trainer):
        super().__init__()
        self.rank, self.world_size = trainer.global_rank, trainer.world_size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn_like:
            share, = args
            size = len(share) * self.world_size, *share.shape[1:]
            return torch.randn(size, dtype=share.dtype, device=share.device)[self.rank::self.world_size]
        return function(*args, **(kwargs or {}))

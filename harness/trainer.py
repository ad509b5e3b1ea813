"""The Trainer of a run, and the checks before training."""

import contextlib
import os
import sys

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import default_collate

from harness import checkpoints, devices, processes, slurm
from harness.errors import one_line, supports_progress_bar, warn
from harness.folder import RunError

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}  # Lightning's names
NO_WORKERS_HINT = "give --num_workers 0, which is the fastest because the images are in memory"


class NoProfiler(PassThroughProfiler):
    """Measures nothing. Lightning's default is slower: it makes a context manager for each of a step's 45 actions."""

    def profile(self, action_name):
        return contextlib.nullcontext()


def make_trainer(args, root_dir, callbacks):
    """
    Creates the Trainer for the flags. It has no logger yet, because the run has no folder yet. Raises a RunError if the
    flags do not match the machine or the processes that were started.
    Inputs:
        args - Namespace of all flags.
        root_dir - The run's own folder: under SLURM, Lightning loads an hpc_ckpt_N.ckpt that is in this folder.
        callbacks - The run's callbacks. The callbacks that every Trainer needs are added.
    """
    num_processes = args.devices * args.num_nodes
    ignored = [name for name in os.environ if name.startswith("PL_TRAINER_")]  # Lightning would use them as arguments
    for name in ignored:
        del os.environ[name]
    if ignored:
        names = ", ".join(ignored)
        warn(f"note: ignored environment variables: {names}; only flags change a run", num_processes)
    callbacks = [
        processes.RunHooks(args.seed),
        *callbacks,
        *([TQDMProgressBar()] if has_progress_bar(args) else []),  # else Lightning uses rich if it is installed
    ]
    try:
        kind = devices.pick_device(args.accelerator, num_processes)
        if kind == "cuda":
            devices.check_number_of_gpus(args.devices, slurm.srun_tasks()[1])
        if args.precision == "bf16" and not devices.has_bf16(kind):
            slower = "--precision bf16 is slower than 32 here: this processor has no native bfloat16"
            warn(f"warning: {slower}", num_processes)
        return pl.Trainer(
            default_root_dir=root_dir,
            max_epochs=args.epochs,
            callbacks=callbacks,
            accelerator=kind,
            devices=args.devices,
            num_nodes=args.num_nodes,
            strategy="ddp" if num_processes > 1 else "auto",
            precision=PRECISIONS[args.precision],
            plugins=[
                checkpoints.BackgroundCheckpointIO(),
                processes.cluster_environment(args.devices, args.num_nodes, args.run_name),
            ],
            use_distributed_sampler=False,
            logger=False,
            profiler=NoProfiler(),
            enable_progress_bar=has_progress_bar(args),
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise RunError(" ".join(str(error).split())) from error


def check_shared_memory(num_workers, loader):
    """
    Raises a RunError if the minibatches that the workers of the training and validation loaders send do not fit into
    shared memory. torch would wait for these minibatches forever.
    """
    size = sum(part.nbytes for part in default_collate([loader.dataset[0]])) * min(
        loader.batch_size, len(loader.dataset)
    )
    try:
        torch.empty(2 * num_workers * (loader.prefetch_factor + 1) * size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise RunError(
            f"out of shared memory for --num_workers {num_workers} ({one_line(error)}): {NO_WORKERS_HINT}"
        ) from error


def check_validation_size(num_val, num_processes):
    """Raises a RunError if there are fewer validation images than processes."""
    if num_val < num_processes:
        raise RunError(
            f"{num_val} validation images are too few for {num_processes} processes: lower --devices or --num_nodes"
        )


def has_progress_bar(args):
    """Returns whether the run shows a progress bar."""
    return args.progress_bar and supports_progress_bar(sys.stdout)

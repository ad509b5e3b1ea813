"""A SLURM job's name for its run, and what it does when SLURM is about to end it."""

import os
import signal
import subprocess
import sys
import threading

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only


def job_id():
    """The job's id as scontrol takes it, '<id>' or '<array id>_<task>'; None outside of batch jobs."""
    if SLURMEnvironment.job_id() is None or hasattr(sys, "ps1"):  # an interactive job or a notebook: no one run's job
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def run_name():
    """The name of the run of this batch job, which is the same after a requeue; None outside of batch jobs."""
    return f"job_{job_id()}" if job_id() else None


def environment(devices, num_nodes):
    """
    Plugins for the Trainer: Lightning's SLURM support, where it applies, without its way to requeue, which saves a
    checkpoint in the middle of a step, from which training could not continue exactly.
    Raises:
        ValueError, RuntimeError - where SLURM has not started one task per device.
    """
    if not SLURMEnvironment.detect():
        return []
    environment = SLURMEnvironment(auto_requeue=False)
    environment.validate_settings(devices, num_nodes)
    return [environment]


class StayInQueue(pl.Callback):
    """
    Lets a batch job go on after SLURM ends it. At SIGUSR1, which announces the time limit (sbatch --signal=USR1@60),
    the job is requeued. SIGTERM announces a preemption and is ignored, until SIGKILL comes: SLURM requeues a preempted
    job that it had to kill, but takes one that ended by itself for done.
    """

    def __init__(self):
        super().__init__()
        self.handle_signals()

    def handle_signals(self, *_):
        if job_id() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, requeue)
            signal.signal(signal.SIGTERM, ignore)

    # Anew each time: Lightning puts a handler of its own, which stops the Trainer, in the place of that for SIGTERM.
    on_train_start = on_validation_start = on_test_start = handle_signals


def requeue(signum, frame):
    if rank_zero_only.rank == 0:
        os.write(1, f"Time is almost up: requeueing job {job_id()}\n".encode())  # print may be what was interrupted
        subprocess.run(["scontrol", "requeue", job_id()])


def ignore(signum, frame):
    pass

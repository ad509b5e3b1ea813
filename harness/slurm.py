"""SLURM: the name of a job's run, its tasks, and requeueing."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only

# Environment variables that srun sets in each task, and that this module or Lightning reads.
SRUN = {
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
}
# Found in the command line of a notebook's kernel: Jupyter, VS Code and PyCharm, Colab, Spyder, marimo.
KERNEL = re.compile(
    rb"(^|[\0/])(jupyter[\w-]*|ipykernel(_launcher)?|colab_kernel_launcher|spyder_kernels\.console|marimo)(\.py)?\0"
)
MAX_GRACE = 600  # seconds from SIGTERM to SIGKILL, as in slurm/job.sh


def is_interactive():
    """Returns whether a person may control this process or its parent, with a terminal, a notebook or a prompt."""
    if hasattr(sys, "ps1") or any(map(KERNEL.search, parent_commands())):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def parent_commands():
    """Yields the command lines of this process's ancestors, if Linux shows them; each word ends with a zero byte."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while pid:
            process = Path("/proc", str(pid))
            yield (process / "cmdline").read_bytes()
            pid = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])


def job_id():
    """Returns the job's id for scontrol, '<id>' or '<array id>_<task>'; None outside of batch jobs."""
    if SLURMEnvironment.job_id() is None or is_interactive():  # an interactive job may start many runs
        return None
    if {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} <= os.environ.keys():
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def run_name():
    """Returns the name of this batch job's run, which is the same after a requeue; None outside of batch jobs."""
    return f"job_{job_id()}" if job_id() else None


def srun_tasks():
    """
    Returns the number of nodes, and of tasks per node (0 if it differs), that srun has started, including this process.
    The variables of the job do not show this: a batch script is one process, and srun may start only some of the tasks.
    """
    if not os.environ.keys() >= SRUN or is_interactive():  # srun --pty always starts one interactive process
        return 1, 1
    per_node = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    return int(os.environ["SLURM_STEP_NUM_NODES"]), int(per_node[1]) if per_node else 0


def cluster_environment():
    """
    Returns Lightning's environment for one run in all tasks of srun. Lightning's own requeueing is switched off: it
    saves a checkpoint in the middle of a step, and from there training could not resume exactly.
    """
    # Lightning derives address and port from the job. But another step of the job may run at the same time.
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    root = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    os.environ.setdefault("MASTER_ADDR", root)
    os.environ.setdefault("MASTER_PORT", str(10000 + (10 * job + step) % 20000))
    os.environ["SLURM_NTASKS_PER_NODE"] = str(srun_tasks()[1])
    return SLURMEnvironment(auto_requeue=False)


class RequeueOnTimeLimit(pl.Callback):
    """
    Callback that lets a batch job resume after SLURM ends it.

    SIGUSR1 announces the time limit (sbatch --signal=USR1@20): the job is requeued. If it has not finished an epoch
    since it started, it is not requeued, because it would never make progress. SIGTERM announces a preemption. It is
    ignored, and the job continues until SIGKILL: SLURM requeues a preempted job if it had to kill it, but regards a job
    that ended by itself as done. SIGTERM also kills the worker processes of the data loaders, so an error after SIGTERM
    waits for SIGKILL, too.
    """

    def __init__(self):
        self.job_id, self.pid = job_id(), os.getpid()
        self.is_ending = False  # whether SIGTERM was received
        self.has_advanced = False  # whether the job has finished an epoch since it started or restarted
        if threading.current_thread() is threading.main_thread():  # Run restores the previous handlers
            signal.signal(signal.SIGUSR1, self.requeue)
            signal.signal(signal.SIGTERM, self.handle_sigterm)

    def on_train_start(self, trainer, pl_module):
        self.first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer, pl_module):
        self.has_advanced = trainer.current_epoch > self.first_epoch

    def on_train_end(self, trainer, pl_module):
        self.has_advanced = True

    def on_exception(self, trainer, pl_module, exception):
        if self.is_ending and isinstance(exception, Exception):
            time.sleep(MAX_GRACE)

    def handle_sigterm(self, signum, frame):
        """Handler of SIGTERM. Unlike SIG_IGN, it does not make the programs that this process starts ignore SIGTERM."""
        self.is_ending = True

    def requeue(self, signum, frame):
        """Handler of SIGUSR1, in each process of the run."""
        if os.getpid() != self.pid:  # a data loader's worker has the same handler, and SLURM signals it, too
            return
        if not self.has_advanced:
            sys.exit(
                f"error: job {self.job_id} has not finished an epoch and its time limit is near, so it is not "
                "requeued: give a longer --time"
                if rank_zero_only.rank == 0
                else 1
            )
        if rank_zero_only.rank != 0:
            return
        # Not print: the signal may have interrupted a print.
        os.write(1, f"note: the time limit is near: requeueing job {self.job_id}\n".encode())
        try:
            subprocess.run(["scontrol", "requeue", self.job_id], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = f"warning: job {self.job_id} cannot be requeued ({error}): training continues until the time limit\n"
            os.write(2, text.encode())

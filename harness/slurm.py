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

# What srun sets in each task, and is used here or by Lightning.
SRUN = {
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
}
# A word in the command line of a notebook's kernel: Jupyter's, VS Code's and PyCharm's, Colab's, Spyder's, marimo.
KERNEL = re.compile(
    rb"(^|[\0/])(jupyter[\w-]*|ipykernel(_launcher)?|colab_kernel_launcher|spyder_kernels\.console|marimo)(\.py)?\0"
)
MAX_GRACE = 600  # seconds from SIGTERM to SIGKILL, as in slurm/job.sh


def is_interactive():
    """Whether somebody may sit at this process: it has a terminal, or is or was started by a notebook or a prompt."""
    if hasattr(sys, "ps1") or any(map(KERNEL.search, parent_commands())):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def parent_commands():
    """The command lines of the processes that have started this one, as far as Linux tells; a zero ends each word."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while pid:
            process = Path("/proc", str(pid))
            yield (process / "cmdline").read_bytes()
            pid = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])


def job_id():
    """The job's id as scontrol takes it, '<id>' or '<array id>_<task>'; None outside of batch jobs."""
    if SLURMEnvironment.job_id() is None or is_interactive():  # an interactive job is no one run's
        return None
    if {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} <= os.environ.keys():
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def run_name():
    """The name of the run of this batch job, which is the same after a requeue; None outside of batch jobs."""
    return f"job_{job_id()}" if job_id() else None


def srun_tasks():
    """
    The number of nodes, and of tasks on each (0 if they differ), that srun has started, this process among them. What a
    job has asked for does not tell: a batch script is one process, and srun starts any part of the tasks.
    """
    if not os.environ.keys() >= SRUN or is_interactive():  # srun --pty has one terminal, whatever it was asked for
        return 1, 1
    per_node = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    return int(os.environ["SLURM_STEP_NUM_NODES"]), int(per_node[1]) if per_node else 0


def cluster_environment():
    """
    Lightning's environment for one run in all tasks of srun, without its way to requeue, which saves a checkpoint in
    the middle of a step, from which training could not continue exactly.
    """
    # Lightning looks at the job where another step may run beside this one, on other nodes or the same.
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    root = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    os.environ.setdefault("MASTER_ADDR", root)
    os.environ.setdefault("MASTER_PORT", str(10000 + (10 * job + step) % 20000))
    os.environ["SLURM_NTASKS_PER_NODE"] = str(srun_tasks()[1])
    return SLURMEnvironment(auto_requeue=False)


class RequeueOnTimeLimit(pl.Callback):
    """
    Lets a batch job resume after SLURM ends it. At SIGUSR1, which announces the time limit (sbatch --signal=USR1@20),
    the job is requeued, unless it has not finished an epoch since it started: then it never would. SIGTERM announces a
    preemption and is ignored, until SIGKILL comes: SLURM requeues a preempted job that it had to kill, but takes one
    that ended by itself for done. An error after SIGTERM waits for SIGKILL, too: SIGTERM has killed the worker
    processes of the data loaders.
    """

    def __init__(self):
        self.job_id, self.pid = job_id(), os.getpid()
        self.is_ending = False  # whether SIGTERM has come
        self.has_advanced = False  # whether there is a checkpoint of an epoch since this job started, or restarted
        if threading.current_thread() is threading.main_thread():  # Run puts the handlers of before back
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
        """A handler of SIGTERM; unlike with SIG_IGN, programs that this process starts do not ignore it as well."""
        self.is_ending = True

    def requeue(self, signum, frame):
        """A handler of SIGUSR1, in each process of the run."""
        if os.getpid() != self.pid:  # a data loader's worker: it has inherited the handler, and SLURM signals it, too
            return
        if not self.has_advanced:
            sys.exit(
                f"error: job {self.job_id} has not finished an epoch and its time is almost up, so it is not requeued: "
                "give a longer --time"
                if rank_zero_only.rank == 0
                else 1
            )
        if rank_zero_only.rank != 0:
            return
        os.write(1, f"Time is almost up: requeueing job {self.job_id}\n".encode())  # print may be what was interrupted
        try:
            subprocess.run(["scontrol", "requeue", self.job_id], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = f"Job {self.job_id} is not requeued ({error}): training goes on until the time limit\n"
            os.write(2, text.encode())

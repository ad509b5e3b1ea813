"""The threads of a CPU: as many as there are idle cores when a run begins."""

import contextlib
import math
import os
import re
import time
from pathlib import Path

import torch

from harness.errors import warn

MAX_THREADS = 8  # by default: steps as small as these gain nothing from more
SHORTEST_LOOK, LONGEST_LOOK = 0.1, 60  # seconds in which others can be told to be busy
STATISTICS, PROCESS, CGROUPS = Path("/proc/stat"), Path("/proc/self"), Path("/sys/fs/cgroup")  # of Linux


class Cores:
    """The cores of this machine that this process may use, and how busy others keep them from now on."""

    def __init__(self):
        self.since = time.monotonic()
        self.busy = self.busy_seconds()

    @staticmethod
    def mine():
        """The numbers of those that it may run on."""
        if hasattr(os, "sched_getaffinity"):
            return os.sched_getaffinity(0)
        return set(range(os.cpu_count() or 1))

    def busy_seconds(self):
        """Seconds that they have worked for other processes; None where the system does not say so (Linux does)."""
        try:
            lines = [line.split() for line in STATISTICS.read_text().splitlines()]
        except OSError:
            return None
        names = {f"cpu{number}" for number in self.mine()}
        # User, nice, system and, after idle and waiting for disks, interrupts, soft ones, and what a host has taken.
        ticks = sum(sum(map(int, [*line[1:4], *line[6:9]])) for line in lines if line[0] in names)
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

    def share(self):
        """How many of them are this process's: as many as it may run on, or as its job or container is granted."""
        cores = len(self.mine())
        for name in ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"]:
            if os.environ.get(name, "").isdecimal():
                cores = min(cores, int(os.environ[name]))
        return max(1, int(min(cores, quota())))

    def idle(self):
        """How many of them others have left idle, of its share; at least 1."""
        seconds = time.monotonic() - self.since
        if self.busy is None or seconds < SHORTEST_LOOK:
            return self.share()
        others = (self.busy_seconds() - self.busy) / seconds
        return max(1, min(self.share(), len(self.mine()) - round(others)))


AT_START = Cores()  # when the program began, mostly, whose imports take a few seconds


def look_at_cores():
    """Cores that were looked at a little while ago, or are looked at from now on."""
    return AT_START if time.monotonic() - AT_START.since < LONGEST_LOOK else Cores()


def quota():
    """How many cores' time the container's control groups grant this process; infinite where they set no limit."""
    quotas = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in (PROCESS / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "cpu" not in controllers.split(","):
                continue
            root = CGROUPS if number == "0" else CGROUPS / "cpu"
            folder = root / path.strip("/")
            # Where the namespace of the container hides the path, its own group is the root.
            for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]:
                with contextlib.suppress(OSError):
                    if number == "0":
                        granted, period = (place / "cpu.max").read_text().split()
                    else:
                        granted, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ["quota", "period"])
                    if granted != "max" and int(granted) > 0:
                        quotas.append(int(granted) / int(period))
    return min(quotas)


@contextlib.contextmanager
def threads_of_run(threads, before, cores):
    """A context in which torch computes on a CPU with as many threads as pick_threads says."""
    kept = torch.get_num_threads()
    torch.set_num_threads(pick_threads(threads, before, cores))
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def pick_threads(threads, before, cores):
    """
    How many threads a single process computes with on a CPU. Too many are worse than too few: in every operator they
    wait for the one whose core is busy with something else.
    Inputs:
        threads - "auto", or a number, the flag.
        before - What trained the run to continue, as "cpu, 2 threads"; None for a new one.
        cores - The Cores, looked at for a while.
    Outputs:
        threads - The number. With "auto" that of a continued run, on which the last bits of its numbers depend; for a
            new one that of idle cores, but not more than MAX_THREADS or than torch has (as OMP_NUM_THREADS says).
    """
    if threads != "auto":
        return threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    most = min(torch.get_num_threads(), cores.share())
    if number := re.fullmatch(r"cpu, (\d+) threads", before or ""):
        return min(int(number[1]), most)
    idle = cores.idle()
    if idle < min(most, MAX_THREADS):
        warn(f"other programs are busy on {most - idle} of {most} cores: training with --threads {idle}")
    return min(idle, most, MAX_THREADS)

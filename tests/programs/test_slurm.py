"""
Tests of the job scripts on a real SLURM: `python -m unittest tests/programs/test_slurm.py`, a few minutes. They start
their own cluster with two nodes on this machine, and need root and Debian's packages (apt-get install slurm-wlm munge).
"""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from tests.helpers import (
    NO_NETWORK,
    REPOSITORY,
    assert_left_the_same,
    few_digits,
    known_files,
    mirror,
    results,
    small_mnist,
    stand_in_code,
)

MISSING = [name for name in ["slurmctld", "slurmd", "sbatch", "munged"] if not shutil.which(name)]
# Two nodes and two partitions: jobs in `high` preempt those in `low`, which are requeued after 2 s of grace. SLURM
# starts jobs every second instead of every half minute.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={state}/munge.socket
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
MessageTimeout=100
BatchStartTimeout=100
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=2
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Appended to a sitecustomize.py: with SLOW="EPOCH SECONDS" in the environment, a run that was not resumed waits in each
# epoch from that one on, so that even on a fast machine the run does not end before the test interrupts it.
SLOW_START = """
import os, time
from harness import report
begin_epoch = report.EpochReport.begin_epoch
def begin_slowly(self, trainer):
    epoch, seconds = os.environ["SLOW"].split()
    if trainer.current_epoch >= int(epoch):
        time.sleep(int(seconds))
    begin_epoch(self, trainer)
if "SLOW" in os.environ and not os.path.exists(f"VAE_logs/job_{os.environ['SLURM_JOB_ID']}/checkpoints/last.ckpt"):
    report.EpochReport.begin_epoch = begin_slowly
"""
TRAIN = "python train_pl.py --dataset rendered --hidden_dims 32 --z_dim 3 --epochs 1"


def free_ports(count):
    """Ports on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def command(*words, **options):
    """The output of a command."""
    words = list(map(str, words))
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=600, **options).stdout


@unittest.skipIf(MISSING, f"there is no {', '.join(MISSING)} (Debian: apt-get install slurm-wlm munge)")
@unittest.skipUnless(os.getuid() == 0, "only root can bring up a SLURM cluster")
class TestSlurm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        state = cls.folder / "slurm"
        for name in ["ctld", "spool-n1", "spool-n2"]:
            (state / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        (state / "slurm.conf").write_text(CONFIGURATION.format(host=host, state=state, ports=free_ports(3)))
        # MASTER_ADDR, since only this cluster knows the nodes' names
        cls.environment = {
            **os.environ,
            "SLURM_CONF": str(state / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "ACTIVATE": f"export PATH={Path(sys.executable).parent}:$PATH",
        }
        cls.environment.pop("OMP_NUM_THREADS", None)
        cls.start_munge(state)
        cls.addClassCleanup(cls.stop_daemons, state)
        for words in [["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]]:
            command(*words, env=cls.environment)
        cls.wait_for(lambda: cls.slurm("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 4, 60)

    @classmethod
    def start_munge(cls, state):
        """Starts munge, by which SLURM's daemons and commands authenticate each other, beside the machine's own."""
        key = state / "munge.key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = ["socket", "key-file", "pid-file", "seed-file", "log-file"]
        # --force, since munge wants its socket where every user of the machine can reach it.
        options = ["--force", *(f"--{name}={state}/munge.{name}" for name in files)]
        with open(state / "munge.out", "w") as output:
            munge = subprocess.Popen(["munged", "--foreground", *options], stdout=output, stderr=output)
        cls.addClassCleanup(munge.wait)
        cls.addClassCleanup(munge.terminate)
        cls.wait_for((state / "munge.socket").exists, 60)

    @classmethod
    def stop_daemons(cls, state):
        try:
            cls.slurm("scancel", "--full", "--signal=KILL", "--user=root")
        finally:
            for path in [state / "slurmctld.pid", state / "slurmd-n1.pid", state / "slurmd-n2.pid"]:
                if path.exists():
                    pid = int(path.read_text())
                    os.kill(pid, signal.SIGTERM)
                    cls.wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), 30)

    @classmethod
    def slurm(cls, *words):
        return command(*words, env=cls.environment)

    @staticmethod
    def wait_for(condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"nothing happened within {seconds} s")
            time.sleep(0.2)

    def setUp(self):
        """Makes a checkout for the test, in which its jobs run."""
        self.checkout = Path(tempfile.mkdtemp(dir=self.folder))
        self.released = set()  # attempts of requeued jobs that need not wait
        for path in [*REPOSITORY.glob("*.py"), REPOSITORY / "harness", REPOSITORY / "slurm"]:
            (self.checkout / path.name).symlink_to(path)

    def submit(self, *words, **variables):
        """Submits a job and returns its id."""
        words = ["sbatch", "--parsable", "--cpus-per-task=1", *words]
        return command(*words, cwd=self.checkout, env={**self.environment, **variables}).strip()

    def job(self, job_id):
        """The properties of a job, by name."""
        return dict(re.findall(r"(\w+)=(\S+)", self.slurm("scontrol", "show", "job", job_id)))

    def slow_start(self):
        """Environment variables for few digits, with SLOW_START."""
        variables = few_digits(self.checkout)
        with open(self.checkout / "sitecustomize.py", "a") as file:
            file.write(SLOW_START)
        return variables

    def preempt(self, node):
        """Submits a short job that preempts those on a node, and returns its id."""
        (self.checkout / "short.sh").write_text("#!/bin/sh\nsleep 1\n")
        return self.submit(f"--nodelist={node}", "--exclusive", "--partition=high", "short.sh")

    def script(self, text):
        """Writes a user's own job script for the tests' environment, and returns its name."""
        (self.checkout / "own.sh").write_text(f"#!/bin/bash\n{self.environment['ACTIVATE']}\n{text}\n")
        return "own.sh"

    def start_now(self, job_id):
        """
        Shortens the two minutes for which SLURM holds a requeued job to 3 s: slurmd refuses an attempt that begins in
        the second in which it ended the one before.
        """
        job = self.job(job_id)
        attempt = job_id, job["Restarts"]
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and attempt not in self.released:
            self.slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now+3")
            self.released.add(attempt)

    def wait_for_end(self, *job_ids, seconds=1200):
        def all_over():
            for job_id in job_ids:
                self.start_now(job_id)
            states = {self.job(job_id)["JobState"] for job_id in job_ids}
            return not {"PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING", "REQUEUED"} & states

        self.wait_for(all_over, seconds)

    def output(self, job_id):
        path = self.checkout / f"slurm-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def run_folder(self, job_id):
        return self.checkout / "VAE_logs" / f"job_{job_id}"

    def test_jobs_resume_after_a_preemption_and_after_the_time_limit(self):
        variables = self.slow_start()
        flags = ["slurm/train.sbatch", "--dataset", "rendered", "--hidden_dims", "32", "--z_dim", "2", "--epochs", "15"]
        undisturbed = self.submit("--nodelist=n1", *flags, **variables)
        limit = ["--time=3", "--signal=B:USR1@60"]  # which SLURM may send 60 s too early
        limited = self.submit("--nodelist=n1", *limit, *flags, SLOW="1 10", **variables)
        preempted = self.submit("--nodelist=n2", *flags, SLOW="1 5", **variables)
        self.wait_for(lambda: "epoch   2/" in self.output(preempted), 300)
        self.wait_for_end(undisturbed, limited, preempted, self.preempt("n2"))
        for job_id in [undisturbed, limited, preempted]:
            self.assertEqual(self.job(job_id)["JobState"], "COMPLETED", self.output(job_id))
            self.assertEqual(int(self.job(job_id)["Restarts"]) > 0, job_id != undisturbed)
            self.assertEqual("continued after epoch" in self.output(job_id), job_id != undisturbed)
            assert_left_the_same(self, self.run_folder(undisturbed), self.run_folder(job_id))
            self.assertEqual("Time is almost up" in self.output(job_id), job_id == limited)

    def stand_in(self, script):
        """Writes a shell script as a stand-in for Python. Returns the value of ACTIVATE for it."""
        program = self.checkout / "bin" / "python"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\n[ "$1" != slurm/settings.py ] || exec {sys.executable} "$@"\n{script}\n')
        program.chmod(0o755)
        return f"PATH={program.parent}:$PATH"

    def test_the_job_scripts_pass_flags_settings_and_the_number_of_threads(self):
        settings = '\ufeff# a comment\r\n--lr 1e-3\t--hidden_dims 64 32  # another\r\n\r\n--run_name "a  *" --lr $(id)'
        (self.checkout / "settings.txt").write_text(settings)
        activate = self.stand_in('printf "$OMP_NUM_THREADS:"; printf " <%s>" "$@"; echo')
        sweep = self.submit(
            *("--array=0-1", "slurm/sweep.sbatch", "--epochs", "3"), SETTINGS="settings.txt", ACTIVATE=activate
        )
        ddp = self.submit(
            *("--nodes=2", "--ntasks-per-node=2", "slurm/train_ddp.sbatch", "--lr", "0.1"), ACTIVATE=activate
        )
        train = self.submit("--cpus-per-task=2", "slurm/train.sbatch", "--z_dim", "2 3", ACTIVATE=activate)
        little = self.submit(f"--export=ACTIVATE={activate}", "--job-name=my job", "slurm/train.sbatch")
        self.wait_for_end(f"{sweep}_0", f"{sweep}_1", ddp, train, little)
        beginning = "<train_pl.py> <--dataset> <mnist>"
        self.assertEqual(
            [self.output(job_id) for job_id in [f"{sweep}_0", f"{sweep}_1", ddp, train, little]],
            [
                f"1: {beginning} <--lr> <1e-3> <--hidden_dims> <64> <32> <--epochs> <3>\n",
                f"1: {beginning} <--run_name> <a  *> <--lr> <$(id)> <--epochs> <3>\n",
                4 * f"1: {beginning} <--num_nodes> <2> <--devices> <2> <--lr> <0.1>\n",
                f"2: {beginning} <--z_dim> <2 3>\n",
                f"1: {beginning}\n",
            ],
        )

    def test_a_job_that_finishes_no_epoch_within_its_time_fails_and_is_not_requeued(self):
        """It may be of a script of the repository, before Python is ready, or of a user's own script."""
        variables = self.slow_start()
        activate = self.stand_in("echo starting; sleep 100")
        job = self.submit("--requeue", "slurm/train.sbatch", ACTIVATE=activate)
        own = self.submit("--requeue", self.script(f"srun {TRAIN}"), SLOW="0 1000", **variables)
        self.wait_for(lambda: "starting" in self.output(job) and "MLP on" in self.output(own), 300)
        self.assertEqual([path.name for path in self.checkout.glob(".no_epoch*")], [f".no_epoch_yet_{job}"])
        self.slurm("scancel", "--signal=USR1", "--batch", job)  # as SLURM does ahead of the time limit
        self.slurm("scancel", "--signal=USR1", own)
        self.wait_for_end(job, own)
        for job_id, message in [(job, "vae: error: no epoch was finished"), (own, f"job {own} has not finished")]:
            self.assertEqual((self.job(job_id)["JobState"], self.job(job_id)["Restarts"]), ("FAILED", "0"))
            self.assertRegex(self.output(job_id), f"{message}.*: give a longer --time\n")
        self.assertEqual(list(self.checkout.glob(".no_epoch*")), [])

    def test_several_runs_in_one_job_need_names_and_a_run_of_a_terminal_in_it_is_numbered(self):
        variables = few_digits(self.checkout)
        script = self.script(
            f"{TRAIN} --run_name a &\nsrun -n 2 --overlap bash -c '{TRAIN} --run_name r$SLURM_PROCID' &\n"
            "wait\ntouch ready\nsleep 1000"
        )
        job_id = self.submit("--ntasks=2", "--nodes=1", "--job-name=train", script, **variables)
        self.addCleanup(self.wait_for_end, job_id)
        self.addCleanup(self.slurm, "scancel", job_id)
        self.wait_for((self.checkout / "ready").exists, 300)
        folders = {path.parent.name for path in self.checkout.glob("VAE_logs/*/results.json")}
        self.assertEqual(folders, {"a", "r0", "r1"}, self.output(job_id))
        terminal = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
        words = ["srun", f"--jobid={job_id}", "-n1", "--overlap", "--pty", "sh", "-c"]
        words.append(f"{self.environment['ACTIVATE']}; exec {TRAIN}")
        environment = {**self.environment, **variables}
        output = command(*terminal, *words, stdin=subprocess.DEVNULL, cwd=self.checkout, env=environment)
        self.assertIn("run folder VAE_logs/lightning_logs/version_0", output)

    def test_a_job_that_is_preempted_while_python_still_starts_is_requeued(self):
        activate = self.stand_in('echo attempt $SLURM_RESTART_COUNT\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 100')
        job_id = self.submit("--nodelist=n1", "slurm/train.sbatch", ACTIVATE=activate)
        self.wait_for(lambda: "attempt" in self.output(job_id), 60)
        self.wait_for_end(job_id, self.preempt("n1"))
        job = self.job(job_id)
        self.assertEqual((job["JobState"], job["Restarts"]), ("COMPLETED", "1"), self.output(job_id))
        self.assertIn("attempt 1", self.output(job_id))

    def test_two_nodes_reach_the_bpd_of_one_process(self):
        variables = few_digits(self.checkout, (5000, 500, 1000))
        flags = ["--dataset", "rendered", "--epochs", "3"]
        two = self.submit("slurm/train_ddp.sbatch", *flags, **variables)
        one = self.submit("slurm/train.sbatch", *flags, **variables)
        self.wait_for_end(two, one)
        for job_id in [two, one]:
            self.assertEqual(self.job(job_id)["JobState"], "COMPLETED", self.output(job_id))
            self.assertEqual("on cpu x 2" in self.output(job_id), job_id == two)
        bpd, expected = (results(self.run_folder(job_id))["test_bpd"] for job_id in [two, one])
        self.assertAlmostEqual(bpd, expected, delta=0.001)

    def test_a_job_that_cannot_start_fails_and_says_why(self):
        (self.checkout / "settings.txt").write_text("--lr 1\n--run_name 'a\n")
        nowhere = "source /nowhere/bin/activate"
        array = "slurm/sweep.sbatch"
        jobs = {
            self.submit(
                "slurm/train.sbatch", "--data_dir", "data", **NO_NETWORK
            ): "MNIST is not complete in data/MNIST",
            self.submit("--chdir=/", f"--output={self.checkout}/slurm-%j.out", "slurm/train.sbatch"): "slurm/job.sh",
            self.submit("slurm/train.sbatch", ACTIVATE="PATH=/nowhere"): "set ACTIVATE",
            self.submit("slurm/train.sbatch", ACTIVATE=nowhere): f"vae: error: ACTIVATE ended with status 1: {nowhere}",
            self.submit("--array=9", array) + "_9": "=0-7",
            self.submit("--array=0", array, SEEDS="1,2") + "_0": "numbers with spaces between: 1,2",
            self.submit("--array=0", array, SETTINGS="settings.txt") + "_0": "settings.txt, line 2: No",
        }
        invalid = self.submit("slurm/train.sbatch", "--z_dim", "0")
        self.wait_for_end(*jobs, invalid)
        for job_id, problem in jobs.items():
            self.assertEqual(self.job(job_id)["JobState"], "FAILED")
            self.assertIn(problem, self.output(job_id))
        self.assertEqual(self.job(invalid)["ExitCode"], "2:0")
        self.assertIn("error: --z_dim must be at least 1", self.output(invalid))
        self.assertFalse((self.checkout / "VAE_logs").exists())

    def test_only_one_of_eight_array_tasks_downloads_the_data(self):
        """MNIST's mirror is a local server with a small stand-in."""
        content, packed, _, _ = small_mnist(600, 100)
        resources = [(name, hashlib.md5(data).hexdigest()) for name, data in packed.items()]
        with mirror(packed) as (address, requests):
            code = stand_in_code(address, resources, known_files(content), TRAIN_SIZES=[500], NUM_VAL=100)
            (self.checkout / "sitecustomize.py").write_text(code)
            flags = ["--data_dir", "data", "--epochs", "2", "--hidden_dims", "16"]
            path = f"{self.checkout}{os.pathsep}{REPOSITORY}"
            job_id = self.submit("slurm/sweep.sbatch", *flags, PYTHONPATH=path)
            tasks = [f"{job_id}_{task}" for task in range(8)]
            self.wait_for_end(*tasks)
        self.assertEqual({self.job(task)["JobState"] for task in tasks}, {"COMPLETED"}, self.output(tasks[0]))
        self.assertEqual({path.name for path in (self.checkout / "VAE_logs").iterdir()}, {f"job_{t}" for t in tasks})
        settings = [results(self.run_folder(task))["hyperparameters"] for task in tasks]
        self.assertEqual(
            [(flags["z_dim"], flags["seed"]) for flags in settings],
            [(z_dim, seed) for z_dim in [2, 20] for seed in [1, 2, 3, 4]],
        )
        self.assertEqual(sum("Downloading" in self.output(task) for task in tasks), 1)
        self.assertEqual({requests.count(name) for name in packed}, {requests.count(next(iter(packed)))})
        self.assertLess(len(requests), 9)  # one task asked; torchvision looks for redirections first

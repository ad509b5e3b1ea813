"""
Tests of the job scripts on a real SLURM: `python -m unittest tests/programs/test_slurm.py`, a few minutes.

They start a cluster of two nodes on this machine. This needs root and Debian's packages (apt-get install slurm-wlm
munge).
"""

import contextlib
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

from tests.helpers import NO_NETWORK, REPOSITORY, assert_left_the_same, few_digits, results
from tests.helpers.fake_data import known_files, known_resources, mirror, mock_mnist_code, small_mnist

MISSING = [name for name in ["slurmctld", "slurmd", "sbatch", "munged"] if not shutil.which(name)]
# Two nodes and two partitions. Jobs in `high` preempt jobs in `low`, which are requeued after a grace time of 8 s, in
# which no job may end by itself. SLURM looks for jobs to start every second instead of every 30 s.
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
TaskPlugin=task/none
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
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=8
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Appended to a sitecustomize.py. If the environment contains SLOW="EPOCH SECONDS", the first attempt of a job waits
# after each minibatch from this epoch on, so that even on a fast machine it is interrupted before it is finished.
SLOW_START = """
import os, time
from harness.report import EpochReport
on_train_batch_end = EpochReport.on_train_batch_end
def wait(self, trainer, *args):
    epoch, seconds = os.environ["SLOW"].split()
    if trainer.current_epoch >= int(epoch):
        time.sleep(float(seconds))
    on_train_batch_end(self, trainer, *args)
if "SLOW" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    EpochReport.on_train_batch_end = wait
"""
UNFINISHED = ["PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING", "REQUEUED"]  # states of jobs
TRAIN = "python train_pl.py --dataset rendered --hidden_dims 32 --z_dim 3 --epochs 1"


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def command(*words, **options):
    """Runs a command, which must succeed. Returns its stdout."""
    words = list(map(str, words))
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=600, **options).stdout


@unittest.skipIf(MISSING, f"not installed: {', '.join(MISSING)} (Debian: apt-get install slurm-wlm munge)")
@unittest.skipUnless(os.getuid() == 0, "only root can start a SLURM cluster")
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
        # MASTER_ADDR, because only this cluster knows the names of its nodes
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
        """Starts a munged for the tests, which authenticates SLURM's daemons and commands."""
        key = state / "munge.key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = ["socket", "key-file", "pid-file", "seed-file", "log-file"]
        # munged refuses a socket that other users cannot reach, unless it is forced.
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
            for path in state.glob("slurm*.pid"):
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
            assert time.monotonic() < end, f"the condition is not true after {seconds} s"
            time.sleep(0.2)

    def setUp(self):
        """Makes a checkout for this test, in which its jobs run."""
        self.checkout = Path(tempfile.mkdtemp(dir=self.folder))
        self.released = set()  # attempts of requeued jobs that SLURM no longer holds back, see is_over
        for name in ["train_pl.py", "slurm"]:
            (self.checkout / name).symlink_to(REPOSITORY / name)

    def submit(self, *words, **variables):
        words = ["sbatch", "--parsable", "--cpus-per-task=1", *words]
        return command(*words, cwd=self.checkout, env={**self.environment, **variables}).strip()

    def job(self, job_id):
        return dict(re.findall(r"(\w+)=(\S+)", self.slurm("scontrol", "show", "job", job_id)))

    def script(self, text):
        """Writes a job script that runs in the environment of the tests. Returns its name."""
        (self.checkout / "own.sh").write_text(f"#!/bin/bash\n{self.environment['ACTIVATE']}\n{text}\n")
        return "own.sh"

    def add_to_sitecustomize(self, code):
        """Appends to the code that Python runs at its start, see few_digits."""
        with open(self.checkout / "sitecustomize.py", "a") as file:
            file.write(code)

    def mock_python(self, script):
        """Writes a shell script that runs instead of Python. Returns the shell command that activates the script."""
        program = self.checkout / "bin" / "python"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\n[ "$1" != slurm/settings.py ] || exec {sys.executable} "$@"\n{script}\n')
        program.chmod(0o755)
        return f"PATH={program.parent}:$PATH"

    def announce_time_limit(self, job_id, text):
        """Waits until a job's output contains `text`, then sends the signal that SLURM sends before the time limit."""
        self.wait_for(lambda: text in self.output(job_id), 300)
        self.slurm("scancel", "--signal=USR1", job_id)

    def is_over(self, job_id):
        """
        Returns whether a job has ended and will not start again. SLURM holds a requeued job back for two minutes, which
        this function shortens to 3 s. (Without a pause, slurmd refuses the job: it must not start in the second in
        which its previous attempt ended.)
        """
        job = self.job(job_id)
        attempt = job_id, job["Restarts"]
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and attempt not in self.released:
            self.slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now+3")
            self.released.add(attempt)
        return job["JobState"] not in UNFINISHED

    def wait_for_end(self, *job_ids):
        self.wait_for(lambda: not [job_id for job_id in job_ids if not self.is_over(job_id)], 1200)

    def assert_state(self, job_id, state, restarts=0):
        job = self.job(job_id)
        self.assertEqual((job["JobState"], int(job["Restarts"])), (state, restarts), self.output(job_id))

    def output(self, job_id):
        path = self.checkout / f"slurm-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def run_folder(self, job_id):
        return self.checkout / "VAE_logs" / f"job_{job_id}"

    def test_a_run_resumes_after_the_time_limit_and_a_preemption(self):
        """A run that reached its time limit and a preempted run leave the same files as an uninterrupted run."""
        variables = few_digits(self.checkout)
        self.add_to_sitecustomize(SLOW_START)
        # SLURM sends its signals also to worker processes.
        flags = ["--dataset", "rendered", "--hidden_dims", "32", "--epochs", "15", "--num_workers", "1"]
        train = ["slurm/train.sbatch", "--z_dim", "2", "--seed", "1", *flags]
        uninterrupted = self.submit("--nodelist=n1", *train, **variables)
        array = ["--nodelist=n1", "--array=0", "--time=2", "slurm/sweep.sbatch", *flags]
        limited = self.submit(*array, SEEDS="1", Z_DIMS="2", SLOW="1 3", **variables) + "_0"
        preempted = self.submit("--nodelist=n2", *train, SLOW="1 2", **variables)
        self.wait_for(lambda: "epoch   2/" in self.output(preempted), 300)
        urgent = self.submit("--nodelist=n2", "--exclusive", "--partition=high", self.script("sleep 1"))
        self.wait_for_end(uninterrupted, limited, preempted, urgent)
        for job_id in [uninterrupted, limited, preempted]:
            with self.subTest(job_id=job_id, output=self.output(job_id)):
                self.assertEqual(self.job(job_id)["JobState"], "COMPLETED")
                self.assertEqual(int(self.job(job_id)["Restarts"]) > 0, job_id != uninterrupted)
                self.assertEqual("resumed after epoch" in self.output(job_id), job_id != uninterrupted)
                times = self.output(job_id).count(f"note: the time limit is near: requeueing job {job_id}\n")
                self.assertEqual(times, int(self.job(job_id)["Restarts"]) if job_id == limited else 0)
                assert_left_the_same(self, self.run_folder(uninterrupted), self.run_folder(job_id))

    def test_a_run_on_two_nodes_resumes_and_has_the_bpd_of_one_process(self):
        variables = few_digits(self.checkout, (5000, 500, 1000))
        self.add_to_sitecustomize(SLOW_START)
        flags = ["--dataset", "rendered", "--epochs", "3"]
        two = self.submit("slurm/train_ddp.sbatch", *flags, SLOW="1 0.5", **variables)
        one = self.submit("slurm/train.sbatch", *flags, **variables)
        self.announce_time_limit(two, "epoch   1/")
        self.wait_for_end(two, one)
        for job_id in [two, one]:
            self.assert_state(job_id, "COMPLETED", restarts=job_id == two)
            for text in [" on cpu x 2", f"requeueing job {job_id}\n", "resumed after epoch"]:
                self.assertEqual(text in self.output(job_id), job_id == two, self.output(job_id))
        # Only one of the two processes requeues the job
        self.assertEqual(self.output(two).count("the time limit is near"), 1)
        bpd, expected = (results(self.run_folder(job_id))["test_bpd"] for job_id in [two, one])
        self.assertAlmostEqual(bpd, expected, delta=0.001)

    def test_a_job_that_finishes_no_epoch_is_not_requeued(self):
        """One job ends in a script of slurm/, before Python is ready; the other in your own script, on two nodes."""
        variables = few_digits(self.checkout)
        self.add_to_sitecustomize(SLOW_START)
        activate = self.mock_python("echo starting; sleep 100")
        job = self.submit("--time=5", "slurm/train.sbatch", ACTIVATE=activate)
        script = self.script(f"srun {TRAIN} --num_nodes 2")
        own = self.submit("--requeue", "--nodes=2", script, SLOW="0 1000", **variables)
        self.announce_time_limit(job, "starting")
        self.announce_time_limit(own, "MLP on")
        self.wait_for_end(job, own)
        for job_id, message in [
            (job, "vae: error: no epoch was finished within the time limit of 5:00,"),
            (own, f"job {own} has not finished an epoch"),
        ]:
            with self.subTest(message):
                self.assert_state(job_id, "FAILED")
                self.assertRegex(self.output(job_id), f"{message}.*: give a longer --time\n")
                self.assertEqual(self.output(job_id).count("give a longer --time"), 1)

    def test_the_job_scripts_pass_on_the_flags_and_set_the_threads(self):
        settings = '\ufeff# a comment\r\n--lr 1e-3\t--hidden_dims 64 32  # another\r\n\r\n--run_name "a  *" --lr $(id)'
        (self.checkout / "settings.txt").write_text(settings)
        activate = self.mock_python('printf "$OMP_NUM_THREADS:"; printf " <%s>" "$@"; echo')
        words = ["--array=0-1", "slurm/sweep.sbatch", "--epochs", "3"]
        sweep = self.submit(*words, SETTINGS="settings.txt", ACTIVATE=activate)
        words = ["--nodes=2", "--ntasks-per-node=2", "slurm/train_ddp.sbatch", "--lr", "0.1"]
        ddp = self.submit(*words, ACTIVATE=activate)
        train = self.submit("--cpus-per-task=2", "slurm/train.sbatch", "--z_dim", "2 3", ACTIVATE=activate)
        little = self.submit(f"--export=ACTIVATE={activate}", "--job-name=my job", "slurm/train.sbatch")
        beginning = "<train_pl.py> <--dataset> <mnist>"
        expected = {
            f"{sweep}_0": f"1: {beginning} <--lr> <1e-3> <--hidden_dims> <64> <32> <--epochs> <3>\n",
            f"{sweep}_1": f"1: {beginning} <--run_name> <a  *> <--lr> <$(id)> <--epochs> <3>\n",
            ddp: 4 * f"1: {beginning} <--num_nodes> <2> <--devices> <2> <--lr> <0.1>\n",
            train: f"2: {beginning} <--z_dim> <2 3>\n",
            little: f"1: {beginning}\n",
        }
        self.wait_for_end(*expected)
        self.assertEqual({job_id: self.output(job_id) for job_id in expected}, expected)

    def test_one_job_can_contain_several_runs(self):
        """Each run has a different --run_name. Runs in a notebook or a terminal within the job are numbered."""
        variables = few_digits(self.checkout)
        notebook = "import subprocess\nfor epochs in '12':\n    subprocess.run(f'{TRAIN} --epochs {epochs}'.split())\n"
        (self.checkout / "ipykernel_launcher.py").write_text(f"TRAIN = {TRAIN!r}\n{notebook}")
        script = self.script(
            f"{TRAIN} --run_name a &\nsrun -n 2 --overlap bash -c '{TRAIN} --run_name r$SLURM_PROCID' &\n"
            "wait\npython ipykernel_launcher.py\ntouch ready\nsleep 1000"
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
        options = dict(stdin=subprocess.DEVNULL, cwd=self.checkout, env={**self.environment, **variables})
        output = command(*terminal, *words, **options)
        for number in range(2):
            self.assertIn(f"run folder VAE_logs/lightning_logs/version_{number}\n", self.output(job_id))
        self.assertIn("run folder VAE_logs/lightning_logs/version_2\n", output)

    def test_a_job_that_is_preempted_before_python_is_ready_starts_again(self):
        activate = self.mock_python('echo attempt $SLURM_RESTART_COUNT\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 100')
        job_id = self.submit("--nodelist=n1", "slurm/train.sbatch", ACTIVATE=activate)
        self.wait_for(lambda: "attempt" in self.output(job_id), 60)
        urgent = self.submit("--nodelist=n1", "--exclusive", "--partition=high", self.script(""))
        self.wait_for_end(job_id, urgent)
        self.assert_state(job_id, "COMPLETED", restarts=1)
        self.assertIn("attempt 1", self.output(job_id))

    def test_errors_of_the_program_and_of_the_job_scripts_fail_the_job_with_a_message(self):
        (self.checkout / "settings.txt").write_text("--lr 1\n--run_name 'a\n")
        nowhere = "source /nowhere/bin/activate"
        no_data = ["slurm/train.sbatch", "--data_dir", "data"]
        jobs = {
            self.submit("slurm/train.sbatch", "--z_dim", "0"): "error: --z_dim must be at least 1",
            self.submit(*no_data, **NO_NETWORK): "error: MNIST is not complete in data/MNIST/raw",
            self.submit("--chdir=/", f"--output={self.checkout}/slurm-%j.out", "slurm/train.sbatch"): "slurm/job.sh",
            self.submit("slurm/train.sbatch", ACTIVATE="PATH=/nowhere"): "set ACTIVATE",
            self.submit("slurm/train.sbatch", ACTIVATE=nowhere): f"vae: error: ACTIVATE ended with status 1: {nowhere}",
            self.submit("--array=9", "slurm/sweep.sbatch") + "_9": "=0-7",
            self.submit("--array=0", "slurm/sweep.sbatch", SEEDS="1,2") + "_0": "numbers separated by spaces, got 1,2",
            self.submit("--array=0", "slurm/sweep.sbatch", SETTINGS="settings.txt") + "_0": "settings.txt, line 2: No",
        }
        self.wait_for_end(*jobs)
        for job_id, problem in jobs.items():
            with self.subTest(problem):
                self.assert_state(job_id, "FAILED")
                self.assertIn(problem, self.output(job_id))
        self.assertEqual([self.job(job_id)["ExitCode"] for job_id in jobs][:2], ["2:0", "1:0"])  # of the program
        self.assertFalse((self.checkout / "VAE_logs").exists())

    def test_eight_array_tasks_download_missing_data_only_once(self):
        """The default sweep downloads a small mock of MNIST from a local mirror, once for all tasks."""
        content, packed, _, _ = small_mnist(600, 100)
        with mirror(packed) as (address, requests):
            code = mock_mnist_code(
                address, known_resources(packed), known_files(content), TRAIN_SIZES=[500], NUM_VAL=100
            )
            code += "sources.DATA_FLAGS['data']['train_size'] = sources.Flag(500, '', [500])\n"
            self.add_to_sitecustomize(code)
            flags = ["--data_dir", "data", "--epochs", "2", "--hidden_dims", "16"]
            path = f"{self.checkout}{os.pathsep}{REPOSITORY}"
            job_id = self.submit("slurm/sweep.sbatch", *flags, PYTHONPATH=path)
            tasks = [f"{job_id}_{task}" for task in range(8)]
            self.wait_for_end(*tasks)
        self.assertEqual({self.job(task)["JobState"] for task in tasks}, {"COMPLETED"}, self.output(tasks[0]))
        self.assertEqual({path.name for path in (self.checkout / "VAE_logs").iterdir()}, {f"job_{t}" for t in tasks})
        flags = [results(self.run_folder(task))["hyperparameters"] for task in tasks]
        expected = [(z_dim, seed) for z_dim in [2, 20] for seed in [1, 2, 3, 4]]
        self.assertEqual([(given["z_dim"], given["seed"]) for given in flags], expected)
        self.assertEqual(sum("Downloading" in self.output(task) for task in tasks), 1)
        self.assertEqual({requests.count(name) for name in packed}, {requests.count(next(iter(packed)))})
        self.assertLess(len(requests), 9)  # from a single task; torchvision first looks for redirections

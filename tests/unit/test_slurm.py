"""Tests of harness/slurm.py, in a job that is none: `python -m unittest tests/unit/test_slurm.py`."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import unittest
from unittest import mock

from harness import slurm
from tests.helpers import REPOSITORY, Killed, SeededTest, TrainingTest
from train_pl import VAE, train_vae

HOOKS = ["on_train_epoch_start", "on_validation_epoch_start", "on_test_epoch_start"]


def step(tasks_per_node, num_nodes):
    """What srun adds to the environment."""
    names = dict(STEP_ID="0", STEP_NODELIST="n[2-3]", STEP_TASKS_PER_NODE=tasks_per_node, STEP_NUM_NODES=num_nodes)
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


class TestSlurm(TrainingTest):
    """A batch job as the program sees it; a test of programs runs real ones."""

    def setUp(self):
        super().setUp()
        job = dict(SLURM_JOB_ID="7", SLURM_JOB_NAME="vae", SLURM_NTASKS="1")
        job.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
        for patch in [
            mock.patch.dict(os.environ, job),
            mock.patch.object(slurm, "is_interactive", return_value=False),  # whoever runs the tests
        ]:
            patch.start()
            self.addCleanup(patch.stop)
        for number in [signal.SIGTERM, signal.SIGUSR1]:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGUSR1, slurm.ignore)  # where nobody handles it, it does not end the tests

    def train_job(self, **flags):
        """Trains in the folder of the job's run, on the CPU."""
        with contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace(accelerator="cpu", **flags))

    def test_names(self):
        self.assertEqual(slurm.run_name(), "job_7")
        with mock.patch.dict(os.environ, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2"):
            self.assertEqual(slurm.run_name(), "job_5_2")
            del os.environ["SLURM_ARRAY_TASK_ID"]
            self.assertEqual(slurm.run_name(), "job_7")
        with mock.patch.dict(os.environ, SLURM_JOB_NAME="interactive"):
            self.assertIsNone(slurm.run_name())
        with mock.patch.object(slurm, "is_interactive", return_value=True):
            self.assertIsNone(slurm.run_name())
        del os.environ["SLURM_JOB_ID"]
        self.assertIsNone(slurm.run_name())

    def test_checkpoints_of_other_jobs_are_not_read(self):
        """Lightning's hpc_ckpt_N.ckpt, which it would load from the Trainer's root directory."""
        logs = self.folder / "logs"
        logs.mkdir()
        for folder in [self.folder, logs]:
            (folder / "hpc_ckpt_1.ckpt").write_bytes(b"of another job")
        self.train_job(log_dir=str(logs), epochs=1)
        self.assertEqual(set(os.listdir(logs)), {"hpc_ckpt_1.ckpt", "job_7"})

    def test_signals(self):
        """SIGTERM changes nothing; SIGUSR1 requeues the job; both at each stage, where Lightning has its handlers."""
        seen = []

        def kill_twice(model):
            seen.append(model.trainer.state.fn)
            os.kill(os.getpid(), signal.SIGTERM)
            if model.trainer.current_epoch > 0:
                os.kill(os.getpid(), signal.SIGUSR1)

        with (
            mock.patch.multiple(VAE, **dict.fromkeys(HOOKS, kill_twice)),
            mock.patch.object(subprocess, "run") as run,
            mock.patch.object(os, "write") as write,
        ):
            self.train_job(epochs=2, batch_size=20)  # several batches at each stage
        self.assertEqual(seen, ["validate", *["fit"] * 4, "test"])
        self.assertEqual(run.mock_calls, [mock.call(["scontrol", "requeue", "7"], check=True)] * 3)
        self.assertEqual(write.mock_calls.count(mock.call(1, b"Time is almost up: requeueing job 7\n")), 3)
        self.assertTrue((self.folder / "job_7" / "results.json").exists())

    def test_a_life_without_an_epoch(self):
        """It is the last one, be it the first or not; the job script is told of the first epoch that is finished."""
        marker = self.folder / "no_epoch_yet"
        os.environ[slurm.NO_EPOCH_YET] = str(marker)

        def life(epoch, hook, stop):
            """One that is stopped in a hook of this epoch."""
            marker.touch()

            def end(model):
                if model.trainer.current_epoch == epoch and model.trainer.state.fn == "fit":
                    stop()

            with mock.patch.object(VAE, hook, end), mock.patch.object(subprocess, "run") as run:
                try:
                    self.train_job(epochs=3, z_dim=3)
                finally:
                    run.assert_not_called()

        for epoch, hook in [(0, "on_validation_epoch_start"), (1, "on_train_epoch_start")]:
            with self.assertRaises(SystemExit) as caught:
                life(epoch, hook, lambda: os.kill(os.getpid(), signal.SIGUSR1))
            self.assertRegex(caught.exception.code, "^error: job 7 has not finished an epoch .*: give a longer --time$")
            self.assertTrue(marker.exists())
            if epoch == 0:
                with self.assertRaises(Killed):
                    life(1, "on_train_epoch_start", mock.Mock(side_effect=Killed))
                self.assertFalse(marker.exists())

    def test_a_single_epoch_is_enough(self):
        """It is told before the test, which may take its time."""
        marker = self.folder / "no_epoch_yet"
        marker.touch()
        os.environ[slurm.NO_EPOCH_YET] = str(marker)
        with mock.patch.object(VAE, "on_test_epoch_start", lambda model: self.assertFalse(marker.exists())):
            self.train_job(epochs=1, z_dim=3)

    def test_it_cannot_be_requeued(self):
        """As in a container without scontrol: training goes on."""
        queue = slurm.StayInQueue()
        queue.has_advanced = True
        for error, reason in [
            (FileNotFoundError(2, "No such file or directory", "scontrol"), "No such file or directory"),
            (subprocess.CalledProcessError(1, ["scontrol"]), "exit status 1"),
        ]:
            with mock.patch.object(subprocess, "run", side_effect=error), mock.patch.object(os, "write") as write:
                os.kill(os.getpid(), signal.SIGUSR1)
            number, text = write.mock_calls[-1].args
            self.assertEqual((number, text.count(b"\n")), (2, 1))
            self.assertRegex(text.decode(), f"^Job 7 is not requeued .*{reason}.*training goes on")

    def test_one_task_requeues_for_all(self):
        queue = slurm.StayInQueue()
        with (
            mock.patch.object(slurm.rank_zero_only, "rank", 1),
            mock.patch.object(subprocess, "run") as run,
            mock.patch.object(os, "write") as write,
        ):
            with self.assertRaises(SystemExit) as caught:
                queue.requeue(signal.SIGUSR1, None)
            queue.has_advanced = True
            queue.requeue(signal.SIGUSR1, None)
        self.assertEqual((run.mock_calls, write.mock_calls, caught.exception.code), ([], [], 1))

    def test_signals_outside_of_a_job(self):
        del os.environ["SLURM_JOB_ID"]
        with (
            mock.patch.object(VAE, "on_train_epoch_start", lambda model: os.kill(os.getpid(), signal.SIGTERM)),
            self.assertRaises(SystemExit),
        ):
            self.train_job()

    def test_tasks(self):
        self.assertEqual(slurm.tasks(), (1, 1))
        for tasks, expected in [("1", (1, 1)), ("4", (1, 4)), ("4(x2)", (2, 4)), ("2,1", (2, 0)), ("2(x2),1", (3, 0))]:
            with mock.patch.dict(os.environ, step(tasks, expected[0])):
                self.assertEqual(slurm.tasks(), expected, tasks)
                with mock.patch.object(slurm, "is_interactive", return_value=True):
                    self.assertEqual(slurm.tasks(), (1, 1))
        for name in slurm.SRUN:  # what an old shell has left
            with mock.patch.dict(os.environ, step("4", 1)):
                del os.environ[name]
                self.assertEqual(slurm.tasks(), (1, 1), name)

    def test_environment_of_a_step(self):
        """Two steps of a job do not share a port, nor a node that only one of them has; what is set already stays."""
        ports = set()
        for number, variables, address in [(0, {}, "n2"), (1, {}, "n2"), (1, {"MASTER_ADDR": "n9"}, "n9")]:
            with mock.patch.dict(os.environ, {**step("2(x2)", 2), "SLURM_STEP_ID": str(number), **variables}):
                environment = slurm.environment()
                self.assertEqual((environment.main_address, environment.auto_requeue), (address, False))
                ports.add(environment.main_port)
                environment.validate_settings(2, 2)
        self.assertEqual(len(ports), 2)
        self.assertTrue(all(1024 < port < 32768 for port in ports))

    def test_tasks_that_do_not_fit_the_flags(self):
        for tasks, num_nodes, flags, message in [
            ("4", 1, [], "srun has started 4 processes: give --devices 4 --num_nodes 1 .*, or a --run_name"),
            ("2(x2)", 2, ["--devices=2"], "srun has started 4 processes: give --devices 2 --num_nodes 2"),
            ("2(x2)", 2, ["--num_nodes=4"], "srun has started 4 processes: give --devices 2 --num_nodes 2"),
            ("2", 1, ["--devices=4", "--run_name=x"], "srun has started 2 processes: give --devices 2 --num_nodes 1"),
            ("2,1", 2, ["--devices=2"], "srun .*: give it --ntasks-per-node"),
        ]:
            with mock.patch.dict(os.environ, step(tasks, num_nodes)):
                code, error = self.main(f"--log_dir={self.folder}", "--accelerator=cpu", *flags)
            self.assertEqual((code, error.count("\n")), (1, 0), error)
            self.assertRegex(error, f"^train_pl.py: error: {message}")
        self.assertEqual(os.listdir(self.folder), [])

    def test_one_run_in_each_task(self):
        with mock.patch.dict(os.environ, {**step("4(x2)", 2), "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}):
            self.train_job(run_name="x", epochs=1)
        self.assertTrue((self.folder / "x" / "epoch_0_samples.png").exists())
        self.assertTrue((self.folder / "x" / "results.json").exists())


class TestIsInteractive(unittest.TestCase):
    def test_terminal(self):
        for terminal in [False, True]:
            with (
                mock.patch.object(os, "open", side_effect=None if terminal else OSError),
                mock.patch.object(os, "close"),
            ):
                self.assertEqual(slurm.is_interactive(), terminal)

    def test_notebook(self):
        with mock.patch.object(os, "open", side_effect=OSError), mock.patch.object(sys, "ps1", ">>> ", create=True):
            self.assertTrue(slurm.is_interactive())


class TestSettings(SeededTest):
    """The file of sweep.sbatch, by a shell: what slurm/settings.py prints is what the flags are then."""

    def settings(self, data):
        """Exit code, the words of each setting, stderr."""
        path = self.folder / "set tings.txt"
        path.write_bytes(data)
        command = [sys.executable, "-S", REPOSITORY / "slurm" / "settings.py", path]
        process = subprocess.run(command, capture_output=True, timeout=60, cwd=self.folder, env={"LC_ALL": "C"})
        words = []
        for line in process.stdout.splitlines():
            script = b"printf '%s\\0' " + line
            printed = subprocess.run(["sh", "-c", script], capture_output=True, timeout=60, cwd=self.folder).stdout
            words.append(printed.decode("utf-8", "surrogateescape").split("\0")[:-1])
        return process.returncode, words, process.stderr.decode()

    def test_as_a_shell_reads_them(self):
        text = """\
# a comment
--model CNN\t--lr 1e-3  # another
\t
  # a third
--run_name "a b"  --log_dir 'c "d" #'
--run_name a#b --x ä $(id) `id` $HOME * ~ ; touch evil
--z_dim 2"""
        expected = [
            ["--model", "CNN", "--lr", "1e-3"],
            ["--run_name", "a b", "--log_dir", 'c "d" #'],
            ["--run_name", "a#b", "--x", "ä", "$(id)", "`id`", "$HOME", "*", "~", ";", "touch", "evil"],
            ["--z_dim", "2"],
        ]
        for data in [
            text.encode(),
            text.replace("\n", "\r\n").encode(),
            f"{text}\r\n\r\n".encode("utf-8-sig"),
            text.replace("\n", "\r").encode(),
            text.replace("\n", "\r\n").encode("utf-16"),
        ]:
            self.assertEqual(self.settings(data), (0, expected, ""))
        self.assertEqual(os.listdir(self.folder), ["set tings.txt"])
        self.assertEqual(self.settings(b"--x \xe9")[1], [["--x", "\udce9"]])  # bytes of another encoding stay

    def test_what_is_of_no_use(self):
        for data, message in [
            (b"--z_dim 2\n\n--run_name 'a b\n--lr 1", "line 3: No closing quotation"),
            (b'--run_name "a\n', "line 1: No closing quotation"),
            (b"--lr 1 \\\n--z_dim 2", "line 1: No escaped character"),
            (b"# nothing\r\n", "there are no settings"),
            (b"", "there are no settings"),
            ("--lr 1".encode("utf-16-le"), "save it as UTF-8"),
        ]:
            code, words, error = self.settings(data)
            self.assertEqual((code, words, error.count("\n")), (1, [], 1), error)
            self.assertIn(message, error)
            self.assertIn("set tings.txt", error)

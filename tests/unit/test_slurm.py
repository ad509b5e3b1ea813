"""Tests of harness/slurm.py and slurm/settings.py, without SLURM: `python -m unittest tests/unit/test_slurm.py`."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from harness import slurm
from tests.helpers import REPOSITORY, SeededTest, TrainingTest, results
from train_pl import VAE, train_vae

HOOKS = ["on_train_epoch_start", "on_validation_epoch_start", "on_test_epoch_start"]


def step(tasks_per_node, num_nodes):
    """Returns the environment variables that srun adds."""
    names = dict(STEP_ID="0", STEP_NODELIST="n[2-3]", STEP_TASKS_PER_NODE=tasks_per_node, STEP_NUM_NODES=num_nodes)
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


class JobTest(TrainingTest):
    """A test in the environment of a batch job; tests/programs/test_slurm.py runs real jobs."""

    def setUp(self):
        super().setUp()
        job = dict(JOB_ID="7", JOB_NAME="vae", NTASKS="1", PROCID="0", LOCALID="0", NODEID="0")
        self.enter(mock.patch.dict(os.environ, {f"SLURM_{name}": value for name, value in job.items()}))
        # As in a batch job, even if the tests run in a terminal
        self.enter(mock.patch.object(slurm, "is_interactive", return_value=False))
        for number in [signal.SIGTERM, signal.SIGUSR1]:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGUSR1, lambda *_: None)  # so that an additional signal does not end the tests

    def train_job(self, **flags):
        with contextlib.redirect_stdout(io.StringIO()):
            train_vae(self.namespace(**{"accelerator": "cpu", "z_dim": 3, **flags}))


class TestSignals(JobTest):
    def signalled(self, hooks, moments, **flags):
        """
        Trains, and sends SIGTERM in the given hooks and SIGUSR1 at the given moments. A moment is (stage, epoch).
        Returns the moments of all hooks.
        """
        seen = []

        def send_signals(model):
            seen.append((model.trainer.state.fn, model.trainer.current_epoch))
            os.kill(os.getpid(), signal.SIGTERM)
            if seen[-1] in moments:
                os.kill(os.getpid(), signal.SIGUSR1)

        with (
            mock.patch.multiple(VAE, **dict.fromkeys(hooks, send_signals)),
            mock.patch.object(subprocess, "run") as self.run_mock,
            mock.patch.object(os, "write") as self.write_mock,
        ):
            self.train_job(**flags)
        return seen

    def assert_requeued(self, times):
        self.assertEqual(self.run_mock.mock_calls, [mock.call(["scontrol", "requeue", "7"], check=True)] * times)
        message = mock.call(1, b"note: the time limit is near: requeueing job 7\n")
        self.assertEqual(self.write_mock.mock_calls.count(message), times)

    def test_sigusr1_requeues_a_job_that_has_finished_an_epoch_and_sigterm_has_no_effect(self):
        later = [("fit", 1), ("test", 2)]
        seen = self.signalled(HOOKS, later, epochs=2, batch_size=100)
        self.assertEqual(seen, [("validate", 0), *[("fit", 0)] * 2, *[("fit", 1)] * 2, ("test", 2)])
        self.assert_requeued(times=3)
        self.assertTrue(results(self.folder / "job_7"))

        for hook in ["on_train_epoch_start", "on_validation_epoch_start"]:  # in the first epoch of the next attempt
            with self.subTest(hook), self.assertRaises(SystemExit) as caught:
                self.signalled([hook], [("fit", 2)], epochs=3, batch_size=100)
            self.assertRegex(caught.exception.code, "^error: job 7 has not finished an epoch .*: give a longer --time$")
            self.assert_requeued(times=0)

        self.signalled(HOOKS, [("test", 3)], epochs=3, batch_size=100)  # one epoch is enough
        self.assert_requeued(times=1)

    def test_a_job_that_cannot_be_requeued_continues_training(self):
        slurm.RequeueOnTimeLimit().has_advanced = True
        for error, reason in [
            (FileNotFoundError(2, "No such file or directory", "scontrol"), "No such file or directory"),
            (subprocess.CalledProcessError(1, ["scontrol"]), "exit status 1"),
        ]:
            failing = mock.patch.object(subprocess, "run", side_effect=error)
            with self.subTest(reason), failing, mock.patch.object(os, "write") as write:
                os.kill(os.getpid(), signal.SIGUSR1)
                number, text = write.mock_calls[-1].args
                self.assertEqual(number, 2)
                self.assertRegex(
                    text.decode(), rf"^warning: job 7 cannot be requeued .*{reason}.*training continues[^\n]*\n\Z"
                )

    def test_an_error_after_sigterm_waits_for_sigkill(self):
        """SIGTERM kills the workers of data loaders. A preempted job that ends by itself is not requeued."""

        def fail(model, *args):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError

        failing = mock.patch.object(VAE, "training_step", fail)
        with failing, mock.patch.object(slurm, "time") as clock, self.assertRaises(ZeroDivisionError):
            self.train_job()
        clock.sleep.assert_called_once_with(slurm.MAX_GRACE)

    def test_other_ranks_and_worker_processes_leave_requeueing_to_rank_zero(self):
        requeue = slurm.RequeueOnTimeLimit()
        for what, patch, code in [
            ("rank 1", mock.patch.object(slurm.rank_zero_only, "rank", 1), 1),
            ("a worker process", mock.patch.object(os, "getpid", lambda: 1), None),
        ]:
            with self.subTest(what), patch, mock.patch.object(subprocess, "run") as run_mock:
                try:
                    found = requeue.requeue(signal.SIGUSR1, None)
                except SystemExit as end:  # before the end of the first epoch, all ranks exit
                    found = end.code
                requeue.has_advanced = True
                requeue.requeue(signal.SIGUSR1, None)
                requeue.has_advanced = False
                self.assertEqual((found, run_mock.mock_calls), (code, []))


class TestJob(JobTest):
    def test_a_run_is_named_after_its_batch_job_or_array_task(self):
        array = dict(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
        for variables, interactive, expected in [
            ({}, False, "job_7"),
            (array, False, "job_5_2"),
            (dict(SLURM_ARRAY_JOB_ID="5"), False, "job_7"),
            (dict(SLURM_JOB_NAME="interactive"), False, None),
            (array, True, None),
        ]:
            slurm.is_interactive.return_value = interactive
            with self.subTest(variables, interactive=interactive), mock.patch.dict(os.environ, variables):
                self.assertEqual(slurm.run_name(), expected)
        slurm.is_interactive.return_value = False
        del os.environ["SLURM_JOB_ID"]
        self.assertIsNone(slurm.run_name())

    def test_the_number_of_nodes_and_tasks_is_read_from_sruns_environment_variables(self):
        self.assertEqual(slurm.srun_tasks(), (1, 1))
        for tasks, expected in [("1", (1, 1)), ("4", (1, 4)), ("4(x2)", (2, 4)), ("2,1", (2, 0)), ("2(x2),1", (3, 0))]:
            with self.subTest(tasks), mock.patch.dict(os.environ, step(tasks, expected[0])):
                self.assertEqual(slurm.srun_tasks(), expected)
                with mock.patch.object(slurm, "is_interactive", return_value=True):
                    self.assertEqual(slurm.srun_tasks(), (1, 1))
        for name in slurm.SRUN:  # if one of them is missing, the others are from an old shell
            with self.subTest(name), mock.patch.dict(os.environ, step("4", 1)):
                del os.environ[name]
                self.assertEqual(slurm.srun_tasks(), (1, 1))

    def test_each_step_of_a_job_has_its_own_address_and_port(self):
        ports = set()
        for number, variables, address in [(0, {}, "n2"), (1, {}, "n2"), (1, {"MASTER_ADDR": "n9"}, "n9")]:
            with mock.patch.dict(os.environ, {**step("2(x2)", 2), "SLURM_STEP_ID": str(number), **variables}):
                environment = slurm.cluster_environment()
                self.assertEqual((environment.main_address, environment.auto_requeue), (address, False))
                ports.add(environment.main_port)
                environment.validate_settings(2, 2)
        self.assertEqual(len(ports), 2)
        self.assertTrue(all(1024 < port < 32768 for port in ports))

    def test_tasks_that_do_not_match_the_flags_are_refused(self):
        for tasks, num_nodes, flags, message in [
            ("4", 1, [], "srun has started 4 processes: give --devices 4 --num_nodes 1 .*, or .* --run_name"),
            ("2(x2)", 2, ["--devices=2"], "srun has started 4 processes: give --devices 2 --num_nodes 2"),
            ("2(x2)", 2, ["--num_nodes=4"], "srun has started 4 processes: give --devices 2 --num_nodes 2"),
            ("2", 1, ["--devices=4", "--run_name=x"], "srun has started 2 processes: give --devices 2 --num_nodes 1"),
            ("2,1", 2, ["--devices=2"], "srun .*: give srun --ntasks-per-node"),
        ]:
            with self.subTest(tasks=tasks, flags=flags), mock.patch.dict(os.environ, step(tasks, num_nodes)):
                code, error = self.main(f"--log_dir={self.folder}", "--accelerator=cpu", *flags)
                self.assertEqual((code, error.count("\n")), (1, 0), error)
                self.assertRegex(error, f"^train_pl.py: error: {message}")
        self.assertEqual(os.listdir(self.folder), [])

    def test_each_task_can_train_its_own_run_and_reads_no_checkpoints_of_others(self):
        """Lightning would load an hpc_ckpt_N.ckpt of another job from the Trainer's root directory."""
        (self.folder / "hpc_ckpt_1.ckpt").write_bytes(b"of another job")
        with mock.patch.dict(os.environ, {**step("4(x2)", 2), "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}):
            self.train_job(run_name="x", epochs=1)
        self.assertTrue((self.folder / "x" / "epoch_0_samples.png").exists())  # only rank 0 writes these two files
        self.assertTrue((self.folder / "x" / "results.json").exists())


class TestIsInteractive(unittest.TestCase):
    def test_a_process_with_a_terminal_or_a_prompt_is_interactive(self):
        with mock.patch.object(os, "close"), mock.patch.object(os, "open") as open_terminal:
            self.assertTrue(slurm.is_interactive())
            open_terminal.side_effect = OSError
            self.assertFalse(slurm.is_interactive())
            with mock.patch.object(sys, "ps1", ">>> ", create=True):
                self.assertTrue(slurm.is_interactive())

    @unittest.skipUnless(sys.platform == "linux", "other systems have no /proc")
    def test_a_process_that_a_notebook_starts_is_interactive(self):
        """Examples are `!python train_pl.py`, a cell with %%bash, and subprocess.run, all without a terminal."""
        for words, expected in [
            (b"python\0-m\0ipykernel_launcher\0-f\0x.json\0", True),
            (b"/usr/bin/python3\0/opt/colab_kernel_launcher.py\0", True),
            (b"/env/bin/marimo\0edit\0", True),
            (b"bash\0/home/me/ipykernel/job.sh\0", False),
            (b"python\0my_ipykernel.py\0", False),
        ]:
            self.assertEqual(bool(slurm.KERNEL.search(words)), expected, words)
        code = "from harness import slurm; print(slurm.is_interactive())"
        starts = (
            f"import subprocess; subprocess.run(['sh', '-c', {shlex.join([sys.executable, '-c', code]) + '; true'!r}])"
        )
        options = dict(cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE, text=True)
        with tempfile.TemporaryDirectory() as folder:
            started = {}
            for name in ["ipykernel_launcher.py", "script.py"]:
                Path(folder, name).write_text(starts)
                started[name] = subprocess.Popen([sys.executable, Path(folder, name)], **options)
            answers = {name: process.communicate(timeout=100)[0] for name, process in started.items()}
        self.assertEqual(answers, {"ipykernel_launcher.py": "True\n", "script.py": "False\n"})


class TestSettings(SeededTest):
    """slurm/settings.py prints the lines of a file of flags for sweep.sbatch, quoted for a shell."""

    def settings(self, data):
        """Returns the exit code, the words of each setting, and stderr."""
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

    def test_flags_are_split_as_in_a_shell_but_nothing_is_executed(self):
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
        for kind, data in {
            "Unix": text.encode(),
            "Windows": f"{text}\n\n".replace("\n", "\r\n").encode("utf-8-sig"),
            "old Mac": text.replace("\n", "\r").encode(),
            "PowerShell": text.replace("\n", "\r\n").encode("utf-16"),
        }.items():
            with self.subTest(kind):
                self.assertEqual(self.settings(data), (0, expected, ""))
        self.assertEqual(os.listdir(self.folder), ["set tings.txt"])
        self.assertEqual(self.settings(b"--x \xe9")[1], [["--x", "\udce9"]])  # bytes of another encoding are kept

    def test_an_invalid_file_is_refused_with_a_message(self):
        for data, message in [
            (b"--z_dim 2\n\n--run_name 'a b\n--lr 1", "line 3: No closing quotation"),
            (b'--run_name "a\n', "line 1: No closing quotation"),
            (b"--lr 1 \\\n--z_dim 2", "line 1: No escaped character"),
            (b"# nothing\r\n", "contains no settings"),
            ("--lr 1".encode("utf-16-le"), "save it as UTF-8"),
        ]:
            with self.subTest(data):
                code, words, error = self.settings(data)
                self.assertEqual((code, words), (1, []))
                self.assertRegex(error, rf"^(?=.*set tings.txt).*{message}.*\n\Z")

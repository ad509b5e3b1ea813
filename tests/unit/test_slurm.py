"""Tests of harness/slurm.py, in a job that is none: `python -m unittest tests/unit/test_slurm.py`."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from unittest import mock

from harness import report, slurm
from tests.helpers import TrainingTest
from train_pl import VAE, train_vae


class TestSlurm(TrainingTest):
    """A batch job as the program sees it; a test of programs runs real ones."""

    def setUp(self):
        super().setUp()
        job = dict(SLURM_JOB_ID="7", SLURM_JOB_NAME="vae", SLURM_NTASKS="1")
        job.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
        for patch in [mock.patch.dict(os.environ, job), mock.patch.object(report, "draw_figures")]:
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
        with mock.patch.dict(os.environ, SLURM_JOB_NAME="interactive"):
            self.assertIsNone(slurm.run_name())
        with mock.patch.object(sys, "ps1", ">>> ", create=True):
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
            os.kill(os.getpid(), signal.SIGUSR1)

        hooks = ["on_train_epoch_start", "on_validation_epoch_start", "on_test_epoch_start"]
        with (
            mock.patch.multiple(VAE, **dict.fromkeys(hooks, kill_twice)),
            mock.patch.object(subprocess, "run") as run,
            mock.patch.object(os, "write") as write,
        ):
            self.train_job(epochs=2, batch_size=20)  # several batches at each stage
        self.assertEqual(seen, ["validate", *["fit"] * 4, "test"])
        self.assertEqual(run.mock_calls, [mock.call(["scontrol", "requeue", "7"])] * 6)
        self.assertEqual(write.mock_calls.count(mock.call(1, b"Time is almost up: requeueing job 7\n")), 6)
        self.assertTrue((self.folder / "job_7" / "results.json").exists())

    def test_one_task_requeues_for_all(self):
        with (
            mock.patch.object(slurm.rank_zero_only, "rank", 1),
            mock.patch.object(subprocess, "run") as run,
            mock.patch.object(os, "write") as write,
        ):
            slurm.requeue(signal.SIGUSR1, None)
        self.assertEqual((run.mock_calls, write.mock_calls), ([], []))

    def test_lightning_does_not_requeue(self):
        (plugin,) = slurm.environment(devices=1, num_nodes=1)
        self.assertFalse(plugin.auto_requeue)
        del os.environ["SLURM_NTASKS"]
        self.assertEqual(slurm.environment(devices=1, num_nodes=1), [])

    def test_signals_outside_of_a_job(self):
        del os.environ["SLURM_JOB_ID"]
        with (
            mock.patch.object(VAE, "on_train_epoch_start", lambda model: os.kill(os.getpid(), signal.SIGTERM)),
            self.assertRaises(SystemExit),
        ):
            self.train_job()

    def test_tasks_that_do_not_fit_the_flags(self):
        for variables, devices in [
            (dict(SLURM_NTASKS="4"), 1),
            (dict(SLURM_NNODES="2"), 2),
            (dict(SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="4"), 1),
        ]:
            with mock.patch.dict(os.environ, variables):
                code, message = self.main(f"--log_dir={self.folder}", "--accelerator=cpu", f"--devices={devices}")
            self.assertEqual((code, message.count("\n")), (1, 0), message)
            self.assertRegex(message, "^train_pl.py: error: You set .*(tasks|nodes)")
        self.assertEqual(os.listdir(self.folder), [])

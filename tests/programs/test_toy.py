"""Tests of harness.Run with a module that is not a VAE: `python -m unittest tests/programs/test_toy.py`."""

import time
from pathlib import Path

from harness import report
from tests.helpers import CommandTest, Forked, load, metrics, results, scalars_and_images


def wait_in_epoch_4():
    """Makes a run wait at the start of its fourth epoch, so that a test can kill it there even on a fast machine."""
    begin_epoch = report.EpochReport.begin_epoch

    def begin_or_wait(self, trainer):
        while trainer.current_epoch == 3:
            time.sleep(1)
        begin_epoch(self, trainer)

    report.EpochReport.begin_epoch = begin_or_wait


class TestToyModule(CommandTest):
    def start_toy(self, name, setup=None):
        """Starts or resumes the run with this name."""
        return Forked("tests/programs/toy.py", "--log_dir", "logs", "--run_name", name, cwd=self.folder, setup=setup)

    def finish(self, process):
        """Waits until a process has ended without an error. Returns the lines that it printed."""
        stdout, stderr = process.communicate()
        self.assertEqual((process.returncode, stderr), (0, ""))
        return stdout.splitlines()

    def test_a_killed_run_of_another_module_resumes_with_the_same_numbers_as_an_uninterrupted_run(self):
        """The module has another metric, which selects the best checkpoint, and another figure."""
        uninterrupted = self.finish(self.start_toy("uninterrupted"))
        self.assertEqual(uninterrupted[0], "a line on 100 points, on cpu, in logs/uninterrupted")
        self.assertRegex(
            uninterrupted[2], r"^epoch   1/6  train squared error \d\.\d{4}  val squared error \d\.\d{4}  "
        )
        killed = self.start_toy("killed", wait_in_epoch_4)
        next(line for line in killed.stdout if line.startswith("epoch   3/6"))
        killed.kill()
        killed.communicate()
        self.assertRegex(self.finish(self.start_toy("killed"))[0], r"resumed after epoch [123]$")
        test_error = results(self.folder / "logs" / "killed")["test_error"]
        line = f"logs/killed is finished: test squared error {test_error:.4f}"
        self.assertEqual(self.finish(self.start_toy("killed")), [line])

        folders = [Path(self.folder, "logs", name) for name in ["uninterrupted", "killed"]]
        self.assertEqual(*map(metrics, folders))
        self.assertEqual(*map(scalars_and_images, folders))
        self.assertEqual(results(folders[0])["test_error"], test_error)
        self.assertEqual(*(str(load(folder, "best")["state_dict"]) for folder in folders))
        self.assertEqual(*((folder / "line.txt").read_text() for folder in folders))
        val_errors = [float(row["val_error"]) for row in metrics(folders[0])[1:]]
        self.assertEqual(results(folders[0])["best_val_error"], min(val_errors))

"""Tests of harness.Run with a module that is no VAE: `python -m unittest tests/programs/test_toy.py`."""

import time
import unittest

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import REPOSITORY, CommandTest, load, metrics, results

EPOCHS = 150


class TestToyModule(CommandTest):
    def start_toy(self, name):
        """Starts or resumes the run of that name."""
        flags = ["--log_dir", self.folder, "--run_name", name, "--epochs", EPOCHS]
        return self.start("-m", "tests.programs.toy", *flags, PYTHONPATH=str(REPOSITORY))

    def finish(self, process):
        """The lines that a process prints, once it has ended as it should."""
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ""))
        return stdout.splitlines()

    def test_a_run_of_another_module_is_started_killed_resumed_and_finished(self):
        """With its own metric, and with the same numbers as a run that was never killed."""
        undisturbed = self.finish(self.start_toy("undisturbed"))
        self.assertEqual(undisturbed[0], f"a line on 100 points, on cpu, in {self.folder}/undisturbed")
        self.assertRegex(undisturbed[2], r"epoch   1/150  train squared error \d\.\d{4}  val squared error \d\.\d{4}  ")

        process = self.start_toy("killed")
        while not (self.folder / "killed" / "checkpoints" / "previous.ckpt").exists():
            self.assertIsNone(process.poll(), "it ended before it could be killed")
            time.sleep(0.01)
        process.kill()
        process.communicate()
        resumed = self.finish(self.start_toy("killed"))
        self.assertRegex(resumed[0], r"continued after epoch \d+$")
        self.assertEqual(self.finish(self.start_toy("killed"))[0].split(":")[0], f"{self.folder}/killed is finished")

        folders = [self.folder / name for name in ["undisturbed", "killed"]]
        self.assertEqual(*map(metrics, folders))
        self.assertEqual(*(results(folder)["test_error"] for folder in folders))
        self.assertEqual(*(str(load(folder, "best")["state_dict"]) for folder in folders))
        self.assertEqual((folders[1] / "line.txt").read_text(), (folders[0] / "line.txt").read_text())
        for folder in folders:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            for name in ["train_error", "val_error"]:
                steps = [event.step for event in events.Scalars(name)]
                self.assertEqual(steps, [*range(name == "train_error", EPOCHS + 1)], f"{name} of {folder.name}")


if __name__ == "__main__":
    unittest.main()

"""
Tests that the benchmarks run and write their files; the speed itself is not tested: `python -m unittest
tests/programs/test_benchmarks.py`.
"""

import json
import re

from tests.helpers import CommandTest, few_digits


class TestBenchmarks(CommandTest):
    def assert_written(self, name, *flags):
        variables = few_digits(self.folder, (6400, 200, 200))  # with fewer than 50 steps, Lightning would warn
        variables["TMPDIR"] = str(self.folder)  # killed processes leave their runs here
        code, stdout, stderr = self.run_command(f"benchmarks/{name}.py", "--rounds", "1", *flags, **variables)
        self.assertEqual((code, stderr), (0, ""))
        (path,) = self.folder.glob(f"{name}_*.json")
        self.assertEqual(path.with_suffix(".png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        return stdout, json.loads(path.read_text())

    def test_speed_measures_each_way_to_train(self):
        stdout, measured = self.assert_written("speed", "--dataset", "rendered", "--whole_run", "1")
        for way, row in measured["summary"].items():
            self.assertRegex(stdout, rf"(?m)^{way} .*{re.escape(measured['ways'][way])}$")
            self.assertTrue(row["min"] > 0 and row["memory_mib"] > 100, row)
        self.assertEqual(measured["summary"]["bare loop"]["ratio"], 1)
        self.assertGreater(measured["whole_run"]["process"], measured["whole_run"]["fit"])
        self.assertGreater(min(measured["start"]["first step"]), 0)

    def test_the_shares_that_step_prints_add_up_to_100_percent(self):
        variables = few_digits(self.folder, (6400, 200, 200))
        for model in ["MLP", "CNN"]:
            flags = ["--dataset", "rendered", "--steps", "3", "--model", model]
            # Torch's profiler prints to stderr
            code, stdout, _ = self.run_command("benchmarks/step.py", *flags, **variables)
            first, *rows = stdout.splitlines()
            self.assertEqual(code, 0)
            self.assertRegex(first, rf"^{model}: \d+\.\d\d ms per step, median of 3, \d+ threads$")
            shares = {row[:22].strip(): int(row.split()[-1].rstrip("%")) for row in rows}
            self.assertAlmostEqual(sum(shares.values()), 100, delta=len(shares))
            self.assertIn("convolutions" if model == "CNN" else "matrix products", shares)

    def test_the_time_outside_of_the_steps_is_less_than_the_epoch_and_more_than_its_largest_part(self):
        variables = few_digits(self.folder, (2000, 200, 200))
        flags = ["--dataset", "rendered", "--epochs", "3", "--batch_size", "500"]
        code, stdout, stderr = self.run_command("benchmarks/epoch.py", *flags, **variables)
        self.assertEqual((code, stderr), (0, ""))
        total, outside = map(float, re.search(r"\n(\S+) ms per epoch, (\S+) ms of them outside", stdout).groups())
        parts = re.findall(r"^ *(\S+) ms \[", stdout, re.MULTILINE)
        self.assertTrue(total > outside > float(parts[0]) > 0, stdout)
        self.assertIn("[Callback]EpochReport.on_train_epoch_end", stdout)

    def test_gpu_on_a_machine_without_a_gpu_reports_what_it_skips(self):
        variables = {"CUDA_VISIBLE_DEVICES": "", **few_digits(self.folder, (6400, 200, 200))}
        code, stdout, stderr = self.run_command("benchmarks/gpu.py", "--models", "MLP", **variables)
        self.assertEqual((code, stderr), (0, ""))
        measured = json.loads((self.folder / "gpu.json").read_text())
        for name in ["run MLP --no_cuda_graph", "speed MLP", "TestGPU"]:
            self.assertIn({"name": name, "why": "there is no CUDA device"}, measured["left_out"])
            self.assertIn(f"note: {name} is skipped: there is no CUDA device\n", stdout)
        self.assertGreater(measured["run MLP"]["process"], measured["run MLP"]["fit"])
        self.assertLess(measured["evaluation MLP"]["log_likelihood"], -50)

    def test_growth_has_a_single_copy_of_the_data_set_in_memory(self):
        _, measured = self.assert_written("growth", "--batch_sizes", "500", "--widths", "16", "--num_images", "200000")
        self.assertTrue(all(measured[name][0]["seconds"] > 0 for name in ["batch size", "hidden width"]))
        images = measured["images"][0]
        self.assertEqual((images["images"], images["bytes_per_pixel"]), (200_000, 1))
        self.assertLess(images["process_mib"] * 2**20 / (784 * 200_000), 1.3)  # no second copy

"""
What only a GPU can show: `python -m unittest tests/programs/test_gpu.py`, some minutes on one CUDA device; skipped
without one. Uses MNIST where it is found, in ../shared/data or ../data, else rendered digits.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import unittest
from unittest import mock

import torch

from evaluate import evaluate
from harness import cuda_graph
from tests.helpers import MNIST_DIR, SeededTest, load, results
from train_pl import VAE, train_vae


def weights(checkpoint):
    """The weights in a checkpoint."""
    return list(checkpoint["state_dict"].values())


def run_again(function, indices):
    """In the place of cuda_graph.run_and_capture: its replay runs the function once more."""
    result = function(indices)
    replay_result = {name: torch.zeros_like(value) for name, value in result.items()}

    def replay():
        for name, value in function(indices).items():
            replay_result[name].copy_(value)

    return result, replay, replay_result


@unittest.skipUnless(torch.cuda.is_available(), "there is no CUDA device")
class TestGPU(SeededTest):
    def train(self, plain=False, **flags):
        """The last checkpoint and the results of a run, which took the path that it should."""
        data = dict(dataset="mnist", data_dir=str(MNIST_DIR)) if MNIST_DIR else dict(dataset="rendered")
        name = tempfile.mkdtemp(dir=self.folder)[-8:]
        flags = {"epochs": 2, "log_dir": str(self.folder), "run_name": name, "plain": plain, **data, **flags}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(cuda_graph, "run_and_capture", wraps=cuda_graph.run_and_capture) as capture,
        ):
            train_vae(argparse.Namespace(**flags))
        self.assertEqual(capture.call_count, 0 if plain else 2)  # chunks of 8,192 images, and the last one of 4,040
        run = self.folder / flags["run_name"]
        return load(run, "last"), results(run)

    def test_a_seed_repeats_itself(self):
        for flags in [dict(model=model, plain=plain) for model in ["MLP", "CNN"] for plain in [False, True]]:
            (first, of_first), (second, of_second) = self.train(**flags), self.train(**flags)
            self.assertTrue(all(map(torch.equal, weights(first), weights(second))), flags)
            self.assertEqual(of_first["test_bpd"], of_second["test_bpd"])

    def test_replays_are_the_steps(self):
        """A graph's replays against the same chunks run step by step."""
        torch.set_float32_matmul_precision("high")  # as in a graph
        self.addCleanup(torch.set_float32_matmul_precision, "highest")
        for model in ["MLP", "CNN"]:
            replayed, of_replayed = self.train(model=model)
            with mock.patch.object(cuda_graph, "run_and_capture", run_again):
                stepped, of_stepped = self.train(model=model)
            for weight, other in zip(weights(replayed), weights(stepped), strict=True):
                torch.testing.assert_close(weight, other, rtol=0.01, atol=0.01)  # rounding grows as training goes on
            self.assertAlmostEqual(of_replayed["first_step_bpd"], of_stepped["first_step_bpd"], places=5)
            self.assertAlmostEqual(of_replayed["test_bpd"], of_stepped["test_bpd"], places=3)

    def test_checkpoints_are_those_of_plain_training(self):
        (fast, _), (plain, _) = self.train(), self.train(plain=True)
        self.assertEqual(fast["global_step"], plain["global_step"])
        self.assertEqual(fast["global_step"], 2 * 352)
        self.assertEqual(fast.keys(), plain.keys())
        groups, plain_groups = (run["optimizer_states"][0]["param_groups"] for run in [fast, plain])
        self.assertEqual(groups, plain_groups)
        self.assertEqual({weight.device.type for weight in weights(fast)}, {"cpu"})
        path = next(self.folder.glob("*/checkpoints/best.ckpt"))
        VAE.load_from_checkpoint(path, map_location="cpu").sample(2)

    def test_a_run_that_stopped_goes_on_as_if_it_had_not(self):
        def stop(model):
            if model.current_epoch == 2:
                raise InterruptedError

        for plain in [False, True]:
            undisturbed, of_undisturbed = self.train(plain, epochs=4)
            with mock.patch.object(VAE, "on_train_epoch_start", stop), self.assertRaises(InterruptedError):
                self.train(plain, epochs=4, run_name="stopped")
            continued, of_continued = self.train(plain, epochs=4, run_name="stopped")
            self.assertTrue(all(map(torch.equal, weights(undisturbed), weights(continued))))
            self.assertEqual(of_undisturbed["test_bpd"], of_continued["test_bpd"])
            shutil.rmtree(self.folder / "stopped")

    def test_drawn_images_and_learning_rate(self):
        """The images are drawn anew on the GPU for each epoch, and the captured steps follow the learning rate."""
        flags = dict(binarization="stochastic", lr_schedule="cosine", epochs=6)
        (fast, of_fast), (plain, of_plain) = self.train(**flags), self.train(**flags, plain=True)
        self.assertEqual(fast["optimizer_states"][0]["param_groups"], plain["optimizer_states"][0]["param_groups"])
        self.assertAlmostEqual(of_fast["test_bpd"], of_plain["test_bpd"], delta=0.003)
        again, _ = self.train(**flags)
        self.assertTrue(all(map(torch.equal, weights(fast), weights(again))))

    def test_evaluation_on_either_device(self):
        """Of a checkpoint of the GPU and of one of the CPU; the same numbers, up to the noise."""
        for accelerator in ["gpu", "cpu"]:
            _, trained = self.train(accelerator=accelerator, plain=True, epochs=1, run_name=accelerator)
            checkpoint = self.folder / accelerator / "checkpoints" / "best.ckpt"
            (gpu, _), (cpu, _) = (evaluate(checkpoint, iw_samples=10, accelerator=device) for device in ["gpu", "cpu"])
            self.assertEqual((gpu["device"], cpu["device"]), ("cuda", "cpu"))
            for name in ["test_bpd", "elbo", "log_likelihood"]:
                self.assertAlmostEqual(gpu[name], cpu[name], delta=cpu[f"{name}_standard_error"] / 2)
            self.assertEqual(gpu["active_units"], cpu["active_units"])
            self.assertAlmostEqual(gpu["test_bpd"], trained["test_bpd"], delta=gpu["test_bpd_standard_error"] / 2)

    def test_fast_and_plain_agree_after_80_epochs(self):
        bpds = {
            plain: [self.train(plain=plain, epochs=80, seed=seed)[1]["test_bpd"] for seed in [1, 2, 3]]
            for plain in [False, True]
        }
        print(f"\ntest bpd of seeds 1, 2, 3: fast {bpds[False]}, plain {bpds[True]}")
        self.assertAlmostEqual(sum(bpds[False]) / 3, sum(bpds[True]) / 3, delta=0.001)


if __name__ == "__main__":
    unittest.main()

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

import train_pl
from evaluate import evaluate
from harness import cuda_graph
from tests.helpers import MNIST_DIR, SeededTest, load, results, small_loaders
from train_pl import VAE, train_vae


def weights(checkpoint):
    """The weights in a checkpoint, on the CPU."""
    return [weight.cpu() for weight in checkpoint["state_dict"].values()]


def run_again(function, indices):
    """In the place of cuda_graph.run_and_capture: its replay runs the function once more."""
    result = function(indices)
    replay_result = {name: torch.zeros_like(value) for name, value in result.items()}

    def replay():
        for name, value in function(indices).items():
            replay_result[name].copy_(value)

    return result, replay, replay_result


@unittest.skipUnless(torch.cuda.is_available(), "there is no CUDA device")
class GPUTest(SeededTest):
    def train_somehow(self, plain=False, **flags):
        """The last checkpoint and the results of a run."""
        data = dict(dataset="mnist", data_dir=str(MNIST_DIR)) if MNIST_DIR else dict(dataset="rendered")
        name = tempfile.mkdtemp(dir=self.folder)[-8:]
        flags = {"epochs": 2, "log_dir": str(self.folder), "run_name": name, "plain": plain, **data, **flags}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            mock.patch.object(cuda_graph, "run_and_capture", wraps=cuda_graph.run_and_capture) as capture,
        ):
            train_vae(argparse.Namespace(**flags))
        self.stderr, self.num_captures = stderr.getvalue(), capture.call_count
        run = self.folder / flags["run_name"]
        return load(run, "last"), results(run)

    def train(self, plain=False, **flags):
        """The same; all steps were captured, or none."""
        left = self.train_somehow(plain, **flags)
        # The rehearsal's two steps, chunks of 8,192 images, and the last one of 4,040.
        self.assertEqual((self.num_captures, self.stderr), (0 if plain else 3, ""))
        return left


class TestGPU(GPUTest):
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
        self.assertEqual({weight.device.type for weight in fast["state_dict"].values()}, {"cpu"})
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
        for accelerator, model, num_samples in [("gpu", "MLP", 10), ("cpu", "MLP", 10), ("gpu", "CNN", 1)]:
            name = f"{accelerator} {model}"
            _, trained = self.train(accelerator=accelerator, model=model, plain=True, epochs=1, run_name=name)
            checkpoint = self.folder / name / "checkpoints" / "best.ckpt"
            (gpu, _), (cpu, _) = (
                evaluate(checkpoint, iw_samples=num_samples, accelerator=device) for device in ["gpu", "cpu"]
            )
            self.assertEqual((gpu["device"], cpu["device"]), ("cuda", "cpu"))
            for name in ["test_bpd", "elbo", "log_likelihood"]:
                self.assertAlmostEqual(gpu[name], cpu[name], delta=cpu[f"{name}_standard_error"] / 2)
            self.assertEqual(gpu["active_units"], cpu["active_units"])
            self.assertAlmostEqual(gpu["test_bpd"], trained["test_bpd"], delta=gpu["test_bpd_standard_error"] / 2)

    def test_small_minibatches(self):
        """Graphs of 64 steps, of few images. After 600 steps of Adam a few weights differ by 0.02, from TF32."""
        for batch_size in [1, 8]:
            with mock.patch.object(train_pl, "load_data", small_loaders):
                (fast, _), (plain, _) = (self.train_somehow(plain, batch_size=batch_size) for plain in [False, True])
            self.assertEqual(self.stderr, "")
            for weight, other in zip(weights(fast), weights(plain), strict=True):
                self.assertLess((weight - other).abs().mean(), 0.002)

    def test_a_number_that_changes(self):
        """A weight of the KL that is another one in each epoch: the graphs are captured anew."""

        def warm_up(model):
            model.kl_weight = (model.current_epoch + 1) / 4

        def training_step(model, batch, batch_idx):
            L_rec, L_reg = model.losses(batch[0], reduction="mean")
            model.add_to(model.train_sums, batch[0], L_rec, L_reg)
            return L_rec + model.kl_weight * L_reg

        with mock.patch.multiple(
            VAE, on_train_epoch_start=warm_up, training_step=training_step, kl_weight=1.0, create=True
        ):
            _, of_fast = self.train_somehow(epochs=4)
            self.assertEqual((self.num_captures, self.stderr), (1 + 4 * 2, ""))
            _, of_plain = self.train(plain=True, epochs=4)
        self.assertAlmostEqual(of_fast["test_bpd"], of_plain["test_bpd"], delta=0.003)

    def assert_falls_back(self, words, **flags):
        """The fast path is left with a line of these words, for what plain training does, to the bit."""
        fast, of_fast = self.train_somehow(**flags)
        self.assertRegex(self.stderr, f"^step by step: .*{words}.*\n$")
        plain, of_plain = self.train_somehow(plain=True, **flags)
        self.assertTrue(all(map(torch.equal, weights(fast), weights(plain))), words)
        self.assertEqual(of_fast["test_bpd"], of_plain["test_bpd"])

    def test_what_a_graph_cannot_hold(self):
        training_step = VAE.training_step

        def waits(model, batch, batch_idx):
            output = training_step(model, batch, batch_idx)
            return output if output["loss"].item() < 10 else None

        def logs(model, batch, batch_idx):
            output = training_step(model, batch, batch_idx)
            model.log("train_loss", output["loss"], on_step=False, on_epoch=True)
            return output

        def sgd(model):
            return torch.optim.SGD(model.parameters(), lr=0.01)

        for name, function, words in [
            ("training_step", waits, "training_step waits for the GPU, as .item"),
            ("training_step", logs, "training_step uses self.trainer, as self.log"),
            ("configure_optimizers", sgd, "SGD has no option `capturable`"),
        ]:
            with mock.patch.object(VAE, name, function):
                self.assert_falls_back(words)

    def test_what_fails_in_the_training(self):
        """In the midst of the warm-up, in a capture, and before a replay: it is as if it had not been tried."""
        run_and_capture = cuda_graph.run_and_capture
        for number, moment in [(1, "warm-up"), (1, "capture"), (2, "capture"), (1, "replay")]:
            num_calls = 0

            def failing(function, indices, number=number, moment=moment):
                nonlocal num_calls
                num_calls += 1

                def fail(*args):
                    raise torch.OutOfMemoryError("injected")

                def function_that_fails(indices):
                    if torch.cuda.is_current_stream_capturing() == (moment == "capture"):
                        function(indices[:300])
                        fail()
                    return function(indices)

                if num_calls != number + 1 or moment == "replay":
                    result, replay, replay_result = run_and_capture(function, indices)
                    return result, fail if num_calls == number + 1 else replay, replay_result
                return run_and_capture(function_that_fails, indices)

            with mock.patch.object(cuda_graph, "run_and_capture", failing):
                if (number, moment) == (1, "warm-up") or (number, moment) == (1, "capture"):
                    self.assert_falls_back("the GPU has too little memory for graphs")
                else:  # some chunks were trained in TF32
                    _, of_fast = self.train_somehow()
                    self.assertRegex(self.stderr, "^step by step: the GPU has too little memory.*\n$")
                    _, of_plain = self.train(plain=True)
                    self.assertAlmostEqual(of_fast["test_bpd"], of_plain["test_bpd"], delta=0.003)

    def test_runs_one_after_another(self):
        """Of a notebook; the graphs of the first one are gone when those of the second are captured."""
        for model in ["MLP", "CNN", "MLP"]:
            _, of_run = self.train(model=model)
            self.assertLess(of_run["test_bpd"], 0.4)
        before = torch.cuda.memory_allocated()
        self.train()
        self.assertLess(torch.cuda.memory_allocated() - before, 2**20)


class TestManyEpochs(GPUTest):
    def test_fast_and_plain_agree_after_80_epochs(self):
        bpds = {
            plain: [self.train(plain=plain, epochs=80, seed=seed)[1]["test_bpd"] for seed in [1, 2, 3]]
            for plain in [False, True]
        }
        print(f"\ntest bpd of seeds 1, 2, 3: fast {bpds[False]}, plain {bpds[True]}")
        self.assertAlmostEqual(sum(bpds[False]) / 3, sum(bpds[True]) / 3, delta=0.001)


if __name__ == "__main__":
    unittest.main()

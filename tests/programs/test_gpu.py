"""
Tests that need a GPU: `python -m unittest tests/programs/test_gpu.py`, some minutes on one CUDA device; skipped without
a CUDA device. They use MNIST if it is in ../shared/data or ../data, else rendered digits.
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
from harness import graphs
from tests.helpers import MNIST_DIR, SeededTest, load, results
from train_pl import VAE, train_vae

TRAINING_STEP = VAE.training_step


def weights(checkpoint):
    """Returns the weights in a checkpoint, on the CPU."""
    return [weight.cpu() for weight in checkpoint["state_dict"].values()]


@unittest.skipUnless(torch.cuda.is_available(), "there is no CUDA device")
class GPUTest(SeededTest):
    def train_unchecked(self, **flags):
        """Trains with or without CUDA graphs. Returns the last checkpoint and the results."""
        data = dict(dataset="mnist", data_dir=str(MNIST_DIR)) if MNIST_DIR else dict(dataset="rendered")
        name = tempfile.mkdtemp(dir=self.folder)[-8:]
        flags = {"epochs": 2, "log_dir": str(self.folder), "run_name": name, **data, **flags}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            mock.patch.object(graphs, "capture", wraps=graphs.capture) as capture,
        ):
            train_vae(argparse.Namespace(**flags))
        self.stderr, self.num_captures = stderr.getvalue(), capture.call_count
        run = self.folder / flags["run_name"]
        return load(run, "last"), results(run)

    def train(self, epochs=2, no_cuda_graph=False, **flags):
        """Trains like train_unchecked, and asserts that each epoch captured one step, or none with no_cuda_graph."""
        left = self.train_unchecked(epochs=epochs, no_cuda_graph=no_cuda_graph, **flags)
        self.assertEqual((self.num_captures, self.stderr), (0 if no_cuda_graph else epochs, ""))
        return left


class TestGPU(GPUTest):
    def assert_the_same(self, run, other, names=("test_bpd",)):
        """Asserts that two runs have bit-identical weights and the same results with these names."""
        self.assertTrue(all(map(torch.equal, weights(run[0]), weights(other[0]))))
        self.assertEqual(*([left[name] for name in names] for _, left in [run, other]))

    def test_a_seed_is_reproducible_bit_for_bit(self):
        for flags in [dict(model=model, no_cuda_graph=off) for model in ["MLP", "CNN"] for off in [False, True]]:
            with self.subTest(flags):
                self.assert_the_same(self.train(**flags), self.train(**flags))

    def test_training_with_cuda_graphs_agrees_with_training_without_them(self):
        """Not tested with stochastic binarisation: with graphs, the GPU samples the pixels, otherwise the CPU."""
        for flags in [
            dict(),
            dict(model="CNN"),
            dict(lr_schedule="cosine", beta=2.0, beta_warmup=2, epochs=3),
            dict(objective="iwae", train_samples=5),
        ]:
            with self.subTest(flags):
                runs = [self.train(**flags, no_cuda_graph=off) for off in [False, True]]
                (replayed, of_replayed), (ordinary, of_ordinary) = runs
                torch.testing.assert_close(weights(replayed), weights(ordinary), rtol=0.01, atol=0.01)  # rounding grows
                self.assertAlmostEqual(of_replayed["first_step_bpd"], of_ordinary["first_step_bpd"], places=5)
                self.assertAlmostEqual(of_replayed["test_bpd"], of_ordinary["test_bpd"], delta=0.002)
                self.assertEqual(replayed["global_step"], ordinary["global_step"])
                self.assertEqual(*(run["optimizer_states"][0]["param_groups"] for run, _ in runs))
                self.assertEqual({weight.device.type for weight in replayed["state_dict"].values()}, {"cpu"})

    def test_a_stopped_run_resumes_as_if_it_had_not_stopped(self):
        def stop(model):
            if model.current_epoch == 2:
                raise InterruptedError

        for off in [False, True]:
            uninterrupted = self.train(epochs=4, no_cuda_graph=off)
            with mock.patch.object(VAE, "on_train_epoch_start", stop), self.assertRaises(InterruptedError):
                self.train_unchecked(epochs=4, no_cuda_graph=off, run_name="stopped")
            self.assert_the_same(uninterrupted, self.train_unchecked(epochs=4, no_cuda_graph=off, run_name="stopped"))
            shutil.rmtree(self.folder / "stopped")

    def test_an_evaluation_has_the_same_numbers_on_the_gpu_and_the_cpu_up_to_the_noise(self):
        """The checkpoint may be from a training on the GPU or on the CPU."""
        for accelerator, model, num_samples in [("gpu", "MLP", 10), ("cpu", "MLP", 10), ("gpu", "CNN", 1)]:
            name = f"{accelerator} {model}"
            flags = dict(accelerator=accelerator, model=model, epochs=1, run_name=name)
            _, trained = self.train(**flags, no_cuda_graph=True)
            best = self.folder / name / "checkpoints" / "best.ckpt"
            gpu, cpu = (evaluate(best, iw_samples=num_samples, accelerator=kind)[0] for kind in ["gpu", "cpu"])
            self.assertEqual((gpu["device"], cpu["device"]), ("cuda", "cpu"))
            for name in ["test_bpd", "elbo", "log_likelihood"]:
                self.assertAlmostEqual(gpu[name], cpu[name], delta=cpu[f"{name}_standard_error"] / 2)
            self.assertEqual(gpu["active_units"], cpu["active_units"])
            self.assertAlmostEqual(gpu["test_bpd"], trained["test_bpd"], delta=gpu["test_bpd_standard_error"] / 2)

    def test_if_the_capture_fails_training_is_bit_identical_to_no_cuda_graph(self):

        def waits(model, batch, batch_idx):
            output = TRAINING_STEP(model, batch, batch_idx)
            return output if output["loss"].item() < 10 else None

        def copies(model, batch, batch_idx):
            output = TRAINING_STEP(model, batch, batch_idx)
            return {**output, "loss": output["loss"] * torch.tensor(0.5).to(model.device)}

        def logs(model, batch, batch_idx):
            output = TRAINING_STEP(model, batch, batch_idx)
            model.log("train_loss", output["loss"], on_step=False, on_epoch=True)
            return output

        def fails(model, batch, batch_idx):
            output = TRAINING_STEP(model, batch, batch_idx)
            if torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("injected")
            return output

        def invalidates(model, batch, batch_idx):
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.current_stream().synchronize()
            return TRAINING_STEP(model, batch, batch_idx)

        for step, words in [
            *((step, "training_step waits for the GPU") for step in [waits, copies, invalidates]),
            (logs, r"training_step uses self.trainer \(as self.log"),
            (fails, "OutOfMemoryError: injected"),
        ]:
            with self.subTest(step.__name__), mock.patch.object(VAE, "training_step", step):
                other = self.train_unchecked()
                self.assertRegex(self.stderr, f"^note: training without CUDA graphs: .*{words}.*\n$")
                self.assert_the_same(other, self.train_unchecked(no_cuda_graph=True), names=[])
            self.train()  # CUDA and torch still work after the failed capture

    def test_a_run_frees_its_gpu_memory_and_more_epochs_need_no_more_memory(self):
        self.train()
        before = torch.cuda.memory_allocated()
        reserved = []
        for epochs in [2, 6]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.train(epochs=epochs)
            reserved.append(torch.cuda.max_memory_reserved())
        self.assertLess(torch.cuda.memory_allocated() - before, 2**20)
        self.assertLess(reserved[1] - reserved[0], 2**24)


class TestManyEpochs(GPUTest):
    def test_graphs_and_ordinary_steps_agree_after_80_epochs(self):
        bpds = {
            off: [self.train(no_cuda_graph=off, epochs=80, seed=seed)[1]["test_bpd"] for seed in [1, 2, 3]]
            for off in [False, True]
        }
        print(f"\ntest bpd of seeds 1, 2, 3: graphs {bpds[False]}, ordinary steps {bpds[True]}")
        self.assertAlmostEqual(sum(bpds[False]) / 3, sum(bpds[True]) / 3, delta=0.001)

"""
Tests of harness/cuda_graph.py on a CPU, where a graph's stand-in runs a function again:
`python -m unittest tests/unit/test_cuda_graph.py`.
"""

import argparse
import os
import time
import unittest
import warnings
from unittest import mock

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from harness import cuda_graph, processes, report
from tests.helpers import TrainingTest, load, metrics, results, scalars_and_images, small_loaders
from train_pl import VAE, GenerateCallback


def loaders(sampler=None, **flags):
    """Loaders with 8 minibatches of training images per epoch: 7 of 40 images and one of 20."""
    return small_loaders(argparse.Namespace(batch_size=40, **flags), sampler=sampler)


class ChunksTest(TrainingTest):
    """A test that trains in chunks of 80, 80, 80 and 60 images."""

    def setUp(self):
        super().setUp()
        self.replays = []  # the number of images of each chunk that a stand-in for a graph replayed
        patch = mock.patch.object(cuda_graph, "CHUNK", 100)
        patch.start()
        self.addCleanup(patch.stop)

    def run_and_capture(self, function, indices):
        """A graph's stand-in: a replay runs the function again and leaves its result in the same tensors."""
        result = function(indices)
        replay_result = apply_to_collection(result, torch.Tensor, torch.zeros_like)

        def replay():
            self.replays.append(len(indices))
            output = function(indices)
            if isinstance(output, dict):
                for name, value in output.items():
                    replay_result[name].copy_(value)
            else:
                replay_result.copy_(output)

        return result, replay, replay_result

    def use_stand_in(self):
        """From now on chunks are replayed."""
        for patch in [
            mock.patch.object(cuda_graph.ChunkedSteps, "use_graph", True),
            mock.patch.object(cuda_graph, "run_and_capture", self.run_and_capture),
        ]:
            patch.start()
            self.addCleanup(patch.stop)


class TestTraining(ChunksTest):
    """Whole runs: their metrics, results, last checkpoint and the x axes of TensorBoard."""

    def train(self, in_chunks, **flags):
        """Folder of a run, with 8 steps per epoch."""
        with mock.patch.object(cuda_graph, "can_capture", lambda trainer, model, train_loader: in_chunks):
            folder, _ = super().train(**{"z_dim": 16, "batch_size": 40, "epochs": 3, **flags})
        return folder

    def compare(self, folder, other, **tolerance):
        """Two runs: the same names, epochs and counts, and the same numbers (within a tolerance)."""
        for row, other_row in zip(metrics(folder), metrics(other), strict=True):
            self.assertEqual(row.keys(), other_row.keys())
            for name, value in row.items():
                self.assertAlmostEqual(float(value or 0), float(other_row[name] or 0), places=3, msg=name)
        last, other_last = load(folder, "last"), load(other, "last")
        for name in ["epoch", "global_step", "hyper_parameters"]:
            self.assertEqual(last[name], other_last[name])
        for name in ["state_dict", "optimizer_states"]:
            torch.testing.assert_close(last[name], other_last[name], **tolerance)
        for name in ["test_bpd", "first_step_bpd", "best_val_bpd"]:
            self.assertAlmostEqual(results(folder)[name] or 0, results(other)[name] or 0, places=5)
        points = [sorted((tag, step) for tag, step, _ in scalars_and_images(run)) for run in [folder, other]]
        self.assertEqual(*points)

    def test_chunks_are_plain_training_to_the_bit(self):
        with warnings.catch_warnings(record=True) as caught:
            plain, chunks = self.train(in_chunks=False), self.train(in_chunks=True)
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.compare(plain, chunks, rtol=0, atol=0)
        self.assertEqual(load(chunks, "last")["global_step"], 3 * 8)
        self.assertTrue(1 < results(chunks)["first_step_bpd"] < 1.1)
        larger = self.train(in_chunks=True, batch_size=128)  # than a chunk
        self.assertEqual(load(larger, "last")["global_step"], 3 * 3)

    def test_a_step_that_returns_the_loss_alone(self):
        """As Lightning's tutorials have it; then nothing tells the bpd of the first step."""
        training_step = VAE.training_step
        with_bpd = self.train(in_chunks=False, epochs=2)
        with mock.patch.object(VAE, "training_step", lambda *args: training_step(*args)["loss"]):
            plain, chunks = self.train(in_chunks=False, epochs=2), self.train(in_chunks=True, epochs=2)
            self.use_stand_in()
            replayed = self.train(in_chunks=True, epochs=2)
        self.compare(plain, chunks, rtol=0, atol=0)
        self.compare(plain, replayed, rtol=1e-4, atol=1e-5)
        self.assertEqual([results(folder)["first_step_bpd"] for folder in [plain, chunks, replayed]], [None] * 3)
        weights = load(with_bpd, "last")["state_dict"], load(chunks, "last")["state_dict"]
        torch.testing.assert_close(*weights, rtol=0, atol=0)

    def test_drawn_images_are_drawn_where_the_steps_read_them(self):
        flags = dict(binarization="stochastic", epochs=2)
        plain, chunks = self.train(in_chunks=False, **flags), self.train(in_chunks=True, **flags)
        self.compare(plain, chunks, rtol=0, atol=0)

    def test_plain_flag(self):
        with mock.patch.object(cuda_graph, "train_in_chunks", mock.Mock(side_effect=AssertionError)):
            self.train(in_chunks=True, plain=True, epochs=1)

    def test_graph_is_replayed(self):
        """The first chunk of each size runs, the others are replayed."""
        plain = self.train(in_chunks=False)
        self.use_stand_in()
        replayed = self.train(in_chunks=True)
        self.assertEqual(self.replays, [80, 80] + 2 * [80, 80, 80, 60])
        self.compare(plain, replayed, rtol=1e-4, atol=1e-5)  # a graph's learning rate is in single precision
        groups, plain_groups = (load(run, "last")["optimizer_states"][0]["param_groups"] for run in [replayed, plain])
        self.assertEqual(groups, plain_groups)

    def test_what_a_graph_cannot_do_is_an_error(self):
        self.use_stand_in()

        def scheduled(model):
            optimizer = torch.optim.Adam(model.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        def logging(model, batch, batch_idx):
            loss = model(batch[0])[2]
            model.log("train_loss", loss)
            return loss

        for name, function, message in [
            ("configure_optimizers", scheduled, "does not step learning-rate schedulers: train with --plain"),
            ("training_step", logging, "inside a CUDA graph, where self.log would record nothing: .* --plain"),
        ]:
            with mock.patch.object(VAE, name, function), self.assertRaisesRegex(cuda_graph.CaptureError, message):
                self.train(in_chunks=True)


class TestCheckpoints(ChunksTest):
    @mock.patch("warnings.warn")  # Lightning's, that the folder is there already
    def test_checkpoints_continue_either_way(self, _):
        report.quiet_libraries()
        train_loader, val_loader, _ = loaders(
            sampler=lambda images, shuffle: processes.EpochSampler(images, 1, 0, shuffle, seed=1)
        )
        final = {}
        for first_in_chunks in [False, True]:
            path = None
            for in_chunks, epochs in [(first_in_chunks, 2), (not first_in_chunks, 4)]:
                pl.seed_everything(epochs)
                model = VAE("MLP", [16], 4, 2, 1e-3)
                checkpoint = pl.callbacks.ModelCheckpoint(self.folder / f"{first_in_chunks}")
                callbacks = [processes.SeedEpochs(1), checkpoint]
                options = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
                options.update(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, callbacks=callbacks)
                trainer = pl.Trainer(**options)
                both = train_loader, val_loader
                if in_chunks:
                    both = cuda_graph.train_in_chunks(trainer, model, *both)
                    trainer.strategy.checkpoint_io = cuda_graph.BackgroundCheckpointIO(trainer.strategy.checkpoint_io)
                trainer.fit(model, *both, ckpt_path=path)
                self.assertEqual((trainer.current_epoch, trainer.global_step), (epochs, 8 * epochs))
                path = checkpoint.best_model_path
                self.assertTrue(path.endswith(f"epoch={epochs - 1}-step={8 * epochs}.ckpt"), path)
            final[first_in_chunks] = model.state_dict()
        torch.testing.assert_close(final[False], final[True], rtol=0, atol=0)

    def test_checkpoints_in_the_background(self):
        """The weights are those of the call; no file waits while a newer one of its name is made."""
        running, most = [], 0

        class SlowCheckpointIO(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                time.sleep(0.05)
                super().save_checkpoint(checkpoint, path)
                running.remove(path)

        checkpoint_io = cuda_graph.BackgroundCheckpointIO(SlowCheckpointIO())
        path, other_path = self.folder / "a.ckpt", self.folder / "b.ckpt"
        weight = torch.ones(2)
        for epoch in range(3):
            running += [path, other_path]
            checkpoint_io.save_checkpoint({"weight": weight, "epoch": epoch}, path)
            checkpoint_io.save_checkpoint({"weight": weight, "epoch": epoch}, other_path)
            most = max(most, len(running))
        weight.zero_()
        checkpoint_io.teardown()
        self.assertEqual(running, [])
        self.assertLessEqual(most, 2)
        loaded = torch.load(path)
        self.assertEqual((loaded["weight"].tolist(), loaded["epoch"]), ([1, 1], 2))
        self.assertEqual(set(os.listdir(self.folder)), {"a.ckpt", "b.ckpt"})


class TestParts(ChunksTest):
    def test_index_chunks(self):
        """The minibatches of a DataLoader in the order of its sampler, of images that are drawn anew for each pass."""
        loader, _, _ = loaders(binarization="stochastic", sampler=lambda images, shuffle: range(len(images))[::-1])
        chunks = cuda_graph.IndexChunks(loader, pin_memory=False)
        self.assertIs(chunks.sampler, loader.sampler)
        images, before = loader.dataset.images, loader.dataset.images.clone()
        indices = list(chunks)
        self.assertIs(loader.dataset.images, images)
        self.assertFalse(torch.equal(images, before))
        self.assertEqual([len(chunk) for chunk in indices], [80, 80, 80, 60])
        self.assertEqual((len(chunks), indices[0].dtype), (4, torch.int64))
        minibatches = [batch.tolist() for chunk in indices for batch in chunk.split(40)]
        self.assertEqual(minibatches, list(loader.batch_sampler))

    def test_data_sets_are_moved_in_place(self):
        """So that whatever draws the images anew draws those that the steps read."""
        train_loader, val_loader, _ = loaders(binarization="stochastic")
        trainer, model = mock.Mock(), VAE("MLP", [16], 4, 2, 1e-3)
        trainer.strategy.root_device = torch.device("meta")
        chunks, val_chunks = cuda_graph.train_in_chunks(trainer, model, train_loader, val_loader)
        for loader in [train_loader, val_loader]:
            self.assertEqual({tensor.device.type for tensor in vars(loader.dataset).values()}, {"meta"})
        self.assertIs(chunks.loader, train_loader)
        self.assertIs(model.training_step.__self__.train_set, train_loader.dataset)
        self.assertIs(val_chunks.dataset, val_loader.dataset)
        self.assertEqual(torch.cat(list(val_chunks.sampler)).tolist(), list(range(50)))

    def test_learning_rate_reaches_the_graph(self):
        self.use_stand_in()
        trainer = mock.Mock(lr_scheduler_configs=[], optimizers=[torch.optim.Adam([torch.zeros(1)], lr=0.5)])
        model = VAE("MLP", [16], 4, 2, 1e-3)
        (group,) = trainer.optimizers[0].param_groups
        steps = cuda_graph.ChunkedSteps(trainer, model, None, batch_size=4)
        captured = []

        def minibatches(indices):
            captured.append(group["lr"])
            return indices.sum()

        with mock.patch.object(steps, "steps", minibatches), mock.patch.object(steps, "count_steps"):
            for size in [4, 3]:
                steps.training_step(torch.arange(size), 0)
            graphs_read = captured.copy()
            group["lr"] = 0.25
            self.assertEqual(steps.training_step(torch.full([4], 2), 1), 8)
        self.assertEqual([lr.item() for lr in graphs_read], [0.25, 0.25])
        self.assertEqual(group["lr"], 0.25)

    def test_capture(self):
        """The calls to torch.cuda, on mocks of them."""
        names = ["Stream", "CUDAGraph", "current_stream", "stream", "graph"]
        with mock.patch.multiple(torch.cuda, **{name: mock.MagicMock() for name in names}):
            torch.cuda.graph.return_value.__exit__.return_value = False  # lets errors pass
            function = mock.Mock(side_effect=[1, 2])
            self.assertEqual(cuda_graph.run_and_capture(function, 5), (1, torch.cuda.CUDAGraph().replay, 2))
            self.assertEqual(function.mock_calls, [mock.call(5), mock.call(5)])
            function = mock.Mock(side_effect=[1, RuntimeError("not permitted when stream is capturing\nCUDA kernel")])
            with self.assertRaisesRegex(cuda_graph.CaptureError, "not permitted.* --plain$"):
                cuda_graph.run_and_capture(function, 5)

    def test_can_capture(self):
        class Watched(VAE):
            def on_after_backward(self):
                pass

        class Watcher(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                pass

        loader, _, _ = loaders()
        room = 2 * 300 * 28 * 28 + 1
        generate = GenerateCallback()
        for expected, device, world_size, free, vae, callback in [
            (True, "cuda", 1, room, VAE, generate),
            (False, "cpu", 1, room, VAE, generate),
            (False, "cuda", 2, room, VAE, generate),
            (False, "cuda", 1, room - 1, VAE, generate),
            (False, "cuda", 1, room, Watched, generate),
            (False, "cuda", 1, room, VAE, Watcher()),
        ]:
            trainer = mock.Mock(world_size=world_size, callbacks=[callback])
            trainer.strategy.root_device = torch.device(device)
            with mock.patch.object(torch.cuda, "mem_get_info", lambda device, free=free: (free, free)):
                self.assertEqual(cuda_graph.can_capture(trainer, vae("MLP", [4], 4, 2, 1e-3), loader), expected)


if __name__ == "__main__":
    unittest.main()

"""
Tests of harness/chunks.py on a CPU, where a graph's stand-in runs a function again:
`python -m unittest tests/unit/test_chunks.py`.
"""

import argparse
import contextlib
import copy
import gc
import os
import time
import unittest
import warnings
import weakref
from unittest import mock

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from harness import chunks, cuda_graph, processes, report
from tests.helpers import ChunksTest, load, metrics, results, scalars_and_images, small_loaders
from train_pl import VAE


def loaders(sampler=None, **flags):
    """Loaders with 8 minibatches of training images per epoch: 7 of 40 images and one of 20."""
    return small_loaders(argparse.Namespace(batch_size=40, **flags), sampler=sampler)


class TestTraining(ChunksTest):
    """Whole runs: their metrics, results, last checkpoint and the x axes of TensorBoard."""

    def train(self, in_chunks, by_graph=True, **flags):
        """Folder of a run, with 8 steps per epoch."""
        with mock.patch.object(chunks, "has_graphs", lambda device: by_graph):
            flags = {"z_dim": 16, "batch_size": 40, "epochs": 3, "plain": not in_chunks, **flags}
            folder, self.printed = super().train(**flags)
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
            plain, in_chunks = self.train(in_chunks=False), self.train(in_chunks=True, by_graph=False)
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.compare(plain, in_chunks, rtol=0, atol=0)
        self.assertEqual(load(in_chunks, "last")["global_step"], 3 * 8)
        self.assertTrue(1 < results(in_chunks)["first_step_bpd"] < 1.1)
        larger = self.train(in_chunks=True, by_graph=False, batch_size=128)  # than a chunk
        self.assertEqual(load(larger, "last")["global_step"], 3 * 3)

    def test_a_step_that_returns_the_loss_alone(self):
        """As Lightning's tutorials have it; then nothing tells the bpd of the first step."""
        training_step = VAE.training_step
        with_bpd = self.train(in_chunks=False, epochs=2)
        with mock.patch.object(VAE, "training_step", lambda *args: training_step(*args)["loss"]):
            plain = self.train(in_chunks=False, epochs=2)
            in_chunks = self.train(in_chunks=True, by_graph=False, epochs=2)
            replayed = self.train(in_chunks=True, epochs=2)
        self.compare(plain, in_chunks, rtol=0, atol=0)
        self.compare(plain, replayed, rtol=1e-4, atol=1e-5)
        self.assertEqual([results(folder)["first_step_bpd"] for folder in [plain, in_chunks, replayed]], [None] * 3)
        weights = load(with_bpd, "last")["state_dict"], load(in_chunks, "last")["state_dict"]
        torch.testing.assert_close(*weights, rtol=0, atol=0)

    def test_drawn_images_are_drawn_where_the_steps_read_them(self):
        flags = dict(binarization="stochastic", epochs=2)
        plain = self.train(in_chunks=False, **flags)
        for by_graph, tolerance in [(False, 0), (True, 1e-4)]:
            self.compare(plain, self.train(in_chunks=True, by_graph=by_graph, **flags), rtol=tolerance, atol=tolerance)

    def test_plain_flag(self):
        with mock.patch.object(chunks, "fast_path", mock.Mock(side_effect=AssertionError)):
            self.train(in_chunks=True, plain=True, epochs=1)
            with self.assertRaises(AssertionError):
                self.train(in_chunks=True, epochs=1)

    def test_graph_is_replayed(self):
        """The first chunk of each size runs, the others are replayed; the first one of all is the rehearsal's."""
        plain = self.train(in_chunks=False)
        replayed = self.train(in_chunks=True)
        self.assertNotIn("step by step", self.printed)
        self.assertEqual(self.captures, [80, 80, 60])
        self.assertEqual(self.replays, [80, 80] + 2 * [80, 80, 80, 60])
        self.compare(plain, replayed, rtol=1e-4, atol=1e-5)  # a graph's learning rate is in single precision
        groups, plain_groups = (load(run, "last")["optimizer_states"][0]["param_groups"] for run in [replayed, plain])
        self.assertEqual(groups, plain_groups)

    def test_small_minibatches(self):
        """A graph holds so many steps and no more, whatever the size of a minibatch."""
        with mock.patch.object(chunks, "MAX_STEPS", 2):
            plain, replayed = (self.train(in_chunks, batch_size=20, epochs=2) for in_chunks in [False, True])
        self.assertEqual(self.captures, [40, 40, 20])
        self.compare(plain, replayed, rtol=1e-4, atol=1e-5)

    def test_what_changes_between_epochs(self):
        """A number, which parameters learn, the optimizer's settings: the graphs are captured anew for each of them."""

        def number(model, epoch, optimizer):
            model.hparams.kl_weight = 0.5  # as save_hyperparameters has it, of the same name
            model.kl_weight = min(1.0, (epoch + 1) / 2)

        def frozen(model, epoch, optimizer):
            model.encoder.requires_grad_(epoch != 1)

        def setting(model, epoch, optimizer):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * min(epoch, 1)

        def tensor(model, epoch, optimizer):
            model.scale = torch.tensor(min(1.0, (epoch + 1) / 2))

        def listed(model, epoch, optimizer):
            vars(model).setdefault("kept", {"kl_weight": [0.0]})["kl_weight"][0] = min(1.0, (epoch + 1) / 2)

        def another(model, epoch, optimizer):
            if epoch == 1:
                model.trainer.optimizers = [torch.optim.Adam(model.parameters(), lr=0.01, fused=True)]

        def further(model, epoch, optimizer):
            if epoch == 1:
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})

        def training_step(model, batch, batch_idx):
            L_rec, L_reg = model.losses(batch[0], reduction="mean")
            model.add_to(model.train_sums, batch[0], L_rec, L_reg)
            kept = getattr(model, "kept", {"kl_weight": [1.0]})
            weight = getattr(model, "kl_weight", 1.0) * getattr(model, "scale", 1.0) * kept["kl_weight"][0]
            return L_rec + weight * L_reg

        for change in [number, frozen, setting, tensor, listed, another, further]:

            def on_train_epoch_start(model, change=change):
                change(model, model.current_epoch, model.trainer.optimizers[0])

            self.captures.clear()
            with (
                self.subTest(change.__name__),
                mock.patch.object(VAE, "on_train_epoch_start", on_train_epoch_start),
                mock.patch.object(VAE, "training_step", training_step),
            ):
                plain, replayed = (self.train(in_chunks, epochs=2) for in_chunks in [False, True])
                self.assertNotIn("step by step", self.printed)
                self.compare(plain, replayed, rtol=1e-3, atol=1e-4)
                self.assertEqual(self.captures, [80] + 2 * [80, 60])

    def test_a_validation_step_by_the_training_step(self):
        def validation_step(model, batch, batch_idx):
            model.log("val_bpd", model.training_step(batch, batch_idx)["bpd"], batch_size=len(batch[0]))

        unchanged = dict(validation_step=validation_step, on_validation_epoch_end=lambda model: None)
        with mock.patch.multiple(VAE, **unchanged):
            self.train(in_chunks=True, epochs=1)
        self.assertNotIn("step by step", self.printed)

    def test_a_hook_of_torch_that_comes_later(self):
        calls = []

        def on_train_epoch_start(model):
            if model.current_epoch == 1:
                model.decoder.register_forward_hook(lambda *args: calls.append(args))

        with mock.patch.object(VAE, "on_train_epoch_start", on_train_epoch_start):
            self.train(in_chunks=True, epochs=2)
        self.assertIn("step by step: the module, its parts or its optimizer have hooks", self.printed)
        self.assertEqual(len(calls), 8 + 1)  # validation

    def test_nothing_of_it_is_left(self):
        """A graph that dies later, in the midst of another's capture, would spoil that."""
        graphs = []

        class Replay:
            def __call__(self):
                pass

        def run_and_capture(function, indices):
            replay = Replay()
            graphs.append(weakref.ref(replay))
            result = function(indices)
            return result, replay, result

        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        with mock.patch.object(cuda_graph, "run_and_capture", run_and_capture), mock.patch.object(gc, "collect"):
            self.train(in_chunks=True, epochs=1)
        self.assertEqual([graph() for graph in graphs], [None] * 3)


class TestFallBack(ChunksTest):
    """Whatever fails, the training is the plain one to the bit, and a line says why."""

    def train(self, in_chunks=True, **flags):
        return super().train(**{"z_dim": 4, "batch_size": 40, "epochs": 1, "plain": not in_chunks, **flags})

    def fail(self, number, moment, error):
        """Makes the capture of that number (0 is the rehearsal's) fail at a moment."""
        run_and_capture, num_captures, num_steps = self.run_and_capture, 0, 0
        step = torch.optim.Adam.step

        def failing_step(optimizer):
            nonlocal num_steps
            num_steps += 1
            if num_steps == 2:
                raise error
            return step(optimizer)

        def failing_replay():
            torch.rand(1)  # a graph's replay takes its random numbers before it is launched
            raise error

        def failing(function, indices):
            nonlocal num_captures, num_steps
            num_captures, num_steps = num_captures + 1, 0
            if num_captures != number + 1:
                return run_and_capture(function, indices)
            if moment == "warm-up":
                with mock.patch.object(torch.optim.Adam, "step", failing_step):
                    function(indices)
            result, replay, replay_result = run_and_capture(function, indices)
            if moment == "capture":
                raise error
            return result, failing_replay, replay_result

        return mock.patch.object(cuda_graph, "run_and_capture", failing)

    def test_failures(self):
        driver = RuntimeError("CUDA error: operation not supported\nCUDA kernel errors might be")
        capture = RuntimeError("CUDA error: operation not permitted when stream is capturing")
        memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        plain, _ = self.train(in_chunks=False)
        for number, moment, error, words in [
            (0, "warm-up", driver, "CUDA error: operation not supported"),
            (0, "capture", capture, "training_step waits for the GPU, as .item() and print do"),
            (1, "warm-up", memory, "the GPU has too little memory for graphs"),
            (1, "capture", memory, "the GPU has too little memory"),
            (2, "capture", memory, "too little memory"),
            (1, "replay", driver, "operation not supported"),
        ]:
            with self.subTest(number=number, moment=moment, words=words), self.fail(number, moment, error):
                folder, printed = self.train()
                lines = [line for line in printed.splitlines() if line.startswith("step by step: ")]
                self.assertEqual(len(lines), 1, printed)
                self.assertIn(words, lines[0])
                kept, other = load(folder, "last"), load(plain, "last")
                # A chunk that was replayed had its learning rate in single precision.
                tolerance = 1e-4 if number > 1 or moment == "replay" else 0
                for name in ["state_dict", "optimizer_states"]:
                    torch.testing.assert_close(kept[name], other[name], rtol=tolerance, atol=tolerance)
                self.assertEqual(kept["global_step"], other["global_step"])
                for row, other_row in zip(metrics(folder), metrics(plain), strict=True):
                    self.assertAlmostEqual(float(row["train_bpd"] or 0), float(other_row["train_bpd"] or 0), places=5)

    def test_errors_of_the_step_are_raised(self):
        """As they are, whenever they come."""
        training_step, seen = VAE.training_step, []
        for first in [1, 3, 9]:

            def failing(model, batch, batch_idx, first=first):
                seen.append(batch)
                if len(seen) >= first:
                    raise ZeroDivisionError("of the user's own")
                return training_step(model, batch, batch_idx)

            seen.clear()
            with (
                mock.patch.object(VAE, "training_step", failing),
                self.assertRaisesRegex(ZeroDivisionError, "of the user's own"),
            ):
                self.train()


class TestCheckpoints(ChunksTest):
    @mock.patch.object(chunks, "has_graphs", lambda device: False)
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
                with contextlib.ExitStack() as undo:
                    if in_chunks:
                        both = chunks.train_in_chunks(trainer, model, *both, undo)
                    trainer.fit(model, *both, ckpt_path=path)
                self.assertIs(type(trainer.strategy.checkpoint_io), TorchCheckpointIO)
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

        checkpoint_io = chunks.BackgroundCheckpointIO(SlowCheckpointIO())
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
        in_chunks = chunks.IndexChunks(loader, pin_memory=False, max_steps=64)
        self.assertIs(copy.copy(in_chunks).sampler, loader.sampler)
        images, before = loader.dataset.images, loader.dataset.images.clone()
        indices = list(in_chunks)
        self.assertIs(loader.dataset.images, images)
        self.assertFalse(torch.equal(images, before))
        self.assertEqual([len(chunk) for chunk in indices], [80, 80, 80, 60])
        self.assertEqual((len(in_chunks), indices[0].dtype), (4, torch.int64))
        minibatches = [batch.tolist() for chunk in indices for batch in chunk.split(40)]
        self.assertEqual(minibatches, list(loader.batch_sampler))

    def test_snapshot(self):
        """Of weights, of attributes, and of tensors among these, whether or not they can be written to."""
        model = VAE("MLP", [16], 4, 2, 1e-3)
        model.ones, model.noise, model.name = torch.ones(1).expand(3), torch.rand(2), "before"
        kept, noise, sums = copy.deepcopy(model.state_dict()), model.noise.clone(), model.train_sums
        restore = chunks.snapshot(model, torch.optim.Adam(model.parameters()))
        model.noise.add_(1)
        model.train_sums, model.name, model.count = model.train_sums + 1, "after", 1
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        restore()
        self.assertIs(model.train_sums, sums)
        self.assertEqual((model.name, "count" in vars(model)), ("before", False))
        torch.testing.assert_close([model.noise, *model.state_dict().values()], [noise, *kept.values()])

    def test_data_sets_are_moved_in_place(self):
        """So that whatever draws the images anew draws those that the steps read."""
        train_loader, val_loader, _ = loaders(binarization="stochastic")
        trainer, model = mock.Mock(), VAE("MLP", [16], 4, 2, 1e-3)
        trainer.strategy.root_device = torch.device("meta")
        undo = contextlib.ExitStack()
        in_chunks, val_chunks = chunks.train_in_chunks(trainer, model, train_loader, val_loader, undo)
        for loader in [train_loader, val_loader]:
            self.assertEqual({tensor.device.type for tensor in vars(loader.dataset).values()}, {"meta"})
        self.assertIs(in_chunks.loader, train_loader)
        self.assertIs(trainer.strategy.training_step.__self__.train_set, train_loader.dataset)
        self.assertIs(val_chunks.dataset, val_loader.dataset)
        self.assertEqual(torch.cat(list(val_chunks.sampler)).tolist(), list(range(50)))

    def test_validation_of_large_images(self):
        """A chunk has fewer of them, at least a minibatch."""
        trainer = mock.Mock(**{"strategy.root_device": torch.device("meta")})
        for most, expected in [(100, [50]), (45, [45, 5]), (1, [40, 10])]:
            with mock.patch.object(chunks, "PIXELS", most * 28 * 28):
                _, val_chunks = chunks.train_in_chunks(trainer, mock.Mock(), *loaders()[:2], contextlib.ExitStack())
            self.assertEqual([len(indices) for indices in val_chunks.sampler], expected)


if __name__ == "__main__":
    unittest.main()

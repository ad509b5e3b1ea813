"""
Tests of harness/graphs.py and graph_checks.py on a CPU, with a stand-in for graphs: `python -m unittest
tests/unit/test_graphs.py`.
"""

import argparse
import contextlib
import operator
import random
import unittest
from collections import deque
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch

import bmnist
import train_pl
from harness import graph_checks, graphs, run
from tests.helpers import GraphTest, load, metrics, results, scalars_and_images, small_loaders
from train_pl import TITLES, VAE, GenerateCallback, complete_flags

WEIGHT = 1.0  # a global variable that a step reads
TRAINING_STEP = VAE.training_step


class TrainingTest(GraphTest):
    def train(self, by_graph=True, **flags):
        """Folder of a run of 8 steps per epoch: 7 of 40 images and one of 20."""
        self.captures.clear(), self.replays.clear()
        flags = {"z_dim": 4, "batch_size": 40, "epochs": 2, "no_cuda_graph": not by_graph, **flags}
        folder, self.printed = super().train(**flags)
        return folder

    def compare(self, folder, other):
        """Two runs: the same weights, counts and training metrics; validation has other noise by graphs."""
        last, other_last = load(folder, "last"), load(other, "last")
        for name in ["epoch", "global_step", "hyper_parameters"]:
            self.assertEqual(last[name], other_last[name])
        for name in ["state_dict", "optimizer_states"]:
            torch.testing.assert_close(last[name], other_last[name], rtol=0, atol=0)
        for row, other_row in zip(metrics(folder), metrics(other), strict=True):
            self.assertEqual(row.keys(), other_row.keys())
            for name, value in row.items():
                delta = 0.02 * float(other_row[name] or 0) if name.startswith("val") else 1e-5
                self.assertAlmostEqual(float(value or 0), float(other_row[name] or 0), delta=delta, msg=name)
        self.assertEqual(results(folder)["first_step_bpd"], results(other)["first_step_bpd"])
        self.assertEqual(*([sorted(point[:2] for point in scalars_and_images(run)) for run in [folder, other]]))

    def assert_no_graph(self, words, folder=None):
        """One line says why there are no graphs."""
        lines = [line for line in self.printed.splitlines() if line.startswith("note: training without CUDA graphs: ")]
        self.assertEqual(len(lines), 1, self.printed)
        self.assertRegex(lines[0], words)


class TestTraining(TrainingTest):
    def test_replays_are_ordinary_steps(self):
        for flags in [
            dict(),
            dict(binarization="stochastic", lr_schedule="cosine", beta=2.0, beta_warmup=2),
            dict(model="CNN", num_filters=2),
            dict(batch_size=300),
            dict(batch_size=20),
        ]:
            with self.subTest(flags):
                ordinary, replayed = self.train(by_graph=False, **flags), self.train(**flags)
                self.assertNotIn("without CUDA graphs", self.printed)
                self.compare(replayed, ordinary)
                size = flags.get("batch_size", 40)
                # In each epoch the first minibatch and a smaller one at the end are ordinary steps.
                self.assertEqual((self.captures, self.replays), ([size] * 2, [size] * 2 * (300 // size - 1)))
        self.assertEqual(load(replayed, "last")["global_step"], 2 * 15)

    def test_lightning_sees_few_batches(self):
        loader = graphs.IndexLoader(small_loaders(argparse.Namespace(batch_size=40))[0])
        self.assertEqual([len(indices) for indices in loader], [40, 80, 80, 80, 20])
        self.assertEqual((len(loader), len(loader.dataset)), (5, 300))

    def test_a_step_that_returns_the_loss_alone(self):
        with mock.patch.object(VAE, "training_step", lambda *args: TRAINING_STEP(*args)["loss"]):
            self.compare(self.train(), self.train(by_graph=False))

    def test_what_changes_between_epochs(self):
        """Each epoch captures again: numbers, globals, what is frozen, settings of the optimizer, another one."""

        def training_step(model, batch, batch_idx):
            output = TRAINING_STEP(model, batch, batch_idx)
            weight = getattr(model, "weight", 1.0) * WEIGHT * getattr(model, "kept", {"weight": [1.0]})["weight"][0]
            return {**output, "loss": weight * output["loss"]}

        on_train_epoch_start = VAE.on_train_epoch_start
        for change in [
            "model.weight = 0.5 * epoch",
            "global WEIGHT; WEIGHT = 0.5 * epoch",
            "model.encoder.requires_grad_(epoch != 1)",
            "optimizer.param_groups[0]['weight_decay'] = optimizer.param_groups[0]['lr'] = 0.1 * epoch",
            "model.kept = {'weight': [0.5 * epoch, object()]}",
            "if epoch == 1: model.trainer.optimizers = [torch.optim.Adam(model.parameters(), lr=0.01, fused=True)]",
        ]:

            def changed(model, change=change):
                on_train_epoch_start(model)
                scope = dict(model=model, epoch=model.current_epoch, optimizer=model.trainer.optimizers[0])
                exec(change, globals(), scope)

            patches = dict(on_train_epoch_start=changed, training_step=training_step)
            with self.subTest(change), mock.patch.multiple(VAE, **patches):
                ordinary, replayed = self.train(by_graph=False, epochs=3), self.train(epochs=3)
                self.assertNotIn("without CUDA graphs", self.printed)
                self.compare(replayed, ordinary)
            globals()["WEIGHT"] = 1.0

    def test_a_run_continues_either_way(self):
        def stop(model):
            if model.current_epoch == 2:
                raise ZeroDivisionError

        expected = self.train(by_graph=False, epochs=4)
        for by_graph in [True, False]:
            name = f"first {by_graph}"
            with mock.patch.object(VAE, "on_train_epoch_start", stop), self.assertRaises(ZeroDivisionError):
                self.train(by_graph, epochs=4, run_name=name)
            self.train(not by_graph, epochs=4, run_name=name)
            last, other = load(self.folder / name, "last"), load(expected, "last")
            self.assertEqual(last["global_step"], 4 * 8)
            torch.testing.assert_close(last["state_dict"], other["state_dict"], rtol=0, atol=0)

    def test_everything_is_as_before(self):
        """After the training, and after a fit that failed."""
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        model = VAE("MLP", [16], 4, 2, 1e-3)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        images = train_loader.dataset.images
        with contextlib.suppress(KeyError), graphs.graphed(trainer, model, train_loader, val_loader) as loaders:
            self.assertEqual((len(loaders[0]), model.automatic_optimization), (5, False))
            self.assertIs(loaders[0].dataset, train_loader.dataset)
            raise KeyError
        self.assertTrue(model.automatic_optimization)
        self.assertIs(train_loader.dataset.images, images)
        self.assertEqual(trainer.strategy.training_step.__func__, type(trainer.strategy).training_step)


class TestNoGraph(TrainingTest):
    """Training goes on with ordinary steps, and is the same bit for bit; a line says why."""

    def assert_ordinary(self, words, **patches):
        with mock.patch.multiple(VAE, create=True, **patches):
            ordinary, other = self.train(by_graph=False), self.train()
        self.assert_no_graph(words)
        self.assertEqual(self.replays, [])
        self.compare(other, ordinary)

    def test_captures_that_fail(self):
        """In the first epoch, or in a later one."""
        sync = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel")
        for error, words in [
            (sync, "training_step waits for the GPU, as .item"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried"), "OutOfMemoryError: CUDA out of memory"),
            (KeyError("beta"), "KeyError: 'beta'"),
        ]:
            for number in range(2):
                capture, ordinary = [self.capture, self.capture], self.train(by_graph=False, epochs=3)
                capture[number:] = [mock.Mock(side_effect=error)]
                captures = iter(capture)
                with mock.patch.object(graphs, "capture", lambda *args, captures=captures: next(captures)(*args)):
                    folder = self.train(epochs=3)
                self.assert_no_graph(words)
                self.compare(folder, ordinary)
                self.assertEqual(len(self.replays), 6 * number)

    def test_errors_of_the_step_are_raised(self):
        for first in [1, 3]:
            seen = []

            def failing(model, batch, batch_idx, first=first, seen=seen):
                seen.append(batch)
                if len(seen) >= first:
                    raise ZeroDivisionError("of the user's own")
                return TRAINING_STEP(model, batch, batch_idx)

            with (
                mock.patch.object(VAE, "training_step", failing),
                mock.patch.object(graphs, "capture", side_effect=KeyError),
                self.assertRaisesRegex(ZeroDivisionError, "of the user's own"),
            ):
                self.train()

    def test_what_a_step_does_in_python(self):
        for act, words in [
            ("model.log('train_own', loss, on_step=False, on_epoch=True)", "uses self.trainer, as self.log"),
            ("loss = loss * min(1.0, model.current_epoch / 10)", "uses self.trainer, as self.log"),
            ("loss = loss if model.global_step > 10 else 2 * loss", "uses self.trainer, as self.log"),
            ("loss = loss if batch_idx % 2 else 2 * loss", "uses batch_idx"),
            ("model.count = getattr(model, 'count', 0) + 1; loss = model.count * loss", "changes self.count in Python"),
            ("model.last = loss.detach()", "changes self.last in Python"),
            ("model.kept['outputs'].append(loss.detach())", r"changes self.kept\['outputs'\]\[\d+\] in Python"),
            ("model.kept['numbers'][0] += 1", r"changes self.kept\['numbers'\]\[0\] in Python"),
            ("model.kept['array'][0] += 1", r"changes self.kept\['array'\] in Python"),
            ("model.kept['object'].count += 1", r"changes self.kept\['object'\].count in Python"),
            ("model.encoder.net.seen = batch_idx + 1", "changes self.encoder.net.seen in Python"),
            (
                "loss = loss * torch.rand((), generator=model.kept['generator'])",
                r"changes self.kept\['generator'\] in Python",
            ),
            ("loss = loss * float(model.kept['numpy'].random())", r"changes self.kept\['numpy'\] in Python"),
            ("loss = loss * model.kept['python'].random()", r"changes self.kept\['python'\] in Python"),
            ("model.pair = loss.detach(), 1", r"changes self.pair\[0\] in Python"),
            ("model.kept['next'] = iter([])", r"self.kept\['next'\] is an iterator"),
            ("loss = loss * (random.random() < 0.5)", "random numbers that are not the GPU's"),
            ("loss = loss * float(np.random.rand())", "random numbers that are not the GPU's"),
        ]:

            def training_step(model, batch, batch_idx, act=act):
                output = TRAINING_STEP(model, batch, batch_idx)
                scope = dict(model=model, loss=output["loss"], batch_idx=batch_idx)
                exec(act, globals(), scope)
                return {**output, "loss": scope["loss"]}

            def on_train_start(model):
                random.seed(1), np.random.seed(1)
                model.kept = {"numbers": [1, 2], "array": np.zeros(2), "object": argparse.Namespace(count=1)}
                model.kept |= {"generator": torch.Generator().manual_seed(1), "outputs": deque(), "itself": model}
                model.kept |= {"numpy": np.random.default_rng(1), "python": random.Random(1)}
                model.pair = torch.zeros(()), 1

            with self.subTest(act):
                self.assert_ordinary(words, training_step=training_step, on_train_start=on_train_start)

    def test_modules(self):
        def hooked(model):
            model.decoder.register_forward_hook(lambda *args: None)

        def sgd(model):
            return torch.optim.SGD(model.parameters(), lr=0.1)

        def scheduled(model):
            optimizer = torch.optim.Adam(model.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        self.assert_ordinary("have hooks", on_train_start=hooked)
        self.assert_ordinary("SGD has no option `capturable`", configure_optimizers=sgd)
        self.assert_ordinary("more than an optimizer", configure_optimizers=scheduled)
        self.assert_ordinary("of its own", configure_callbacks=lambda model: [pl.callbacks.Timer()])
        self.assert_ordinary("VAE has on_after_backward", on_after_backward=lambda model: None)

    def test_no_room_for_the_images(self):
        """Those that were on the GPU already come back."""
        to, places = bmnist.BinaryImages.to, []

        def second_fails(images, device):
            places.append(str(device))
            if len(places) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return to(images, device)

        with mock.patch.object(bmnist.BinaryImages, "to", second_fails):
            self.train(epochs=1)
        self.assert_no_graph("CUDA out of memory")
        self.assertEqual(places, ["cpu"] * 4)


class TestCheck(GraphTest):
    """What is known before the training."""

    def why_not(self, *callbacks, vae=VAE, loader_options={}, **settings):  # noqa: B006 (only read)
        """The line that says why there are no graphs; None if there are."""
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        train_loader = bmnist.ImageLoader(train_loader.dataset, 40, **loader_options)
        options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer = pl.Trainer(**{**options, "enable_checkpointing": False, "callbacks": list(callbacks), **settings})
        with (
            mock.patch.object(graphs, "note") as warn,
            graphs.graphed(trainer, vae("MLP", [16], 4, 2, 1e-3), train_loader, val_loader) as loaders,
        ):
            self.assertEqual(loaders[0] is train_loader, bool(note.mock_calls))
        return note.mock_calls[0].args[0] if note.mock_calls else None

    def test_what_is_no_hindrance(self):
        args = complete_flags(
            argparse.Namespace(accelerator="cpu", log_dir=str(self.folder), progress_bar=True, beta=2)
        )
        with mock.patch.object(run, "shows_bar", lambda args: True):
            callbacks = run.Run(args, {}, TITLES, [GenerateCallback(), *train_pl.schedules(args)]).trainer.callbacks
        self.assertEqual([graph_checks.step_hooks(callback) for callback in callbacks], [[]] * 6)
        self.assertIsNone(self.why_not(pl.callbacks.EarlyStopping("val_bpd"), pl.callbacks.Timer(), GenerateCallback()))

    def test_hooks(self):
        for hook in graph_checks.STEP_HOOKS:
            for base in [VAE, pl.Callback]:
                if hasattr(base, hook):
                    own = type("Own", (base,), {hook: lambda *args, **kwargs: None})
                    with self.subTest(hook=hook, base=base):
                        line = self.why_not(vae=own) if base is VAE else self.why_not(own())
                        self.assertIn(f"Own has {hook}", line or "")

    def test_callbacks_of_lightning(self):
        for callback in [
            pl.callbacks.LearningRateMonitor("step"),
            pl.callbacks.StochasticWeightAveraging(0.01),
            pl.callbacks.GradientAccumulationScheduler({0: 1}),
            pl.callbacks.LambdaCallback(on_train_batch_end=lambda *args: None),
            pl.callbacks.ModelCheckpoint(self.folder, every_n_train_steps=3),
        ]:
            own = dict(enable_checkpointing=True) if isinstance(callback, pl.callbacks.ModelCheckpoint) else {}
            line = self.why_not(callback, logger=pl.loggers.CSVLogger(self.folder), **own)
            self.assertIn(type(callback).__name__, line or "")

    def test_settings_of_the_trainer(self):
        for setting in [
            dict(accumulate_grad_batches=2),
            dict(gradient_clip_val=1.0),
            dict(precision="bf16-true"),
            dict(max_steps=5),
            dict(limit_train_batches=3),
            dict(limit_train_batches=1),
            dict(overfit_batches=1),
            dict(limit_val_batches=2),
            dict(val_check_interval=0.5),
        ]:
            with self.subTest(setting):
                self.assertRegex(
                    self.why_not(**setting) or "", f"the Trainer.s ({next(iter(setting))}|limit_train_batches) is"
                )

    def test_loaders(self):
        for options in [dict(drop_last=True), dict(num_workers=1), dict(collate_fn=lambda samples: samples)]:
            line = self.why_not(loader_options=options)
            self.assertIn("the training loader does more than to index its images", line or "")


class TestParts(unittest.TestCase):
    def test_what_is_on_the_cpu_of_a_module_on_a_gpu(self):
        """Python alone changes its tensors there, and the CPU's random numbers. Inference tensors are no error."""
        model = argparse.Namespace(device=torch.device("cuda"), kept=torch.zeros(2))
        with torch.inference_mode():
            model.of_validation = torch.zeros(2)
        before = graph_checks.python_state(model)
        self.assertEqual([*graph_checks.changes(before, graph_checks.python_state(model))], [])
        model.kept.add_(1)
        torch.rand(1)
        found = [*graph_checks.changes(before, graph_checks.python_state(model))]
        self.assertEqual(found[0], "training_step draws random numbers that are not the GPU's")
        self.assertRegex(found[1], "changes self.kept on the CPU in Python")

    def test_no_use_of_a_refusal(self):
        refusal = graph_checks.Refusal("batch_idx")
        for use in [
            *(bool, int, float, len, list, str, hash, abs, round, range, operator.index, operator.neg),
            *(lambda x: x % 2, lambda x: 2 * x, lambda x: x == 0, lambda x: x >= 3, lambda x: x // 2, lambda x: f"{x}"),
            *(lambda x: x.current_epoch, lambda x: x.bit_length(), lambda x: [1, 2][x], lambda x: x in [1]),
            *(lambda x: torch.ones(2) * x, lambda x: x + torch.ones(2), lambda x: {x: 1}, lambda x: x and 1),
        ]:
            with self.assertRaisesRegex(graph_checks.CaptureError, "^training_step uses batch_idx, which a graph"):
                use(refusal)

    @unittest.skipUnless(torch.version.cuda, "this torch is built without CUDA")
    def test_this_torch_has_the_names(self):
        """Those for which torch has no public function."""
        for names in [{"_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"}, {"_cuda_releasePool"}]:
            self.assertTrue(names & set(dir(torch._C)), names)

    def test_the_end_of_a_capture(self):
        """On mocks of CUDA: after an error nothing waits for the capture's end, and torch is as before."""
        for error in [None, KeyError]:
            cuda, allocator = mock.MagicMock(get_sync_debug_mode=lambda: 0), mock.MagicMock()
            cuda.default_generators = [generator := mock.MagicMock()]
            cuda.current_device = lambda: 0
            names = dict(_cuda_endAllocateToPool=allocator.end, _cuda_releasePool=allocator.release)
            function, previous = mock.Mock(side_effect=error), mock.MagicMock()
            with (
                mock.patch.object(torch, "cuda", cuda),
                mock.patch.multiple(torch._C, create=True, **names),
                mock.patch.object(graphs, "FAILED", []) as failed,
                contextlib.suppress(KeyError),
            ):
                graphs.capture(function, previous)
            graph, pool = cuda.CUDAGraph(), previous.pool()
            self.assertEqual(graph.mock_calls, [mock.call.capture_begin(pool), mock.call.capture_end()])
            self.assertEqual(cuda.set_sync_debug_mode.mock_calls, [mock.call("error"), mock.call(0)])
            expected = [mock.call.end(0, pool), mock.call.release(0, pool)] if error else []
            self.assertEqual((allocator.mock_calls, len(failed)), (expected, int(bool(error))))
            self.assertEqual(generator.graphsafe_set_state.called, bool(error))


if __name__ == "__main__":
    unittest.main()

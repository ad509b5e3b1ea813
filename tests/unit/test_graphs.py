"""
Tests of harness/graphs.py and graph_checks.py on a CPU, with a mock of CUDA graphs: `python -m unittest
tests/unit/test_graphs.py`.
"""

import argparse
import contextlib
import functools
import itertools
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
from harness import graph_checks, graphs, processes, run, trainer
from harness.settings import process_settings
from tests.helpers import GraphTest, load, metrics, results, scalars_and_images, small_loaders
from train_pl import VAE, GenerateCallback, complete_flags

WEIGHT = 1.0  # a global variable that a step reads
TRAINING_STEP = VAE.training_step


class TestRuns(GraphTest):
    def train(self, by_graph=True, **flags):
        """Trains a run of 8 steps per epoch, 7 of 40 images and one of 20. Returns its folder."""
        self.captures.clear(), self.replays.clear()
        flags = {"z_dim": 4, "batch_size": 40, "epochs": 2, "no_cuda_graph": not by_graph, **flags}
        folder, output = super().train(**flags)
        self.assertNotIn("without CUDA graphs", output)
        return folder

    def test_runs_with_and_without_graphs_leave_the_same_files(self):
        """Only the noise of validation differs, because its minibatches are larger with graphs."""
        for flags in [
            dict(),
            dict(binarization="stochastic", lr_schedule="cosine", beta=2.0, beta_warmup=2),
            dict(objective="iwae", train_samples=3),
            dict(batch_size=300),
            dict(batch_size=20),
        ]:
            with self.subTest(flags):
                ordinary, replayed = self.train(by_graph=False, **flags), self.train(**flags)
                last, other_last = load(replayed, "last"), load(ordinary, "last")
                self.assertEqual(last["hyper_parameters"], other_last["hyper_parameters"])
                for name in ["epoch", "global_step", "state_dict", "optimizer_states"]:
                    torch.testing.assert_close(last[name], other_last[name], rtol=0, atol=0)
                for row, other in zip(metrics(replayed), metrics(ordinary), strict=True):
                    self.assertEqual(row.keys(), other.keys())
                    for name, value in row.items():
                        delta = 0.02 * float(other[name] or 0) if name.startswith("val") else 1e-5
                        self.assertAlmostEqual(float(value or 0), float(other[name] or 0), delta=delta, msg=name)
                self.assertEqual(results(replayed)["first_step_bpd"], results(ordinary)["first_step_bpd"])
                points = [sorted(point[:2] for point in scalars_and_images(folder)) for folder in [replayed, ordinary]]
                self.assertEqual(*points)
                size = flags.get("batch_size", 40)
                # In each epoch the first minibatch and a smaller one at the end are ordinary steps.
                self.assertEqual((self.captures, self.replays), ([size] * 2, [size] * 2 * (300 // size - 1)))

    def test_a_run_resumes_with_or_without_graphs(self):
        def stop(model):
            if model.current_epoch == 1:
                raise ZeroDivisionError

        expected = load(self.train(by_graph=False), "last")
        for by_graph in [True, False]:
            name = f"first {by_graph}"
            with mock.patch.object(VAE, "on_train_epoch_start", stop), self.assertRaises(ZeroDivisionError):
                self.train(by_graph, run_name=name)
            self.train(not by_graph, run_name=name)
            last = load(self.folder / name, "last")
            self.assertEqual(last["global_step"], 2 * 8)
            torch.testing.assert_close(last["state_dict"], expected["state_dict"], rtol=0, atol=0)


class FitTest(GraphTest):
    """A test that trains with only a Trainer, without a run."""

    def fit(self, by_graph=True, epochs=1, **patches):
        """
        Trains a VAE with patched methods on 3 minibatches of 100 images per epoch. Returns its weights, the state of
        its optimizer and its metrics. If no graphs are used, self.notes contains the reason.
        """
        self.captures.clear(), self.replays.clear()
        self.enter(process_settings())
        off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        hooks = [processes.RunHooks(seed=1)]  # make each epoch's random numbers independent of validation
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, callbacks=hooks, **off)
        sampler = functools.partial(processes.sampler, trainer=trainer, seed=1)
        loaders, self.notes = small_loaders(argparse.Namespace(batch_size=100), sampler=sampler)[:2], []
        loaders[0].generator = torch.Generator()  # as a run does
        patches = {"on_fit_start": pl.LightningModule.on_fit_start, **patches}  # mock needs at least one
        with mock.patch.object(graphs, "warn", self.notes.append), mock.patch.multiple(VAE, create=True, **patches):
            torch.manual_seed(1)
            model = VAE("MLP", [16], 4, 4, 1e-3)
            cuda_graphs = graphs.cuda_graphs(trainer, model, *loaders) if by_graph else contextlib.nullcontext(loaders)
            with cuda_graphs as loaders:
                trainer.fit(model, *loaders)
        means = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train")}
        return model.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers], means

    def assert_trained_alike(self, **options):
        """Asserts that a fit with graphs, if they are possible, and a fit without graphs are bit-identical."""
        ordinary = self.fit(by_graph=False, **options)
        torch.testing.assert_close(self.fit(**options), ordinary, rtol=0, atol=0)

    def assert_no_graph(self, words):
        self.assertEqual(len(self.notes), 1, self.notes)
        self.assertRegex(self.notes[0], f"^note: training without CUDA graphs: .*{words}")


class TestGraphs(FitTest):
    def test_a_step_may_return_only_the_loss(self):
        self.assert_trained_alike(training_step=lambda *args: TRAINING_STEP(*args)["loss"])
        self.assertEqual(self.replays, [100] * 2)

    def test_changes_between_epochs_take_effect(self):
        """They may affect attributes, globals, frozen weights, settings of the optimizer, or replace the optimizer."""

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

            with self.subTest(change):
                self.assert_trained_alike(epochs=3, on_train_epoch_start=changed, training_step=training_step)
                self.assertEqual((self.notes, self.replays), ([], [100] * 6))
            globals()["WEIGHT"] = 1.0

    def test_the_trainer_and_the_module_are_restored_after_a_failed_fit(self):
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        self.enter(process_settings())
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        model, images = VAE("MLP", [16], 4, 2, 1e-3), train_loader.dataset.images
        with contextlib.suppress(KeyError), graphs.cuda_graphs(trainer, model, train_loader, val_loader) as loaders:
            self.assertEqual((len(loaders[0]), model.automatic_optimization), (5, False))
            raise KeyError
        self.assertTrue(model.automatic_optimization)
        self.assertIs(train_loader.dataset.images, images)
        self.assertEqual(trainer.strategy.training_step.__func__, type(trainer.strategy).training_step)


class TestNoGraph(FitTest):
    """Without a graph, training continues with ordinary steps, bit for bit, and a note gives the reason."""

    def assert_ordinary(self, words, **patches):
        self.assert_trained_alike(**patches)
        self.assert_no_graph(words)
        self.assertEqual(self.replays, [])

    def test_a_capture_may_fail_in_the_first_epoch_or_in_a_later_epoch(self):
        sync = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel")
        for error, words in [
            (sync, "training_step waits for the GPU, as .item"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried"), "OutOfMemoryError: CUDA out of memory"),
            (KeyError("beta"), "KeyError: 'beta'"),
        ]:
            for number in range(2):
                captures = iter([*[self.capture] * number, mock.Mock(side_effect=error)])
                capture = mock.patch.object(graphs, "capture", lambda *args, left=captures: next(left)(*args))
                with self.subTest(words, epoch=number + 1), capture:
                    self.assert_trained_alike(epochs=3)
                    self.assert_no_graph(words)
                    self.assertEqual(self.replays, [100] * 2 * number)

    def test_errors_of_the_step_itself_are_raised(self):
        fail = mock.Mock(side_effect=ZeroDivisionError("of the user's own"))
        for number in [0, 2]:
            steps = iter([TRAINING_STEP] * number)
            failed_capture = mock.patch.object(graphs, "capture", side_effect=KeyError)
            with failed_capture, self.assertRaisesRegex(ZeroDivisionError, "of the user's own"):
                self.fit(training_step=lambda *args, steps=steps: next(steps, fail)(*args))

    def test_changes_that_a_step_makes_in_python_are_found(self):
        """A replay would not repeat them, so each of these steps is trained without graphs."""
        for act, words in [
            ("model.log('train_own', loss, on_step=False, on_epoch=True)", r"uses self.trainer \(as self.log"),
            ("loss = loss * min(1.0, model.current_epoch / 10)", r"uses self.trainer \(as self.log"),
            ("loss = loss if model.global_step > 10 else 2 * loss", r"uses self.trainer \(as self.log"),
            ("loss = loss if batch_idx % 2 else 2 * loss", "uses batch_idx"),
            ("model.count = getattr(model, 'count', 0) + 1; loss = model.count * loss", "changes self.count in Python"),
            ("model.last = loss.detach()", "changes self.last in Python"),
            ("model.kept['outputs'].append(loss.detach())", r"changes self.kept\['outputs'\]\[\d+\] in Python"),
            ("model.kept['numbers'][0] += 1", r"changes self.kept\['numbers'\]\[0\] in Python"),
            ("model.kept['array'][0] += 1", r"changes self.kept\['array'\] in Python"),
            ("model.kept['object'].count += 1", r"changes self.kept\['object'\].count in Python"),
            ("model.encoder.net.seen = batch_idx + 1", "changes self.encoder.net.seen in Python"),
            ("loss = loss * torch.rand((), generator=model.kept['torch'])", r"changes self.kept\['torch'\] in Python"),
            ("loss = loss * float(model.kept['numpy'].random())", r"changes self.kept\['numpy'\] in Python"),
            ("loss = loss * model.kept['python'].random()", r"changes self.kept\['python'\] in Python"),
            ("model.pair = loss.detach(), 1", r"changes self.pair\[0\] in Python"),
            ("model.kept['next'] = iter([])", r"self.kept\['next'\] is an iterator"),
            ("loss = loss * (random.random() < 0.5)", "random numbers that are not generated on the GPU"),
            ("loss = loss * float(np.random.rand())", "random numbers that are not generated on the GPU"),
        ]:

            def training_step(model, batch, batch_idx, act=act):
                output = TRAINING_STEP(model, batch, batch_idx)
                scope = dict(model=model, loss=output["loss"], batch_idx=batch_idx)
                exec(act, globals(), scope)
                return {**output, "loss": scope["loss"]}

            def on_train_start(model):
                random.seed(1), np.random.seed(1)
                model.kept = {"numbers": [1, 2], "array": np.zeros(2), "object": argparse.Namespace(count=1)}
                model.kept |= {"torch": torch.Generator().manual_seed(1), "outputs": deque(), "itself": model}
                model.kept |= {"numpy": np.random.default_rng(1), "python": random.Random(1)}
                model.pair = torch.zeros(()), 1

            with self.subTest(act):
                self.assert_ordinary(words, training_step=training_step, on_train_start=on_train_start)

    def test_a_module_that_a_graph_cannot_train_is_trained_without_graphs(self):
        def scheduled(model):
            optimizer = torch.optim.Adam(model.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        for words, patches in {
            "have hooks": dict(on_train_start=lambda model: model.decoder.register_forward_hook(lambda *args: None)),
            "SGD has no option": dict(configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
            "more than a single optimizer": dict(configure_optimizers=scheduled),
            "or configure_callbacks": dict(configure_callbacks=lambda model: [pl.callbacks.Timer()]),
            "VAE overrides on_after_backward": dict(on_after_backward=lambda model: None),
        }.items():
            with self.subTest(words):
                self.assert_ordinary(words, **patches)

    def test_images_that_are_too_large_for_the_gpu_return_to_the_cpu(self):
        to, places = bmnist.BinaryImages.to, []

        def second_fails(images, device):
            places.append(str(device))
            if len(places) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return to(images, device)

        with mock.patch.object(bmnist.BinaryImages, "to", second_fails):
            self.fit()
        self.assert_no_graph("CUDA out of memory")
        self.assertEqual(places, ["cpu"] * 4)


class TestCheck(GraphTest):
    def why_not(self, *callbacks, vae=VAE, loader_options={}, **settings):  # noqa: B006 (only read)
        """Returns the note that says why no graphs are used, or an empty string."""
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        train_loader = bmnist.ImageLoader(train_loader.dataset, 40, **loader_options)
        options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
        self.enter(process_settings())
        trainer = pl.Trainer(**{**options, "enable_checkpointing": False, "callbacks": list(callbacks), **settings})
        model, notes = vae("MLP", [16], 4, 2, 1e-3), []
        cuda_graphs = graphs.cuda_graphs(trainer, model, train_loader, val_loader)
        with mock.patch.object(graphs, "warn", notes.append), cuda_graphs as loaders:
            self.assertEqual(loaders[0] is train_loader, bool(notes))
        return "".join(notes)

    def test_the_programs_own_callbacks_allow_graphs(self):
        args = complete_flags(
            argparse.Namespace(accelerator="cpu", log_dir=str(self.folder), progress_bar=True, beta=2)
        )
        # The progress bar is a callback, too.
        with mock.patch.object(trainer, "supports_progress_bar", lambda stream: True):
            callbacks = [GenerateCallback(), *train_pl.make_callbacks(args)]
            with run.Run(args, {}, train_pl.make_experiment(args), callbacks) as started:
                callbacks = started.trainer.callbacks
        self.assertEqual([graph_checks.step_hooks(callback) for callback in callbacks], [[]] * 6)
        self.assertEqual(self.why_not(pl.callbacks.EarlyStopping("val_bpd"), pl.callbacks.Timer()), "")

    def test_hooks_of_minibatches_prevent_graphs(self):
        for hook, base in itertools.product(graph_checks.STEP_HOOKS, [VAE, pl.Callback]):
            if hasattr(base, hook):
                own = type("Own", (base,), {hook: lambda *args, **kwargs: None})
                with self.subTest(hook=hook, base=base):
                    line = self.why_not(vae=own) if base is VAE else self.why_not(own())
                    self.assertIn(f"Own overrides {hook}", line)

    def test_callbacks_settings_and_loaders_that_change_the_steps_prevent_graphs(self):
        callbacks, own_checkpoints = pl.callbacks, dict(enable_checkpointing=True)
        settings = [
            *(dict(accumulate_grad_batches=2), dict(gradient_clip_val=1.0), dict(precision="bf16-true")),
            *(dict(limit_train_batches=3), dict(limit_train_batches=1), dict(overfit_batches=1), dict(max_steps=5)),
            *(dict(limit_val_batches=2), dict(val_check_interval=0.5)),
        ]
        options = [dict(drop_last=True), dict(num_workers=1), dict(collate_fn=lambda samples: samples)]
        for given, words in [
            ([callbacks.LearningRateMonitor("step"), {}], "LearningRateMonitor"),
            ([callbacks.StochasticWeightAveraging(0.01), {}], "StochasticWeightAveraging"),
            ([callbacks.GradientAccumulationScheduler({0: 1}), {}], "GradientAccumulationScheduler"),
            ([callbacks.LambdaCallback(on_train_batch_end=lambda *args: None), {}], "LambdaCallback"),
            ([callbacks.ModelCheckpoint(self.folder, every_n_train_steps=3), own_checkpoints], "ModelCheckpoint"),
            *(([setting], f"the Trainer.s ({[*setting][0]}|limit_train_batches) is") for setting in settings),
            *(([dict(loader_options=option)], "loader does more than index its images") for option in options),
        ]:
            with self.subTest(words):
                *own, flags = given
                logger = pl.loggers.CSVLogger(self.folder) if own else False
                self.assertRegex(self.why_not(*own, logger=logger, **flags), words)


class TestParts(unittest.TestCase):
    def test_changes_on_the_cpu_by_a_module_on_a_gpu_are_found(self):
        """A graph would not repeat a change of the module's tensors on the CPU, or of the CPU's random numbers."""
        model = argparse.Namespace(device=torch.device("cuda"), kept=torch.zeros(2))
        with torch.inference_mode():
            model.of_validation = torch.zeros(2)  # it has no version, which must not cause an error
        before = graph_checks.python_state(model)
        self.assertEqual([*graph_checks.describe_changes(before, graph_checks.python_state(model))], [])
        model.kept.add_(1)
        torch.rand(1)
        found = [*graph_checks.describe_changes(before, graph_checks.python_state(model))]
        self.assertEqual(found[0], "training_step uses random numbers that are not generated on the GPU")
        self.assertRegex(found[1], "changes self.kept on the CPU in Python")

    def test_every_use_of_a_forbidden_object_raises_an_error(self):
        refusal = graph_checks.Forbidden("batch_idx")
        for use in [
            *(bool, int, float, len, list, str, hash, abs, round, range, operator.index, operator.neg),
            *(lambda x: x % 2, lambda x: 2 * x, lambda x: x == 0, lambda x: x >= 3, lambda x: x // 2, lambda x: f"{x}"),
            *(lambda x: x.current_epoch, lambda x: x.bit_length(), lambda x: [1, 2][x], lambda x: x in [1]),
            *(lambda x: torch.ones(2) * x, lambda x: x + torch.ones(2), lambda x: {x: 1}, lambda x: x and 1),
        ]:
            with self.assertRaisesRegex(graph_checks.CaptureError, "^training_step uses batch_idx, which is constant"):
                use(refusal)

"""
Tests of what training in chunks takes and what it leaves to plain training, on a CPU:
`python -m unittest tests/unit/test_chunks_border.py`.
"""

import argparse
import copy
import pickle
import random
import threading
import unittest
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import bmnist
from harness import chunks, run
from objectives import CosineLearningRate
from tests.helpers import ChunksTest, load, small_loaders
from train_pl import QUANTITIES, VAE, GenerateCallback, complete_flags


class BorderTest(ChunksTest):
    def why_not(self, vae=VAE, *callbacks, change={}, **settings):  # noqa: B006 (only read)
        """Why a module is trained step by step; None where it is not."""
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        for which, function in change.items():
            function({"training": train_loader, "validation": val_loader}[which])
        options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer = pl.Trainer(**{**options, "enable_checkpointing": False, "callbacks": list(callbacks), **settings})
        with (
            mock.patch.object(chunks, "note") as note,
            chunks.fast_path(trainer, vae("MLP", [16], 4, 2, 1e-3), train_loader, val_loader) as loaders,
        ):
            self.assertEqual(loaders[0] is train_loader, bool(note.mock_calls))
        (line,) = [call.args[0] for call in note.mock_calls] or [None]
        return line


class TestTaken(BorderTest):
    def test_the_assignment(self):
        self.assertIsNone(self.why_not(VAE, GenerateCallback(), CosineLearningRate()))

    def test_every_callback_of_a_run(self):
        args = complete_flags(argparse.Namespace(accelerator="cpu", log_dir=str(self.folder), progress_bar=True))
        with mock.patch.object(run, "shows_bar", lambda args: True):
            training = run.Run(args, {}, QUANTITIES, [GenerateCallback()])
        for callback in training.trainer.callbacks:
            self.assertEqual(chunks.hooks_of_steps(callback), [], callback)
        self.assertIn(pl.callbacks.TQDMProgressBar, map(type, training.trainer.callbacks))

    def test_hooks_outside_an_epoch(self):
        class Own(VAE):
            def on_train_start(self):
                pass

            def on_train_epoch_start(self):
                self.log("epoch", 1.0)

            def on_validation_epoch_end(self):
                pass

        self.assertIsNone(self.why_not(Own, pl.callbacks.EarlyStopping("val_bpd"), pl.callbacks.Timer()))

    def test_what_it_keeps(self):
        """Random numbers, weights and data are as they were."""
        train_loader, val_loader, _ = small_loaders(argparse.Namespace(batch_size=40))
        model = VAE("MLP", [16], 4, 2, 1e-3)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
        images = train_loader.dataset.images
        with chunks.fast_path(trainer, model, train_loader, val_loader) as loaders:
            self.assertIn("training_step", vars(trainer.strategy))
            self.assertEqual((trainer.log_every_n_steps, model.automatic_optimization), (1, False))
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            with torch.random.fork_rng():
                self.assertEqual(copied.training_step((images[:4, None] / 255.0, None), 0)["loss"].shape, ())
            self.assertIs(loaders[0].dataset, train_loader.dataset)
        self.assertNotIn("training_step", vars(trainer.strategy))
        self.assertEqual((trainer.log_every_n_steps, model.automatic_optimization), (50, True))
        self.assertTrue(torch.equal(torch.get_rng_state(), states[0]))
        self.assertEqual((random.getstate(), np.random.get_state()[2]), states[1:])
        self.assertIs(train_loader.dataset.images, images)
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        self.assertEqual(model.train_sums.count_nonzero(), 0)
        self.assertIsNone(model._trainer)


class TestNotTaken(BorderTest):
    def assert_not_taken(self, words, *args, **options):
        line = self.why_not(*args, **options)
        self.assertRegex(line or "", f"^step by step: .*{words}")
        self.assertNotIn("\n", line)

    def test_hooks(self):
        for hook in chunks.STEP_HOOKS:
            for base in [VAE, pl.Callback]:
                if hasattr(base, hook):
                    own = type("Own", (base,), {hook: lambda *args, **kwargs: None})
                    with self.subTest(hook=hook, base=base):
                        args = [own] if base is VAE else [VAE, own()]
                        self.assert_not_taken(f"Own has {hook}", *args)
        self.assertLessEqual(
            {"backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "on_train_batch_end"},
            set(chunks.STEP_HOOKS),
        )

    def test_a_hook_of_the_assignment_changed(self):
        class Own(VAE):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                super().on_train_batch_end(outputs, batch, batch_idx)

        self.assert_not_taken("Own has on_train_batch_end", Own)
        with mock.patch.object(VAE, "on_train_batch_end", lambda *args: None):
            self.assert_not_taken("VAE has on_train_batch_end")

    def test_callbacks_of_lightning(self):
        for callback in [
            pl.callbacks.LearningRateMonitor("step"),
            pl.callbacks.StochasticWeightAveraging(0.01),
            pl.callbacks.GradientAccumulationScheduler({0: 1}),
            pl.callbacks.LambdaCallback(on_train_batch_end=lambda *args: None),
            pl.callbacks.ModelCheckpoint(self.folder, every_n_train_steps=3),
        ]:
            own = dict(enable_checkpointing=True) if isinstance(callback, pl.callbacks.ModelCheckpoint) else {}
            logger = pl.loggers.CSVLogger(self.folder)
            self.assert_not_taken(type(callback).__name__, VAE, callback, logger=logger, **own)

    def test_settings_of_the_trainer(self):
        for setting in [
            dict(accumulate_grad_batches=2),
            dict(gradient_clip_val=1.0),
            dict(precision="bf16-true"),
            dict(max_steps=5),
            dict(limit_train_batches=3),
            dict(limit_train_batches=1),
            dict(limit_val_batches=0),
            dict(val_check_interval=0.5),
        ]:
            (name,) = setting
            self.assert_not_taken(f"the Trainer's .*{name.removesuffix('_batches')}", VAE, **setting)

    def test_loaders(self):
        def drop_last(loader):
            vars(loader)["drop_last"] = True

        def augment(loader):
            loader.collate_fn = lambda batch: (1 - batch[0], batch[1])

        def own_iter(loader):
            loader.__class__ = type("Own", (DataLoader,), {"__iter__": lambda loader: iter([])})

        def some(loader):
            vars(loader)["sampler"] = range(10)

        for which in ["training", "validation"]:
            self.assert_not_taken(f"the {which} loader .*leaves images out", change={which: drop_last})
            self.assert_not_taken(f"the {which} loader changes the images", change={which: augment})
            self.assert_not_taken(f"the {which} loader has an __iter__", change={which: own_iter})
        self.assert_not_taken("the validation loader .*not all", change={"validation": some})

    def test_memory(self):
        with mock.patch.object(chunks, "free_memory", lambda device: 500 * 2**20):
            self.assert_not_taken(r"the GPU has 500 MiB of memory free, and images and graphs may take 384 MiB")

    def test_no_room_for_the_images(self):
        """Those that were on the GPU already come back."""
        to, places = bmnist.BinaryImages.to, []

        def second_fails(images, device):
            places.append(str(device))
            if len(places) == 3:  # the first one is the rehearsal's
                raise torch.OutOfMemoryError("CUDA out of memory")
            return to(images, device)

        with mock.patch.object(bmnist.BinaryImages, "to", second_fails):
            self.assert_not_taken("the GPU has too little memory")
        self.assertEqual(places, ["cpu"] * 5)

    def test_steps(self):
        """What a training_step may do that a graph would not follow."""
        beta = mock.Mock(value=1.0)

        def log(model, loss, batch_idx):
            model.log("loss", loss)

        def log_dict(model, loss, batch_idx):
            model.log_dict({"loss": loss})

        def epoch(model, loss, batch_idx):
            return loss * min(1.0, model.current_epoch / 10)

        def step(model, loss, batch_idx):
            return loss if model.global_step > 10 else 2 * loss

        def maximum(model, loss, batch_idx):
            return loss * model.trainer.max_epochs

        def tensorboard(model, loss, batch_idx):
            model.logger.experiment.add_scalar("loss", loss, 0)

        def every_second(model, loss, batch_idx):
            return loss if batch_idx % 2 else 2 * loss

        def printed(model, loss, batch_idx):
            print(f"{batch_idx}")

        def counts(model, loss, batch_idx):
            model.count = getattr(model, "count", 0) + 1

        def keeps(model, loss, batch_idx):
            model.last = loss.detach()

        def adds(model, loss, batch_idx):
            model.train_sums = model.train_sums + 1

        def appends(model, loss, batch_idx):
            model.outputs.append(loss.detach())

        def in_a_list(model, loss, batch_idx):
            model.kept["numbers"][0] += 1

        def in_an_array(model, loss, batch_idx):
            model.kept["array"][0] += 1

        def in_an_object(model, loss, batch_idx):
            model.kept["object"].count = 2

        def in_a_layer(model, loss, batch_idx):
            model.encoder.net.seen = "one"

        def of_a_generator(model, loss, batch_idx):
            return loss * torch.rand((), generator=model.kept["generator"])

        def drops(model, loss, batch_idx):
            return loss * (random.random() < 0.5)

        def draws(model, loss, batch_idx):
            return loss * float(np.random.rand())

        def nothing(model, loss, batch_idx):
            return {"loss": None}

        def wrong(model, loss, batch_idx):
            return loss * beta["value"]

        for act, words in [
            *((act, "uses self.trainer, as self.log") for act in [log, log_dict, epoch, step, maximum, tensorboard]),
            *((act, "uses batch_idx") for act in [every_second, printed]),
            *((act, "sets self.count anew") for act in [counts]),
            *((act, "sets self.last anew") for act in [keeps]),
            *((act, "sets self.train_sums anew") for act in [adds]),
            *((act, "sets self.outputs anew") for act in [appends]),
            *((act, "sets self.kept anew") for act in [in_a_list, in_an_array, in_an_object, of_a_generator]),
            *((act, "sets self.encoder.net.seen anew") for act in [in_a_layer]),
            *((act, "random numbers that are not the GPU's") for act in [drops, draws]),
            *((act, "Error: ") for act in [nothing, wrong]),
        ]:

            class Own(VAE):
                def __init__(self, *args):
                    super().__init__(*args)
                    self.outputs = []
                    self.kept = {"numbers": [1, 2], "array": np.zeros(2), "object": argparse.Namespace(count=1)}
                    self.kept["generator"] = torch.Generator()

                def training_step(self, batch, batch_idx, act=act):
                    loss = self(batch[0])[2]
                    result = act(self, loss, batch_idx)
                    return loss if result is None else result

            with self.subTest(act.__name__):
                self.assert_not_taken(words, Own)

    def test_modules(self):
        class Hooked(VAE):
            def __init__(self, *args):
                super().__init__(*args)
                self.encoder.register_forward_hook(lambda *args: None)

        class Manual(VAE):
            def __init__(self, *args):
                super().__init__(*args)
                self.automatic_optimization = False

        class Replaced(VAE):
            def __init__(self, *args):
                super().__init__(*args)
                self.training_step = lambda batch, batch_idx: self(batch[0])[2]

        class Scheduled(VAE):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        class Stochastic(VAE):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        class HookedWeight(VAE):
            def __init__(self, *args):
                super().__init__(*args)
                self.encoder.net[0].weight.register_hook(lambda grad: 2 * grad)

            def __deepcopy__(self, memo):  # torch leaves such hooks out of a copy
                return type(self)("MLP", [16], 4, 2, 1e-3)

        class HookedOptimizer(VAE):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                optimizer.register_step_post_hook(lambda *args: None)
                return optimizer

        class Locked(VAE):
            def __init__(self, *args):
                super().__init__(*args)
                self.lock = threading.Lock()

            def __deepcopy__(self, memo):
                return type(self)("MLP", [16], 4, 2, 1e-3)

        class WithCallbacks(VAE):
            def configure_callbacks(self):
                return [pl.callbacks.EarlyStopping("val_bpd")]

        for vae, words in [
            (Hooked, "have hooks"),
            (HookedWeight, "have hooks"),
            (HookedOptimizer, "have hooks"),
            (Locked, "self.lock holds cannot be compared"),
            (WithCallbacks, "configure_callbacks"),
            (Manual, "optimises by itself"),
            (Replaced, "training_step was replaced"),
            (Scheduled, "schedulers"),
            (Stochastic, "SGD has no option `capturable`"),
        ]:
            self.assert_not_taken(words, vae)

    def test_plain_training_follows(self):
        """To the bit, in a run that logs and counts within training_step."""

        def training_step(model, batch, batch_idx):
            model.log("in_step", float(batch_idx), on_step=False, on_epoch=True)
            L_rec, L_reg = model.losses(batch[0], reduction="mean")
            model.add_to(model.train_sums, batch[0], L_rec, L_reg)
            return L_rec + min(1.0, model.global_step / 10) * L_reg

        weights = []
        with mock.patch.object(VAE, "training_step", training_step):
            for plain, on_gpu in [(True, False), (False, False), (False, True)]:
                with mock.patch.object(chunks, "has_graphs", lambda device, on_gpu=on_gpu: on_gpu):
                    folder, printed = self.train(z_dim=4, batch_size=40, epochs=2, plain=plain)
                self.assertEqual("step by step: training_step uses" in printed, on_gpu, printed)
                weights.append(load(folder, "last")["state_dict"])
        torch.testing.assert_close(weights[1:], weights[:1] * 2, rtol=0, atol=0)

    def test_what_a_cpu_follows(self):
        """There, steps in chunks may do whatever plain ones may that does not ask the Trainer."""
        seen = []

        def training_step(model, batch, batch_idx):
            model.steps = getattr(model, "steps", 0) + 1
            output = VAE_training_step(model, batch, batch_idx)
            seen.append((batch_idx, model.steps, output["loss"].item(), random.random()))
            return output

        VAE_training_step, all_seen = VAE.training_step, []
        with (
            mock.patch.object(VAE, "training_step", training_step),
            mock.patch.object(chunks, "has_graphs", lambda device: False),
        ):
            for plain in [True, False]:
                seen.clear()
                self.train(z_dim=4, batch_size=40, epochs=2, plain=plain)
                all_seen.append(seen[-16:])  # without the rehearsal's
        self.assertEqual(*all_seen)
        self.assertEqual(all_seen[0][0][:2], (0, 1))

    def test_workers_on_a_cpu(self):
        """They are what the user asked for."""
        with mock.patch.object(chunks, "has_graphs", lambda device: False):
            loaders = small_loaders(argparse.Namespace(batch_size=40, num_workers=1))
            trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            with self.assertRaisesRegex(chunks.CaptureError, "worker processes"):
                chunks.check(trainer, VAE("MLP", [16], 4, 2, 1e-3), *loaders[:2])


if __name__ == "__main__":
    unittest.main()

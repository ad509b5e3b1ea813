"""Tests of evaluate.py: `python -m unittest tests/unit/test_evaluate.py`."""

import argparse
import contextlib
import functools
import io
import json
import math
import shutil
import sys
from unittest import mock

import numpy as np
import torch
import torch.distributions as D

import evaluate
import likelihoods
from harness.checkpoints import RUN, CheckpointError, read_checkpoint
from harness.errors import DataError, FlagError, Terminated, UserError
from pictures import explorer, latent_space
from sources.locations import data_locations
from tests.helpers import SeededTest, printed_lines, small_loaders
from train_pl import complete_flags, make_vae
from utils import log_likelihood, quadrature_log_likelihood


class TestEvaluate(SeededTest):
    """Tests of evaluations of untrained checkpoints on 200 digits, without pictures."""

    def setUp(self):
        self.load_data = mock.Mock(side_effect=functools.partial(small_loaders, sizes=(300, 100, 200)))
        self.out = self.folder / "out"
        coarse = functools.partial(quadrature_log_likelihood, step=0.2)
        self.enter(mock.patch.object(evaluate, "load_data", self.load_data))
        self.enter(mock.patch.object(likelihoods, "quadrature_log_likelihood", coarse))
        self.enter(mock.patch.object(latent_space, "save_pictures"))

    def checkpoint(self, **flags):
        """Saves a checkpoint of the run `run` after epoch 3. Returns its path and the VAE."""
        flags = {"z_dim": 3, "hidden_dims": [32], "dataset": "rendered", "data_dir": "there", **flags}
        args = complete_flags(argparse.Namespace(**flags))
        model, run = make_vae(args), self.folder / "run"
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)  # so that latents and pixels vary, as in a trained model
        run_data = {"flags": vars(args), **data_locations(vars(args), run)}
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "hparams.yaml").touch()
        path = run / "checkpoints" / "best.ckpt"
        hparams = {"hyper_parameters": dict(model.hparams)}
        torch.save({"state_dict": model.state_dict(), **hparams, "epoch": 2, RUN: run_data}, path)
        return path, model

    def evaluate(self, checkpoint, **flags):
        """Returns what evaluate returns. The printed lines are `lines`."""
        with printed_lines() as self.lines:
            return evaluate.evaluate(checkpoint, **{"iw_samples": 20, "accelerator": "cpu", **flags})

    @torch.no_grad()
    def check(self, results, model):
        """Checks the numbers of an evaluation against torch.distributions."""
        (args,), _ = self.load_data.call_args
        imgs, _ = self.load_data.side_effect(args)[2].dataset[torch.arange(200)]
        mean, log_std = model.encoder(imgs)
        posterior = D.Normal(mean, log_std.exp())
        log_probs = [D.Bernoulli(logits=model.decoder(posterior.sample())).log_prob(imgs) for _ in range(10)]
        estimates = log_likelihood(imgs, model.encoder, model.decoder, num_samples=20)
        elbos = torch.stack(log_probs).sum(dim=(2, 3, 4)) - D.kl_divergence(posterior, D.Normal(0.0, 1.0)).sum(dim=1)
        # Four standard deviations of a mean over these images, with one sample of the posterior each, and rounding.
        delta = 4 * math.sqrt(elbos.var(dim=0).mean().item() / 200) + 0.01
        self.assertAlmostEqual(results["elbo"], elbos.mean().item(), delta=delta)
        standard_error = elbos.std(dim=1).mean().item() / math.sqrt(200)
        # The tolerance is large, because a few images are outliers
        self.assertAlmostEqual(results["elbo_standard_error"] / standard_error, 1, delta=0.35)
        self.assertAlmostEqual(results["log_likelihood"], estimates.mean().item(), delta=delta)
        for nats, bpd in [("elbo", "test_bpd"), ("log_likelihood", "log_likelihood_bpd")]:
            self.assertAlmostEqual(results[bpd] * -784 * math.log(2), results[nats], places=3)
        self.assertEqual(results["active_units"], (mean.var(dim=0) > 0.01).sum().item())

    def test_numbers_agree_with_torch_distributions(self):
        for flags in [{}, {"model": "CNN", "num_filters": 2}, {"binarization": "stochastic"}]:
            with self.subTest(flags):
                checkpoint, model = self.checkpoint(**flags)
                results, _ = self.evaluate(checkpoint)
                self.check(results, model)
                expected = {"epoch": 3, "z_dim": 3, "dataset": "rendered", "test_images": 200, "iw_samples": 20}
                self.assertEqual({**results, **expected}, results)

    def test_an_evaluation_is_reproducible_and_restores_the_state_of_the_process(self):
        """It is reproducible for any earlier random numbers. The state is restored even if the evaluation fails."""
        checkpoint, _ = self.checkpoint()
        state, deterministic = torch.get_rng_state(), torch.backends.cudnn.deterministic
        with mock.patch.object(evaluate, "read_checkpoint", wraps=read_checkpoint) as read:
            results, folder = self.evaluate(str(checkpoint))
        self.assertEqual((read.call_count, folder), (1, self.folder / "run" / "evaluation"))
        self.assertEqual(json.loads((folder / "evaluation.json").read_text()), results)
        with mock.patch.object(evaluate, "prepare_folder", side_effect=KeyError), self.assertRaises(KeyError):
            self.evaluate(checkpoint)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertEqual(torch.backends.cudnn.deterministic, deterministic)
        torch.rand(1)
        again, _ = self.evaluate(checkpoint, out=self.out, iw_samples=torch.tensor(20))
        self.assertEqual({**again, "seconds": 0}, {**results, "seconds": 0})

    def test_quadrature_with_2_latents_agrees_with_the_importance_weighted_likelihood(self):
        results, _ = self.evaluate(self.checkpoint(z_dim=2)[0], iw_samples=200)
        self.assertAlmostEqual(results["log_likelihood"], results["log_likelihood_by_quadrature"], delta=0.1)
        self.assertGreater(results["log_likelihood"], results["elbo"] + 0.5)

    def test_a_terminal_shows_the_mean_so_far_and_a_progress_bar_if_the_flag_is_given(self):
        self.enter(mock.patch.object(likelihoods, "tqdm", functools.partial(likelihoods.tqdm, mininterval=0)))
        for progress_bar in [False, True]:
            with contextlib.redirect_stderr(io.StringIO()) as terminal:
                terminal.isatty = lambda: True
                self.evaluate(self.checkpoint()[0], progress_bar=progress_bar)
            self.assertRegex(terminal.getvalue(), r"log p\(x\).* -\d+\.\d\d \+- \d+\.\d\d nats")
            self.assertEqual("2/2" in terminal.getvalue(), progress_bar)
            self.assertNotIn("%", "".join(self.lines))

    def test_the_file_of_latents_contains_the_numbers_of_each_image(self):
        checkpoint, model = self.checkpoint()
        for split, number in [("train", 300), ("validation", 100), ("test", 200)]:
            with self.subTest(split):
                path = self.folder / "new" / f"{split}.npz"
                results, folder = self.evaluate(checkpoint, latents=path, split=split, iw_samples=2)
                dataset = {"train": 0, "validation": 1, "test": 2}[split]
                dataset = small_loaders(self.load_data.call_args.args[0], sizes=(300, 100, 200))[dataset].dataset
                imgs, labels = dataset[torch.arange(number)]
                arrays = dict(np.load(path))
                floats = {name for name, array in arrays.items() if array.dtype == np.float32}
                self.assertEqual(floats, {"mean", "log_std", "elbo", "log_likelihood"})
                with torch.no_grad():
                    mean, log_std = model.encoder(imgs)
                np.testing.assert_allclose(arrays["mean"], mean, atol=1e-5)
                np.testing.assert_allclose(arrays["log_std"], log_std, atol=1e-5)
                np.testing.assert_array_equal(arrays["label"], labels)
                for name in ["elbo", "log_likelihood"]:
                    self.assertAlmostEqual(float(arrays[name].mean()), results[name], places=3)
                self.assertEqual((results[f"{split}_images"], f"{split}_bpd" in results), (number, True))
                self.assertEqual(folder.name, "evaluation" if split == "test" else f"evaluation_{split}")
                self.assertEqual((folder / "explorer.html").exists(), split == "test")

    def test_latents_are_kept_if_the_evaluation_is_interrupted_and_other_files_are_not_overwritten(self):
        checkpoint, _ = self.checkpoint()
        path = self.folder / "latents.npz"
        with mock.patch.object(evaluate, "log_likelihoods", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.evaluate, checkpoint, latents=path)
        self.assertEqual(sorted(np.load(path)), ["elbo", "label", "log_std", "mean"])
        self.evaluate(checkpoint, latents=path)
        content = path.read_bytes()
        with mock.patch.object(evaluate, "log_likelihoods", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.evaluate, checkpoint, latents=path)
        self.assertEqual(path.read_bytes(), content)
        np.savez(self.folder / "images.npz", train_images=1)
        (self.folder / "text.npz").write_text("mine")
        for name, words in [
            ("images.npz", "--latents .*images.npz is not a file of latents"),
            ("text.npz", "--latents .*text.npz is not a file of latents"),
            ("latents.csv", "--latents must be the path of an .npz file, got .*latents.csv"),
            ("text.npz/latents.npz", "--latents .*text.npz/latents.npz is not a file of latents"),
            (300 * "x" + ".npz", "--latents .* is not a file of latents"),
        ]:
            with self.subTest(name), self.assertRaisesRegex(UserError, words):
                self.evaluate(checkpoint, latents=self.folder / name)

    def test_latents_of_another_model_are_replaced_at_once_and_another_split_keeps_the_pictures_of_the_test_set(self):
        path, out = self.folder / "latents.npz", self.folder / "out"
        self.evaluate(self.checkpoint()[0], latents=path, out=out)
        page, means = (out / "explorer.html").read_bytes(), np.load(path)["mean"]
        other, _ = self.checkpoint(seed=7)
        with contextlib.redirect_stderr(io.StringIO()) as notes:
            self.evaluate(other, split="validation", out=out)
        self.assertIn(" is replaced", notes.getvalue())
        self.assertEqual((out / "explorer.html").read_bytes(), page)
        with mock.patch.object(evaluate, "log_likelihoods", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.evaluate, other, latents=path)
        self.assertNotIn("log_likelihood", np.load(path))
        self.assertFalse(np.array_equal(np.load(path)["mean"], means))

    def test_images_without_labels_have_latents_without_labels(self):
        dataset = small_loaders(argparse.Namespace(batch_size=20))[2].dataset
        dataset.labels = torch.full_like(dataset.labels, -1)
        self.load_data.side_effect = lambda *args, **options: [None, None, argparse.Namespace(dataset=dataset)]
        self.evaluate(self.checkpoint()[0], latents=self.folder / "latents.npz")
        self.assertNotIn("label", np.load(self.folder / "latents.npz"))

    def test_another_checkpoint_of_a_run_keeps_the_evaluation_of_the_first_one(self):
        best, _ = self.checkpoint()
        last = shutil.copy(best, best.with_name("last.ckpt"))
        _, folder = self.evaluate(best)
        content = (folder / "evaluation.json").read_bytes()
        self.assertEqual(self.evaluate(last)[1].name, "evaluation_last")
        self.assertEqual((folder / "evaluation.json").read_bytes(), content)
        self.assertEqual(self.evaluate(best)[1].name, "evaluation")
        with contextlib.redirect_stderr(io.StringIO()) as notes:
            self.evaluate(last, out=folder)
            self.evaluate(last, out=folder, dataset="mnist")
            self.evaluate(last, out=folder, dataset="mnist")
        former = [f"{best} on rendered", f"{last} on rendered"]
        expected = [f"note: in {folder}, the evaluation of {name} is replaced" for name in former]
        self.assertEqual(notes.getvalue().splitlines(), expected)

    def test_several_checkpoints_make_one_table_and_a_failure_does_not_stop_the_others(self):
        best, _ = self.checkpoint()
        last, gone = shutil.copy(best, best.with_name("last.ckpt")), best.with_name("gone.ckpt")
        flags = ["--iw_samples", "2", "--accelerator", "cpu"]
        for checkpoints, code in [
            ([best, last], None),
            ([best, gone, last], "evaluate.py: error: not evaluated .see .*: .*"),
        ]:
            argv = mock.patch.object(sys, "argv", ["evaluate.py", *map(str, checkpoints), *flags])
            ends = contextlib.nullcontext() if code is None else self.assertRaisesRegex(SystemExit, code)
            with argv, printed_lines() as lines, contextlib.redirect_stderr(io.StringIO()) as errors, ends:
                evaluate.main()
            self.assertEqual(f"error: {gone} cannot be read" in errors.getvalue(), code is not None)
            results = json.loads((self.folder / "run" / "evaluation" / "evaluation.json").read_text())
            cell = rf"rendered  {results['test_bpd']:.4f} \+- 0\.\d{{4}}  {results['elbo']:.2f} \+- "
            self.assertRegex(
                lines[-3], "^checkpoint  +data      test bpd  +ELBO, nats  +log p.x., nats  +log p.x., bpd "
            )
            self.assertRegex(lines[-2], rf"^{best}  {cell}.*  \d of 3$")
            self.assertRegex(lines[-1], rf"^{last}  {cell}")
        for flag in ["--out", "--latents"]:
            argv = mock.patch.object(sys, "argv", ["evaluate.py", str(best), str(last), flag, "x.npz"])
            with argv, contextlib.redirect_stderr(io.StringIO()) as errors, self.assertRaises(SystemExit) as end:
                evaluate.main()
            self.assertEqual(end.exception.code, 2)
            self.assertIn(f"{flag} is valid only for a single checkpoint", errors.getvalue())

    def test_an_evaluation_does_not_need_the_checkpoint_that_the_training_started_from(self):
        path, _ = self.checkpoint()
        checkpoint = read_checkpoint(path)
        checkpoint[RUN]["flags"].update(init_from="/gone.ckpt", init_from_sha256="0")
        torch.save(checkpoint, path)
        self.assertEqual(self.evaluate(path)[0]["epoch"], 3)

    def test_interrupted_pictures_are_listed_as_missing(self):
        checkpoint, _ = self.checkpoint()
        with mock.patch.object(latent_space, "save_pictures", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.evaluate, checkpoint)
        results = json.loads((self.folder / "run" / "evaluation" / "evaluation.json").read_text())
        self.assertEqual(results["missing"], ["pictures", "log_likelihood"])
        self.assertTrue(self.lines[-1].startswith("note: interrupted before pictures and log_likelihood; "))

    def test_fast_results_are_computed_first_and_kept_if_slow_results_are_interrupted(self):
        checkpoint, _ = self.checkpoint(z_dim=2)
        complete, folder = self.evaluate(checkpoint)
        self.assertRegex(
            self.lines[0], "^MLP, 2 latents, after 3 epochs, .*: log p.x. with 20 samples takes about .*(s|min)$"
        )
        names = [line.split("  ")[0] for line in self.lines[1:]]
        self.assertEqual(names[:3] + names[-4:-1], ["test bpd", "ELBO", "active units", *["log p(x)"] * 3])
        slow = ["log_likelihood", "log_likelihood_by_quadrature"]
        for function, number, end in [
            ("log_likelihood", 0, KeyboardInterrupt),
            (f"quadrature_{slow[0]}", 1, Terminated),
        ]:
            interrupted = mock.patch.object(likelihoods, function, side_effect=end)
            still = mock.patch.object(evaluate, "estimate_seconds", return_value=3000.0)
            shutil.rmtree(folder)
            with self.subTest(function), interrupted, still, self.assertRaises(end):
                self.evaluate(checkpoint)
            self.assertRegex(self.lines[0], "takes about 50 min$")
            self.assertEqual(
                self.lines[-1].partition(";")[0], f"note: interrupted before {' and '.join(slow[number:])}"
            )
            left = json.loads((folder / "evaluation.json").read_text())
            self.assertEqual(left["missing"], slow[number:])
            expected = {name for name in complete if not name.startswith(slow[number:][0])} | {"missing"}
            self.assertTrue(expected <= left.keys() | {"log_likelihood_by_quadrature"}, expected - left.keys())
            self.assertEqual({**complete, **left, "seconds": 0, "missing": 0}, {**complete, "seconds": 0, "missing": 0})
            self.assertTrue((folder / "explorer.html").exists())
        again, _ = self.evaluate(checkpoint)
        self.assertEqual({**again, "seconds": 0}, {**complete, "seconds": 0})
        interrupted = mock.patch.object(evaluate, "log_likelihoods", side_effect=KeyboardInterrupt)
        exact = mock.patch.object(evaluate, "quadrature_log_likelihoods", side_effect=KeyboardInterrupt)
        still = mock.patch.object(evaluate, "estimate_seconds", return_value=0.0)
        for interrupt in [interrupted, exact]:  # the complete evaluation of the same weights is kept
            with interrupt, still, self.assertRaises(KeyboardInterrupt):
                self.evaluate(checkpoint, iw_samples=10)
            self.assertEqual(json.loads((folder / "evaluation.json").read_text()), again)

    def test_the_mean_so_far_is_printed_after_every_tenth_of_the_images(self):
        with mock.patch.object(likelihoods, "BATCH_SIZE", 10):
            self.evaluate(self.checkpoint()[0])
        shown = [line for line in self.lines if "%" in line]
        self.assertEqual([line.split()[2] for line in shown], [f"{number}0%" for number in range(1, 10)])
        self.assertRegex(shown[0], r"^log p\(x\)   10%  -\d+\.\d\d \+- \d+\.\d\d nats$")

    def assert_refused_at_once(self, words, out):
        """Checks that an evaluation with this folder is an error before anything is computed."""
        computing = mock.patch.object(evaluate, "posteriors", side_effect=AssertionError("this takes minutes"))
        with computing, self.assertRaisesRegex(UserError, words):
            self.evaluate(self.checkpoint()[0], out=out)

    def test_files_that_evaluate_did_not_write_are_not_overwritten(self):
        for name, content in [
            ("explorer.html", "mine"),
            ("evaluation.json", '{"score": 3}'),
            ("latent_space.pdf/more", "mine"),
            ("evaluation.json/more", "mine"),
        ]:
            with self.subTest(name):
                (self.out / name).parent.mkdir(parents=True)
                (self.out / name).write_text(content)
                self.assert_refused_at_once(f"out contains {name.split('/')[0]}, .*not overwrite: .*--out", self.out)
                self.assertEqual([path.read_text() for path in self.out.rglob("*") if path.is_file()], [content])
                shutil.rmtree(self.out)

    def test_a_folder_that_cannot_be_written_is_refused_at_once(self):
        words = "cannot write to .* .*: choose another folder with --out"
        (self.folder / "file").touch()
        for out in ["file", "file/x"]:
            self.assert_refused_at_once(words, self.folder / out)
        with mock.patch.object(evaluate.tempfile, "TemporaryFile", side_effect=OSError(30, "Read-only")):
            self.assert_refused_at_once(words, self.out)

    def test_other_files_may_be_in_the_folder(self):
        """Files of an earlier evaluation are replaced, even if it was interrupted."""
        checkpoint, _ = self.checkpoint()
        (self.out / "empty").mkdir(parents=True)
        (self.out / "train.log").write_text("mine")
        self.evaluate(checkpoint, out=self.out)
        text = (self.out / "evaluation.json").read_text()
        for left in [text, "\0" * 100, text[:30]]:
            (self.out / "evaluation.json").write_text(left)
            self.evaluate(checkpoint, out=self.out)
            names = {path.name for path in self.out.iterdir()}
            self.assertEqual(names, {"empty", "train.log", "evaluation.json", "explorer.html"})

    def test_the_explorer_shows_the_facts_of_the_evaluation(self):
        """The explorer does not show paths of this machine. If there is no new explorer, the old one is removed."""
        checkpoint, _ = self.checkpoint()
        page = self.folder / "run" / "evaluation" / "explorer.html"
        with mock.patch.object(evaluate, "write_explorer", wraps=explorer.write_explorer) as write:
            results, _ = self.evaluate(checkpoint)
        facts, expected = write.call_args.args[-1], {**results, "run": "run", "legend": "digit"}
        self.assertEqual([facts.get(name) for name in explorer.FACTS], [expected[name] for name in explorer.FACTS])
        self.assertNotIn(str(self.folder), page.read_text())
        with mock.patch.object(explorer, "MAX_WEIGHTS", 9), contextlib.redirect_stderr(io.StringIO()) as error:
            self.evaluate(checkpoint)
        self.assertRegex(
            error.getvalue(),
            r"^warning: writing .*explorer.html failed .* \(the networks have .* at most 9 are possible\)\n$",
        )
        self.assertFalse(page.exists())
        page.touch()
        self.evaluate(checkpoint, no_explorer=True)
        self.assertFalse(page.exists())

    def test_the_data_set_is_that_of_the_training_unless_flags_replace_it(self):
        checkpoint, _ = self.checkpoint(binarization="stochastic")
        for flags, expected in [
            (dict(), ("rendered", "there", False)),
            (dict(dataset="mnist", data_dir="here"), ("mnist", "here", True)),
        ]:
            with contextlib.redirect_stderr(io.StringIO()):  # the second evaluation replaces the first one
                self.evaluate(checkpoint, **flags)
            (args,), options = self.load_data.call_args
            self.assertEqual((args.dataset, args.data_dir, options["download"]), expected)
            self.assertEqual(args.binarization, "stochastic")
        self.load_data.side_effect = DataError("MNIST is not complete")
        with self.assertRaisesRegex(
            UserError, r"complete \(if the data was moved, give its directory with --data_dir\)$"
        ):
            self.evaluate(checkpoint)
        with self.assertRaisesRegex(UserError, "complete$"):
            self.evaluate(checkpoint, data_dir="here")

    def test_invalid_flags_in_a_checkpoint_are_a_one_line_error(self):
        checkpoint, _ = self.checkpoint()
        saved = torch.load(checkpoint, weights_only=True)
        for flags in ["mnist", {"dataset": "x"}, {"batch_size": "x"}, {"dataset_sha256": "0"}]:
            with self.subTest(flags):
                saved[RUN]["flags"] = flags
                torch.save(saved, checkpoint)
                with self.assertRaisesRegex(CheckpointError, "^.*best.ckpt contains invalid flags .*$"):
                    self.evaluate(checkpoint)

    def test_a_checkpoint_without_flags_needs_a_dataset(self):
        """ModelCheckpoint(save_weights_only=True) writes such files. A bare state_dict needs the model's flags, too."""
        checkpoint, _ = self.checkpoint(binarization="stochastic")
        saved = torch.load(checkpoint, weights_only=True)
        for parts in [["state_dict", "hyper_parameters", "epoch"], ["state_dict", "hyper_parameters"]]:
            torch.save({part: saved[part] for part in parts}, checkpoint)
            with self.assertRaisesRegex(
                FlagError, "best.ckpt does not contain the name of its training data: give --dataset"
            ):
                self.evaluate(checkpoint)
            results, _ = self.evaluate(checkpoint, dataset="rendered")
            expected = ("threshold", 3 if "epoch" in parts else None)
            self.assertEqual((results["binarization"], results["epoch"]), expected)
            self.assertIn(f"after {results['epoch'] or 'an unknown number of'} epoch", self.lines[0])
        torch.save(saved["state_dict"], checkpoint)
        with self.assertRaisesRegex(
            CheckpointError, "size mismatch .*: give the --model, --z_dim, .* it was trained with"
        ):
            self.evaluate(checkpoint, dataset="rendered")
        again, _ = self.evaluate(checkpoint, dataset="rendered", z_dim=3, hidden_dims=[32])
        self.assertEqual(again["test_bpd"], results["test_bpd"])

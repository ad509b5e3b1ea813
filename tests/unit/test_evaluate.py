"""Tests of evaluate.py: `python -m unittest tests/unit/test_evaluate.py`."""

import contextlib
import errno
import functools
import io
import json
import math
import shutil
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.distributions as D
from harness.program import FlagError, UserError
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train_pl
from harness.checkpoints import CheckpointError
from tests.helpers import NamedRunTest, printed_lines, results, small_loaders
from train_pl import VAE
from utils import log_likelihood, quadrature_log_likelihood

SIZES = 300, 100, 200  # of training, validation and test set
PICTURES = {"reconstructions", "interpolations", "traversals", "samples", "sample_means", "latent_space"}


class EvaluateTest(NamedRunTest):
    """A test that evaluates checkpoints of few digits. What it would draw is kept in `drawn`, by name."""

    draws_pictures = False

    def setUp(self):
        super().setUp()
        self.drawn = {}
        self.load_data = mock.Mock(side_effect=functools.partial(small_loaders, sizes=SIZES))
        quadrature = functools.partial(quadrature_log_likelihood, step=0.2)
        patches = [
            mock.patch.object(train_pl, "load_data", self.load_data),
            mock.patch.multiple(evaluate, load_data=self.load_data, quadrature_log_likelihood=quadrature),
        ]
        if not self.draws_pictures:
            patches.append(mock.patch.multiple(evaluate.figures, image_table=self.draw, latent_space=self.draw))
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def draw(self, path, *args, **labels):
        """In the place of a function that draws a figure."""
        self.drawn[Path(path).name] = (*args, labels)

    def trained(self, **flags):
        """A trained model's checkpoint."""
        self.train(**{**dict(hidden_dims=[32], epochs=1, lr=0.01, dataset="rendered"), **flags})
        return self.folder / flags.get("run_name", "run") / "checkpoints" / "best.ckpt"

    def evaluate(self, checkpoint, **choices):
        """What evaluate returns."""
        return evaluate.evaluate(checkpoint, **{"iw_samples": 20, "accelerator": "cpu", **choices})

    def digits(self):
        """Images of the test set that was asked for last, and their labels."""
        return self.load_data.side_effect(*self.load_data.call_args.args)[2].dataset[torch.arange(200)]


class TestNumbers(EvaluateTest):
    def check(self, **flags):
        """Evaluates a model that was trained with these flags, and computes the numbers in another way."""
        checkpoint = self.trained(epochs=3, **flags)
        state = torch.get_rng_state()
        left, folder = self.evaluate(checkpoint)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertEqual(folder, checkpoint.parent.parent / "evaluation")
        self.assertEqual(json.loads((folder / "evaluation.json").read_text()), left)
        torch.rand(1)  # whatever has been drawn before
        again, _ = self.evaluate(checkpoint, out=self.folder / "again", iw_samples=torch.tensor(20))
        for run in [left, again]:
            del run["seconds"]
        self.assertEqual(left, again)

        model = VAE.load_from_checkpoint(checkpoint)
        imgs, _ = self.digits()
        with torch.no_grad():
            mean, log_std = model.encoder(imgs)
            posterior = D.Normal(mean, log_std.exp())
            draws = [D.Bernoulli(logits=model.decoder(posterior.sample())).log_prob(imgs) for _ in range(10)]
            estimates = log_likelihood(imgs, model.encoder, model.decoder, num_samples=20)
        elbos = torch.stack(draws).sum(dim=(2, 3, 4)) - D.kl_divergence(posterior, D.Normal(0.0, 1.0)).sum(dim=1)
        # Four standard deviations of a mean over these images, with one sample of the posterior each, and rounding.
        delta = 4 * math.sqrt(elbos.var(dim=0).mean().item() / 200) + 0.01
        self.assertAlmostEqual(left["elbo"], elbos.mean().item(), delta=delta)
        standard_error = elbos[0].std().item() / math.sqrt(200)
        self.assertAlmostEqual(left["elbo_standard_error"] / standard_error, 1, delta=0.05)
        self.assertAlmostEqual(left["test_bpd"] * -784 * math.log(2), left["elbo"], places=3)
        trained_bpd = results(checkpoint.parent.parent)["test_bpd"]
        self.assertAlmostEqual(left["elbo"], trained_bpd * -784 * math.log(2), delta=delta)
        self.assertAlmostEqual(left["log_likelihood"], estimates.mean().item(), delta=delta)
        self.assertAlmostEqual(left["log_likelihood_bpd"] * -784 * math.log(2), left["log_likelihood"], places=3)
        self.assertEqual(left["active_units"], (mean.var(dim=0) > 0.01).sum().item())
        provenance = {"epoch": 3, "z_dim": 3, "dataset": "rendered", "test_images": 200, "iw_samples": 20}
        self.assertEqual({name: left[name] for name in provenance}, provenance)

    def test_mlp(self):
        self.check()

    def test_cnn(self):
        self.check(model="CNN", num_filters=2)

    def test_drawn_images(self):
        self.check(binarization="stochastic")

    def test_two_latents(self):
        left, _ = self.evaluate(self.trained(z_dim=2, lr=1e-3), iw_samples=100)
        self.assertAlmostEqual(left["log_likelihood"], left["log_likelihood_by_quadrature"], delta=0.1)
        self.assertGreater(left["log_likelihood"], left["elbo"] + 0.5)

    def test_no_active_unit(self):
        checkpoint = self.trained()
        saved = torch.load(checkpoint, weights_only=True)
        for weight in list(saved["state_dict"])[2:4]:  # the encoder's last layer
            saved["state_dict"][weight].zero_()
        torch.save(saved, checkpoint)
        left, _ = self.evaluate(checkpoint)
        self.assertEqual(left["active_units"], 0)
        self.assertEqual(set(self.drawn), PICTURES - {"traversals"})


class TestPictures(EvaluateTest):
    draws_pictures = True

    def test_pictures(self):
        savefig = Figure.savefig

        def save_small(figure, file, dpi, **options):  # which takes less time
            savefig(figure, file, dpi=75, **options)

        for z_dim, names in [(1, PICTURES), (2, PICTURES | {"manifold"}), (5, PICTURES)]:
            checkpoint = self.trained(z_dim=z_dim, run_name=f"run {z_dim}")
            with mock.patch.object(Figure, "savefig", save_small):
                _, folder = self.evaluate(checkpoint, iw_samples=1)
            self.assertLessEqual(names, set(evaluate.PICTURES))
            files = {f"{name}.{kind}" for name in names for kind in ["png", "pdf"]}
            self.assertEqual({path.name for path in folder.iterdir()}, files | {"evaluation.json", "explorer.html"})
            for name in names:
                picture = imread(folder / f"{name}.png")
                self.assertTrue(min(picture.shape[:2]) > 50 and picture[..., :3].std() > 0.05, name)  # not blank
                self.assertEqual((folder / f"{name}.pdf").read_bytes()[:5], b"%PDF-")


class TestFailures(EvaluateTest):
    """No picture costs the numbers or another picture, and nothing of others is touched."""

    draws_pictures = True

    def evaluate(self, checkpoint, **choices):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            _, folder = super().evaluate(checkpoint, **{"iw_samples": 1, **choices})
        return {path.name for path in folder.iterdir()}, error.getvalue()

    def save(self, figure, path, **options):
        """In the place of Figure.savefig: fails where `failing` is in the path."""
        self.assertTrue((Path(path).parent / "evaluation.json").exists())
        if self.failing in str(path):
            raise self.error
        Path(path).touch()

    def test_pictures_that_fail(self):
        checkpoint = self.trained()
        pictures = {f"{name}.{kind}" for name in PICTURES for kind in ["png", "pdf"]}
        all_files = pictures | {"evaluation.json", "explorer.html"}
        with mock.patch.object(Figure, "savefig", autospec=True, side_effect=self.save):
            self.failing = "no such"
            self.assertEqual(self.evaluate(checkpoint), (all_files, ""))
            for self.failing, self.error in [
                ("samples.png", ValueError("no such\nfont")),
                ("samples.png", FileNotFoundError(2, "No such font")),
                ("samples.png", PermissionError(13, "Permission denied")),
            ]:
                files, error = self.evaluate(checkpoint)
                self.assertEqual(files, all_files - {"samples.png", "samples.pdf"})  # nor that of an earlier evaluation
                self.assertRegex(error, r"^drawing .*/samples failed, the rest goes on \(.*\)\n$")
            self.failing, self.error = "samples.png", OSError(errno.ENOSPC, "No space left on device")
            with self.assertRaisesRegex(UserError, "cannot write .*samples.png .No space left.*; make room"):
                self.evaluate(checkpoint, out=self.folder / "full")
            self.assertIn("test_bpd", json.loads((self.folder / "full" / "evaluation.json").read_text()))

    def test_files_of_others(self):
        checkpoint = self.trained()
        out = self.folder / "out"
        for name, content in [
            ("samples.png", "mine"),
            ("evaluation.json", '{"score": 3}'),
            ("evaluation.json", "[]"),
            ("latent_space.pdf/more", "mine"),
            ("evaluation.json/more", "mine"),
        ]:
            (out / name).parent.mkdir(parents=True)
            (out / name).write_text(content)
            with (
                mock.patch.object(evaluate, "likelihoods", side_effect=AssertionError("computed first")),
                self.assertRaisesRegex(UserError, f"out holds {name.split('/')[0]}, .*not overwrite: choose .*--out"),
            ):
                self.evaluate(checkpoint, out=out)
            self.assertEqual([path.read_text() for path in out.rglob("*") if path.is_file()], [content])
            shutil.rmtree(out)

    def test_folders_that_can_be_used(self):
        """With a log, a hidden file and an empty folder in it; with what an earlier evaluation left, even if cut."""
        checkpoint = self.trained()
        out = self.folder / "out"
        (out / "empty").mkdir(parents=True)
        others = {"empty", ".hidden", "train.log"}
        for name in others - {"empty"}:
            (out / name).write_text("mine")
        with mock.patch.object(Figure, "savefig", autospec=True, side_effect=lambda _, path, **__: Path(path).touch()):
            expected, _ = self.evaluate(checkpoint, out=out)
            self.assertGreater(expected, others)
            text = (out / "evaluation.json").read_text()
            for left in [text, "", "\0" * 100, text[:30]]:
                (out / "evaluation.json").write_text(left)
                self.assertEqual(self.evaluate(checkpoint, out=out), (expected, ""))

    def test_folder_that_cannot_be_written(self):
        """It is known before minutes of computing."""
        checkpoint = self.trained()
        (self.folder / "file").touch()
        with mock.patch.object(evaluate, "likelihoods", side_effect=AssertionError("computed first")):
            for out in ["file", "file/out"]:
                with self.assertRaisesRegex(UserError, "cannot write to .*file.* .*: choose another folder with --out"):
                    self.evaluate(checkpoint, out=self.folder / out)
            with (
                mock.patch.object(evaluate.tempfile, "TemporaryFile", side_effect=OSError(30, "Read-only")),
                self.assertRaisesRegex(UserError, "cannot write to .*out .Read-only.: choose another folder"),
            ):
                self.evaluate(checkpoint, out=self.folder / "out")


class NoDoubles(TorchDispatchMode):
    """Makes the device `meta` refuse double precision, as a Mac's GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value) and value.device.type != "cpu" and value.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return result


class TestDevice(EvaluateTest):
    def test_no_double_precision_on_a_macs_gpu(self):
        with NoDoubles(), self.assertRaises(TypeError):
            torch.zeros(1, device="meta").double()
        model = VAE("MLP", [16], 32, 2, 1e-3).to("meta")
        test_set = small_loaders(self.namespace(), sizes=SIZES)[2].dataset
        cpu = torch.Tensor.cpu

        def from_meta(tensor):
            return torch.rand(tensor.shape) if tensor.is_meta else cpu(tensor)

        with NoDoubles(), torch.no_grad(), mock.patch.object(torch.Tensor, "cpu", from_meta):
            results, means = evaluate.likelihoods(model, test_set, 2, progress_bar=False)
            evaluate.pictures(self.folder, model, *test_set[torch.arange(200)], means)
        self.assertIn("log_likelihood_by_quadrature", results)
        self.assertLessEqual({"manifold", "latent_space"}, self.drawn.keys())


class TestWhatPicturesShow(EvaluateTest):
    def setUp(self):
        super().setUp()
        self.draw_pictures()

    def draw_pictures(self):
        """Of a model that nobody trained."""
        self.model = VAE("MLP", [32], 32, 3, 1e-3)
        self.imgs, self.labels = small_loaders(self.namespace(), sizes=SIZES)[2].dataset[torch.arange(200)]
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.mul_(4)  # so that latents and pixels vary, as in a trained model
            self.model.encoder.net[-1].weight[1] = 0  # the second latent of three knows nothing
            self.means, _ = self.model.encoder(self.imgs)
            evaluate.pictures(self.folder, self.model, self.imgs, self.labels, self.means)

    @torch.no_grad()
    def decode(self, z):
        """Means of the pixels [...,28,28] of latents."""
        return torch.sigmoid(self.model.decoder(z)).squeeze(-3)

    def pick(self, digit, number):
        """Index of the test image of a digit that is the first one, if the number is 0."""
        return (self.labels == digit).nonzero()[number, 0]

    def test_reconstructions(self):
        """Three images of each digit, each above its reconstruction."""
        images, _ = self.drawn["reconstructions"]
        self.assertEqual(images.shape, (6, 10, 28, 28))
        for row in [0, 2, 4]:
            for digit in range(10):
                index = self.pick(digit, row // 2)
                self.assertTrue(torch.equal(images[row, digit], self.imgs[index, 0]))
                torch.testing.assert_close(images[row + 1, digit], self.decode(self.means[index]))

    def test_interpolations(self):
        """From the first image of a digit to the second one of the next digit."""
        images, _ = self.drawn["interpolations"]
        ends = torch.stack([self.pick(3, 0), self.pick(4, 1)])
        torch.testing.assert_close(images[3, [0, -1]], self.imgs[ends, 0])
        torch.testing.assert_close(images[3, [1, -2]], self.decode(self.means[ends]))
        torch.testing.assert_close(images[3, 6], self.decode(self.means[ends].mean(dim=0)))

    def test_traversals(self):
        """Of the active units, the one that varies most first."""
        images, labels = self.drawn["traversals"]
        order = ["z0", "z2"] if self.means[:, 0].var() > self.means[:, 2].var() else ["z2", "z0"]
        self.assertEqual((images.shape[:2], labels["rows"]), ((2, 13), order))
        z = self.means[0].clone()
        z[2] = 1.5
        row, column = labels["rows"].index("z2"), labels["columns"].index("1.5")
        torch.testing.assert_close(images[row, column], self.decode(z))

    def test_latent_space(self):
        """On the first two principal components."""
        points, _, names, *_ = self.drawn["latent_space"]
        centred = self.means - self.means.mean(dim=0)
        _, _, v = torch.linalg.svd(centred)
        torch.testing.assert_close(points.abs(), (centred @ v[:2].T).abs(), atol=1e-4, rtol=1e-4)
        self.assertRegex(names[0], r"^first principal component \(\d+% of the variance\)")


class TestChoices(EvaluateTest):
    def test_what_it_was_trained_on(self):
        checkpoint = self.trained(binarization="stochastic", data_dir="there")
        for choices, expected in [
            (dict(), ("rendered", "there", False)),
            (dict(dataset="mnist", data_dir="here"), ("mnist", "here", True)),
        ]:
            self.evaluate(checkpoint, **choices)
            (flags,), options = self.load_data.call_args
            self.assertEqual((flags.dataset, flags.data_dir, options["download"]), expected)
            self.assertEqual(flags.binarization, "stochastic")

    def test_older_and_moved_checkpoints(self):
        checkpoint = self.trained()
        saved = torch.load(checkpoint, weights_only=True)
        moved = self.folder / "model.ckpt"
        shutil.copy(checkpoint, moved)
        self.assertEqual(self.evaluate(moved)[1], self.folder / "evaluation")
        saved["callbacks"]["EpochReport"] = saved.pop("run")  # as the old version kept it
        torch.save(saved, moved)
        self.assertEqual(self.evaluate(moved)[0]["dataset"], "rendered")
        del saved["callbacks"]["EpochReport"]["flags"]
        torch.save(saved, moved)
        with self.assertRaisesRegex(FlagError, "model.ckpt does not say .* --dataset"):
            self.evaluate(moved)
        self.assertEqual(self.evaluate(moved, dataset="rendered")[0]["dataset"], "rendered")
        for flags in ["mnist", {"dataset": "faces"}, {"batch_size": "many"}, {"hidden_dims": None}]:
            saved["callbacks"]["EpochReport"]["flags"] = flags
            torch.save(saved, moved)
            with self.assertRaisesRegex(CheckpointError, "model.ckpt holds flags of no use"):
                self.evaluate(moved)

    def test_of_the_assignments_template(self):
        """A file that ModelCheckpoint(save_weights_only=True) wrote says nothing of the data."""
        saved = torch.load(self.trained(binarization="stochastic"), weights_only=True)
        path = self.folder / "template.ckpt"
        for parts in [["state_dict", "hyper_parameters", "epoch"], ["state_dict", "hyper_parameters"]]:
            torch.save({part: saved[part] for part in parts}, path)
            with self.assertRaisesRegex(FlagError, "template.ckpt does not say what data .* give --dataset"):
                self.evaluate(path)
            results, _ = self.evaluate(path, dataset="rendered")
            self.assertEqual((results["binarization"], results["epoch"] == 1), ("threshold", "epoch" in parts))
            with printed_lines() as lines:
                evaluate.print_results(results, self.folder)
        self.assertIn(f"after {results['epoch'] or 'some'} epoch", lines[0])
        torch.save(saved["state_dict"], path)  # as train_torch.py does
        with self.assertRaisesRegex(CheckpointError, "size mismatch .*: give --model, --z_dim, .* it was trained with"):
            self.evaluate(path, dataset="rendered")
        again = self.evaluate(path, dataset="rendered", z_dim=3, hidden_dims=[32])[0]
        self.assertEqual(again["test_bpd"], results["test_bpd"])

    def test_bad_choices(self):
        checkpoint = self.trained()
        for choices, message in [
            (dict(iw_samples=0), "--iw_samples must be at least 1, got 0"),
            (dict(dataset="faces"), "--dataset must be one of mnist, fashion"),
            (dict(accelerator="tpu"), "--accelerator must be one of"),
        ]:
            with self.assertRaisesRegex(FlagError, message):
                self.evaluate(checkpoint, **choices)
        if not torch.cuda.is_available():
            with self.assertRaisesRegex(UserError, "there is no GPU here"):
                self.evaluate(checkpoint, accelerator="gpu")
        self.assertFalse((checkpoint.parent.parent / "evaluation").exists())


if __name__ == "__main__":
    unittest.main()

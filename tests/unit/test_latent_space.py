"""Tests of pictures/latent_space.py: `python -m unittest tests/unit/test_latent_space.py`."""

import contextlib
import errno
import io
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from bmnist import binarize
from harness.errors import DiskFullError
from pictures import figures, latent_space
from pictures.latent_space import first_three_per_label, plane, save_pictures
from sources.rendered_digits import rendered_digits
from tests.helpers import SeededTest
from train_pl import VAE

PICTURES = {"reconstructions", "interpolations", "traversals", "samples", "sample_means", "latent_space"}


class TestPictures(SeededTest):
    """Tests of the pictures of a model and 200 digits."""

    @torch.no_grad()
    def setUp(self):
        images, self.labels = rendered_digits(200)
        self.imgs = binarize(images)
        self.use_model(z_dim=3)

    @torch.no_grad()
    def use_model(self, z_dim):
        """Makes a model whose latents and pixels vary, as in a trained model, except latent 1 of 3."""
        self.model = VAE("MLP", [32], 32, z_dim, 1e-3, img_size=list(self.imgs.shape[-2:]))
        for weight in self.model.parameters():
            weight.mul_(4)
        if z_dim == 3:
            self.model.encoder.net[-1].weight[1] = 0
        self.means, _ = self.model.encoder(self.imgs)

    def save(self):
        """Saves the pictures. Returns what is printed on stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as error:
            save_pictures(self.folder, self.model, self.imgs, self.labels, self.means)
        return error.getvalue()

    def shown(self):
        """Returns what the pictures show, as a dict from name to the arguments of the plotting function."""
        with mock.patch.multiple(figures, image_table=mock.DEFAULT, latent_space=mock.DEFAULT) as plot:
            self.assertEqual(self.save(), "")
        calls = [call for function in plot.values() for call in function.call_args_list]
        return {call.args[0].name: (*call.args[1:], call.kwargs) for call in calls}

    def test_each_picture_is_a_png_and_a_pdf_file(self):
        """The images may have another size and no labels."""
        savefig = Figure.savefig

        def save_small(figure, file, dpi, **options):  # a low resolution is faster
            savefig(figure, file, dpi=50, **options)

        self.enter(mock.patch.object(Figure, "savefig", save_small))
        for z_dim, names in [(2, PICTURES | {"manifold"}), (1, PICTURES)]:
            with self.subTest(z_dim=z_dim):
                if z_dim == 1:
                    self.imgs, self.labels = self.imgs[..., 4:24, 7:21], torch.full_like(self.labels, -1)
                self.use_model(z_dim)
                self.assertEqual(self.save(), "")
                files = {path.name for path in self.folder.iterdir()}
                self.assertEqual(files, {name for name in latent_space.FILES if Path(name).stem in names})
                for name in names:
                    picture = imread(self.folder / f"{name}.png")
                    self.assertGreater(picture[..., :3].std(), 0.05, f"{name} is blank")
                    self.assertEqual((self.folder / f"{name}.pdf").read_bytes()[:5], b"%PDF-")

    def test_a_picture_that_fails_does_not_prevent_the_others(self):
        """Its old version is removed, and the reason is printed. A full disk is an error."""
        error, files = ValueError("no such\nfont"), {f"{name}.{kind}" for name in PICTURES for kind in ["png", "pdf"]}

        def save(figure, path, **options):
            if "samples.png" in path:
                raise error
            Path(path).touch()

        (self.folder / "samples.pdf").touch()
        with mock.patch.object(Figure, "savefig", autospec=True, side_effect=save):
            self.assertRegex(self.save(), r"^warning: saving .*/samples failed .* \(.*\)\n$")
            self.assertEqual({path.name for path in self.folder.iterdir()}, files - {"samples.png", "samples.pdf"})
            error = OSError(errno.ENOSPC, "No space left on device")
            with self.assertRaisesRegex(DiskFullError, "cannot write .*samples.png .No space left"):
                self.save()

    @torch.no_grad()
    def decode(self, z):
        """Returns the means of the pixels, [...,28,28], of latents [...,3]."""
        return torch.sigmoid(self.model.decoder(z)).squeeze(-3)

    def pick(self, digit, number):
        """Returns the index of a test image of a digit, the first one if the number is 0."""
        return (self.labels == digit).nonzero()[number, 0]

    def test_reconstructions_are_below_three_images_of_each_digit(self):
        images, _ = self.shown()["reconstructions"]
        self.assertEqual(images.shape, (6, 10, 28, 28))
        for row in [0, 2, 4]:
            picks = torch.stack([self.pick(digit, row // 2) for digit in range(10)])
            torch.testing.assert_close(images[row], self.imgs[picks, 0])
            torch.testing.assert_close(images[row + 1], self.decode(self.means[picks]))

    def test_interpolations_lead_from_a_digit_to_the_next_one(self):
        """They begin at the first image of the digit and end at the second image of the next one."""
        images, _ = self.shown()["interpolations"]
        ends = torch.stack([self.pick(3, 0), self.pick(4, 1)])
        torch.testing.assert_close(images[3, [0, -1]], self.imgs[ends, 0])
        torch.testing.assert_close(images[3, [1, -2]], self.decode(self.means[ends]))
        torch.testing.assert_close(images[3, 6], self.decode(self.means[ends].mean(dim=0)))

    def test_traversals_begin_with_the_most_active_unit(self):
        images, options = self.shown()["traversals"]
        order = ["z0", "z2"] if self.means[:, 0].var() > self.means[:, 2].var() else ["z2", "z0"]
        self.assertEqual((images.shape[:2], options["rows"]), ((2, 13), order))
        z = self.means[0].clone()
        z[2] = 1.5
        row, column = options["rows"].index("z2"), options["columns"].index("1.5")
        torch.testing.assert_close(images[row, column], self.decode(z))

        self.means = torch.zeros_like(self.means)  # no unit is active
        self.assertEqual(set(self.shown()), PICTURES - {"traversals"})

    def test_the_latents_of_the_manifold_increase_to_the_right_and_upwards(self):
        self.use_model(z_dim=2)
        images, options = self.shown()["manifold"]
        z = torch.tensor([float(options["columns"][4]), float(options["rows"][2])])
        self.assertTrue(z[0] < 0 < z[1])
        torch.testing.assert_close(self.shown()["latent_space"][0], self.means)
        torch.testing.assert_close(images[2, 4], self.decode(z), atol=0.02, rtol=0)

    def test_the_latent_space_is_shown_by_its_first_two_principal_components(self):
        points, labels, names, title, legend, _ = self.shown()["latent_space"]
        centred = self.means - self.means.mean(dim=0)
        _, _, v = torch.linalg.svd(centred)
        torch.testing.assert_close(points.abs(), (centred @ v[:2].T).abs(), atol=1e-4, rtol=1e-4)
        self.assertRegex(names[0], r"^first principal component \(\d+% of the variance\)")
        self.assertEqual((title, legend), ("Posterior means of the 200 test images, 3 latents", "digit"))

    def test_the_first_30_images_are_shown_if_there_are_no_labels(self):
        self.assertEqual(first_three_per_label(torch.full((40,), -1)).tolist(), torch.arange(30).view(3, 10).tolist())
        self.assertEqual(first_three_per_label(torch.tensor([7, 5] * 3 + [9])).tolist(), [[1, 0], [3, 2], [5, 4]])


class TestPlane(SeededTest):
    def test_a_single_latent_is_shown_over_the_labels(self):
        means, labels = torch.randn(50, 1), torch.arange(50) % 10
        shown = plane(means, labels)
        torch.testing.assert_close(shown.places, torch.stack([means[:, 0], labels.float()], dim=1))
        self.assertEqual(shown.axes[1], "digit")

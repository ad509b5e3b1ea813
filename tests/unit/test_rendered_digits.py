"""Tests of sources/rendered_digits.py: `python -m unittest tests/unit/test_rendered_digits.py`."""

import importlib.util
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFont

from harness.errors import DataError
from sources import rendered_digits as module
from sources.rendered_digits import rendered_digits, rendered_mnist
from tests.helpers import SeededTest


class TestRenderedDigits(SeededTest):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = rendered_digits()
        cls.ink = cls.images > 127

    def test_images_and_labels_have_mnists_shapes_and_types(self):
        self.assertEqual((self.images.shape, self.images.dtype), ((60_000, 28, 28), torch.uint8))
        self.assertEqual((self.labels.shape, self.labels.dtype), ((60_000,), torch.int64))
        self.assertEqual((self.images.min().item(), self.images.max().item()), (0, 255))

    def test_fewer_images_are_the_first_ones_of_more_images(self):
        """This is tested with one and two threads. Their number and torch's random numbers do not change."""
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        state = torch.get_rng_state()
        for threads, number in [(1, 1), (1, 1_000), (2, 1_001)]:
            torch.set_num_threads(threads)
            images, labels = rendered_digits(number)
            self.assertTrue(torch.equal(images, self.images[:number]))
            self.assertTrue(torch.equal(labels, self.labels[:number]))
            self.assertEqual(torch.get_num_threads(), threads)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        with self.assertRaisesRegex(ValueError, "num_images must be at least 1"):
            rendered_digits(0)

    def test_rendered_mnist_is_two_parts_of_the_same_images(self):
        train_images, train_labels, test_images, test_labels = rendered_mnist(1_500, 700)
        self.assertTrue(torch.equal(torch.cat([train_images, test_images]), self.images[:2_200]))
        self.assertTrue(torch.equal(torch.cat([train_labels, test_labels]), self.labels[:2_200]))
        self.assertEqual((len(train_images), len(train_labels)), (1_500, 1_500))

    def test_the_fonts_of_a_linux_distribution_render_the_same_digits(self):
        """Debian's matplotlib has its data outside the package. A missing font is an error."""
        package, data = self.folder / "matplotlib", self.folder / "share"
        fonts = data / "fonts" / "ttf"
        for folder in [package, fonts]:
            folder.mkdir(parents=True)
        for name in module.FONTS:
            (fonts / f"{name}.ttf").symlink_to(module.font_path(name))
        spec = importlib.util.spec_from_file_location("matplotlib", package / "__init__.py")
        folder_spec = importlib.machinery.ModuleSpec("matplotlib", None, is_package=True)  # of a folder of this name
        self.addCleanup(module.glyphs.cache_clear)
        with mock.patch.object(module, "SYSTEM_DATA", data):
            for found in [spec, None, folder_spec]:
                with self.subTest(found), mock.patch.object(importlib.util, "find_spec", return_value=found):
                    self.assertEqual(module.font_path("cmr10"), fonts / "cmr10.ttf")
            module.glyphs.cache_clear()
            with mock.patch.object(importlib.util, "find_spec", return_value=spec):
                self.assertTrue(torch.equal(rendered_digits(1_000)[0], self.images[:1_000]))
                (fonts / "cmr10.ttf").unlink()
                module.glyphs.cache_clear()
                with self.assertRaisesRegex(DataError, "font cmr10.ttf, which is missing: run `pip install"):
                    rendered_digits(1)

    def test_the_share_of_ink_is_similar_to_mnists(self):
        """In MNIST, 0.13 of the pixels are ink. No digit is empty or a blot."""
        shares = self.ink.flatten(1).float().mean(1)
        self.assertAlmostEqual(shares.mean().item(), 0.13, delta=0.02)
        self.assertGreater(shares.min().item(), 0.03)
        self.assertLess(shares.max().item(), 0.35)

    def test_digits_stay_inside_the_image(self):
        border = torch.ones(28, 28, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        touching = self.ink[:, border].any(1).float().mean().item()
        self.assertLess(touching, 0.01)  # the feet of some sevens; MNIST has 0.011

    def test_the_size_and_the_centre_of_digits_follow_mnists_rules(self):
        rows, columns = self.ink.any(2), self.ink.any(1)
        height, width = (28 - side.byte().argmax(1) - side.flip(1).byte().argmax(1) for side in [rows, columns])
        longer = torch.maximum(height, width)
        self.assertGreaterEqual(longer.min().item(), 17)
        self.assertLessEqual(longer.max().item(), 21)
        grey = self.images.float()
        pixels = torch.arange(28.0)
        for axis in [1, 2]:
            profile = grey.sum(3 - axis)
            centre = (profile * pixels).sum(1) / profile.sum(1)
            self.assertAlmostEqual(centre.mean().item(), 14, delta=0.2)
            self.assertLess((centre - 14).abs().max().item(), 1.5)

    def test_every_split_has_about_equally_many_of_each_digit(self):
        for labels in self.labels.split([45_000, 5_000, 10_000]):
            share = torch.bincount(labels, minlength=10) / len(labels)
            torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.02, rtol=0)

    def test_labels_belong_to_the_images(self):
        """The nearest class mean finds 0.96 of all labels and 0.85 of the fives; of shuffled labels, 0.1."""
        train, test = self.ink[:45_000].flatten(1).float(), self.ink[50_000:].flatten(1).float()
        train_labels, test_labels = self.labels[:45_000], self.labels[50_000:]
        means = torch.stack([train[train_labels == digit].mean(0) for digit in range(10)])
        right = torch.cdist(test, means).argmin(1) == test_labels
        for digit in range(10):
            self.assertGreater(right[test_labels == digit].float().mean().item(), 0.75, f"digit {digit}")

    def test_labels_name_the_digits(self):
        """The mean of the images with a label is most similar to this digit in DejaVu Sans."""
        font = ImageFont.truetype(str(module.font_path("DejaVuSans")), module.EM)
        glyphs = np.stack([module.render_glyph(font, digit) for digit in range(10)]).astype(np.float32)
        glyphs = F.interpolate(torch.from_numpy(glyphs).unsqueeze(0), size=28, mode="area").squeeze(0)
        means = torch.stack([self.images[self.labels == digit].float().mean(0) for digit in range(10)])
        similarity = torch.corrcoef(torch.cat([means, glyphs]).flatten(1))[:10, 10:]
        self.assertEqual(similarity.argmax(1).tolist(), [*range(10)])

"""Tests of sources/rendered_digits.py: `python -m unittest tests/unit/test_rendered_digits.py`."""

import importlib.util
from unittest import mock

import torch

from harness.errors import DataError
from sources import rendered_digits as module
from sources.rendered_digits import rendered_digits, rendered_mnist
from tests.helpers import SeededTest


class TestRenderedDigits(SeededTest):
    @classmethod
    def setUpClass(cls):
        cls.images, cls.labels = rendered_digits()
        cls.ink = cls.images > 127

    def test_shapes_and_types(self):
        self.assertEqual(self.images.shape, (60_000, 28, 28))
        self.assertEqual(self.images.dtype, torch.uint8)
        self.assertEqual((self.images.min().item(), self.images.max().item()), (0, 255))
        self.assertEqual(self.labels.shape, (60_000,))
        self.assertEqual(self.labels.dtype, torch.int64)

    def test_fewer_images_are_the_first_of_more(self):
        for number in [1, 3, 1_000, 1_001]:
            images, labels = rendered_digits(number)
            self.assertTrue(torch.equal(images, self.images[:number]))
            self.assertTrue(torch.equal(labels, self.labels[:number]))
        for number in [0, -1]:
            with self.assertRaisesRegex(ValueError, "num_images must be at least 1"):
                rendered_digits(number)

    def test_rendered_mnist_is_two_parts_of_the_same_images(self):
        train_images, train_labels, test_images, test_labels = rendered_mnist(1_500, 700)
        self.assertTrue(torch.equal(train_images, self.images[:1_500]))
        self.assertTrue(torch.equal(train_labels, self.labels[:1_500]))
        self.assertTrue(torch.equal(test_images, self.images[1_500:2_200]))
        self.assertTrue(torch.equal(test_labels, self.labels[1_500:2_200]))

    def test_another_seed_gives_other_images(self):
        images, labels = rendered_digits(5_000, seed=1)
        self.assertLess((labels == self.labels[:5_000]).float().mean().item(), 0.2)
        same = (images == self.images[:5_000]).flatten(1).all(1)
        self.assertFalse(same.any())

    def test_fonts_of_a_linux_distribution_give_the_same_digits(self):
        """Debian's matplotlib has its data outside of the package. Fonts that are missing are an error."""
        package, data = self.folder / "matplotlib", self.folder / "share"
        fonts = data / "fonts" / "ttf"
        for folder in [package, fonts]:
            folder.mkdir(parents=True)
        for name in module.FONTS:
            (fonts / f"{name}.ttf").symlink_to(module.font_path(name))
        spec = importlib.util.spec_from_file_location("matplotlib", package / "__init__.py")
        folder_spec = importlib.machinery.ModuleSpec("matplotlib", None, is_package=True)  # of any folder of that name
        self.addCleanup(module.glyphs.cache_clear)
        with mock.patch.object(module, "SYSTEM_DATA", data):
            for found in [spec, None, folder_spec]:
                module.glyphs.cache_clear()
                with mock.patch.object(importlib.util, "find_spec", return_value=found):
                    self.assertTrue(torch.equal(rendered_digits(1_000)[0], self.images[:1_000]))
            (fonts / "cmr10.ttf").unlink()
            module.glyphs.cache_clear()
            with (
                mock.patch.object(importlib.util, "find_spec", return_value=spec),
                self.assertRaisesRegex(DataError, "font cmr10.ttf, which is missing: pip install"),
            ):
                rendered_digits(1)

    def test_the_number_of_threads_does_not_matter(self):
        before = torch.get_num_threads()
        try:
            for threads in [1, 2]:
                torch.set_num_threads(threads)
                images, labels = rendered_digits(5_000)
                self.assertTrue(torch.equal(images, self.images[:5_000]))
                self.assertTrue(torch.equal(labels, self.labels[:5_000]))
                self.assertEqual(torch.get_num_threads(), threads)
        finally:
            torch.set_num_threads(before)

    def test_the_global_random_numbers_are_untouched(self):
        before = torch.get_rng_state()
        rendered_digits(100, seed=5)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_the_share_of_ink_is_that_of_mnist(self):
        """MNIST has 0.13 of its pixels inked. No digit is empty or a blot."""
        shares = self.ink.flatten(1).float().mean(1)
        self.assertGreater(shares.mean().item(), 0.11)
        self.assertLess(shares.mean().item(), 0.15)
        self.assertGreater(shares.min().item(), 0.03)
        self.assertLess(shares.max().item(), 0.35)

    def test_digits_stay_inside_of_the_image(self):
        border = torch.ones(28, 28, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        touching = self.ink[:, border].any(1).float().mean().item()
        self.assertLess(touching, 0.01)  # the feet of some sevens; MNIST has 0.011

    def test_size_and_centre_are_those_of_mnist(self):
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

    def test_every_split_is_a_fair_sample(self):
        for labels in self.labels.split([45_000, 5_000, 10_000]):
            share = torch.bincount(labels, minlength=10) / len(labels)
            self.assertEqual(len(share), 10)
            self.assertGreater(share.min().item(), 0.08)
            self.assertLess(share.max().item(), 0.12)

    def test_labels_belong_to_the_images(self):
        """The nearest class mean finds 0.96 of all, 0.85 of the fives; with shuffled labels 0.1."""
        train, test = self.ink[:45_000].flatten(1).float(), self.ink[50_000:].flatten(1).float()
        train_labels, test_labels = self.labels[:45_000], self.labels[50_000:]
        means = torch.stack([train[train_labels == digit].mean(0) for digit in range(10)])
        right = torch.cdist(test, means).argmin(1) == test_labels
        for digit in range(10):
            self.assertGreater(right[test_labels == digit].float().mean().item(), 0.75, f"digit {digit}")

    def test_labels_name_the_digits(self):
        """
        Holes show what class means cannot, whether the images labelled 8 are eights: 0, 4, 6, 8 and 9 have one, the
        others none. The background is flooded from a corner; what stays dry is a hole.
        """
        paper = ~self.ink[50_000:52_000]
        labels = self.labels[50_000:52_000]
        wet = torch.zeros_like(paper)
        wet[:, 0, 0] = True
        while True:
            spread = wet.clone()
            spread[:, 1:] |= wet[:, :-1]
            spread[:, :-1] |= wet[:, 1:]
            spread[:, :, 1:] |= wet[:, :, :-1]
            spread[:, :, :-1] |= wet[:, :, 1:]
            spread &= paper
            if torch.equal(spread, wet):
                break
            wet = spread
        dry = paper & ~wet
        hole = dry.flatten(1).sum(1) > 3
        for digit in range(10):
            share = hole[labels == digit].float().mean().item()
            if digit in [0, 4, 6, 8, 9]:
                self.assertGreater(share, 0.9, f"digit {digit}")
            else:
                self.assertLess(share, 0.1, f"digit {digit}")
        rows = torch.arange(28)[:, None].expand(28, 28)
        mean_row = {digit: (dry[labels == digit] * rows).sum() / dry[labels == digit].sum() for digit in [6, 9]}
        self.assertGreater(mean_row[6].item(), 15)  # the loop of a six is below the middle,
        self.assertLess(mean_row[9].item(), 13)  # that of a nine above

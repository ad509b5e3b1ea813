"""Tests of bmnist.py: `python -m unittest tests/unit/test_bmnist.py`."""

import argparse
import contextlib
import io
import subprocess
import sys
import unittest
from collections import Counter
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler, default_collate, random_split

import bmnist
from sources.npz_file import OwnImages
from sources.rendered_digits import rendered_digits
from tests.helpers import REPOSITORY, SeededTest

NUM_TRAIN, NUM_TEST = 60_000, 10_000  # MNIST's


def grey_images(intensity=None):
    """Returns as many images of 2x2 pixels as MNIST has, of all intensities or of one. Their labels are numbers."""
    images = torch.arange(NUM_TRAIN * 4).view(NUM_TRAIN, 2, 2) % 256
    images = images.to(torch.uint8) if intensity is None else torch.full_like(images, intensity, dtype=torch.uint8)
    return images, torch.arange(NUM_TRAIN), images[:NUM_TEST], NUM_TRAIN + torch.arange(NUM_TEST)


def labels_of(loader):
    """Returns the labels of a pass, in its order."""
    return torch.cat([labels for _, labels in loader])


class TestDataLoaders(SeededTest):
    def test_grey_images_become_the_batches_of_three_splits(self):
        """Each pass has all training images in a new order. A pixel is 1 if its intensity / 255 is above 0.5."""
        data = grey_images()
        loaders = bmnist.data_loaders(*data)
        seen = labels_of(loaders[0])
        self.assertEqual([len(loader) for loader in loaders], [352, 40, 79])
        self.assertFalse(torch.equal(seen, torch.arange(45_000)))
        self.assertFalse(torch.equal(seen, labels_of(loaders[0])))
        self.assertTrue(torch.equal(seen.sort().values, torch.arange(45_000)))
        self.assertEqual(len(bmnist.data_loaders(*data, np.int64(100), torch.tensor(0))[1]), 50)  # from a notebook
        imgs, numbers = next(iter(loaders[0]))
        self.assertEqual((imgs.shape, imgs.dtype), ((128, 1, 2, 2), torch.float32))
        self.assertEqual((numbers.shape, numbers.dtype), ((128,), torch.int64))
        self.assertTrue(torch.equal(imgs[:, 0], (data[0][numbers].float() / 255 > 0.5).float()))

    def test_invalid_choices_are_errors(self):
        for choice in [dict(train_size=50_000), dict(binarization="half")]:
            with self.subTest(choice), self.assertRaisesRegex(ValueError, "must be one of"):
                bmnist.data_loaders(*grey_images(), **choice)

    def test_a_sampler_determines_the_order(self):
        """The function `sampler` is called once for each of the three sets, and only the first one is shuffled."""
        asked = []

        def every_second(dataset, shuffle):
            asked.append((dataset, shuffle))
            return range(1, len(dataset), 2)

        for binarization in bmnist.BINARIZATIONS:
            asked.clear()
            loaders = bmnist.data_loaders(*grey_images(), binarization=binarization, sampler=every_second)
            self.assertEqual([dataset for dataset, _ in asked], [loader.dataset for loader in loaders])
            self.assertEqual([shuffle for _, shuffle in asked], [True, False, False])
            for loader, first, end in zip(loaders, [0, 45_000, 60_000], [45_000, 50_000, 70_000]):
                self.assertTrue(torch.equal(labels_of(loader), torch.arange(first + 1, end, 2)))

    def test_stochastic_training_images_change_from_pass_to_pass(self):
        """Validation and test images never change, for any seed of torch's random numbers."""
        passes = []
        for seed in [0, 0, 1]:
            torch.manual_seed(seed)
            loaders = bmnist.data_loaders(*grey_images(intensity=100), binarization="stochastic")
            both = [tuple(map(torch.cat, zip(*loader))) for loader in loaders for _ in range(2)]
            passes.append([imgs[labels.argsort()] for imgs, labels in both])
        for train, train_again, val, val_again, test, test_again in passes:
            self.assertFalse(torch.equal(train, train_again))
            self.assertTrue(torch.equal(val, val_again) and torch.equal(test, test_again))
            self.assertTrue(torch.equal(val, passes[0][2]) and torch.equal(test, passes[0][4]))
        self.assertTrue(torch.equal(passes[0][0], passes[1][0]))
        self.assertFalse(torch.equal(passes[0][0], passes[2][0]))

    def test_stochastic_images_depend_on_the_samplers_seed(self):
        """If the sampler has a resampling_seed, torch's random numbers do not matter."""
        dataset = bmnist.StochasticBinaryImages(torch.full((9, 4, 4), 100, dtype=torch.uint8), torch.arange(9))
        sampler = mock.MagicMock(resampling_seed=mock.Mock(side_effect=[5, 6, 5]), order=lambda: torch.arange(9))
        loader = bmnist.ImageLoader(dataset, 9, resamples=True, sampler=sampler)
        passes = [next(iter(loader))[0] for _ in range(3)]
        self.assertTrue(torch.equal(passes[0], passes[2]))
        self.assertFalse(torch.equal(passes[0], passes[1]))


class TestImages(SeededTest):
    def test_the_mean_of_a_stochastic_pixel_is_its_intensity(self):
        """The pixels are sampled independently of each other."""
        images = torch.arange(256, dtype=torch.uint8).repeat(4_000).view(4_000, 16, 16)
        before = images.clone()
        dataset = bmnist.StochasticBinaryImages(images, torch.zeros(4_000, dtype=torch.int64))
        samples = dataset[torch.arange(4_000)][0]
        self.assertEqual(set(samples.unique().tolist()), {0, 1})
        intensities = torch.arange(256) / 255
        self.assertEqual((samples[:, 0, 0, 0].max().item(), samples[:, 0, -1, -1].min().item()), (0, 1))
        # The tolerance is 4.4 standard errors
        torch.testing.assert_close(samples.mean(dim=0).flatten(), intensities, atol=0.035, rtol=0)
        self.assertAlmostEqual((samples.mean(dim=0).flatten() - intensities).mean().item(), 0, delta=0.002)
        torch.testing.assert_close(torch.corrcoef(samples[:, 0, 7, 8:].T), torch.eye(8), atol=0.08, rtol=0)
        self.assertTrue(torch.equal(images, before))

    def test_the_size_of_a_block_changes_no_sample(self):
        """The random numbers of all grey pixels are in order, for any size of a block."""
        images, samples = torch.randint(0, 256, (7, 5, 3), dtype=torch.uint8), []
        for block in [2**20, 8]:
            with mock.patch.object(bmnist, "BLOCK", block):
                samples.append(bmnist.StochasticBinaryImages(images, torch.arange(7), seed=3).images)
        grey = images[(images > 0) & (images < 255)]
        numbers = torch.empty_like(grey).random_(0, 255, generator=torch.Generator().manual_seed(3))
        expected = images.clone()
        expected[(images > 0) & (images < 255)] = torch.where(numbers < grey, 255, 0).to(torch.uint8)
        self.assertTrue(torch.equal(samples[0], expected) and torch.equal(samples[1], expected))

    @unittest.skipUnless(sys.platform == "linux", "the peak of a process is read from Linux's /proc")
    def test_stochastic_photographs_take_less_than_4_bytes_per_pixel(self):
        """This includes the given images and the peak while the pixels are sampled. A separate process measures it."""
        code = (
            "import re, torch, bmnist\n"
            "def peak():\n"  # resource's maximum would include that of the tests' process
            "    return 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
            "images = torch.full((8_000, 64, 64), 100, dtype=torch.uint8)\n"
            "before = peak()\n"
            "bmnist.StochasticBinaryImages(images, torch.arange(8_000)).resample(1)\n"
            "print(1 + (peak() - before) / images.numel())\n"
        )
        command, options = [sys.executable, "-c", code], dict(cwd=REPOSITORY, capture_output=True, text=True)
        done = subprocess.run(command, **options, timeout=300)
        self.assertEqual(done.stderr, "")
        self.assertGreater(float(done.stdout), 1.5)  # the samples were counted
        self.assertLess(float(done.stdout), 4)

    def test_the_data_sets_work_with_torchs_classes(self):
        """Subset, ConcatDataset and torch's DataLoader accept the data sets, as they accept torchvision's MNIST."""
        for Images in [bmnist.BinaryImages, bmnist.StochasticBinaryImages]:
            dataset = Images(torch.full((10, 2, 2), 200, dtype=torch.uint8), torch.arange(10))
            parts = random_split(dataset, [6, 4])
            for data in [dataset, Subset(dataset, range(7)), *parts, ConcatDataset(parts)]:
                batches = list(DataLoader(data, batch_size=4))
                self.assertEqual(batches[0][0].shape, (4, 1, 2, 2))
                self.assertEqual(sum(len(labels) for _, labels in batches), len(data))
            self.assertEqual(Counter(label for _, label in dataset), Counter(range(10)))
            odd = Subset(dataset, (dataset.targets % 2).nonzero().flatten().tolist())
            self.assertEqual([label for _, label in odd], [1, 3, 5, 7, 9])
            self.assertEqual((dataset.data.shape, dataset.data.dtype), ((10, 2, 2), torch.uint8))
            batch = next(iter(DataLoader(dataset, 6, sampler=WeightedRandomSampler(dataset.targets == 3, 6))))
            self.assertEqual((batch[0].shape, batch[1].tolist()), ((6, 1, 2, 2), [3] * 6))

    def test_to_moves_every_tensor_in_place(self):
        images, labels = torch.full((3, 2, 2), 100, dtype=torch.uint8), torch.arange(3)
        for Images in [bmnist.BinaryImages, bmnist.StochasticBinaryImages]:
            dataset = Images(images, labels)
            dataset.to("meta")
            self.assertEqual({tensor.device.type for tensor in vars(dataset).values()}, {"meta"})
            self.assertEqual(dataset[torch.arange(3, device="meta")][0].device.type, "meta")
        self.assertEqual(images.device.type, "cpu")


class TestImageLoader(SeededTest):
    def test_options_of_torchs_loader_have_their_usual_effect(self):
        """With options that exclude indexing at once, the batches are those of torch's DataLoader."""
        data = [part[:100] for part in grey_images()]
        images = bmnist.BinaryImages(*data[:2])
        expected = [labels for _, labels in bmnist.ImageLoader(images, 30)]
        self.assertEqual([len(labels) for labels in expected], [30, 30, 30, 10])
        for options in [dict(num_workers=1), dict(drop_last=True), dict(collate_fn=lambda x: default_collate(x))]:
            loader = bmnist.ImageLoader(images, 30, **options)
            self.assertFalse(loader.indexes_at_once)
            self.assertEqual([*map(len, loader)], [*map(len, DataLoader(images, 30, **options))])
            for (_, labels), others in zip(loader, expected):
                self.assertTrue(torch.equal(labels, others))
        by_batches = bmnist.ImageLoader(images, batch_sampler=[[3, 1], [2]])
        self.assertEqual([labels.tolist() for _, labels in by_batches], [[3, 1], [2]])

    def test_random_numbers_are_those_of_torchs_loader(self):
        """Order and later random numbers equal those of torch's DataLoader, with and without worker processes."""
        images = bmnist.BinaryImages(*[part[:50] for part in grey_images()][:2])
        orders, states = [], []
        for Loader, workers in [(DataLoader, 0), (bmnist.ImageLoader, 0), (bmnist.ImageLoader, 1)]:
            torch.manual_seed(1)
            loader = Loader(images, batch_size=20, shuffle=True, num_workers=workers)
            orders.append(torch.cat([labels_of(loader), labels_of(loader)]).tolist())
            states.append(torch.get_rng_state().tolist())
        self.assertEqual(orders, orders[:1] * 3)
        self.assertEqual(states, states[:1] * 3)

    def test_workers_change_no_pixel(self):
        passes, data = [], [*rendered_digits(60), *rendered_digits(10)]
        for workers in [0, 1]:
            torch.manual_seed(1)
            loader = bmnist.data_loaders(*data, 25, workers, binarization="stochastic", train_size=None)[0]
            passes.append([imgs for _ in range(2) for imgs, _ in loader])
        self.assertEqual([len(imgs) for imgs in passes[0]], [25, 25, 4] * 2)
        self.assertTrue(all(map(torch.equal, *passes)))


class TestLoadData(SeededTest):
    def test_each_data_set_has_its_splits_and_the_batch_size_of_one_process(self):
        """Your own file is split like MNIST only if it has 60,000 training images and no val_images."""
        images, labels, *test = grey_images()
        for dataset, num_images, train_size, num_train, num_val, own in [
            ("mnist", 60_000, 55_000, 55_000, 5_000, None),
            ("rendered", 50_000, 45_000, 45_000, 5_000, None),
            ("own.npz", 60_000, 45_000, 45_000, 5_000, None),
            ("own.npz", 60_000, 45_000, 59_000, 1_000, 1_000),
            ("own.npz", 105, 45_000, 95, 10, None),
            ("own.npz", 105, 45_000, 60, 45, 45),
            ("own.npz", 58_000, 45_000, 53_000, 5_000, None),
        ]:
            flags = dict(dataset=dataset, train_size=train_size, binarization="threshold", num_workers=0)
            args = argparse.Namespace(**flags, batch_size=60, devices=2, num_nodes=3)
            data = (images[:num_images], labels[:num_images], *test)
            data = OwnImages(*data, own, ", read well") if dataset == "own.npz" else data
            with self.subTest(dataset, num_images=num_images), mock.patch.object(bmnist, "load_images") as load_images:
                load_images.return_value = data
                loaders = bmnist.load_data(args, download=False)
                load_images.assert_called_once_with(args, False)
                train, val, tested = (loader.dataset.labels for loader in loaders)
                self.assertTrue(torch.equal(train, torch.arange(num_train)))
                self.assertTrue(torch.equal(val, torch.arange(num_train, num_train + num_val)))
                self.assertTrue(torch.equal(tested, test[1]))
                self.assertEqual({loader.batch_size for loader in loaders}, {10})
                which = (
                    f"validation set: its {num_val:,} val_images"
                    if own
                    else f"validation set: the next {num_val:,} images"
                )
                self.assertEqual(loaders[0].description, f"{which}, read well" if dataset == "own.npz" else "")


class TestGrid(SeededTest):
    def test_the_grid_has_pairs_of_evenly_spread_images(self):
        """Each image is followed by its binary version, with 4 pairs per row. Sorted images show every class."""
        images = torch.arange(249, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 4, 3)  # 32 of them: 0, 8, 16 ...
        bmnist.save_grid(self.folder / "grid.png", bmnist.BinaryImages(images, torch.arange(249)))
        picture = np.asarray(Image.open(self.folder / "grid.png"))[..., 0]
        self.assertEqual(picture.shape, (8 * 6 + 2, 8 * 5 + 2))
        shown = picture[2::6, 2::5].reshape(32, 2)
        self.assertEqual(shown[:, 0].tolist(), list(range(0, 249, 8)))
        self.assertEqual(shown[:, 1].tolist(), [0] * 16 + [255] * 16)


class TestProgram(SeededTest):
    def main(self, **load):
        """Returns what the program prints on a terminal that supports only ASCII, and its exit code or last line."""
        output, code = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True), None
        argv = mock.patch.object(sys, "argv", ["bmnist.py", "--data_dir", "здесь", "--dataset", "kmnist"])
        with argv, mock.patch.object(bmnist, "load_data", **load), contextlib.redirect_stdout(output):
            try:
                bmnist.main()
            except SystemExit as end:
                code = end.code
        return output.buffer.getvalue().decode(), code

    def test_the_splits_are_printed(self):
        images, *others = grey_images()
        images[:45_000], images[45_000:] = 0, 255
        output, code = self.main(return_value=bmnist.data_loaders(images, *others))
        head, *splits = [" ".join(line.split()) for line in output.splitlines()]
        self.assertRegex(head, r"^KMNIST in \\u0437.*/KMNIST/raw: all four files verified$")
        self.assertEqual(
            splits[:2],
            ["train 45,000 images 0.00% of the pixels are 1", "validation 5,000 images 100.00% of the pixels are 1"],
        )
        self.assertRegex(splits[2], r"^test 10,000 images \d+\.\d\d% of the pixels are 1$")
        self.assertIsNone(code)

    def test_an_error_is_one_line(self):
        error = bmnist.DataError("t10k-labels is damaged")
        self.assertEqual(self.main(side_effect=error), ("", "bmnist.py: error: t10k-labels is damaged"))
        self.assertEqual(self.main(side_effect=KeyboardInterrupt), ("", "bmnist.py: interrupted"))

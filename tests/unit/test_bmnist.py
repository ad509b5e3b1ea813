"""Tests of bmnist.py but for its files: `python -m unittest tests/unit/test_bmnist.py`."""

import contextlib
import inspect
import io
import os
import sys
from unittest import mock

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, random_split

import bmnist
from tests.helpers import SeededTest

NUM_TRAIN, NUM_TEST = 60_000, 10_000  # MNIST's


def grey_images(intensity=None):
    """Images of 2x2 pixels in the number of MNIST's, all intensities in turn or a single one, and their numbers."""
    images = torch.arange(NUM_TRAIN * 4).view(NUM_TRAIN, 2, 2) % 256
    images = images.to(torch.uint8) if intensity is None else torch.full_like(images, intensity, dtype=torch.uint8)
    return images, torch.arange(NUM_TRAIN), images[:NUM_TEST], NUM_TRAIN + torch.arange(NUM_TEST)


def labels_of(loader):
    """The labels of a pass, in its order."""
    return torch.cat([labels for _, labels in loader])


class TestLoaders(SeededTest):
    """On data of MNIST's size whose labels are the images' numbers."""

    def test_signature(self):
        defaults = {p.name: p.default for p in inspect.signature(bmnist.bmnist).parameters.values()}
        expected = {"root": "../data/", "batch_size": 128, "num_workers": 0, "download": True}
        self.assertEqual(defaults, {**expected, "binarization": "threshold", "train_size": 45_000, "kind": "mnist"})

    def test_splits_and_batches(self):
        data = grey_images()
        loaders = bmnist.data_loaders(*data)
        seen = [labels_of(loader) for loader in loaders]
        self.assertEqual([len(loader) for loader in loaders], [352, 40, 79])  # the last, smaller batch is there
        self.assertFalse(torch.equal(seen[0], torch.arange(45_000)))
        self.assertFalse(torch.equal(seen[0], labels_of(loaders[0])))
        self.assertTrue(torch.equal(seen[0].sort().values, torch.arange(45_000)))
        self.assertTrue(torch.equal(seen[1], torch.arange(45_000, 50_000)))
        self.assertTrue(torch.equal(seen[2], data[3]))
        self.assertEqual(len(bmnist.data_loaders(*data, np.int64(100), torch.tensor(0))[1]), 50)  # from a notebook
        imgs, numbers = next(iter(loaders[0]))
        self.assertEqual((imgs.shape, imgs.dtype), ((128, 1, 2, 2), torch.float32))
        self.assertEqual((numbers.shape, numbers.dtype), ((128,), torch.int64))
        self.assertTrue(torch.equal(imgs[:, 0], (data[0][numbers].float() / 255 > 0.5).float()))

    def test_train_sizes(self):
        data = grey_images()
        for train_size in [45_000, 55_000]:
            loaders = bmnist.data_loaders(*data, train_size=train_size)
            self.assertTrue(torch.equal(loaders[0].dataset.labels, torch.arange(train_size)))
            self.assertTrue(torch.equal(loaders[1].dataset.labels, torch.arange(train_size, train_size + 5_000)))
        for num_images, num_val in [(105, 10), (1_000, 100), (58_000, 5_000)]:  # of one's own
            loaders = bmnist.data_loaders(*(part[:num_images] for part in data), train_size=None)
            self.assertTrue(torch.equal(loaders[0].dataset.labels, torch.arange(num_images - num_val)))
            self.assertTrue(torch.equal(loaders[1].dataset.labels, torch.arange(num_images - num_val, num_images)))
        for choice in [dict(train_size=50_000), dict(binarization="half")]:
            with self.assertRaisesRegex(ValueError, "must be one of"):
                bmnist.data_loaders(*data, **choice)

    def test_sampler(self):
        """It is asked for the order of each set, and says which of its images come."""
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

    def test_when_images_are_drawn(self):
        """Training images anew for each pass, the others once and for all, whatever the random numbers are."""
        passes = []
        for seed in [0, 0, 1]:
            torch.manual_seed(seed)
            loaders = bmnist.data_loaders(*grey_images(intensity=100), binarization="stochastic")
            of_this_seed = []
            for loader in loaders:
                for _ in range(2):
                    imgs, labels = map(torch.cat, zip(*loader))
                    of_this_seed.append(imgs[labels.argsort()])
            passes.append(of_this_seed)
        for train, train_again, val, val_again, test, test_again in passes:
            self.assertFalse(torch.equal(train, train_again))
            self.assertTrue(torch.equal(val, val_again) and torch.equal(test, test_again))
            self.assertTrue(torch.equal(val, passes[0][2]) and torch.equal(test, passes[0][4]))
        self.assertTrue(torch.equal(passes[0][0], passes[1][0]))
        self.assertFalse(torch.equal(passes[0][0], passes[2][0]))

    def test_images_are_drawn_from_the_samplers_seed(self):
        """Where it has one, whatever torch's random numbers are; and it is asked before each pass."""
        dataset = bmnist.SampledImages(torch.full((9, 4, 4), 100, dtype=torch.uint8), torch.arange(9))

        class Sampler(list):
            draw_seed = mock.Mock(side_effect=[5, 6, 5])

        loader = bmnist.ImageLoader(dataset, 9, redraws=True, sampler=Sampler(range(9)))
        passes = []
        for seed in range(3):
            torch.manual_seed(seed)
            passes += [imgs for imgs, _ in loader]
        self.assertTrue(torch.equal(passes[0], passes[2]))
        self.assertFalse(torch.equal(passes[0], passes[1]))
        dataset.redraw(5)
        self.assertTrue(torch.equal(passes[0], dataset[torch.arange(9)][0]))


class TestLines(SeededTest):
    def test_a_closed_pipe(self):
        """As of `python bmnist.py | true`: a line costs nobody a download."""
        reader, writer = os.pipe()
        os.close(reader)
        with (
            open(writer, "w") as pipe,
            mock.patch.object(sys, "__stderr__", io.StringIO()) as stderr,
            contextlib.redirect_stdout(pipe),
        ):
            for line in ["Downloading", "verified"]:
                bmnist.print_line(line)
        self.assertEqual(stderr.getvalue(), "nothing can be printed here (Broken pipe)\n")


class TestImages(SeededTest):
    def test_threshold(self):
        images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        dataset = bmnist.BinaryImages(images, torch.zeros(1, dtype=torch.int64))
        img, label = dataset[0]
        self.assertTrue(torch.equal(img.flatten(), (torch.arange(256) >= 128).float()))
        self.assertEqual((img.shape, label), ((1, 16, 16), 0))

    def test_stochastic_binarization(self):
        """Each pixel is a draw of its own, with its intensity as its mean."""
        images = torch.arange(256, dtype=torch.uint8).repeat(4_000).view(4_000, 16, 16)
        before = images.clone()
        dataset = bmnist.SampledImages(images, torch.zeros(4_000, dtype=torch.int64))
        draws = dataset[torch.arange(4_000)][0]
        self.assertEqual(set(draws.unique().tolist()), {0, 1})
        intensities = torch.arange(256) / 255
        self.assertTrue(torch.equal(draws[:, 0, 0, 0], torch.zeros(4_000)))
        self.assertTrue(torch.equal(draws[:, 0, -1, -1], torch.ones(4_000)))
        torch.testing.assert_close(draws.mean(dim=0).flatten(), intensities, atol=0.035, rtol=0)  # 4.4 standard errors
        self.assertAlmostEqual((draws.mean(dim=0).flatten() - intensities).mean().item(), 0, delta=0.002)
        torch.testing.assert_close(torch.corrcoef(draws[:, 0, 7, 8:].T), torch.eye(8), atol=0.08, rtol=0)
        first = dataset.images.clone()
        dataset.redraw(1)
        self.assertFalse(torch.equal(dataset.images, first))
        dataset.redraw(0)
        self.assertTrue(torch.equal(dataset.images, first))
        self.assertTrue(torch.equal(images, before))

    def test_a_batch_is_indexed_at_once(self):
        """As the loader does it, by a tensor; torch's own classes get a list of samples."""
        dataset = bmnist.BinaryImages(*grey_images()[:2])
        imgs, labels = dataset[torch.tensor([5, 2, 9])]
        self.assertEqual(labels.tolist(), [5, 2, 9])
        self.assertTrue(torch.equal(imgs, bmnist.binarize(dataset.images[[5, 2, 9]])))
        samples = dataset.__getitems__([5, 2, 9])
        self.assertTrue(all(map(torch.equal, torch.utils.data.default_collate(samples), [imgs, labels])))
        self.assertEqual((samples[0][0].shape, samples[0][1]), ((1, 2, 2), 5))

    def test_in_other_hands(self):
        """Wherever torchvision's MNIST can be given, so can a data set of ours."""
        for Images in [bmnist.BinaryImages, bmnist.SampledImages]:
            dataset = Images(torch.full((10, 2, 2), 200, dtype=torch.uint8), torch.arange(10))
            parts = random_split(dataset, [6, 4])
            for data in [dataset, Subset(dataset, range(7)), *parts, ConcatDataset(parts)]:
                for num_workers in [0, 1]:
                    batches = list(DataLoader(data, batch_size=4, num_workers=num_workers))
                    self.assertEqual(batches[0][0].shape, (4, 1, 2, 2))
                    self.assertEqual(sum(len(labels) for _, labels in batches), len(data))

    def test_loaders_are_torchs(self):
        """Options that a loader does not index at once for give the same batches; and so does torch's own class."""
        data = [part[:100] for part in grey_images()]
        images = bmnist.BinaryImages(*data[:2])
        expected = [labels for _, labels in bmnist.ImageLoader(images, 30)]
        self.assertEqual([len(labels) for labels in expected], [30, 30, 30, 10])
        for options in [
            dict(num_workers=1),
            dict(collate_fn=lambda samples: torch.utils.data.default_collate(samples)),
            dict(drop_last=True),
        ]:
            loader = bmnist.ImageLoader(images, 30, **options)
            self.assertFalse(loader.indexes_at_once)
            self.assertEqual([*map(len, loader)], [*map(len, DataLoader(images, 30, **options))])
            for (_, labels), others in zip(loader, expected):
                self.assertTrue(torch.equal(labels, others))
        by_batches = bmnist.ImageLoader(images, batch_sampler=[[3, 1], [2]])
        self.assertEqual([labels.tolist() for _, labels in by_batches], [[3, 1], [2]])

    def test_the_random_numbers_of_torchs_loader(self):
        """The same order, and the same state afterwards, as of torch's DataLoader: with workers or without."""
        images = bmnist.BinaryImages(*[part[:50] for part in grey_images()][:2])
        orders, states = [], []
        for Loader, workers in [(DataLoader, 0), (bmnist.ImageLoader, 0), (bmnist.ImageLoader, 1)]:
            torch.manual_seed(1)
            loader = Loader(images, batch_size=20, shuffle=True, num_workers=workers)
            orders.append(torch.cat([labels_of(loader), labels_of(loader)]).tolist())
            states.append(torch.get_rng_state().tolist())
        self.assertEqual(orders, orders[:1] * 3)
        self.assertEqual(states, states[:1] * 3)
        drawn = []
        for workers in [0, 1]:
            torch.manual_seed(1)
            data = grey_images(intensity=100)
            loader = bmnist.data_loaders(*data, 20_000, workers, binarization="stochastic")[0]
            drawn.append(sum(imgs.sum() for imgs, _ in loader))
        self.assertEqual(*drawn)

    def test_to_moves_in_place(self):
        """Every tensor of it; whoever holds the data set has it moved, too."""
        images, labels = torch.full((3, 2, 2), 100, dtype=torch.uint8), torch.arange(3)
        for Images in [bmnist.BinaryImages, bmnist.SampledImages]:
            dataset = Images(images, labels)
            self.assertIs(dataset.to("meta"), dataset)
            self.assertEqual({tensor.device.type for tensor in vars(dataset).values()}, {"meta"})
            self.assertEqual(dataset[torch.arange(3, device="meta")][0].device.type, "meta")
        self.assertEqual(images.device.type, "cpu")

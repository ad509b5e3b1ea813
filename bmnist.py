"""
MNIST, its relatives and your own images as binary images in memory: binarisation, splits and data loaders.

As a program, `python bmnist.py --data_dir DIR` downloads and verifies MNIST's files before any training (the compute
nodes of a cluster often have no network). `python bmnist.py --dataset images.npz` validates your own file and saves a
picture of its images.
"""

import operator
import os
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.utils import save_image

from harness.errors import DataError, exit_on_error, print_line  # noqa: F401 (bmnist.DataError)
from harness.files import atomic_write
from harness.flags import Parser
from sources import (
    BINARIZATIONS,
    DATA_FLAGS,
    NUM_VAL,
    TRAIN_SIZES,
    describe_classes,
    describe_data,
    is_own_file,
    load_images,
)
from sources.mnist_files import KINDS, load_mnist

BLOCK = 2**20  # pixels that are sampled at a time; this bounds the memory for masks and random numbers


class BinaryImages(Dataset):
    """
    Data set of grey images and their labels, in one tensor each. A whole minibatch is indexed and binarised at once.
    Inputs:
        images - uint8 tensor of shape [N,H,W], intensities; stored unchanged, one byte per pixel.
        labels - int64 tensor of shape [N].
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """
        Returns the binary images, float32 [...,1,H,W], and the labels, int64 [...], at a tensor of indices. If the
        index is a single number, the label is an int.
        """
        labels = self.labels[index]
        return binarize(self.images[index]), labels if labels.dim() else labels.item()

    def __getitems__(self, indices):
        """Returns a list of the samples at a list of indices. torch's DataLoader and Subset call it for a batch."""
        imgs, labels = self[torch.as_tensor(indices)]
        return list(zip(imgs, labels.tolist()))

    data, targets = (property(operator.attrgetter(name)) for name in ["images", "labels"])  # torchvision's names

    def to(self, device):
        """Moves the data set to a device."""
        vars(self).update({name: tensor.to(device) for name, tensor in vars(self).items()})


class StochasticBinaryImages(BinaryImages):
    """
    Data set of images whose pixels are sampled from Bernoulli(intensity / 255), as in most of the literature
    (Salakhutdinov & Murray 2008). The attribute `images` contains the samples, as intensities 0 and 255. They take one
    byte per pixel in addition to the given images, which are neither copied nor changed. `seed` is the seed of the
    first samples, see resample.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int = 0):
        self.intensities = images.contiguous()
        super().__init__(self.intensities.clone(), labels)
        self.resample(seed)

    def resample(self, seed: int):
        """Samples all pixels again, in place. The same seed gives the same pixels on the same kind of device."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        # A random number from 0 to 254 is below the intensity with probability intensity / 255.
        if self.images.device.type != "cpu":
            # No mask: the CPU would have to wait for the GPU to learn how many pixels are selected.
            self.images.random_(0, 255, generator=generator).lt_(self.intensities).mul_(255)
            return
        blocks = zip(self.intensities.view(-1).split(BLOCK), self.images.view(-1).split(BLOCK))
        for intensities, samples in (map(Tensor.numpy, block) for block in blocks):  # NumPy's masks are faster
            is_grey = (intensities > 0) & (intensities < 255)  # pixels of 0 and 255 never change
            intensities = intensities[is_grey]
            numbers = torch.empty(len(intensities), dtype=torch.uint8).random_(0, 255, generator=generator).numpy()
            samples[is_grey] = (numbers < intensities) * np.uint8(255)


class ImageLoader(DataLoader):
    """
    DataLoader of BinaryImages that indexes each minibatch at once: dataset[order[i : i + batch_size]]. With worker
    processes, a collate_fn, drop_last or a batch_sampler, it behaves like any DataLoader. If `resamples` is True, the
    pixels are sampled again for each pass. The seed comes from the sampler's method `resampling_seed`, or from torch if
    the sampler has no such method.
    """

    description = ""  # how your own file was read; printed in a run's first line

    def __init__(self, dataset: BinaryImages, batch_size: int = 1, resamples: bool = False, **options):
        self.resamples = resamples
        super().__init__(dataset, batch_size, **options)

    @property
    def indexes_at_once(self) -> bool:
        """Whether each minibatch is dataset[order[i : i + batch_size]], without any further processing."""
        is_plain = self.collate_fn is default_collate and type(self).__iter__ is ImageLoader.__iter__
        return is_plain and self.batch_size is not None and not (self.num_workers or self.drop_last)

    def order(self) -> Tensor:
        """Returns the order of the images in a pass, int64 [N]."""
        order = self.sampler.order() if hasattr(self.sampler, "order") else torch.tensor(list(self.sampler))
        return order.to(self.dataset.images.device)

    def resample(self):
        """Samples the pixels again for a new pass, if `resamples` is True."""
        if self.resamples:
            resampling_seed = getattr(self.sampler, "resampling_seed", None)
            self.dataset.resample(resampling_seed() if resampling_seed else torch.randint(2**62, ()).item())

    def __iter__(self):
        self.resample()
        if not self.indexes_at_once:
            return super().__iter__()
        # torch's DataLoader samples a seed for its workers in each pass. This keeps later random numbers the same.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return map(self.dataset.__getitem__, self.order().split(self.batch_size))


def binarize(images: Tensor) -> Tensor:
    """Converts intensities, uint8 [...,H,W], to pixels, float32 [...,1,H,W]: 1 if intensity / 255 > 0.5, else 0."""
    pixels = torch.empty(images.shape, device=images.device)
    return torch.gt(images, 127, out=pixels).unsqueeze(-3)  # float32 at once, without a bool tensor


def data_loaders(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    batch_size: int = 128,
    num_workers: int = 0,
    binarization: str = "threshold",
    train_size: int | None = 45_000,
    sampler: Callable | None = None,
    num_val: int | None = None,
) -> tuple[ImageLoader, ...]:
    """
    Splits and binarises grey images. Of the training images, the first 45,000 or 55,000 are the training set and the
    next 5,000 the validation set. Raises a ValueError if binarization or train_size is not one of the possible values.
    Inputs:
        train_images, train_labels, test_images, test_labels - uint8 tensors [N,H,W] and int64 tensors [N].
        batch_size - Number of images per batch; the last batch of an epoch may be smaller.
        num_workers - Number of worker processes of each loader. With the images in memory, 0 is the fastest.
        binarization - "threshold", or "stochastic": pixels are sampled from Bernoulli(intensity / 255), again in every
            pass for the training set, and only once for the validation and test sets.
        train_size - 45,000, 55,000, or None for all images that are not in the validation set.
        sampler - Function of (dataset, shuffle) that returns a sampler, an iterable of indices. If None, torch's
            samplers are used.
        num_val - Number of validation images if train_size is None; by default a tenth of the images, at most 5,000.
    Outputs:
        train_loader, val_loader, test_loader - Data loaders, of which only the first one shuffles. A batch is
            (imgs, labels): float32 [B,1,H,W] of zeros and ones, and int64 [B].
    """
    if binarization not in BINARIZATIONS or train_size not in [*TRAIN_SIZES, None]:
        possible = f"binarization must be one of {BINARIZATIONS}, and train_size one of {TRAIN_SIZES} or None"
        raise ValueError(f"{possible}, got binarization={binarization!r} and train_size={train_size!r}")
    is_sampled = binarization == "stochastic"
    batch_size, num_workers = operator.index(batch_size), operator.index(num_workers)  # may be of NumPy or torch
    num_val = NUM_VAL if train_size else num_val or min(len(train_images) // 10, NUM_VAL)
    train_size = train_size or len(train_images) - num_val
    train, val = slice(train_size), slice(train_size, train_size + num_val)
    train_part, val_part = ((train_images[part], train_labels[part]) for part in [train, val])
    loaders = []
    for images, labels in [train_part, val_part, (test_images, test_labels)]:
        is_train = not loaders
        dataset = StochasticBinaryImages(images, labels) if is_sampled else BinaryImages(images, labels)
        options = {"shuffle": is_train} if sampler is None else {"sampler": sampler(dataset, is_train)}
        loaders.append(ImageLoader(dataset, batch_size, is_sampled and is_train, num_workers=num_workers, **options))
    return tuple(loaders)


def bmnist(
    root: str | os.PathLike = "../data/",
    batch_size: int = 128,
    num_workers: int = 0,
    download: bool = True,
    binarization: str = "threshold",
    train_size: int = 45_000,
    kind: str = "mnist",
) -> tuple[ImageLoader, ...]:
    """
    Returns the data loaders of MNIST (see data_loaders), binarised with a fixed threshold (the assignment's choice,
    simple and reproducible) or by sampling from the intensities (as in most of the literature).
    Inputs:
        root - Directory of the data. The files are in its subfolder MNIST/raw (or FashionMNIST/raw, KMNIST/raw).
        batch_size, num_workers - See data_loaders.
        download - If True, missing files are downloaded. A DataError is raised if the download fails.
        binarization, train_size - See data_loaders.
        kind - "mnist", or one of its relatives: "fashion" (Xiao et al. 2017) or "kmnist" (Clanuwat et al. 2018).
    """
    return data_loaders(*load_mnist(root, download, kind), batch_size, num_workers, binarization, train_size)


def load_data(args, download: bool = True, sampler: Callable | None = None) -> tuple[ImageLoader, ...]:
    """
    Returns the data loaders for the flags of train_pl.py, see bmnist and data_loaders. The validation set of your own
    file is its val_images. Without val_images, it is the last tenth of the training images (at most 5,000), or the same
    as MNIST's if there are 60,000 training images.
    """
    data, batch_size = load_images(args, download), args.batch_size // (args.devices * args.num_nodes)  # per process
    is_own = is_own_file(args.dataset)
    num_val = data.num_val if is_own else None
    train_size = None if is_own and (num_val or len(data[0]) != 60_000) else args.train_size
    loaders = data_loaders(*data[:4], batch_size, args.num_workers, args.binarization, train_size, sampler, num_val)
    if is_own:
        number = f"{len(loaders[1].dataset):,}"
        which = f"validation set: its {number} val_images" if num_val else f"validation set: the next {number} images"
        loaders[0].description = which + data.description
    return loaders


def save_grid(path: str | os.PathLike, dataset: BinaryImages):
    """Saves 32 images, evenly spread over a data set, as a PNG file. To the right of each is its binary version."""
    images = dataset.images[torch.arange(32) * (len(dataset) - 1) // 31]
    pairs = torch.stack([images.unsqueeze(1) / 255, binarize(images)], dim=1).flatten(0, 1)
    with atomic_write(path) as unfinished:
        save_image(pairs, unfinished, format="png", nrow=8, pad_value=0.5)


def main():
    flags = {name: DATA_FLAGS["data"][name] for name in ["dataset", "data_dir"]}
    parser = Parser(
        "Validates images and prints their splits; saves a picture of images other than MNIST's.", {"data": flags}
    )
    with exit_on_error(parser):
        args = Parser("", DATA_FLAGS).complete(parser.parse_args())  # with the defaults of the other flags
        loaders = load_data(Namespace(**vars(args), batch_size=1, devices=1, num_nodes=1))
        if kind := KINDS.get(args.dataset):
            folder = os.path.join(os.path.expanduser(args.data_dir), kind.__name__, "raw")
            print_line(f"{kind.__name__} in {folder}: all four files verified")
        else:
            print_line(describe_data(args, loaders))
        for split, loader in zip(["train", "validation", "test"], loaders):
            images = loader.dataset.images
            share_of_ones = (images > 127).sum().item() / images.numel()
            print_line(f"{split:10}  {len(images):6,} images  {share_of_ones:.2%} of the pixels are 1")
        if share_of_ones > 0.5:
            print_line("note: most pixels are 1. If the images are dark on a white background, store 255 - images")
        if not kind:
            print_line(f"labels      {describe_classes(loaders)}")
            path = f"{os.path.basename(args.dataset).removesuffix('.npz')}_grid.png"
            save_grid(path, loaders[0].dataset)
            print_line(f"32 training images, each with its binary version to its right: {path}")


if __name__ == "__main__":
    main()

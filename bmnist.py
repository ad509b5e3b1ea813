"""
MNIST as binary images in memory, split into training, validation and test set.

Run by itself, `python bmnist.py --data_dir DIR` fetches and checks the data ahead of time (the compute nodes of a
cluster often have no network), and prints the splits.
"""

import argparse
import contextlib
import http.client
import io
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import calculate_md5

# The four files, unpacked: MD5 and size in bytes. torchvision checks only the packed ones that it downloads itself.
FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", 47_040_016),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", 60_008),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", 7_840_016),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", 10_008),
}
TRAIN_SIZES = [45_000, 55_000]  # the assignment's, and all images but those of the validation set
NUM_VAL = 5_000
BINARIZATIONS = ["threshold", "stochastic"]
TIMEOUT = 20  # seconds without an answer until a download is given up; by default a firewall can hold it for minutes


class DataError(OSError):
    """The data is missing or damaged; the message is one line that says which file and what to do."""


class BinaryImages(Dataset):
    """Grey images and their labels as one tensor each, from which a whole batch is indexed at once."""

    def __init__(self, images, labels):
        """
        Inputs:
            images - uint8 tensor of shape [N,H,W], intensities; kept as it is, one byte per pixel.
            labels - int64 tensor of shape [N].
        """
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Binary image(s) float32 [...,1,H,W] and label(s) int64 [...] at an index or a tensor of indices."""
        return binarize(self.images[index]), self.labels[index]

    def __getitems__(self, indices):
        """What DataLoader asks for: the images and labels of a batch, by the list of their indices."""
        indices = torch.tensor(indices)
        return binarize(self.images.index_select(0, indices)), self.labels.index_select(0, indices)

    def to(self, device):
        """Moves the data set to a device, and returns it."""
        vars(self).update({name: tensor.to(device) for name, tensor in vars(self).items()})
        return self


class SampledImages(BinaryImages):
    """
    Images whose pixels are each drawn from Bernoulli(intensity / 255), as in most of the literature (Salakhutdinov &
    Murray 2008). `images` holds the drawn ones, as intensities 0 and 255.
    """

    def __init__(self, images, labels, seed=0):
        """
        Inputs:
            images, labels - As in BinaryImages; the images are left as they are.
            seed - Seed of the first draw, see redraw.
        """
        super().__init__(images.clone(), labels)
        self.grey = images.flatten().gt(0).logical_and_(images.flatten() < 255).nonzero().squeeze(1)
        self.intensities = images.flatten()[self.grey]  # the other pixels are what they are
        self.redraw(seed)

    def redraw(self, seed):
        """Draws all pixels anew, in place; the same seed gives the same ones again on the same kind of device."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        # Of 255 equally likely numbers, `intensity` are below it.
        numbers = torch.empty_like(self.intensities).random_(0, 255, generator=generator)
        self.images.view(-1)[self.grey] = torch.where(numbers < self.intensities, 255, 0).to(torch.uint8)


class RedrawingLoader(DataLoader):
    """
    A DataLoader of SampledImages that draws them anew for each pass: from its sampler's `draw_seed()` where it has one,
    else from torch's global random numbers.
    """

    def __iter__(self):
        self.redraw()
        return super().__iter__()

    def redraw(self):
        """Draws the images of a pass."""
        draw_seed = getattr(self.sampler, "draw_seed", None)
        self.dataset.redraw(draw_seed() if draw_seed else torch.randint(2**62, ()).item())


def binarize(images):
    """Intensities uint8 [...,H,W] to pixels float32 [...,1,H,W]: 1 where intensity / 255 > 0.5, else 0."""
    pixels = torch.empty(images.shape, device=images.device)
    return torch.gt(images, 127, out=pixels).unsqueeze(-3)  # without zeros and ones of another type in between


def already_a_batch(batch):
    """Collate function for BinaryImages, which indexes whole batches (by name: a lambda cannot go to a worker)."""
    return batch


def data_loaders(
    train_images,
    train_labels,
    test_images,
    test_labels,
    batch_size=128,
    num_workers=0,
    binarization="threshold",
    train_size=45_000,
    sampler=None,
):
    """
    Splits and binarises grey images: the first 45,000 or 55,000 train, the next 5,000 validate, the test images test.
    Inputs:
        train_images, train_labels - uint8 tensor of shape [N,28,28], int64 tensor of shape [N]
        test_images, test_labels - the same for the test images
        batch_size - Number of images per batch; the last batch of an epoch may be smaller.
        num_workers - Number of worker processes of each loader. With the images in memory, 0 is the fastest.
        binarization - "threshold", or "stochastic": each pixel is drawn from Bernoulli(intensity), anew for every pass
            over the training set, and always the same for validation and test.
        train_size - Number of training images, 45,000 or 55,000.
        sampler - Function of (dataset, shuffle) that returns a sampler, an iterable of indices; if None, torch's own.
    Outputs:
        train_loader, val_loader, test_loader - The first one is shuffled. Their batches are (imgs, labels): float32
            [B,1,28,28] of zeros and ones, and int64 [B].
    Raises:
        ValueError - where binarization or train_size is none of the possible values.
    """
    if binarization not in BINARIZATIONS or train_size not in TRAIN_SIZES:
        raise ValueError(
            f"binarization must be one of {BINARIZATIONS} and train_size one of {TRAIN_SIZES}, got "
            f"{binarization!r} and {train_size!r}"
        )
    Images, TrainLoader = BinaryImages, DataLoader
    if binarization == "stochastic":
        Images, TrainLoader = SampledImages, RedrawingLoader
    val_end = train_size + NUM_VAL
    splits = [
        (TrainLoader, Images(train_images[:train_size], train_labels[:train_size]), True),
        (DataLoader, Images(train_images[train_size:val_end], train_labels[train_size:val_end]), False),
        (DataLoader, Images(test_images, test_labels), False),
    ]
    loaders = []
    for Loader, split, shuffle in splits:
        order = {"shuffle": shuffle} if sampler is None else {"sampler": sampler(split, shuffle)}
        loaders.append(Loader(split, batch_size, **order, num_workers=num_workers, collate_fn=already_a_batch))
    return tuple(loaders)


def bmnist(root="../data/", batch_size=128, num_workers=0, download=True, binarization="threshold", train_size=45_000):
    """
    Returns data loaders for MNIST, binarised with a fixed threshold (the assignment's choice, simple and reproducible)
    or by sampling from the intensities (as in most of the literature).
    Inputs:
        root - Directory of the data; the files are in its subfolder MNIST/raw.
        batch_size - Number of images per batch
        num_workers - Number of worker processes of each loader
        download - If True, MNIST is downloaded where it is missing.
        binarization, train_size - See data_loaders.
    Outputs:
        train_loader, val_loader, test_loader - See data_loaders.
    Raises:
        DataError - where a file is missing and cannot be downloaded, or is not MNIST's.
    """
    return data_loaders(*load_mnist(root, download), batch_size, num_workers, binarization, train_size)


def load_mnist(root="../data/", download=True):
    """
    Finds, or downloads, the four files of MNIST and reads them after checking each one.
    Inputs:
        root, download - As in bmnist.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [60000,28,28], int64 tensor of shape [60000]
        test_images, test_labels - the same for the 10,000 test images
    Raises:
        DataError - As in bmnist.
    """
    folder = Path(root).expanduser() / "MNIST" / "raw"  # where torchvision's MNIST keeps them
    if missing_files(folder):
        problem = "download is switched off"
        if download:
            try:
                download_mnist(folder)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                problem = " ".join(str(error).split()) or repr(error)
        if missing := missing_files(folder):
            raise DataError(
                f"MNIST is not complete in {folder}: of the four files expected there ({', '.join(FILES)}), "
                f"{len(missing)} are missing and could not be downloaded ({problem}). Run `python bmnist.py "
                "--data_dir DIR` where there is a network, or train on the embedded stand-in with --dataset rendered"
            )
    for name in FILES:
        check_file(folder / name)
    return (
        read_image_file(folder / "train-images-idx3-ubyte"),
        read_label_file(folder / "train-labels-idx1-ubyte"),
        read_image_file(folder / "t10k-images-idx3-ubyte"),
        read_label_file(folder / "t10k-labels-idx1-ubyte"),
    )


def missing_files(folder):
    """The names of MNIST's four files that are not in a folder."""
    return [name for name in FILES if not (folder / name).is_file()]


def download_mnist(folder):
    """
    Downloads the missing files of MNIST into a folder. Several processes may do so at once: one downloads, the others
    wait for it. Each file appears under its name only when it is complete and torchvision has verified it.
    Inputs:
        folder - Path of the folder.
    Raises:
        OSError, RuntimeError, HTTPException - whatever torchvision met.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = missing_files(folder)
        if not missing:
            return  # another process was faster
        print(f"Downloading MNIST to {folder}", flush=True)
        unfinished = folder / ".download"
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        staged = unfinished / "MNIST" / "raw"
        staged.mkdir(parents=True)
        for packed in folder.glob("*.gz"):  # brought along by hand: torchvision verifies and unpacks them
            shutil.copy(packed, staged)
        default_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                MNIST(unfinished, download=True)
            for name in missing:
                os.replace(staged / name, folder / name)
        finally:
            socket.setdefaulttimeout(default_timeout)
            shutil.rmtree(unfinished, ignore_errors=True)


def check_file(path):
    """Raises a DataError that says what is wrong, unless the file at a path is MNIST's file of that name."""
    md5, size = FILES[path.name]
    found_md5, found_size = calculate_md5(path), path.stat().st_size
    if found_md5 == md5:
        return
    with open(path, "rb") as file:
        magic, found_magic = 2051 if "images" in path.name else 2049, int.from_bytes(file.read(4), "big")
    twins = [name for name in FILES if FILES[name][0] == found_md5]
    if twins:
        problem = f"it holds {twins[0]} (files swapped?)"
    elif found_magic != magic:
        problem = f"it begins with the number {found_magic} instead of {magic} (not an unpacked file of this kind?)"
    elif found_size != size:
        problem = f"it has {found_size:,} bytes instead of {size:,} (truncated?)"
    else:
        problem = f"its MD5 checksum is {found_md5} instead of {md5} (damaged?)"
    raise DataError(f"{path} is not MNIST's: {problem}. Delete it, and it will be downloaded again")


def main():
    parser = argparse.ArgumentParser(
        description="Fetches MNIST, checks it and prints its splits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="../data/", help="Directory of the data, which go to MNIST/raw in it")
    args = parser.parse_args()
    try:
        loaders = bmnist(args.data_dir)
    except OSError as error:
        sys.exit(f"bmnist.py: error: {error}")
    print(f"MNIST in {Path(args.data_dir).expanduser() / 'MNIST' / 'raw'}: all four files verified")
    for name, loader in zip(["train", "validation", "test"], loaders):
        images = loader.dataset.images
        print(f"{name:10}  {len(images):6,} images  ink {binarize(images).mean().item():.2%}")


if __name__ == "__main__":
    main()

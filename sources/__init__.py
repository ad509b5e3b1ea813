"""The sources of images: a table of data sets, or your own .npz file."""

import argparse
import contextlib

import torch
from torch import Tensor

from harness.errors import DataError
from harness.files import checksum
from harness.flags import Flag, complete_file
from sources.mnist_files import KINDS, load_mnist
from sources.npz_file import OwnImages, load_file, open_dataset_file
from sources.rendered_digits import rendered_mnist

TRAIN_SIZES = [45_000, 55_000]  # the assignment's, and all of MNIST except the validation set
NUM_VAL = 5_000
DATASET_CHECKSUM = "dataset_sha256"  # a flag that complete_dataset sets: the checksum of your own file
BINARIZATIONS = ["threshold", "stochastic"]
# Functions of (args, download) that return train_images, train_labels, test_images and test_labels, see load_mnist.
SOURCES = {
    **{kind: lambda args, download, kind=kind: load_mnist(args.data_dir, download, kind) for kind in KINDS},
    "rendered": lambda args, download: rendered_mnist(args.train_size + NUM_VAL),  # as many as are needed
}
DATASET_NAMES = f"{', '.join(SOURCES)}, or the path of an .npz file"


def is_own_file(dataset: str) -> bool:
    """Returns whether a value of the flag --dataset is the path of your own file."""
    return dataset.endswith(".npz")


def parse_dataset(value):
    """Returns the value of the flag --dataset. Raises a ValueError that lists the possible values if it is invalid."""
    if isinstance(value, str) and (value in SOURCES or is_own_file(value)):
        return value
    raise ValueError(f"one of {DATASET_NAMES}")


DATA_FLAGS = {
    "data": {
        "dataset": Flag("mnist", f"Images: {DATASET_NAMES}", parse=parse_dataset),
        "data_dir": Flag("../data/", "Directory that contains MNIST/raw; missing files are downloaded"),
        "binarization": Flag("threshold", "Pixels: 1 if intensity > 0.5, or sampled in every epoch", BINARIZATIONS),
        "train_size": Flag(TRAIN_SIZES[0], "Training images; the next 5,000 are the validation set", TRAIN_SIZES),
        "num_workers": Flag(0, "Worker processes per data loader; 0 is the fastest (images are in memory)", minimum=0),
    }
}


def complete_dataset(args: argparse.Namespace):
    """
    Adds to the flags what identifies your own file: its absolute path, and the SHA-256 checksum of its content. Raises
    a DataError if the file cannot be read.
    """
    if is_own_file(args.dataset):
        complete_file(args, "dataset", open_dataset_file)
    else:
        vars(args).pop(DATASET_CHECKSUM, None)  # from the flags of another run


def find_file(paths, sha256: str):
    """Returns the first of the paths whose file has this checksum, or None."""
    for path in paths:
        with contextlib.suppress(DataError), open_dataset_file(path) as file:
            if checksum(file) == sha256:
                return path
    return None


def load_images(args: argparse.Namespace, download: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor] | OwnImages:
    """
    Loads the images that the flags ask for.
    Inputs:
        args - Namespace of the flags dataset and data_dir, and of train_size for rendered digits.
        download - See load_mnist.
    Outputs:
        train_images, train_labels, test_images, test_labels - See load_mnist; for your own file, an OwnImages.
    """
    if is_own_file(args.dataset):
        return load_file(args.dataset, vars(args).get(DATASET_CHECKSUM))
    return SOURCES[args.dataset](args, download)


def describe_data(args: argparse.Namespace, loaders: tuple) -> str:
    """Describes the training data for a run's first line; for your own file, with image size and splits."""
    train = loaders[0].dataset
    text = f"{args.dataset}, {len(train):,} training images"
    if is_own_file(args.dataset):
        text += f" of {'x'.join(map(str, train.images.shape[1:]))}, {loaders[0].description}"
    return text


def describe_classes(loaders: tuple) -> str:
    """Describes the classes of the labels in all data sets: their number, and the first and the last one."""
    classes = torch.cat([loader.dataset.labels for loader in loaders]).unique().tolist()
    if classes[0] < 0:
        return "none, so the latent space has no colours"
    return f"{len(classes)} classes, from {classes[0]} to {classes[-1]}"

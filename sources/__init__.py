"""Where images come from: a table of sources, or your own .npz file."""

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

TRAIN_SIZES = [45_000, 55_000]  # the assignment's, and all of MNIST's images but those of the validation set
NUM_VAL = 5_000
DATASET_CHECKSUM = "dataset_sha256"  # a flag that no one gives: the checksum of your own file identifies it
BINARIZATIONS = ["threshold", "stochastic"]
# Functions of (args, download) that return train_images, train_labels, test_images and test_labels, see load_mnist.
SOURCES = {
    **{kind: lambda args, download, kind=kind: load_mnist(args.data_dir, download, kind) for kind in KINDS},
    "rendered": lambda args, download: rendered_mnist(args.train_size + NUM_VAL),  # as many as are needed
}
NAMES = f"{', '.join(SOURCES)}, or the path of an .npz file"


def is_own_file(dataset: str) -> bool:
    """Whether the flag --dataset names your own file."""
    return dataset.endswith(".npz")


def parse_dataset(value):
    """The value of the flag --dataset. Raises a ValueError that says what it must be."""
    if isinstance(value, str) and (value in SOURCES or is_own_file(value)):
        return value
    raise ValueError(f"one of {NAMES}")


DATA_FLAGS = {
    "data": {
        "dataset": Flag("mnist", f"Images: {NAMES}", parse=parse_dataset),
        "data_dir": Flag("../data/", "Directory that contains MNIST/raw; what is missing there is downloaded"),
        "binarization": Flag("threshold", "Pixels: intensity above 0.5, or sampled for every epoch", BINARIZATIONS),
        "train_size": Flag(TRAIN_SIZES[0], "Number of training images; the 5,000 after them validate", TRAIN_SIZES),
        "num_workers": Flag(0, "Worker processes per loader; the images are in memory, so 0 is the fastest", minimum=0),
    }
}


def complete_dataset(args: argparse.Namespace):
    """
    Completes the flags by what identifies your own file: its absolute path, and the SHA-256 checksum of its content.
    Raises a DataError if it cannot be read.
    """
    if is_own_file(args.dataset):
        complete_file(args, "dataset", open_dataset_file)
    else:
        vars(args).pop(DATASET_CHECKSUM, None)  # of another run's flags


def find_file(paths, sha256: str):
    """The first one of paths with a file of that checksum; None if there is none."""
    for path in paths:
        with contextlib.suppress(DataError), open_dataset_file(path) as file:
            if checksum(file) == sha256:
                return path
    return None


def load_images(args: argparse.Namespace, download: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor] | OwnImages:
    """
    Loads the images that the flags ask for.
    Inputs:
        args - Namespace of the flags dataset and data_dir; and train_size, for rendered digits.
        download - As in load_mnist.
    Outputs:
        train_images, train_labels, test_images, test_labels - As load_mnist returns them; of your own file OwnImages.
    """
    if is_own_file(args.dataset):
        return load_file(args.dataset, vars(args).get(DATASET_CHECKSUM))
    return SOURCES[args.dataset](args, download)


def describe_data(args: argparse.Namespace, loaders: tuple) -> str:
    """What a run trains on, for its first line: of your own file, whose sizes nobody knows by heart, these too."""
    train = loaders[0].dataset
    text = f"{args.dataset}, {len(train):,} training images"
    if is_own_file(args.dataset):
        text += f" of {'x'.join(map(str, train.images.shape[1:]))}, {loaders[0].reading}"
    return text


def describe_classes(loaders: tuple) -> str:
    """How many classes the labels of all data sets have, and which numbers, for people."""
    classes = torch.cat([loader.dataset.labels for loader in loaders]).unique().tolist()
    if classes[0] < 0:
        return "none, so the latent space has no colours"
    return f"{len(classes)} classes, from {classes[0]} to {classes[-1]}"

"""Where images come from: one table of sources, or a file of one's own."""

import contextlib
import functools
import hashlib
import os
import zipfile

import numpy as np
import torch

from bmnist import BINARIZATIONS, KINDS, NUM_VAL, TRAIN_SIZES, DataError, data_loaders, load_mnist
from sources.rendered_digits import rendered_mnist

MIN_IMAGES = 100  # in a file of one's own
NO_LABEL = -1  # of each image where there are none
PARTS = ["train_images", "train_labels", "test_images", "test_labels"]


def rendered(args, download):
    """Digits rendered from fonts; as many as MNIST's splits need."""
    return rendered_mnist(args.train_size + NUM_VAL)


def from_kind(kind, args, download):
    """MNIST, or one of its relatives, from data_dir; downloaded where missing."""
    return load_mnist(args.data_dir, download, kind)


# Functions of (args, download) that return train_images, train_labels, test_images and test_labels, see load_mnist.
SOURCES = {**{kind: functools.partial(from_kind, kind) for kind in KINDS}, "rendered": rendered}
NAMES = f"{', '.join(SOURCES)}, or the path of an .npz file"


def known_dataset(value):
    """The value of the flag --dataset. Raises a ValueError that says what it must be."""
    if isinstance(value, str) and (value in SOURCES or is_file(value)):
        return value
    raise ValueError(f"one of {NAMES}")


# As in train_pl.py.
DATA_FLAGS = {
    "data": {
        "dataset": ("mnist", known_dataset, f"Images: {NAMES}"),
        "data_dir": ("../data/", None, "Directory of MNIST, which is in MNIST/raw; downloaded where missing"),
        "binarization": ("threshold", BINARIZATIONS, "Pixels: intensity above 0.5, or drawn anew for every epoch"),
        "train_size": (TRAIN_SIZES[0], TRAIN_SIZES, "Number of training images; the 5,000 after them validate"),
        "num_workers": (0, 0, "Worker processes per data loader; the images are in memory, so 0 is the fastest"),
    }
}


def is_file(dataset):
    """Whether the flag --dataset names a file of one's own."""
    return dataset.endswith(".npz")


def complete_dataset(args):
    """
    Completes the flags by what tells a file of one's own from others: its absolute path, and the SHA-256 checksum of
    its content, dataset_sha256. Raises a DataError where it cannot be read.
    """
    vars(args).pop("dataset_sha256", None)  # of another run's flags
    if is_file(args.dataset):
        args.dataset = os.path.abspath(os.path.expanduser(args.dataset))
        args.dataset_sha256 = checksum(args.dataset)


def checksum(path):
    """The SHA-256 checksum of a file. Raises a DataError where it cannot be read."""
    with opened(path) as file:
        return checksum_of(file)


def checksum_of(file):
    """The same of an open file, which is read in blocks: it may be larger than the memory."""
    digest = hashlib.sha256()
    for block in iter(functools.partial(file.read, 2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def find_file(paths, sha256):
    """The first one of paths where a file of that checksum is; None where there is none."""
    for path in paths:
        with contextlib.suppress(DataError):
            if checksum(path) == sha256:
                return path
    return None


def load_data(args, download=True, sampler=None):
    """
    The loaders of training, validation and test set that the flags ask for.
    Inputs:
        args - Namespace of the flags of train_pl.py.
        download, sampler - As in bmnist.load_mnist and bmnist.data_loaders.
    Outputs:
        train_loader, val_loader, test_loader - As of bmnist.data_loaders. Of a file of one's own with another number of
            training images than MNIST's, the last tenth validates, but 5,000 at most.
    Raises:
        DataError - where the data is missing, damaged, or of no use.
    """
    train_size = args.train_size
    if is_file(args.dataset):
        data = load_file(args.dataset, vars(args).get("dataset_sha256"))
        train_size = train_size if len(data[0]) == 60_000 else None
    else:
        data = SOURCES[args.dataset](args, download)
    batch_size = args.batch_size // (args.devices * args.num_nodes)  # that of each process
    return data_loaders(*data, batch_size, args.num_workers, args.binarization, train_size, sampler)


@contextlib.contextmanager
def opened(path):
    """A file to read from. Raises a DataError where it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            yield file
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"--dataset {path} cannot be read ({error.strerror}): give {NAMES}") from error


def load_file(path, sha256=None):
    """
    The images of an .npz file of NumPy's, as np.savez writes it.
    Inputs:
        path - Path of the file. It holds train_images and test_images, uint8 arrays of shape [N,H,W] with intensities
            from 0 to 255, and may hold train_labels and test_labels, whole numbers of shape [N] from 0 on.
        sha256 - The checksum that it must have, see complete_dataset; None: any.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [N,H,W], int64 tensor of shape [N]; labels that the file
            lacks are -1.
        test_images, test_labels - The same for the test images.
    Raises:
        DataError - where the file is damaged, has changed, or holds something else.
    """
    with opened(path) as file:
        if sha256 is not None and checksum_of(file) != sha256:
            raise DataError(f"{path} has changed since the command began: give the same command again")
        file.seek(0)
        if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle
            raise DataError(f"{path} is no .npz file of plain arrays, which np.savez writes")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as content:
                arrays = {name: np.ascontiguousarray(content[name]) for name in PARTS if name in content.files}
        except MemoryError as error:
            raise DataError(f"the memory is too small for {path}, or it is damaged ({error!r})") from error
        except Exception as error:  # a damaged file may raise anything
            raise DataError(f"{path} is no .npz file of plain arrays ({' '.join(str(error).split())})") from error
    if problem := what_is_wrong(arrays):
        raise DataError(f"{path} is of no use: {problem}")
    images = {name: torch.from_numpy(arrays[name]) for name in PARTS[::2]}
    for name, part in zip(PARTS[1::2], PARTS[::2]):
        labels = arrays.get(name, np.full(len(images[part]), NO_LABEL))
        images[name] = torch.from_numpy(labels.astype(np.int64))
    return tuple(images[name] for name in PARTS)


def what_is_wrong(arrays):
    """What is wrong with the arrays of a file, by name; None where nothing is."""
    for name in PARTS[::2]:
        images = arrays.get(name)
        if images is None:
            return f"it lacks {name}, a uint8 array of shape [N,H,W]"
        if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape[1:]:
            return f"its {name} is {images.dtype} of shape {list(images.shape)}, and must be uint8 of shape [N,H,W]"
        if len(images) < MIN_IMAGES:
            return f"its {name} has {len(images)} images, and must have {MIN_IMAGES} or more"
        if images.max() <= 127:
            return f"no pixel of its {name} is above 127: intensities go from 0 to 255, white being 255"
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape[1:] != test.shape[1:]:
        return f"its images are of {size(train)} and of {size(test)} pixels, and must all be of one size"
    if ("train_labels" in arrays) != ("test_labels" in arrays):
        return "it has labels of one part alone: give both train_labels and test_labels, or none"
    for name, images in [("train_labels", train), ("test_labels", test)]:
        labels = arrays.get(name)
        if labels is None:
            continue
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            return (
                f"its {name} is {labels.dtype} of shape {list(labels.shape)}, and must be whole numbers, {len(images)}"
            )
        if labels.min() < 0 or labels.max() > 255:
            return f"its {name} goes from {labels.min()} to {labels.max()}, and must be within 0 and 255"
    return None


def size(images):
    """Height and width of images, as text."""
    return "x".join(map(str, images.shape[1:]))

"""Your own images in an .npz file: read and validated."""

import contextlib
import functools
import hashlib
import os
import zipfile

import numpy as np
import torch
from torch import Tensor

from harness.errors import DataError

MIN_IMAGES = 100  # of each part
PARTS = ["train_images", "train_labels", "test_images", "test_labels"]


@contextlib.contextmanager
def opened(path):
    """A file to read from. Raises a DataError if it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"--dataset {path} cannot be read ({error.strerror}): give the path of an .npz file") from error


def checksum(file) -> str:
    """The SHA-256 checksum of an open file, which is read in blocks: it may be larger than the memory."""
    digest = hashlib.sha256()
    for block in iter(functools.partial(file.read, 2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def load_file(path: str, sha256: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Loads the images of an .npz file of NumPy's, as np.savez writes it.
    Inputs:
        path - Path of the file. It contains train_images and test_images, uint8 arrays of shape [N,H,W], and may
            contain train_labels and test_labels, integers of shape [N] from 0 to 255.
        sha256 - The checksum that it must have; None: any.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [N,H,W], int64 tensor of shape [N]; if the file has no
            labels, all are -1.
        test_images, test_labels - The same for the test images.
    Raises:
        DataError - if the file is damaged, has changed, or contains something else.
    """
    with opened(path) as file:
        if sha256 is not None and checksum(file) != sha256:
            raise DataError(f"{path} has changed since the command began: give the same command again")
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
        raise DataError(f"{path} is invalid: {problem}")
    for part in ["train", "test"]:
        labels = arrays.get(f"{part}_labels", np.full(len(arrays[f"{part}_images"]), -1))
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    return tuple(torch.from_numpy(arrays[name]) for name in PARTS)


def what_is_wrong(arrays: dict) -> str | None:
    """What is wrong with the arrays of a file, by name; None if nothing is."""
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
    sizes = [f"{height}x{width}" for _, height, width in (arrays[name].shape for name in PARTS[::2])]
    if sizes[0] != sizes[1]:
        return f"its images are of {sizes[0]} and of {sizes[1]} pixels, and must all be of one size"
    if ("train_labels" in arrays) != ("test_labels" in arrays):
        return "it has labels of one part alone: give both train_labels and test_labels, or none"
    for name in [name for name in PARTS[1::2] if name in arrays]:
        labels, number = arrays[name], len(arrays[name.replace("labels", "images")])
        if labels.shape != (number,) or not np.issubdtype(labels.dtype, np.integer):
            return f"its {name} is {labels.dtype} of shape {list(labels.shape)}, and must be {number} integers"
        if labels.min() < 0 or labels.max() > 255:
            return f"its {name} goes from {labels.min()} to {labels.max()}, and must be within 0 and 255"
    return None

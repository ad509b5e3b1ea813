"""Your own images in an .npz file: read and validated."""

import contextlib
import os
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.errors import DataError
from harness.files import checksum

MIN_IMAGES = 100  # of the training and the test images
KERAS = {"x": "images", "y": "labels"}  # x_train, y_train ..., as in its mnist.npz
PARTS = ["train_images", "train_labels", "test_images", "test_labels"]
NAMES = {name: name for name in [*PARTS, "val_images", "val_labels"]}  # those of MedMNIST, too
NAMES |= {f"{kind}_{part}": f"{part}_{name}" for part in ["train", "val", "test"] for kind, name in KERAS.items()}


@contextlib.contextmanager
def open_dataset_file(path):
    """A file to read from. Raises a DataError if it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"--dataset {path} cannot be read ({error.strerror}): give the path of an .npz file") from error


class OwnImages(NamedTuple):
    """The images of your own file. The validation images, if it has any, are the last ones of the training images."""

    train_images: Tensor  # uint8 [N,H,W], 0 to 255
    train_labels: Tensor  # int64 [N]; if the file has no labels, all are -1
    test_images: Tensor
    test_labels: Tensor
    num_val: int | None  # number of validation images; None if the file does not say which these are
    reading: str  # how arrays were read that are not simply of these types and shapes, for people


def load_file(path: str, sha256: str | None = None) -> OwnImages:
    """
    Loads the images of an .npz file of NumPy's, as np.savez writes it.
    Inputs:
        path - Path of the file. It contains train_images and test_images and may contain train_labels, test_labels,
            val_images and val_labels (x_train, y_train ... are the same), as uint8 images of shape [N,H,W] and integer
            labels of shape [N] from 0 to 255, or as `to_grey` and `to_label_vector` turn into these.
        sha256 - The checksum that it must have; None: any.
    Outputs:
        images - The OwnImages.
    Raises:
        DataError - if the file is damaged, has changed, or contains something else.
    """
    with open_dataset_file(path) as file:
        if sha256 is not None and checksum(file) != sha256:
            raise DataError(f"{path} has changed since the command began: give the same command again")
        if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle
            raise DataError(f"{path} is no .npz file of plain arrays, which np.savez writes")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as content:
                names = content.files
                arrays = {name: np.ascontiguousarray(content[name]) for name in names if name in NAMES}
        except MemoryError as error:
            raise DataError(f"the memory is too small for {path}, or it is damaged ({error!r})") from error
        except Exception as error:  # a damaged file may raise anything
            raise DataError(f"{path} is no .npz file of plain arrays ({' '.join(str(error).split())})") from error
    try:
        return read_arrays(arrays, names)
    except MemoryError as error:
        raise DataError(f"the memory is too small for {path} ({error})") from error
    except ValueError as error:
        raise DataError(f"{path} is invalid: {error}") from error


def read_arrays(given: dict, names: list) -> OwnImages:
    """
    Turns arrays into OwnImages. Raises a ValueError that says what is wrong with them.
    Inputs:
        given - Dict of the arrays by name. It is emptied, so that each array can be freed when it has been read.
        names - Names of all arrays of the file.
    """
    arrays, notes = {NAMES[name]: array for name, array in given.items()}, []
    if len(arrays) < len(given):
        raise ValueError(f"it has both kinds of names, {' and '.join(sorted(given))}: leave one of them out")
    given.clear()
    for part, minimum in [("train", MIN_IMAGES), ("test", MIN_IMAGES), ("val", 1)]:
        images, labels = f"{part}_images", f"{part}_labels"
        if images in arrays:
            arrays[images] = to_grey(arrays[images], f"its {images}", minimum, notes)
            array = arrays.get(labels, np.full(len(arrays[images]), -1))
            arrays[labels] = to_label_vector(array, f"its {labels}", len(arrays[images]), notes)
        elif part != "val":
            found = join_names(names, 200) or "no arrays"
            raise ValueError(f"it lacks {images} (or x_{part}), images of shape [N,H,W]; it has {found}")
        else:
            arrays.pop(labels, None)
    sizes = [arrays[name].shape[1:] for name in arrays if name.endswith("images")]
    if len({*sizes}) > 1:
        both = " and of ".join(f"{height}x{width}" for height, width in dict.fromkeys(sizes))
        raise ValueError(f"its images are of {both} pixels, and must all be of one size")
    if len({labels.max() < 0 for name, labels in arrays.items() if name.endswith("labels")}) > 1:
        raise ValueError("it has labels of some parts alone: give labels of every part, or none")
    num_val = len(arrays["val_images"]) if "val_images" in arrays else None
    not_used = join_names([name for name in names if NAMES.get(name) not in arrays], 60)
    for kind in ["images", "labels"] if num_val else []:
        arrays[f"train_{kind}"] = np.concatenate([arrays[f"train_{kind}"], arrays.pop(f"val_{kind}")])
    tensors = [torch.from_numpy(arrays[name]) for name in PARTS]
    reading = "".join(f", {note}" for note in dict.fromkeys(notes))
    return OwnImages(*tensors, num_val, reading + (f" (not used: {not_used})" if not_used else ""))


def join_names(names: list, length: int) -> str:
    """Names on one line, of which those after `length` characters are left out."""
    text = "".join(letter if letter.isprintable() else "?" for letter in ", ".join(names))
    return text if len(text) <= length else f"{text[:length]}..."


def to_grey(images: np.ndarray, name: str, minimum: int, notes: list) -> np.ndarray:
    """
    Images as uint8 [N,H,W]. Raises a ValueError if they are invalid or could mean two things.
    Inputs:
        images - Array of shape [N,H,W], or with one channel or three (RGB), first or last in each image. Its values are
            numbers from 0 to 255, floats from 0 to 1, or bool.
        name - What messages call them.
        minimum - How many there must be at least.
        notes - List to which a line for people is added for each conversion.
    """
    found = f"{name} is {images.dtype} of shape {list(images.shape)}"
    channels = [axis for axis in (1, 3) if images.ndim == 4 and images.shape[axis] in (1, 3)]
    if images.ndim not in (3, 4) or 0 in images.shape[1:] or (images.ndim == 4 and len(channels) != 1):
        raise ValueError(f"{found}, and must be of shape [N,H,W], [N,H,W,1] or [N,H,W,3]")
    if len(images) < minimum:
        raise ValueError(f"{name} has {len(images)} images, and must have {minimum} or more")
    low, high = images.min(), images.max()
    if images.dtype == bool:
        images = images.view(np.uint8) * np.uint8(255)
        notes.append("bool read as black and white")
    elif images.dtype.kind == "f" and low >= 0 and high <= 1:
        images = apply_in_blocks(images, lambda block: (block * 255).round())
        notes.append("floats from 0 to 1 read as intensities")
    elif images.dtype.kind not in "iuf" or not 0 <= low <= high <= 255:
        possible = "whole numbers from 0 to 255, floats from 0 to 1, or bool"
        raise ValueError(f"{found} with values from {low} to {high}, and must be {possible}")
    elif high == 1:
        raise ValueError(f"{name} has the values 0 and 1 alone: store {name.split()[-1]} == 1, or 255 times it")
    elif images.dtype.kind == "f":
        images = apply_in_blocks(images, np.round)
    images = images.astype(np.uint8, copy=False)
    if channels:
        images = np.moveaxis(images, channels[0], -1)
        if images.shape[-1] == 3:
            weights = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as in PIL
            images = apply_in_blocks(images, lambda block: (block @ weights).round())
            notes.append("RGB turned to grey")
        images = images.reshape(images.shape[:3])
    if images.max() <= 127:
        values = f"its values go from {low} to {high}"
        raise ValueError(f"no pixel of {name} is above 127 ({values}): intensities go from 0 to 255, white being 255")
    if images.min() > 127:
        raise ValueError(
            f"every pixel of {name} is above 127 (its values go from {low} to {high}), so all would be white"
        )
    constant = int((images.min(axis=(1, 2)) == images.max(axis=(1, 2))).sum())
    if constant == len(images):
        raise ValueError(f"every image of {name} is of a single intensity (of 16 bits per pixel, or transparent?)")
    if constant:
        notes.append(f"{constant:,} {name.split()[-1]} of a single intensity")
    return np.ascontiguousarray(images)


def apply_in_blocks(images: np.ndarray, function: Callable) -> np.ndarray:
    """Applies a function to some images at a time, so that the memory for floats is bounded. Returns them as uint8."""
    blocks = np.array_split(images, images.size // 2**22 + 1)
    result = np.empty((len(images), *function(blocks[0][:1]).shape[1:]), np.uint8)
    for block, part in zip(blocks, np.array_split(result, len(blocks))):
        part[:] = function(block)
    return result


def to_label_vector(labels: np.ndarray, name: str, number: int, notes: list) -> np.ndarray:
    """
    Labels as int64 [N]; several labels per image, [N,K], become -1, none. Raises a ValueError if they are invalid.
    Inputs:
        labels - Array of integers from 0 to 255, of shape [N], [N,1] or [N,K]; -1 are no labels.
        name - What messages call them.
        number - N, the number of the images.
        notes - List to which a line for people is added if there are several labels per image.
    """
    if labels.shape[:1] != (number,) or labels.ndim > 2 or labels.dtype.kind not in "iub" or not labels.size:
        raise ValueError(f"{name} is {labels.dtype} of shape {list(labels.shape)}, and must be {number} integers")
    if labels.ndim == 2 and labels.shape[1] > 1:
        notes.append("several labels per image, so without colours")
        return np.full(number, -1)
    if (labels.min() < 0 or labels.max() > 255) and (labels != -1).any():
        raise ValueError(f"{name} goes from {labels.min()} to {labels.max()}, and must be within 0 and 255")
    return labels.reshape(number).astype(np.int64)

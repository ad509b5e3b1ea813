"""Reads and validates your own images in an .npz file."""

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

MIN_IMAGES = 100  # minimum number of training images and of test images
KERAS = {"x": "images", "y": "labels"}  # x_train, y_train and so on, as in Keras' mnist.npz
PARTS = ["train_images", "train_labels", "test_images", "test_labels"]
ARRAY_NAMES = {name: name for name in [*PARTS, "val_images", "val_labels"]}  # also MedMNIST's names
ARRAY_NAMES |= {f"{kind}_{part}": f"{part}_{name}" for part in ["train", "val", "test"] for kind, name in KERAS.items()}


@contextlib.contextmanager
def open_dataset_file(path):
    """Context manager that opens a file for reading. Raises a DataError if the file cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"--dataset {path} cannot be read ({error.strerror}): give the path of an .npz file") from error


class OwnImages(NamedTuple):
    """The images of your own file. If it has validation images, they are the last ones of the training images."""

    train_images: Tensor  # uint8 [N,H,W], 0 to 255
    train_labels: Tensor  # int64 [N]; if the file has no labels, all are -1
    test_images: Tensor
    test_labels: Tensor
    num_val: int | None  # number of validation images; None if the file has no val_images
    description: str  # how other types and shapes were converted, and what was not used; printed


def load_file(path: str, sha256: str | None = None) -> OwnImages:
    """
    Loads the images of an .npz file, as np.savez writes it.
    Inputs:
        path - Path of the file. It must contain train_images and test_images and may contain train_labels, test_labels,
            val_images and val_labels; the names x_train, y_train and so on are valid, too. Images are uint8 of shape
            [N,H,W]; labels are integers from 0 to 255 of shape [N]. `to_grey` and `to_label_vector` convert some other
            types and shapes.
        sha256 - The checksum that the file must have; None accepts any file.
    Outputs:
        images - The OwnImages.
    Raises:
        DataError - if the file is damaged, has changed, or contains something else.
    """
    with open_dataset_file(path) as file:
        if sha256 is not None and checksum(file) != sha256:
            raise DataError(f"{path} has changed since the command began: give the same command again")
        if not zipfile.is_zipfile(file):  # NumPy would try to read it as a pickle
            raise DataError(f"{path} is not an .npz file of plain arrays, as np.savez writes it")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as content:
                names = content.files
                arrays = {name: np.ascontiguousarray(content[name]) for name in names if name in ARRAY_NAMES}
        except MemoryError as error:
            raise DataError(f"out of memory while reading {path}, or the file is damaged ({error!r})") from error
        except Exception as error:  # a damaged file can raise any exception
            raise DataError(f"{path} is not an .npz file of plain arrays ({' '.join(str(error).split())})") from error
    try:
        return read_arrays(arrays, names)
    except MemoryError as error:
        raise DataError(f"out of memory while reading {path} ({error})") from error
    except ValueError as error:
        raise DataError(f"{path} is invalid: {error}") from error


def read_arrays(given: dict, names: list) -> OwnImages:
    """
    Converts arrays to OwnImages. Raises a ValueError that says what is wrong with the arrays.
    Inputs:
        given - Dict from name to array. It is emptied, so that each array can be freed after its conversion.
        names - Names of all arrays of the file.
    """
    arrays, notes = {ARRAY_NAMES[name]: array for name, array in given.items()}, []
    if len(arrays) < len(given):
        raise ValueError(f"it has both kinds of names, {' and '.join(sorted(given))}: use only one kind")
    given.clear()
    for part, minimum in [("train", MIN_IMAGES), ("test", MIN_IMAGES), ("val", 1)]:
        images, labels = f"{part}_images", f"{part}_labels"
        if images in arrays:
            arrays[images] = to_grey(arrays[images], f"its {images}", minimum, notes)
            array = arrays.get(labels, np.full(len(arrays[images]), -1))
            arrays[labels] = to_label_vector(array, f"its {labels}", len(arrays[images]), notes)
        elif part != "val":
            found = join_names(names, 200) or "no arrays"
            raise ValueError(f"it lacks {images} (or x_{part}), images of shape [N,H,W]; it contains {found}")
        else:
            arrays.pop(labels, None)
    sizes = [arrays[name].shape[1:] for name in arrays if name.endswith("images")]
    if len({*sizes}) > 1:
        both = " and of ".join(f"{height}x{width}" for height, width in dict.fromkeys(sizes))
        raise ValueError(f"its images are of {both} pixels, but must all have the same size")
    if len({labels.max() < 0 for name, labels in arrays.items() if name.endswith("labels")}) > 1:
        raise ValueError("it has labels for only some of its parts: give labels for every part, or for no part")
    num_val = len(arrays["val_images"]) if "val_images" in arrays else None
    not_used = join_names([name for name in names if ARRAY_NAMES.get(name) not in arrays], 60)
    for kind in ["images", "labels"] if num_val else []:
        arrays[f"train_{kind}"] = np.concatenate([arrays[f"train_{kind}"], arrays.pop(f"val_{kind}")])
    tensors = [torch.from_numpy(arrays[name]) for name in PARTS]
    description = "".join(f", {note}" for note in dict.fromkeys(notes))
    return OwnImages(*tensors, num_val, description + (f" (arrays not used: {not_used})" if not_used else ""))


def join_names(names: list, length: int) -> str:
    """Joins names on one line, which is cut off after `length` characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in ", ".join(names))
    return text if len(text) <= length else f"{text[:length]}..."


def to_grey(images: np.ndarray, name: str, minimum: int, notes: list) -> np.ndarray:
    """
    Converts images to uint8 [N,H,W]. Raises a ValueError if they are invalid or ambiguous.
    Inputs:
        images - Array of shape [N,H,W], or with one channel or three (RGB), first or last in each image. Its values are
            numbers from 0 to 255, floats from 0 to 1, or bool.
        name - Name of the images for messages.
        minimum - Minimum number of images.
        notes - List to which a description of each conversion is added.
    """
    found = f"{name} is {images.dtype} of shape {list(images.shape)}"
    channels = [axis for axis in (1, 3) if images.ndim == 4 and images.shape[axis] in (1, 3)]
    if images.ndim not in (3, 4) or 0 in images.shape[1:] or (images.ndim == 4 and len(channels) != 1):
        raise ValueError(f"{found}, but must be of shape [N,H,W], [N,H,W,1] or [N,H,W,3]")
    if len(images) < minimum:
        raise ValueError(f"{name} has {len(images)} images, but must have at least {minimum}")
    possible = "whole numbers from 0 to 255, floats from 0 to 1, or bool"
    if images.dtype.kind not in "biuf":  # such as strings, which have no minimum
        raise ValueError(f"{found}, but must contain {possible}")
    low, high = images.min(), images.max()
    if images.dtype == bool:
        images = images.view(np.uint8) * np.uint8(255)
        notes.append("bool read as black and white")
    elif images.dtype.kind == "f" and low >= 0 and high <= 1:
        images = apply_in_blocks(images, lambda block: (block * 255).round())
        notes.append("floats from 0 to 1 read as intensities")
    elif not 0 <= low <= high <= 255:
        raise ValueError(f"{found} with values from {low} to {high}, but must contain {possible}")
    elif high == 1:
        raise ValueError(
            f"{name} contains only the values 0 and 1: convert {name.split()[-1]} to bool, or multiply it by 255"
        )
    elif images.dtype.kind == "f":
        images = apply_in_blocks(images, np.round)
    images = images.astype(np.uint8, copy=False)
    if channels:
        images = np.moveaxis(images, channels[0], -1)
        if images.shape[-1] == 3:
            weights = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as in PIL
            images = apply_in_blocks(images, lambda block: (block @ weights).round())
            notes.append("RGB converted to grey")
        images = images.reshape(images.shape[:3])
    if images.max() <= 127:
        values = f"its values go from {low} to {high}"
        raise ValueError(
            f"no pixel of {name} is above 127 ({values}): intensities must range from 0 (black) to 255 (white)"
        )
    if images.min() > 127:
        raise ValueError(
            f"every pixel of {name} is above 127 (its values go from {low} to {high}), so all pixels would be white: "
            "scale the intensities to the range from 0 (black) to 255 (white)"
        )
    constant = int((images.min(axis=(1, 2)) == images.max(axis=(1, 2))).sum())
    if constant == len(images):
        raise ValueError(
            f"in every image of {name}, all pixels are equal (perhaps 16-bit images were cut to 8 bits, or "
            "transparency was ignored): convert the images to 8-bit grey"
        )
    if constant:
        notes.append(f"{constant:,} {name.split()[-1]} of a single intensity")
    return np.ascontiguousarray(images)


def apply_in_blocks(images: np.ndarray, function: Callable) -> np.ndarray:
    """Applies a function to blocks of images, which bounds the memory for floats. Returns the results as uint8."""
    blocks = np.array_split(images, images.size // 2**22 + 1)
    result = np.empty((len(images), *function(blocks[0][:1]).shape[1:]), np.uint8)
    for block, part in zip(blocks, np.array_split(result, len(blocks))):
        part[:] = function(block)
    return result


def to_label_vector(labels: np.ndarray, name: str, number: int, notes: list) -> np.ndarray:
    """
    Converts labels to int64 [N]. If there are several labels per image, [N,K], all become -1, which means no label.
    Raises a ValueError if the labels are invalid.
    Inputs:
        labels - Array of integers from 0 to 255, of shape [N], [N,1] or [N,K], or of -1 only.
        name - Name of the labels for messages.
        number - N, the number of images.
        notes - List to which a description is added if there are several labels per image.
    """
    if labels.shape[:1] != (number,) or labels.ndim > 2 or labels.dtype.kind not in "iub" or not labels.size:
        raise ValueError(f"{name} is {labels.dtype} of shape {list(labels.shape)}, but must be {number} integers")
    if labels.ndim == 2 and labels.shape[1] > 1:
        notes.append("several labels per image, which are not used")
        return np.full(number, -1)
    if (labels.min() < 0 or labels.max() > 255) and (labels != -1).any():
        raise ValueError(f"{name} has values from {labels.min()} to {labels.max()}, but must be between 0 and 255")
    return labels.reshape(number).astype(np.int64)

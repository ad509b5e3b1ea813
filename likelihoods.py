"""Computes the posterior, the ELBO and log p(x) of each image for evaluate.py, and writes the file of latents."""

import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bmnist import BinaryImages
from harness.errors import FlagError, is_out_of_memory, print_line, supports_progress_bar
from harness.files import atomic_write
from train_pl import VAE
from utils import elbo_to_bpd, log_likelihood, quadrature_log_likelihood

# Batch sizes for images of MNIST's size. Batches of larger images have fewer images, see scale_batch_size.
BATCH_SIZE = 100  # images
DECODE_BATCH_SIZE = {"cpu": 512, "gpu": 16_384}  # samples: they fit into a CPU's caches; a GPU needs more of them
QUADRATURE_SIZE = 2048  # points of the quadrature that are decoded at once


def batch_indices(dataset):
    """Returns the indices of a data set's images, a tensor for each batch."""
    return torch.arange(len(dataset)).split(scale_batch_size(BATCH_SIZE, dataset.images[0].numel()))


def posteriors(model: VAE, dataset: BinaryImages) -> tuple[Tensor, Tensor, Tensor]:
    """
    Computes the ELBOs and the posteriors q(z|x) of all images, which takes seconds.
    Inputs:
        model, dataset - The VAE, with D latents, and a data set of N images.
    Outputs:
        elbos - Tensor of shape [N], in nats, from one sample of the posterior per image, as in training.
        means, log_stds - Tensors of shape [N,D]. All three are on the CPU.
    """
    parts = []
    for indices in batch_indices(dataset):
        terms = model.terms(dataset[indices][0].to(model.device))
        parts.append([tensor.cpu() for tensor in [-(terms.L_rec + terms.L_reg), terms.mean, terms.log_std]])
    return tuple(map(torch.cat, zip(*parts)))


def log_likelihoods(model: VAE, dataset: BinaryImages, iw_samples: int, progress_bar: bool = False) -> Tensor:
    """
    Returns the importance-weighted log p(x) of all images, a tensor of shape [N] in nats, on the CPU. On a terminal,
    the mean so far and its standard error are shown all the time; elsewhere, a line is printed after each tenth.
    Inputs:
        model, dataset - The VAE, and a data set of N images.
        iw_samples, progress_bar - See evaluate.
    """
    number_of_batches, log_ps = len(batch_indices(dataset)), []
    # A notebook would show each state on a new line
    is_shown = supports_progress_bar(sys.stderr) and (progress_bar or sys.stderr.isatty())
    bar = tqdm(
        log_likelihoods_of_batches(model, dataset, iw_samples),
        "log p(x)",
        number_of_batches,
        leave=progress_bar,
        bar_format=None if progress_bar else "{desc}  {percentage:3.0f}%{postfix}",
        disable=not is_shown,
    )
    for number, log_p in enumerate(bar, start=1):
        log_ps.append(log_p)
        is_tenth = 10 * number // number_of_batches > 10 * (number - 1) // number_of_batches
        if is_shown or (is_tenth and 1 < number < number_of_batches):
            so_far = torch.cat(log_ps)
            text = f"{so_far.mean().item():.2f} +- {so_far.std().item() / math.sqrt(len(so_far)):.2f} nats"
            if is_shown:
                bar.set_postfix_str(text, refresh=False)
            else:
                print_line(f"log p(x)  {number / number_of_batches:4.0%}  {text}")
    return torch.cat(log_ps)


def log_likelihoods_of_batches(model, dataset, iw_samples):
    """Yields log p(x) of each batch. If memory runs out, fewer samples are decoded at once from then on."""
    chunk_size = DECODE_BATCH_SIZE["cpu" if model.device.type == "cpu" else "gpu"]
    chunk_size = scale_batch_size(chunk_size, dataset.images[0].numel())
    for indices in batch_indices(dataset):
        imgs, log_p = dataset[indices][0].to(model.device), None
        while log_p is None:
            try:
                log_p = log_likelihood(imgs, model.encoder, model.decoder, iw_samples, chunk_size).cpu()
            except RuntimeError as error:
                if not is_out_of_memory(error) or chunk_size <= len(imgs):
                    raise
                chunk_size //= 2
        yield log_p


def quadrature_log_likelihoods(model: VAE, dataset: BinaryImages, limit: float = 6.0) -> Tensor:
    """Computes log p(x) of all images by quadrature, for 2 latents. Returns a tensor [N] in nats, on the CPU."""
    imgs = dataset[torch.arange(len(dataset))][0].to(model.device)
    size = scale_batch_size(QUADRATURE_SIZE, dataset.images[0].numel())
    return quadrature_log_likelihood(imgs, model.decoder, limit=limit, chunk_size=size).cpu()


def estimate_seconds(model: VAE, dataset: BinaryImages, iw_samples: int) -> float:
    """Estimates how many seconds log p(x) takes, from the time of one batch with at most 100 samples."""
    samples, times = min(100, iw_samples), []
    for _ in range(2):  # the first call takes longer
        start = time.perf_counter()
        next(log_likelihoods_of_batches(model, dataset, samples))
        times.append(time.perf_counter() - start)
    seconds = min(times) * iw_samples / samples * len(batch_indices(dataset))
    if model.hparams.z_dim == 2:
        start = time.perf_counter()
        quadrature_log_likelihoods(model, dataset, limit=0.4)  # instead of 6, along each axis
        seconds += (time.perf_counter() - start) * (6 / 0.4) ** 2
    return seconds


def scale_batch_size(num_images, num_pixels):
    """
    Scales a batch size of num_images MNIST images to images of num_pixels pixels, so that a batch has about as many
    pixels. The result is between 1 and num_images.
    """
    return max(min(num_images, num_images * 28 * 28 // num_pixels), 1)


def statistics(name: str, values: Tensor, dataset: BinaryImages, name_in_bpd: str = "") -> dict[str, float]:
    """
    Computes the numbers of evaluation.json for a quantity: its mean over the images, and the mean's standard error.
    Inputs:
        name - Name of the quantity, such as elbo.
        values - Tensor of shape [N], the quantity of each image in nats.
        dataset - The data set.
        name_in_bpd - Name of the quantity in bits per dimension; empty if only nats are wanted.
    Outputs:
        numbers - Dict with the keys name and name_standard_error, and the same two for name_in_bpd.
    """
    numbers, values = {}, values.double()  # on the CPU, since a Mac's GPU has no double precision
    bpd = elbo_to_bpd(-values, (1, dataset.images[0].numel()))
    for quantity, value in {name: values, **({name_in_bpd: bpd} if name_in_bpd else {})}.items():
        numbers[quantity] = value.mean().item()
        numbers[f"{quantity}_standard_error"] = value.std().item() / math.sqrt(len(value))
    return numbers


def check_latents_path(path: Path):
    """
    Raises a FlagError if save_latents must not write to a path, because it does not end with .npz or is a file of
    another kind.
    """
    if path.suffix != ".npz":
        raise FlagError(f"--latents must be the path of an .npz file, got {path}")
    try:
        with zipfile.ZipFile(path) as file:
            is_ours = {"mean.npy", "log_std.npy", "elbo.npy"} <= {*file.namelist()}
    except FileNotFoundError:
        return
    except (OSError, zipfile.BadZipFile):
        is_ours = False
    if not is_ours:
        raise FlagError(f"--latents {path} is not a file of latents and is not overwritten: choose another path")


def has_latents(path: Path, means: Tensor) -> bool:
    """Returns whether a file of latents exists at a path and contains these means [N,D] of the posteriors."""
    try:
        return np.array_equal(np.load(path)["mean"], means.numpy())
    except (OSError, ValueError):
        return False


def save_latents(path: Path, **tensors: Tensor):
    """
    Writes the .npz file of the flag --latents, which np.load reads.
    Inputs:
        path - Path of the file.
        tensors - For N images in the order of the data set: mean and log_std [N,D], elbo and log_likelihood [N] in
            nats, which become float32; and label [N], integers, which is left out if the images have no labels.
    """
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items() if name != "label"}
    if tensors["label"].max() >= 0:
        arrays["label"] = tensors["label"].numpy()
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)

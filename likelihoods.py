"""What evaluate.py computes for each image: the posterior, the ELBO and log p(x); and the file of --latents."""

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
from harness.errors import FlagError, is_out_of_memory, is_screen, print_line
from harness.files import atomic_write
from train_pl import VAE
from utils import elbo_to_bpd, log_likelihood, quadrature_log_likelihood

# Numbers of images of MNIST's size in a batch; of larger images there are fewer, see fit_batch.
BATCH_SIZE = 100  # images
CHUNK_SIZE = {"cpu": 512, "gpu": 16_384}  # decoded samples, as many as fit into the caches of a CPU; a GPU needs more
QUADRATURE_SIZE = 2048  # decoded points of the quadrature


def batches(dataset):
    """The indices of a data set's images, a tensor for each batch."""
    return torch.arange(len(dataset)).split(fit_batch(BATCH_SIZE, dataset.images[0].numel()))


def posteriors(model: VAE, dataset: BinaryImages) -> tuple[Tensor, Tensor, Tensor]:
    """
    The ELBOs and the posteriors q(z|x) of all images, which take seconds.
    Inputs:
        model, dataset - The VAE, with D latents, and a data set of N images.
    Outputs:
        elbos - Tensor of shape [N], in nats, from one sample of the posterior per image, as in training.
        means, log_stds - Tensors of shape [N,D]. All three are on the CPU.
    """
    parts = []
    for indices in batches(dataset):
        terms = model.terms(dataset[indices][0].to(model.device))
        parts.append([tensor.cpu() for tensor in [-(terms.L_rec + terms.L_reg), terms.mean, terms.log_std]])
    return tuple(map(torch.cat, zip(*parts)))


def log_likelihoods(model: VAE, dataset: BinaryImages, iw_samples: int, progress_bar: bool = False) -> Tensor:
    """
    The importance-weighted log p(x) of all images, tensor of shape [N] in nats, on the CPU. A terminal shows the mean
    so far and its standard error all the time, anything else a line every tenth of the way.
    Inputs:
        model, dataset - The VAE, and a data set of N images.
        iw_samples, progress_bar - See evaluate.
    """
    num_pixels, parts = dataset.images[0].numel(), batches(dataset)
    chunk_size = fit_batch(CHUNK_SIZE["cpu" if model.device.type == "cpu" else "gpu"], num_pixels)
    form = None if progress_bar else "{desc}  {percentage:3.0f}%{postfix}"
    is_shown = is_screen(sys.stderr) and (progress_bar or sys.stderr.isatty())  # a notebook would keep each state
    bar = tqdm(parts, "log p(x)", leave=progress_bar, bar_format=form, disable=not is_shown)
    log_ps = []
    for number, indices in enumerate(bar, start=1):
        imgs = dataset[indices][0].to(model.device)
        while len(log_ps) < number:
            try:
                log_ps.append(log_likelihood(imgs, model.encoder, model.decoder, iw_samples, chunk_size).cpu())
            except RuntimeError as error:
                if not is_out_of_memory(error) or chunk_size <= len(imgs):
                    raise
                chunk_size //= 2
        is_tenth = 10 * number // len(parts) > 10 * (number - 1) // len(parts) and 1 < number < len(parts)
        if is_tenth or not bar.disable:
            so_far = torch.cat(log_ps)
            text = f"{so_far.mean().item():.2f} +- {so_far.std().item() / math.sqrt(len(so_far)):.2f} nats"
            if bar.disable:
                print_line(f"log p(x)  {number / len(parts):4.0%}  {text}")
            else:
                bar.set_postfix_str(text, refresh=False)
    return torch.cat(log_ps)


def by_quadrature(model: VAE, dataset: BinaryImages, limit: float = 6.0) -> Tensor:
    """log p(x) of all images by quadrature, for 2 latents, tensor of shape [N] in nats, on the CPU."""
    imgs = dataset[torch.arange(len(dataset))][0].to(model.device)
    size = fit_batch(QUADRATURE_SIZE, dataset.images[0].numel())
    return quadrature_log_likelihood(imgs, model.decoder, limit=limit, chunk_size=size).cpu()


def estimate_seconds(model: VAE, dataset: BinaryImages, iw_samples: int) -> float:
    """About how long log p(x) takes, in seconds, by the time of one batch with at most 100 samples."""
    parts, samples, times = batches(dataset), min(100, iw_samples), []
    imgs = dataset[parts[0]][0].to(model.device)
    for _ in range(2):  # the first time, everything is slower
        start = time.perf_counter()
        log_likelihood(imgs, model.encoder, model.decoder, samples).cpu()
        times.append(time.perf_counter() - start)
    seconds = min(times) * iw_samples / samples * len(parts)
    if model.hparams.z_dim == 2:
        start = time.perf_counter()
        by_quadrature(model, dataset, limit=0.4)  # of 6, along each axis
        seconds += (time.perf_counter() - start) * (6 / 0.4) ** 2
    return seconds


def fit_batch(num_images, num_pixels):
    """Number of images of num_pixels with as many pixels in all as num_images of MNIST's; at most that, at least 1."""
    return max(min(num_images, num_images * 28 * 28 // num_pixels), 1)


def statistics(name: str, values: Tensor, dataset: BinaryImages, name_in_bpd: str = "") -> dict[str, float]:
    """
    The numbers of evaluation.json: the mean over the images, and its standard error.
    Inputs:
        name - Name of a quantity, such as elbo.
        values - Tensor of shape [N], the quantity of each image in nats.
        dataset - The data set.
        name_in_bpd - Name of the quantity in bits per dimension; empty if it is not wanted.
    Outputs:
        numbers - Dict of name and name_standard_error, and of the same for name_in_bpd.
    """
    numbers, values = {}, values.double()  # on the CPU, since a Mac's GPU has no double precision
    bpd = elbo_to_bpd(-values, (1, dataset.images[0].numel()))
    for quantity, value in {name: values, **({name_in_bpd: bpd} if name_in_bpd else {})}.items():
        numbers[quantity] = value.mean().item()
        numbers[f"{quantity}_standard_error"] = value.std().item() / math.sqrt(len(value))
    return numbers


def check_latents(path: Path):
    """
    Refuses, with a FlagError, a path that save_latents must not write: of another file, or without .npz at its end.
    """
    if path.suffix != ".npz":
        raise FlagError(f"--latents must be the path of an .npz file, got {path}")
    if path.exists():
        try:
            with zipfile.ZipFile(path) as file:
                is_ours = {"mean.npy", "log_std.npy", "elbo.npy"} <= {*file.namelist()}
        except (OSError, zipfile.BadZipFile):
            is_ours = False
        if not is_ours:
            raise FlagError(f"--latents {path} is another file, which is not overwritten: choose another name")


def save_latents(path: Path, **tensors: Tensor):
    """
    Writes what `--latents` asks for as an .npz file, for np.load.
    Inputs:
        path - Path of the file.
        tensors - For N images in the order of the data set: mean and log_std [N,D], elbo and log_likelihood [N] in
            nats, which become float32, and label [N], an integer, which is left out if the images have none.
    """
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items() if name != "label"}
    if tensors["label"].max() >= 0:
        arrays["label"] = tensors["label"].numpy()
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)

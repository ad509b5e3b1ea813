"""Saves the pictures of a model's latent space for evaluate.py, and computes the plane that shows the test images."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.errors import best_effort
from pictures import figures
from utils import active_units, manifold_latents


class Plane(NamedTuple):
    """
    A plane of the latent space, on which images are shown.
    Attributes:
        places - Tensor of shape [N,2], the place of each image.
        labels - Tensor of shape [N]; an unknown label is -1.
        axes - Names of the two coordinates.
        center, directions - Tensors of shape [D] and [D,2]: the place of latents z is (z - center) @ directions.
    """

    places: Tensor
    labels: Tensor
    axes: list[str]
    center: Tensor
    directions: Tensor


class PictureData(NamedTuple):
    """
    The data that the pictures show, all on the CPU.
    Attributes:
        decode - Function from latents [...,D] to the means of the pixels [...,H,W], between 0 and 1.
        imgs, labels - The test set, tensors of shape [N,H,W] and [N]; an unknown label is -1.
        means - Tensor of shape [N,D], the means of the posteriors.
        samples, sample_means - Tensors of shape [R,C,H,W], sampled images and the means of their pixels.
        legend - The kind of labels, such as digit.
    """

    decode: Callable[[Tensor], Tensor]
    imgs: Tensor
    labels: Tensor
    means: Tensor
    samples: Tensor
    sample_means: Tensor
    legend: str


def plane(means: Tensor, labels: Tensor, legend: str = "digit") -> Plane:
    """
    Returns the plane on which test images are shown. With 2 latents, it is the latent space; with more, the plane of
    the first two principal components. A single latent is shown on the horizontal axis, and the label on the vertical.
    Inputs:
        means - Tensor of shape [N,D], the means of the posteriors.
        labels, legend - Tensor of shape [N], and the kind of labels.
    """
    z_dim = means.shape[1]
    if z_dim <= 2:
        center, directions, axes = torch.zeros(z_dim), torch.eye(z_dim, 2), ["$z_0$", "$z_1$"]
    else:
        variances, components = torch.linalg.eigh(means.T.double().cov())  # in ascending order
        center, directions = means.mean(dim=0), components[:, [-1, -2]].float()
        shares = variances[[-1, -2]] / variances.sum().clamp(min=1e-12)
        ordinals = zip(["first", "second"], shares)
        axes = [f"{ordinal} principal component ({share:.0%} of the variance)" for ordinal, share in ordinals]
    places = (means - center) @ directions
    if z_dim == 1:
        places[:, 1], axes[1] = labels, legend
    return Plane(places, labels, axes, center, directions)


def first_three_per_label(labels: Tensor) -> Tensor:
    """Returns indices [3,C] of three images per label, for up to ten labels; without labels, of the first 30 images."""
    by_label = [(labels == label).nonzero().squeeze(1)[:3] for label in labels.unique() if label >= 0]
    triples = [indices for indices in by_label if len(indices) == 3][:10]
    return torch.stack(triples, dim=1) if len(triples) > 1 else torch.arange(len(labels))[:30].view(3, -1)


def reconstructions(name, shown):
    """Saves a picture of test images, each above the mean of its reconstruction."""
    picks = first_three_per_label(shown.labels)
    images = torch.stack([shown.imgs[picks], shown.decode(shown.means[picks])], dim=1).flatten(0, 1)
    title = "Test images and the means of their reconstructions"
    figures.image_table(name, images, rows=["input", "reconstruction"] * 3, title=title)


def interpolations(name, shown):
    """Saves a picture of decoded points on straight lines in latent space between test images."""
    start, second, _ = first_three_per_label(shown.labels)
    end = second.roll(-1)  # 0 to 1, 1 to 2, ..., 9 to 0
    weights = torch.linspace(0, 1, 11)
    z = torch.lerp(shown.means[start].unsqueeze(1), shown.means[end].unsqueeze(1), weights.view(1, -1, 1))
    images = torch.cat([shown.imgs[start].unsqueeze(1), shown.decode(z), shown.imgs[end].unsqueeze(1)], dim=1)
    columns = ["input", *(f"{weight:.1f}" for weight in weights), "input"]
    title = "Along straight lines in latent space, between two test images"
    figures.image_table(name, images, columns=columns, title=title)


def traversals(name, shown):
    """
    Saves a picture with one row per active unit, the most active unit first. In its row, the unit changes from -3 to 3
    and the other latents stay constant.
    """
    active = active_units(shown.means).nonzero().squeeze(1)
    active = active[shown.means.var(dim=0)[active].argsort(descending=True)]
    if not len(active):
        return
    values = torch.linspace(-3, 3, 13)
    z = shown.means[0].expand(len(active), len(values), -1).clone()
    z[torch.arange(len(active)), :, active] = values
    rows, columns = [f"z{unit}" for unit in active.tolist()], [f"{value:.1f}" for value in values]
    title = "One latent changes, the others stay those of the first test image"
    figures.image_table(name, shown.decode(z), rows=rows, columns=columns, title=title)


def samples(name, shown):
    """Saves a picture of samples."""
    figures.image_table(name, shown.samples, title="Samples")


def sample_means(name, shown):
    """Saves a picture of the means of the pixels of the same samples."""
    figures.image_table(name, shown.sample_means, title="Means of the samples' pixels")


def manifold(name, shown):
    """Saves a picture of the means of the pixels over a 20x20 grid of latents, if there are 2 latents."""
    if shown.means.shape[1] == 2:
        z = manifold_latents(20).view(20, 20, 2)
        axis = [f"{value:.2f}" for value in z[0, :, 0]]
        figures.image_table(name, shown.decode(z), rows=axis[::-1], columns=axis, axis_names=("$z_0$", "$z_1$"))


def latent_space(name, shown):
    """Plots the posterior means of the test images on their plane, coloured by label."""
    num_images, z_dim = shown.means.shape
    title = f"Posterior means of the {num_images:,} test images, {z_dim} latent{'s' * (z_dim != 1)}"
    places, labels, axes, *_ = plane(shown.means, shown.labels, shown.legend)
    figures.latent_space(name, places, labels, axes, title, shown.legend)


PICTURES = [reconstructions, interpolations, traversals, samples, sample_means, manifold, latent_space]
FILES = [f"{picture.__name__}.{kind}" for picture in PICTURES for kind in ["png", "pdf"]]


@torch.no_grad()
def save_pictures(folder: Path, model: nn.Module, imgs: Tensor, labels: Tensor, means: Tensor, legend: str = "digit"):
    """
    Saves the PICTURES of a model as PNG and PDF files. The pictures of an earlier evaluation are removed first. If a
    picture fails, a warning is printed on stderr and the others are saved. A full disk is an error.
    Inputs:
        folder - Folder of the files.
        model - The VAE.
        imgs, labels - The test set, tensors of shape [N,1,H,W] and [N]; an unknown label is -1.
        means - Tensor of shape [N,D], the means of the posteriors.
        legend - The kind of labels, such as digit.
    """

    def decode(z):
        x_mean = torch.sigmoid(model.decoder(z.flatten(0, -2).to(model.device)))
        return x_mean.squeeze(-3).unflatten(0, z.shape[:-1]).cpu()

    sampled = [part.squeeze(1).unflatten(0, [8, 8]).cpu() for part in model.sample(64)]
    shown = PictureData(decode, imgs.squeeze(1), labels, means, *sampled, legend)
    for name in FILES:
        with best_effort(f"removing {folder / name}"):
            (folder / name).unlink(missing_ok=True)
    for save_picture in PICTURES:
        with best_effort(f"saving {folder / save_picture.__name__}"):
            save_picture(folder / save_picture.__name__, shown)

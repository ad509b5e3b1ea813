"""Figures of a run and of a trained model. Import this before any module that imports matplotlib, such as Lightning."""

import importlib
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import ArrayLike

from harness.files import atomic_write

BPD_TICKS = [0.05, 0.07, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.5, 0.7, 1]  # the range of MNIST's curves
DPI = 150
MAX_PIXELS = 4000  # maximum along a side of a table of images
CELL = 0.45  # inches: side of an image in a table
MAX_IN_LEGEND = 50  # labels in a legend of two columns; more get a colour scale
SETTINGS = ["MPLBACKEND", "MPLCONFIGDIR", "MATPLOTLIBRC"]  # matplotlib's environment variables


def import_matplotlib():
    """
    Imports matplotlib with the user's settings, such as the backend of a notebook, or without these settings if
    matplotlib refuses them. Nothing is printed about them. The environment variables are restored afterwards.
    """
    logger, environment = logging.getLogger("matplotlib"), {name: os.environ.get(name) for name in SETTINGS}
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module("matplotlib.pyplot")
            except Exception:
                for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
                    del sys.modules[name]  # the failed import left them
                os.environ.update(dict.fromkeys(SETTINGS, ""), MPLCONFIGDIR=os.path.join(os.devnull, "unusable"))
                importlib.import_module("matplotlib.pyplot")  # with an empty folder of settings
    finally:
        logger.setLevel(level)
        for name, value in environment.items():  # matplotlib changes MPLCONFIGDIR if it cannot write there
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


import_matplotlib()

from matplotlib import colormaps, style  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator  # noqa: E402

default_settings = style.context("default")  # decorator: the function ignores the user's settings


@default_settings
def bpd_curves(path: str | Path, train: dict, val: dict, test_bpd: float, title: str):
    """
    Plots bits per dimension over epochs.
    Inputs:
        path - The PNG file to write.
        train, val - Dicts from epoch to bpd; epoch 0 is the untrained model.
        test_bpd - Test bpd, plotted as a horizontal line.
        title - The model and its data set.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(train), list(train.values()), label="train")
    axes.plot(list(val), list(val.values()), label="validation")
    axes.axhline(test_bpd, color="black", linestyle="--", linewidth=1, label=f"test: {test_bpd:.4f}")
    axes.set_title(title, parse_math=False)  # the name of a file may contain $
    # On a linear axis, the 1 bit per pixel of the untrained model would flatten all later epochs.
    axes.set(xlabel="epoch", ylabel="bits per dimension", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(bpd_locator(*axes.get_ylim()))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def bpd_locator(low, high):
    """Returns a locator of ticks for a logarithmic axis of bits per dimension from low to high."""
    if sum(low <= tick <= high for tick in BPD_TICKS) > 2 and high < 25 * low:
        return FixedLocator(BPD_TICKS)
    return MaxNLocator(6) if high < 3 * low else LogLocator(subs=[1, 2, 3, 5, 7])


def training_curves(path: str, run, metric: str, title: str):
    """Plots a metric of a finished harness.Run over the epochs: training (from the first step on), validation, test."""
    train = {0: run.results.get(f"first_step_{metric}"), **run.curve(f"train_{metric}")}
    bpd_curves(path, train, run.curve(f"val_{metric}"), run.results[f"test_{metric}"], title)


@default_settings
def samples_over_training(path: str | Path, run=None):
    """
    Saves a picture of a run's samples: of the untrained model, of epoch 10 (or the last epoch before it that has
    samples), and of the last epoch that has samples.
    Inputs:
        path - The PNG file to write, in the folder of the files epoch_N_samples.png.
        run - Not used; a harness.Run passes itself.
    """
    folder = Path(path).parent
    matches = [re.fullmatch(r"epoch_(\d+)_samples.png", file.name) for file in folder.iterdir()]
    epochs = sorted(int(match[1]) for match in matches if match)
    shown = sorted({*epochs[:1], *[epoch for epoch in epochs if epoch <= 10][-1:], *epochs[-1:]})
    figure = Figure(figsize=(4 * len(shown), 4.3), layout="constrained")
    for axes, epoch in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        axes.imshow(imread(folder / f"epoch_{epoch}_samples.png"), interpolation="nearest")
        axes.set_title(f"epoch {epoch}" if epoch else "before training")
        axes.set_axis_off()
    save(figure, path, bbox_inches="tight", pad_inches=0.05)


@default_settings
def bpd_by_setting(path: str | Path, bpds: dict):
    """
    Plots the test bpd of many runs in one row per setting: each run, their mean and their standard deviation.
    Inputs:
        path - The PNG file to write.
        bpds - Dict from setting to the list of its runs' test bpd.
    """
    # Labels get a third of the width. A null character replaces the space between a flag and its value, so that no line
    # ends there.
    lines = [textwrap.fill(re.sub("(?<!,) ", "\0", name), 40, break_on_hyphens=False) for name in bpds]
    names = [name.replace("\0", " ") for name in lines]
    lines_per_row = max(name.count("\n") for name in names) + 1
    figure = Figure(figsize=(7, 1.3 + (0.25 + 0.2 * lines_per_row) * len(bpds)), layout="constrained")
    axes = figure.add_subplot()
    for row, values in enumerate(bpds.values()):
        one, all_runs = ("one run", "mean, standard deviation") if row == 0 else (None, None)
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.4, label=one)
        width = stdev(values) if len(values) > 1 else None
        axes.errorbar(mean(values), row, xerr=width, fmt="|", color="black", markersize=14, capsize=4, label=all_runs)
    axes.set(xlabel="test bpd, bits per dimension")
    axes.set_yticks(range(len(bpds)), names, parse_math=False)
    axes.set_ylim(len(bpds) - 0.5, -0.5)  # the first row is at the top, as in a table
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    save(figure, path)


@default_settings
def image_table(
    name: Path, images: ArrayLike, rows: list = (), columns: list = (), title: str = "", axis_names: tuple = ()
):
    """
    Saves a table of images as a PNG and a PDF file.
    Inputs:
        name - Path of the files without .png and .pdf.
        images - Array of shape [R,C,H,W], values between 0 and 1.
        rows, columns - Lists of R and C labels, or empty.
        title - Title of the table, or empty.
        axis_names - Names of the horizontal and vertical axis if the table is a plane of images. There are then no gaps
            between the images, and the labels of the columns are below the table.
    """
    (num_rows, num_columns), gap = images.shape[:2], 0 if axis_names else 2
    tiles = np.pad(images, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=0.5)
    height, width = tiles.shape[-2:]
    picture = tiles.transpose(0, 2, 1, 3).reshape(num_rows * height, num_columns * width)
    picture = picture[: num_rows * height - gap, : num_columns * width - gap]
    side = max(height, width)
    figsize = CELL * num_columns + 1, CELL * num_rows * height / side + 0.8  # wide enough for any title
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([width * column + (width - gap - 1) / 2 for column in range(len(columns))], columns)
    axes.set_yticks([height * row + (height - gap - 1) / 2 for row in range(len(rows))], rows)
    axes.tick_params(length=0, labeltop=not axis_names, labelbottom=bool(axis_names))
    axes.tick_params(axis="x", labelrotation=90 if axis_names else 0)
    x_name, y_name = axis_names or (None, None)
    axes.set(title=title, xlabel=x_name, ylabel=y_name)
    axes.spines[:].set_visible(False)
    # Enough dots to show each pixel of an image even if labels take a part of the width, but a limited size.
    dpi = max(DPI, min(math.ceil(1.15 * side / CELL), int(MAX_PIXELS / max(figsize))))
    save(figure, f"{name}.png", f"{name}.pdf", dpi=dpi)


@default_settings
def latent_space(name: Path, points: ArrayLike, labels: ArrayLike, axis_names: list, title: str, legend: str = "digit"):
    """
    Plots images as points of a plane, coloured by their labels, as a PNG and a PDF file.
    Inputs:
        name - Path of the files without .png and .pdf.
        points, labels - Arrays of shape [N,2] and [N]. If all labels are negative, there is no legend.
        axis_names - Names of the two coordinates.
        title - Title of the plot.
        legend - Title of the legend, the kind of labels.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({int(label) for label in labels})
    colors = [f"C{kind}" if 0 <= kind < 10 else "black" for kind in kinds]
    scale = Normalize(kinds[0], kinds[-1])
    if kinds[-1] > 9:
        colors = colormaps["turbo"](scale(kinds) if len(kinds) > MAX_IN_LEGEND else np.linspace(0, 1, len(kinds)))
    for kind, color in zip(kinds, colors):
        x, y = points[labels == kind].T
        axes.scatter(x, y, s=4, alpha=0.6, linewidths=0, color=color, label=str(kind), rasterized=True)
    axes.set(title=title, xlabel=axis_names[0], ylabel=axis_names[1])
    axes.grid(alpha=0.3)
    if len(kinds) > MAX_IN_LEGEND:
        figure.colorbar(ScalarMappable(scale, "turbo"), ax=axes, label=legend)
    elif kinds[-1] >= 0:
        figure.legend(loc="outside right upper", title=legend, markerscale=3, ncols=math.ceil(len(kinds) / 25))
    save(figure, f"{name}.png", f"{name}.pdf")


def save(figure, *paths, dpi=DPI, **options):
    """Saves a figure in the format of each path's extension; without an extension, as PNG."""
    for path in paths:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format=Path(path).suffix[1:] or "png", dpi=dpi, **options)

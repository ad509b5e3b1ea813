"""
The figures of a run and of a trained model for a report, drawn by matplotlib.

They depend on no setting of the user's. Whoever imports a library that imports matplotlib itself, as Lightning does,
imports this module first, lest a setting that matplotlib cannot use end the program there.
"""

import contextlib
import importlib
import logging
import math
import os
import re
import sys
import tempfile
import textwrap
import warnings
from statistics import mean, stdev

import numpy as np

from harness.files import atomic_write

BPD_TICKS = [0.05, 0.07, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.5, 0.7, 1]  # where MNIST's curves are
DPI = 150
MOST_PIXELS = 4000  # along a side of a table of large images
CELL = 0.45  # side of an image in a table, in inches
MOST_IN_LEGEND = 50  # labels, in two columns
SETTINGS = ["MPLBACKEND", "MPLCONFIGDIR", "MATPLOTLIBRC"]  # matplotlib's, in the environment


@contextlib.contextmanager
def unheard_settings():
    """A context in which matplotlib says nothing of the user's settings, and the environment may be changed."""
    logger, kept = logging.getLogger("matplotlib"), {name: os.environ.get(name) for name in SETTINGS}
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name, value in kept.items():  # matplotlib, too, changes its folder where it cannot write
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def import_matplotlib():
    """Imports matplotlib with the user's settings, or without them where it cannot use them: a notebook's backend."""
    try:
        importlib.import_module("matplotlib.pyplot")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # half of it is there
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(dict.fromkeys(SETTINGS, ""), MPLCONFIGDIR=folder)
            os.chdir(folder)  # a file of settings in the working directory would be found first of all
            try:
                importlib.import_module("matplotlib.pyplot")
            finally:
                os.chdir(here)


with unheard_settings():
    import_matplotlib()

from matplotlib import colormaps, style  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator  # noqa: E402

plain = style.context("default")  # decorates whatever makes and saves a figure; the user's settings are back afterwards


@plain
def bpd_curves(path, train, val, test_bpd, title):
    """
    Draws bits per dimension over epochs.
    Inputs:
        path - The PNG file to write.
        train, val - Dicts from epoch to bpd; epoch 0 is the untrained model.
        test_bpd - Test bpd, drawn as a horizontal line.
        title - What was trained on what.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(train), list(train.values()), label="train")
    axes.plot(list(val), list(val.values()), label="validation")
    axes.axhline(test_bpd, color="black", linestyle="--", linewidth=1, label=f"test: {test_bpd:.4f}")
    axes.set(xlabel="epoch", ylabel="bits per dimension")
    axes.set_title(title, parse_math=False)  # a file's name may have $ in it
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # On a linear axis, the 1 bit per pixel of the untrained model would flatten all that comes after the first epochs.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(bpd_locator(*axes.get_ylim()))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def bpd_locator(low, high):
    """What places some ticks on a logarithmic axis of bits per dimension."""
    if sum(low <= tick <= high for tick in BPD_TICKS) > 2 and high < 25 * low:
        return FixedLocator(BPD_TICKS)
    return MaxNLocator(6) if high < 3 * low else LogLocator(subs=[1, 2, 3, 5, 7])


@plain
def side_by_side(path, pictures):
    """
    Draws pictures beside each other.
    Inputs:
        path - The PNG file to write.
        pictures - Dict from title to the PNG file of a picture.
    """
    figure = Figure(figsize=(4 * len(pictures), 4.3), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items()):
        axes.imshow(imread(picture), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    save(figure, path, bbox_inches="tight", pad_inches=0.05)


@plain
def bpd_by_setting(path, bpds):
    """
    Draws the test bpd of many runs, a row per setting: each run, their mean and their standard deviation.
    Inputs:
        path - The PNG file to write.
        bpds - Dict from setting to the list of its runs' test bpd.
    """
    # In a third of the width; a flag's name and its value are in one line, as if the space between were a letter.
    lines = [textwrap.fill(re.sub("(?<!,) ", "\0", name), 40, break_on_hyphens=False) for name in bpds]
    names = [name.replace("\0", " ") for name in lines]
    lines_per_row = max(name.count("\n") for name in names) + 1
    figure = Figure(figsize=(7, 1.3 + (0.25 + 0.2 * lines_per_row) * len(bpds)), layout="constrained")
    axes = figure.add_subplot()
    for row, values in enumerate(bpds.values()):
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.4, label="one run" if row == 0 else None)
        axes.errorbar(
            mean(values),
            row,
            xerr=stdev(values) if len(values) > 1 else None,
            fmt="|",
            color="black",
            markersize=14,
            capsize=4,
            label="mean, standard deviation" if row == 0 else None,
        )
    axes.set(xlabel="test bpd, bits per dimension")
    axes.set_yticks(range(len(bpds)), names, parse_math=False)
    axes.set_ylim(len(bpds) - 0.5, -0.5)  # the first one on top, as in a table
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    save(figure, path)


@plain
def image_table(
    name, images, rows=None, columns=None, title=None, xlabel=None, ylabel=None, gap=2, columns_below=False
):
    """
    Draws a table of images.
    Inputs:
        name - Where it goes, without the end of a file's name.
        images - Array of shape [R,C,H,W], values between 0 and 1.
        rows, columns - Their R and C labels, or None.
        title, xlabel, ylabel - What is written around it, or None.
        gap - Number of pixels between the images.
        columns_below - If True, the columns' labels are below the table.
    """
    num_rows, num_columns = images.shape[:2]
    tiles = np.pad(images, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=0.5)
    height, width = tiles.shape[-2:]
    picture = tiles.transpose(0, 2, 1, 3).reshape(num_rows * height, num_columns * width)
    picture = picture[: num_rows * height - gap, : num_columns * width - gap]
    side = max(height, width)
    figsize = CELL * num_columns + 1, CELL * num_rows * height / side + 0.8  # wide enough for the title in any case
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(
        [width * column + (width - gap - 1) / 2 for column in range(num_columns)] if columns else [], columns
    )
    axes.set_yticks([height * row + (height - gap - 1) / 2 for row in range(num_rows)] if rows else [], rows)
    axes.tick_params(length=0, labeltop=not columns_below, labelbottom=columns_below)
    axes.tick_params(axis="x", labelrotation=90 if columns_below else 0)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(False)
    # Enough dots for each pixel of an image, also where labels take room; within limits.
    dpi = max(DPI, min(math.ceil(1.15 * side / CELL), int(MOST_PIXELS / max(figsize))))
    save_png_and_pdf(figure, name, dpi=dpi)


@plain
def latent_space(name, points, labels, axis_names, title, legend="digit"):
    """
    Draws images as points of a plane, coloured by their label.
    Inputs:
        name - Where it goes, without the end of a file's name.
        points, labels - Arrays of shape [N,2] and [N]; of labels that are all negative nothing is said.
        axis_names - Names of the two coordinates.
        title - What is drawn.
        legend - What the labels are.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({int(label) for label in labels})
    colors = [f"C{kind}" if 0 <= kind < 10 else "black" for kind in kinds]
    scale = Normalize(kinds[0], kinds[-1])
    if kinds[-1] > 9:
        colors = colormaps["turbo"](scale(kinds) if len(kinds) > MOST_IN_LEGEND else np.linspace(0, 1, len(kinds)))
    for kind, color in zip(kinds, colors):
        x, y = points[labels == kind].T
        axes.scatter(x, y, s=4, alpha=0.6, linewidths=0, color=color, label=str(kind), rasterized=True)
    axes.set(title=title, xlabel=axis_names[0], ylabel=axis_names[1])
    axes.grid(alpha=0.3)
    if len(kinds) > MOST_IN_LEGEND:
        figure.colorbar(ScalarMappable(scale, "turbo"), ax=axes, label=legend)
    elif kinds[-1] >= 0:
        columns = math.ceil(len(kinds) / 25)
        figure.legend(loc="outside right upper", title=legend, markerscale=3, ncols=columns)
    save_png_and_pdf(figure, name)


def save_png_and_pdf(figure, name, **options):
    """Writes a figure as name.png and name.pdf."""
    for kind in ["png", "pdf"]:
        save(figure, f"{name}.{kind}", **options)


def save(figure, path, dpi=DPI, **options):
    """Writes a figure as the kind of file that its name's end says, PNG where it says none."""
    kind = os.path.splitext(path)[1][1:] or "png"
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format=kind, dpi=dpi, **options)

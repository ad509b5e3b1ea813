"""The figures of a training run for a report, drawn by matplotlib."""
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator


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
    axes.set(xlabel="epoch", ylabel="bits per dimension", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # On a linear axis, the 1 bit per pixel of the untrained model would flatten all that comes after the first epochs.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.05, 0.07, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.5, 0.7, 1]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


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
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)


def bpd_by_setting(path, bpds):
    """
    Draws the test bpd of many runs, a row per setting: each run, their mean and their standard deviation.
    Inputs:
        path - The PNG file to write.
        bpds - Dict from setting to the list of its runs' test bpd.
    """
    figure = Figure(figsize=(7, 1.3 + 0.45 * len(bpds)), layout="constrained")
    axes = figure.add_subplot()
    for row, values in enumerate(bpds.values()):
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.4, label="one run" if row == 0 else None)
        axes.errorbar(mean(values), row, xerr=stdev(values) if len(values) > 1 else None, fmt="|", color="black",
                      markersize=14, capsize=4, label="mean, standard deviation" if row == 0 else None)
    axes.set(xlabel="test bpd, bits per dimension", yticks=range(len(bpds)), yticklabels=list(bpds))
    axes.set_ylim(len(bpds) - 0.5, -0.5)  # the first one on top, as in a table
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)

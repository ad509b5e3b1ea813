"""
Measures how time and memory grow with the batch size, the hidden width and the number of images.

    python benchmarks/growth.py

For each batch size and hidden width, measures epochs of `python train_pl.py` on rendered digits in a separate process,
with one thread and with one thread per core. For each number of images, up to 4.5 million rendered digits, measures
only the data loader. Uses a GPU if one is available. Prints every measurement, and writes all of them to
growth_DEVICE.json and growth_DEVICE.png.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import speed
from bmnist import BinaryImages, ImageLoader
from sources.rendered_digits import rendered_digits


def epochs(rounds, *flags):
    """Measures the package with the given flags. Returns the median seconds of an epoch and the peak memory."""
    command = [sys.executable, str(Path(speed.__file__)), "--dataset", "rendered", "--rounds", str(rounds), *flags]
    turns = speed.measure_epochs(command, ["package"], rounds)["package"]
    return {
        "seconds": statistics.median(turn["seconds"] for turn in turns),
        "memory_mib": turns[-1]["memory_mib"],
        "gpu_mib": turns[-1]["gpu_mib"],
    }


def load(num_images):
    """
    Measures the training loader of bmnist. Returns a dict of the seconds per image (median of 3 epochs), the growth of
    the process in the middle of an epoch, including labels and the shuffled order, and the bytes per pixel.
    """
    rendered_digits(10_000)  # a warm-up: loads the fonts, and allocates torch's own memory
    before = speed.memory_mib("VmRSS")
    loader = ImageLoader(BinaryImages(*rendered_digits(num_images)), 128, shuffle=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for batch_idx, _ in enumerate(loader):
            if batch_idx == len(loader) // 2:
                grown = speed.memory_mib("VmRSS") - before
        seconds.append(time.perf_counter() - start)
    images = loader.dataset.images
    return {
        "seconds_per_image": statistics.median(seconds) / num_images,
        "process_mib": grown,
        "bytes_per_pixel": images.nbytes / images.numel(),
    }


def measure(name, values, function, threads=(None,)):
    """Calls a function for each value and number of threads. Prints each result and returns the list of results."""
    measured = []
    for value, number in itertools.product(values, threads):
        measured.append(
            {name: value, **({"threads": number, **function(value, number)} if number else function(value))}
        )
        print(
            "  ".join(
                f"{key} {number:.4g}" if isinstance(number, float) else f"{key} {number:,}"
                for key, number in measured[-1].items()
            ),
            flush=True,
        )
    return measured


def load_in_a_process(num_images):
    return json.loads(
        subprocess.run(
            [sys.executable, __file__, "--load", str(num_images)], check=True, capture_output=True, text=True
        ).stdout
    )


def plot(path, results, title):
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3)
    for (above, below), name, label in zip(
        panels.T[:2], ["batch size", "hidden width"], ["images per minibatch", "hidden units"]
    ):
        for threads in sorted({row["threads"] for row in results[name]}):
            rows = [row for row in results[name] if row["threads"] == threads]
            values = [row[name] for row in rows]
            above.plot(values, [row["seconds"] for row in rows], "o-", label=f"{threads} thread" + "s" * (threads > 1))
        above.set(ylabel="seconds per epoch")
        below.plot(values, [row["memory_mib"] for row in rows], "o-", label="main memory")
        if rows[0]["gpu_mib"]:
            below.plot(values, [row["gpu_mib"] for row in rows], "o-", label="GPU memory")
        below.set(ylabel="peak memory in MiB", xlabel=label)
        for axes in above, below:
            axes.set(xscale="log")
            axes.set_xticks(values, values)
            axes.minorticks_off()
    above, below = panels.T[2]
    values = [row["images"] for row in results["images"]]
    above.plot(values, [row["seconds_per_image"] * 1e6 for row in results["images"]], "o-")
    above.set(ylabel="microseconds per image, only the loader")
    below.plot(values, [row["process_mib"] for row in results["images"]], "o-", label="growth of the process")
    below.plot(values, [784 * value / 2**20 for value in values], "k--", label="one byte per pixel")
    below.set(ylabel="memory in MiB", xlabel="images in the data set")
    above.set(xscale="log")
    for axes in panels.flat:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    below.set(xscale="log", yscale="log", ylim=(5, None))
    for axes in [*panels[0, :2], *panels[1]]:
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", default=[32, 128, 512, 2048, 8192], type=int, nargs="+")
    parser.add_argument("--widths", default=[128, 256, 512, 1024, 2048, 4096], type=int, nargs="+")
    parser.add_argument("--num_images", default=[45_000, 142_000, 450_000, 1_420_000, 4_500_000], type=int, nargs="+")
    parser.add_argument("--rounds", default=3, type=int, help="Measured epochs of each setting (default: %(default)s)")
    parser.add_argument("--out", default=".", help="Directory of the JSON file and the plot (default: %(default)s)")
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)  # for the separate process that measures a loader
    args = parser.parse_args()
    if args.load:
        return print(json.dumps(load(args.load)))

    platform_info = speed.machine()
    threads = [1] if torch.cuda.is_available() else sorted({1, torch.get_num_threads()})

    def epochs_with(flag):
        return lambda value, number: epochs(args.rounds, flag, str(value), "--threads", str(number))

    results = {
        "machine": platform_info,
        "batch size": measure("batch size", args.batch_sizes, epochs_with("--batch_size"), threads),
        "hidden width": measure("hidden width", args.widths, epochs_with("--hidden_dims"), threads),
        "images": measure("images", args.num_images, load_in_a_process),
    }
    print(", ".join(f"{name} {value}" for name, value in platform_info.items() if value))
    path = Path(args.out) / f"growth_{'gpu' if torch.cuda.is_available() else 'cpu'}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(
        path.with_suffix(".png"),
        results,
        f"Default MLP, 45,000 images (left, middle) and the data loader (right), "
        f"{platform_info['gpu'] or platform_info['cpu']}",
    )


if __name__ == "__main__":
    main()

"""
Measures the seconds per epoch (training and validation) of this package, of the bare loop of train_torch.py, of JAX,
and of two common ways to write the training.

    python benchmarks/speed.py --data_dir ../data/      # or --dataset rendered; --model CNN

First measures in turn the time from the start of `python train_pl.py` to its first training step and the time of
`import torch, torchvision, pytorch_lightning`. Then runs each way to train in a separate process. After one epoch as a
warm-up, the processes take turns, epoch by epoch. Uses a GPU if one is available. JAX is measured only for the MLP on a
CPU, if benchmarks/requirements.txt is installed. Prints a table, writes the table and every measurement to
speed_MODEL_DEVICE.json, and plots the table to speed_MODEL_DEVICE.png.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pl
import train_torch
from bmnist import load_data
from harness import report
from harness.settings import process_settings
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from sources import SOURCES
from train_pl import VAE

WAYS = {
    "package": "python train_pl.py, with its logs, pictures and checkpoints",
    "package --no_cuda_graph": "the same without CUDA graphs, on a GPU",
    "bare loop": "the loop of train_torch.py, minibatches indexed by one shuffled tensor, nothing logged",
    "jax": "the same network, Adam and minibatches in JAX: an epoch is one compiled scan, nothing logged",
    "template": "per-image transforms, 2 workers, Lightning with self.log in every step, Adam not fused",
    "example": "the hundred-line example's loop: 784-400-20, per-image transforms, .item() in every step",
}
# A program that runs train_pl.py, and then prints the GPU memory that it used, in MiB.
WHOLE_RUN = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
import torch, train_pl
train_pl.main()
on_gpu = torch.cuda.is_available()
tensors = torch.cuda.max_memory_reserved() if on_gpu else 0
free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
print(json.dumps({{"tensors_mib": tensors / 2**20, "gpu_mib": (total - free) / 2**20}}))
"""
IMPORTS = "import os, torch, torchvision, pytorch_lightning; os._exit(0)"


def memory_mib(name):
    """Returns the memory of this process in MiB, now if the name is VmRSS, at its peak if the name is VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def turns():
    """
    Generator that waits until the parent process requests an epoch, and then yields. Send it the validation bpd after
    the epoch: it prints the bpd, the seconds and the peak memory for the parent, and waits for the next request.
    """
    for _ in sys.stdin:
        start = time.perf_counter()
        val_bpd = yield
        gpu_mib = 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            gpu_mib = torch.cuda.max_memory_allocated() / 2**20
        seconds = time.perf_counter() - start
        memory = {"memory_mib": memory_mib("VmHWM"), "gpu_mib": gpu_mib}
        print(json.dumps({"seconds": seconds, "val_bpd": val_bpd, **memory}), flush=True)
    os._exit(0)  # the parent has closed the pipe


class Turns(pl.Callback):
    """Callback whose turns last from one on_train_epoch_start to the next, and so include all work of the Trainer."""

    def __init__(self):
        self.turns = turns()

    def on_train_epoch_start(self, trainer, pl_module):
        self.turns.send(trainer.callback_metrics["val_bpd"].item() if trainer.current_epoch else None)


def training_flags(args, **changes):
    """Returns a Namespace of the benchmark's flags that are also flags of train_pl.py, with changes."""
    names = train_pl.make_parser().defaults
    return argparse.Namespace(**{name: value for name, value in {**vars(args), **changes}.items() if name in names})


def run_package(args):
    """Runs train_vae. The only change: its report waits for its turn at the start of each epoch."""

    class Report(report.EpochReport):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.send(self.history[-1]["val_bpd"] if trainer.current_epoch else None)
            super().on_train_epoch_start(trainer, pl_module)

    epochs = turns()
    report.EpochReport = Report
    with tempfile.TemporaryDirectory() as log_dir:
        no_graph = args.way.endswith("--no_cuda_graph")
        train_pl.train_vae(training_flags(args, log_dir=log_dir, epochs=args.rounds + 2, no_cuda_graph=no_graph))


def run_loop(args):
    """Runs the plain loop of train_torch.py, with its model and the package's data, or with those of the example."""
    if args.way == "example":
        model, fused = ExampleVAE(), None
        train_loader, val_loader = per_image_loaders(args, num_workers=0)
    else:
        torch.set_flush_denormal(True)  # like train_torch.main
        model, fused = make_vae(args, train_torch.VAE), True
        train_loader, val_loader = (
            Minibatches(loader.dataset, args.batch_size, shuffle)
            for loader, shuffle in zip(load_data(args), [True, False])
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    epochs = turns()
    next(epochs)
    while True:
        train_torch.train_vae(model, train_loader, optimizer)
        bpd, *_ = train_torch.test_vae(model, val_loader)
        epochs.send(bpd if args.way == "bare loop" else None)  # the example has another loss


class Minibatches:
    """The minibatches of a data set, with less overhead than a DataLoader."""

    def __init__(self, data_set, batch_size, shuffle):
        self.data_set, self.batch_size, self.shuffle = data_set, batch_size, shuffle

    def __iter__(self):
        order = torch.randperm(len(self.data_set)) if self.shuffle else torch.arange(len(self.data_set))
        return map(self.data_set.__getitem__, order.split(self.batch_size))


def run_jax(args):
    import jax_vae

    images = [loader.dataset.images.numpy() for loader in load_data(args)[:2]]
    val_bpds = jax_vae.epochs(*images, args.hidden_dims, args.z_dim, args.lr, args.batch_size)
    epochs = turns()
    next(epochs)
    while True:
        epochs.send(next(val_bpds))


def reason_to_skip(way, args):
    """Returns why a way is not measured, or None if it is measured."""
    if way == "package --no_cuda_graph" and not torch.cuda.is_available():
        return "CUDA graphs need a GPU"
    if way == "jax":
        if torch.cuda.is_available() or args.model != "MLP":
            return "only for the MLP on a CPU"
        if not all(map(importlib.util.find_spec, ["jax", "optax"])):
            return "not installed: pip install -r benchmarks/requirements.txt"
    return None


class TemplateVAE(VAE):
    """The same network, written like a first LightningModule."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    def training_step(self, batch, batch_idx):
        L_rec, L_reg, bpd = self.forward(batch[0])
        self.log("train_reconstruction_loss", L_rec, on_step=False, on_epoch=True)
        self.log("train_regularization_loss", L_reg, on_step=False, on_epoch=True)
        self.log("train_ELBO", L_rec + L_reg, on_step=False, on_epoch=True)
        self.log("train_bpd", bpd, on_step=False, on_epoch=True)
        return bpd

    def validation_step(self, batch, batch_idx):
        L_rec, L_reg, bpd = self.forward(batch[0])
        self.log("val_reconstruction_loss", L_rec)
        self.log("val_regularization_loss", L_reg)
        self.log("val_ELBO", L_rec + L_reg)
        self.log("val_bpd", bpd)

    def on_validation_epoch_end(self):
        pass


def run_template(args):
    train_loader, val_loader = per_image_loaders(args, num_workers=2)
    with process_settings(), tempfile.TemporaryDirectory() as log_dir:  # no warnings; all else as in the template
        torch.set_flush_denormal(False)
        torch.backends.cudnn.deterministic = False
        trainer = pl.Trainer(
            default_root_dir=log_dir,
            max_epochs=args.rounds + 2,
            callbacks=[Turns()],
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(make_vae(args, TemplateVAE), train_loader, val_loader)


class ExampleVAE(nn.Module):
    """The network of the widely used example: 784-400-20 and back."""

    def __init__(self):
        super().__init__()
        self.encoder = MLPEncoder(hidden_dims=[400])
        self.decoder = MLPDecoder(hidden_dims=[400])
        self.total = 0.0

    @property
    def device(self):
        return self.decoder.device

    def forward(self, imgs):
        """Returns the losses like train_torch.VAE, but summed over the batch, and reads the loss in every step."""
        mean, logvar = self.encoder(imgs)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        probs = torch.sigmoid(self.decoder(z))
        L_rec = F.binary_cross_entropy(probs, imgs, reduction="sum")
        L_reg = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        loss = L_rec + L_reg
        self.total += loss.item()
        return L_rec, L_reg, loss


class PerImage(Dataset):
    """Data set that applies torchvision's transforms to one PIL image at a time, like torchvision's MNIST."""

    def __init__(self, split):
        self.split = split
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Lambda(lambda img: (img > 0.5).float())])

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        image = Image.fromarray(self.split.images[index].numpy())
        return self.transform(image), int(self.split.labels[index])


def per_image_loaders(args, num_workers):
    """Returns loaders of the training and the validation images that load image by image."""
    train_loader, val_loader, _ = load_data(args)
    return (
        DataLoader(PerImage(train_loader.dataset), args.batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(PerImage(val_loader.dataset), args.batch_size, num_workers=num_workers),
    )


def make_vae(args, vae_class):
    return vae_class(args.model, args.hidden_dims, args.num_filters, args.z_dim, args.lr)


def run_start(args):
    """Ends the process at the first training step."""
    VAE.training_step = lambda *args: os._exit(0)
    with tempfile.TemporaryDirectory() as log_dir:
        train_pl.train_vae(training_flags(args, log_dir=log_dir))


RUN = {
    "package": run_package,
    "package --no_cuda_graph": run_package,
    "bare loop": run_loop,
    "jax": run_jax,
    "template": run_template,
    "example": run_loop,
    "start": run_start,
}


def measure_start(command, rounds):
    """Measures, in turn, the seconds from the start of a process to its first training step, and of the imports."""
    commands = {"first step": [*command, "--way", "start"], "imports": [sys.executable, "-c", IMPORTS]}
    seconds = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}  # the first round reads uncached files


def measure_epochs(command, ways, rounds):
    """Returns a dict from each way to the list of the answers in its turns (see turns)."""
    pipes, children = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}, {}
    for way in ways:
        # Only the package may set variables that make torch faster.
        variables = os.environ if way.startswith("package") else {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
        children[way] = subprocess.Popen([*command, "--way", way], env=variables, **pipes)
    answers = {way: [] for way in ways}
    try:
        for _ in range(rounds + 1):
            for way, process in children.items():
                print("go", file=process.stdin, flush=True)
                answer = next((line for line in process.stdout if line.startswith("{")), None)
                if answer is None:
                    sys.exit(f"speed.py: error: the process of {way} ended with code {process.wait()}")
                answers[way].append(json.loads(answer))
    finally:
        for process in children.values():
            process.kill()
    return {way: turns[1:] for way, turns in answers.items()}


def measure_whole_run(flags, log_dir, timeout=None):
    """
    Measures a run of `python train_pl.py` in a separate process.
    Inputs:
        flags - List of its flags, as on the command line.
        log_dir - Folder for the run.
        timeout - Time limit of the process, in seconds.
    Outputs:
        measured - Dict: seconds of the process and of its trainer.fit, test_bpd, and the GPU memory that it used.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", WHOLE_RUN, *flags, "--log_dir", log_dir]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout).stdout
    seconds = time.perf_counter() - start
    results = json.loads(next(Path(log_dir).glob("**/results.json")).read_text())
    measured = {"process": seconds, "fit": results["fit_seconds"], "test_bpd": results["test_bpd"]}
    return {**measured, **json.loads(output.splitlines()[-1])}


def machine():
    """Returns a dict that describes the machine and the versions."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
    }


def summary(answers):
    """
    Returns a dict for each way, with the median, lowest and highest seconds, the median ratios to the turns of the bare
    loop and of JAX, the validation bpd after the last turn, and the peak memory in MiB.
    """
    rows = {}
    for way, turns in answers.items():
        seconds = [turn["seconds"] for turn in turns]
        ratios = [turn["seconds"] / bare["seconds"] for turn, bare in zip(turns, answers["bare loop"])]
        to_jax = [turn["seconds"] / jax["seconds"] for turn, jax in zip(turns, answers.get("jax", []))]
        rows[way] = {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "ratio": statistics.median(ratios),
            "ratio_to_jax": statistics.median(to_jax) if to_jax else None,
            "val_bpd": turns[-1]["val_bpd"],
            "memory_mib": turns[-1]["memory_mib"],
            "gpu_mib": turns[-1]["gpu_mib"],
        }
    return rows


def plot(path, rows, title):
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(rows), [row["median"] for row in rows.values()], color="tab:blue")
    axes.bar_label(
        bars, [f"{row['median']:.2f} s, {row['ratio']:.2f} of the bare loop" for row in rows.values()], padding=4
    )
    axes.set(title=title, xlabel="seconds per epoch (training and validation), median")
    axes.margins(x=0.5)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../data/", help="Directory of MNIST (default: %(default)s)")
    parser.add_argument("--dataset", default="mnist", choices=SOURCES)
    parser.add_argument("--model", default="MLP", choices=train_pl.FLAGS["model"]["model"].choices)
    parser.add_argument("--batch_size", default=128, type=int, help="Images per minibatch (default: %(default)s)")
    parser.add_argument("--hidden_dims", default=[512], type=int, nargs="+", help="Widths of the MLP (default: 512)")
    parser.add_argument("--threads", type=int, help="CPU threads, except of JAX (default: one per core)")
    parser.add_argument("--rounds", default=7, type=int, help="Measured turns of each way (default: %(default)s)")
    parser.add_argument(
        "--ways", default=list(WAYS), choices=WAYS, nargs="+", help="Ways to measure, and the bare loop (default: all)"
    )
    parser.add_argument(
        "--whole_run",
        default=0,
        type=int,
        metavar="EPOCHS",
        help="Also measure a whole run of this many epochs (default: 80 on a GPU, none on a CPU)",
    )
    parser.add_argument("--out", default=".", help="Directory of the JSON file and the plot (default: %(default)s)")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # the way that a separate process measures
    args = parser.parse_args(namespace=argparse.Namespace(**{**train_pl.make_parser().defaults, "threads": None}))
    # An explicit number, so that all processes use the same number of threads.
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    if args.way:
        return RUN[args.way](args)
    args.ways = [way for way in WAYS if way in [*args.ways, "bare loop"]]

    command = [sys.executable, *sys.argv]
    start = measure_start(command, args.rounds)
    ratio = statistics.median(first / imports for first, imports in zip(start["first step"], start["imports"]))
    print(
        f"first training step after {statistics.median(start['first step']):.2f} s, the imports take "
        f"{statistics.median(start['imports']):.2f} s, ratio {ratio:.2f} (medians of {args.rounds})\n",
        flush=True,
    )
    on_gpu = torch.cuda.is_available()
    whole_run = {}
    if epochs := args.whole_run or 80 * on_gpu:
        flags = ["--model", args.model, "--dataset", args.dataset, "--data_dir", args.data_dir, "--epochs", str(epochs)]
        with tempfile.TemporaryDirectory() as log_dir:
            whole_run = {"epochs": epochs, **measure_whole_run(flags, log_dir)}
        print(
            "whole run of {epochs} epochs: process {process:.1f} s, trainer.fit {fit:.1f} s, "
            "test bpd {test_bpd:.4f}\n".format(**whole_run),
            flush=True,
        )
    reasons = {way: reason_to_skip(way, args) for way in args.ways}
    answers = measure_epochs(command, [way for way, reason in reasons.items() if reason is None], args.rounds)
    rows, platform_info = summary(answers), machine()

    print(f"{'seconds per epoch':16} median     min     max   ratio  to JAX  val bpd  memory" + "  on the GPU" * on_gpu)
    for way, row in rows.items():
        to_jax = "" if row["ratio_to_jax"] is None else f"{row['ratio_to_jax']:.2f}"
        print(
            f"{way:16} {row['median']:7.3f} {row['min']:7.3f} {row['max']:7.3f} {row['ratio']:7.2f} {to_jax:>7} "
            f"{row['val_bpd'] or math.nan:8.4f} {row['memory_mib']:5.0f} M"
            + f" {row['gpu_mib']:9.0f} M" * on_gpu
            + f"  {WAYS[way]}"
        )
    for way, reason in reasons.items():
        if reason is not None:
            print(f"{way:16} skipped: {reason}")
    print(
        f"{args.model} on {args.dataset}; medians of {args.rounds} turns each; ratios to the bare loop and to JAX, "
        f"turn by turn; val bpd after {args.rounds + 1} epochs; memory: peak of the main process"
    )
    print(", ".join(f"{name} {value}" for name, value in platform_info.items() if value))
    path = Path(args.out) / f"speed_{args.model}_{'gpu' if on_gpu else 'cpu'}"
    path.with_suffix(".json").write_text(
        json.dumps(
            {
                "model": args.model,
                "dataset": args.dataset,
                "machine": platform_info,
                "ways": WAYS,
                "summary": rows,
                "turns": answers,
                "start": start,
                "whole_run": whole_run,
            },
            indent=1,
        )
        + "\n"
    )
    plot(
        path.with_suffix(".png"),
        rows,
        title=f"{args.model} on {args.dataset}, {platform_info['gpu'] or platform_info['cpu']}",
    )


if __name__ == "__main__":
    main()

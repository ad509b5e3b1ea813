"""
A trained model's numbers and pictures: `python evaluate.py CHECKPOINT`, `python evaluate.py --help`.

Test bpd, log p(x), active units, and pictures of the latent space, for any checkpoint of train_pl.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from pictures import latent_space  # isort: skip  before Lightning, which imports matplotlib
import torch
from tqdm import tqdm

from bmnist import BinaryImages, load_data
from harness.checkpoints import RUN, CheckpointError, build_model, read_checkpoint
from harness.devices import pick_device, use_fast_layout
from harness.errors import (
    FlagError,
    Terminated,
    UserError,
    best_effort,
    exit_on_error,
    is_out_of_memory,
    is_screen,
    print_line,
)
from harness.files import write_text
from harness.flags import Flag, Parser, plain_value
from harness.settings import process_settings
from pictures.explorer import write_explorer
from sources import DATASET_CHECKSUM, KINDS, find_file
from sources.places import find_data_dir, places_of_file, run_folder
from train_pl import FLAGS as TRAINING_FLAGS
from train_pl import VAE, complete_flags
from utils import active_units, elbo_to_bpd, log_likelihood, quadrature_log_likelihood

# Numbers of images of MNIST's size in a batch; of larger images there are fewer, see fit_batch.
BATCH_SIZE = 100  # test images
CHUNK_SIZE = {"cpu": 512, "gpu": 16_384}  # decoded samples, as many as fit into the caches of a CPU; a GPU needs more
QUADRATURE_SIZE = 2048  # decoded points of the quadrature
RESULTS, EXPLORER = "evaluation.json", "explorer.html"
IN_BPD = {"elbo": "test_bpd", "log_likelihood": "log_likelihood_bpd"}
DATASET = TRAINING_FLAGS["data"]["dataset"]
FLAGS = {
    "evaluation": {
        "dataset": Flag(None, "Data; by default that of the training", parse=DATASET.parse),
        "data_dir": Flag(None, "Directory of MNIST, downloaded if missing; by default that of the training"),
        "iw_samples": Flag(1000, "Samples per image of the importance-weighted log p(x)", minimum=1),
        "out": Flag(None, "Folder for the results; by default `evaluation` in the run's folder"),
        "accelerator": dataclasses.replace(TRAINING_FLAGS["devices"]["accelerator"], help="Device of the evaluation"),
        "no_explorer": Flag(False, f"Leave {EXPLORER} out"),
        "progress_bar": Flag(False, "Show a progress bar"),
    },
    "a checkpoint that contains only weights, such as that of train_torch.py": {
        name: TRAINING_FLAGS["model"][name] for name in ["model", "z_dim", "hidden_dims", "num_filters"]
    },
}


def evaluate(checkpoint: str | Path, **flags) -> tuple[dict, Path]:
    """
    Evaluates a checkpoint on its test set and saves pictures of its latent space. What takes seconds comes first and is
    written at once; log p(x) follows. The numbers depend on the checkpoint and iw_samples only (if memory is short, on
    that, too). Torch's random numbers and the settings of the process are the same afterwards.
    Inputs:
        checkpoint - Path of a checkpoint of train_pl.py.
        flags - Those of `python evaluate.py --help` by name, such as iw_samples=50; each has the same default.
    Outputs:
        results - Dict of the content of evaluation.json: the numbers, see `statistics`, and where they come from.
        folder - Path of the folder of evaluation.json and the pictures.
    Raises:
        UserError - if a flag, the checkpoint, the data or the folder is invalid; its message is one line.
    """
    args = make_parser().complete(argparse.Namespace(**flags))
    with process_settings(), torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
        return evaluate_checkpoint(Path(checkpoint).expanduser(), args)


def evaluate_checkpoint(path, args):
    """As `evaluate`, for the path of a checkpoint and a Namespace of every flag."""
    start, device = time.perf_counter(), torch.device(pick_device(args.accelerator))
    checkpoint, run = read_checkpoint(path), run_folder(path)
    model = use_fast_layout(build_vae(checkpoint, path, args).to(device).eval())
    flags, epoch = flags_of_training(checkpoint, path, run, args), checkpoint.get("epoch")
    try:
        test_set = load_data(flags, download=args.data_dir is not None)[2].dataset
    except UserError as error:
        if args.data_dir is not None or DATASET_CHECKSUM in vars(flags):
            raise
        raise UserError(f"{error} (--data_dir says where MNIST is now)") from error
    img_size, trained_size = list(test_set.images.shape[1:]), list(model.hparams.get("img_size", [28, 28]))
    if img_size != trained_size:
        raise UserError(f"{flags.dataset} has images of {img_size} pixels, {path} is for those of {trained_size}")
    folder = Path(args.out).expanduser() if args.out else run / "evaluation"
    prepare(folder)
    results = {
        "checkpoint": str(path),
        "epoch": epoch + 1 if isinstance(epoch, int) else None,
        "model": model.hparams.model_name,
        "z_dim": plain_value(model.hparams.z_dim),
        **{name: vars(flags)[name] for name in ["dataset", "binarization", "objective", "train_samples", "beta"]},
        "test_images": len(test_set),
        "iw_samples": args.iw_samples,
        "device": str(device),
        "torch": torch.__version__,
    }
    slow = {"log_likelihood": functools.partial(log_likelihoods, model, test_set, args.iw_samples, args.progress_bar)}
    if results["z_dim"] == 2:
        slow["log_likelihood_by_quadrature"] = functools.partial(by_quadrature, model, test_set)
    print_beginning(results, folder, estimate_seconds(model, test_set, args.iw_samples))
    torch.manual_seed(0)
    elbos, means = posteriors(model, test_set)
    results.update(statistics("elbo", elbos, test_set), active_units=int(active_units(means).sum()))
    print_numbers(results)
    keeps = has_complete(folder, results)
    if not keeps:
        save(results, folder, start, missing=[*slow])
    imgs, labels = test_set[torch.arange(len(test_set))]
    legend = "digit" if flags.dataset in ["mnist", "rendered"] else "label"
    name = os.path.basename(flags.dataset)  # the page may be shown to others: without the folder
    facts = {"run": run.resolve().name, "legend": legend, "dataset": name}
    latent_space.save_pictures(folder, model, imgs, labels, means, legend)
    save_explorer = functools.partial(explore, folder, model, imgs, means, labels, args.no_explorer)
    save_explorer({**results, **facts})
    torch.manual_seed(0)  # the numbers do not depend on the pictures
    for name in [*slow]:
        try:
            numbers = statistics(name, slow[name](), test_set)
        except (KeyboardInterrupt, Terminated):
            print_line(f"\nInterrupted before {' and '.join(slow)}; what was finished is in {folder}")
            raise
        del slow[name]
        results.update(numbers)
        print_numbers({"iw_samples": args.iw_samples, **numbers})
        if not (slow and keeps):
            save(results, folder, start, missing=[*slow])
        if name == "log_likelihood" and (folder / EXPLORER).exists():  # which shows it, too
            save_explorer({**results, **facts})
    print_line(f"evaluation in {folder}, {results['seconds']} s")
    return results, folder


def has_complete(folder, results):
    """Whether a folder has a complete evaluation of the same weights: one with the same quick numbers."""
    with contextlib.suppress(OSError, ValueError):
        older = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return "missing" not in older and {**older, **results, "iw_samples": older.get("iw_samples")} == older
    return False


def save(results, folder, start, missing):
    """Adds to the results what is missing, if anything, and the seconds since the start, and writes evaluation.json."""
    results.pop("missing", None)
    results.update({"missing": missing} if missing else {}, seconds=round(time.perf_counter() - start, 1))
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def explore(folder, model, imgs, means, labels, no_explorer, facts):
    """Writes the latent-space explorer, see write_explorer, unless no_explorer is True."""
    with best_effort(f"writing {folder / EXPLORER}"):
        (folder / EXPLORER).unlink(missing_ok=True)  # of an earlier evaluation
        if not no_explorer:
            plane = latent_space.plane(means, labels, facts["legend"])
            write_explorer(folder / EXPLORER, model.encoder, model.decoder, imgs, means, plane, facts)


def build_vae(checkpoint, path, args):
    """The VAE of a checkpoint that has been read. A bare state_dict needs flags that describe the model."""
    if checkpoint.get("hyper_parameters"):
        return build_model(VAE, checkpoint, path)
    try:
        sizes = dict(hidden_dims=args.hidden_dims, num_filters=args.num_filters, z_dim=args.z_dim)
        return build_model(VAE, checkpoint, path, model_name=args.model, lr=0.0, **sizes)
    except CheckpointError as error:
        hint = "give --model, --z_dim, --hidden_dims and --num_filters as it was trained with"
        raise CheckpointError(f"{error}: {hint}") from error


def flags_of_training(checkpoint, path, run, args):
    """
    The flags that a checkpoint was trained with, as a Namespace of every flag.
    Inputs:
        checkpoint - What read_checkpoint returned.
        path, run - Paths of the checkpoint and of its run's folder.
        args - Namespace of the flags of evaluate.py, of which dataset and data_dir replace the checkpoint's.
    Raises:
        UserError - if the flags are invalid, or the data set is not given, gone or has changed.
    """
    kept = checkpoint.get(RUN) if isinstance(checkpoint.get(RUN), dict) else {}
    if kept.get("flags") is None and args.dataset is None:
        raise FlagError(f"{path} does not say what data it was trained on: give --dataset")
    saved, known = kept.get("flags") or {}, {name for group in TRAINING_FLAGS.values() for name in group}
    try:
        flags = {name: value for name, value in saved.items() if name in known}
        if args.dataset:
            flags["dataset"] = args.dataset
        elif DATASET_CHECKSUM in saved:
            places = places_of_file(run, kept, flags["dataset"])
            flags["dataset"] = find_file(places, saved[DATASET_CHECKSUM]) or places[-1]
            if not os.path.exists(flags["dataset"]):
                raise UserError(f"{places[-1]}, what it was trained on, is gone: give --dataset with where it is now")
        flags = complete_flags(argparse.Namespace(**flags))
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} contains invalid flags ({error})") from error
    if not args.dataset and vars(flags).get(DATASET_CHECKSUM) != saved.get(DATASET_CHECKSUM):
        raise UserError(f"{flags.dataset} has changed since the training: give --dataset to evaluate on it anyway")
    content = KINDS[flags.dataset].__name__ if flags.dataset in KINDS else ""
    flags.data_dir = args.data_dir or find_data_dir(run, kept, flags.data_dir, content)
    return flags


def prepare(folder):
    """Makes the folder of the results. Raises a UserError if it cannot be written or contains files of others."""
    try:
        there = [name for name in [RESULTS, EXPLORER, *latent_space.FILES] if os.path.lexists(folder / name)]
        is_file = (folder / RESULTS).is_file()
        text = (folder / RESULTS).read_text(encoding="utf-8", errors="replace") if is_file else "of others"
        if there and not re.match(r'\0*\Z|\{\s*"checkpoint":', text):  # after a crash the file may be empty
            raise UserError(
                f"{folder} holds {there[0]}, which evaluate.py did not make and does not overwrite: choose another "
                "folder with --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from error


def batches(test_set):
    """The indices of the test images, a tensor for each batch."""
    return torch.arange(len(test_set)).split(fit_batch(BATCH_SIZE, test_set.images[0].numel()))


def posteriors(model: VAE, test_set: BinaryImages) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The ELBOs and the means of the posteriors of the test images, which take seconds.
    Inputs:
        model, test_set - The VAE and the test set, N images.
    Outputs:
        elbos - Tensor of shape [N], in nats, from one sample of the posterior per image, as in training.
        means - Tensor of shape [N,D], the means of the posteriors. Both are on the CPU.
    """
    elbos, means = [], []
    for indices in batches(test_set):
        terms = model.terms(test_set[indices][0].to(model.device))
        elbos.append(-(terms.L_rec + terms.L_reg).cpu())
        means.append(terms.mean.cpu())
    return torch.cat(elbos), torch.cat(means)


def log_likelihoods(model: VAE, test_set: BinaryImages, iw_samples: int, progress_bar: bool = False) -> torch.Tensor:
    """
    The importance-weighted log p(x) of each test image, tensor of shape [N] in nats, on the CPU. Every tenth of the way
    a line shows the mean so far, or the progress bar does.
    Inputs:
        model, test_set - The VAE and the test set, N images.
        iw_samples, progress_bar - See evaluate.
    """
    num_pixels, parts = test_set.images[0].numel(), batches(test_set)
    chunk_size = fit_batch(CHUNK_SIZE["cpu" if model.device.type == "cpu" else "gpu"], num_pixels)
    bar = tqdm(parts, "log p(x)", disable=not (progress_bar and is_screen(sys.stderr)))
    log_ps = []
    for number, indices in enumerate(bar, start=1):
        imgs = test_set[indices][0].to(model.device)
        while len(log_ps) < number:
            try:
                log_ps.append(log_likelihood(imgs, model.encoder, model.decoder, iw_samples, chunk_size).cpu())
            except RuntimeError as error:
                if not is_out_of_memory(error) or chunk_size <= len(imgs):
                    raise
                chunk_size //= 2
        if 10 * number // len(parts) > 10 * (number - 1) // len(parts) and 1 < number < len(parts):
            so_far = torch.cat(log_ps)
            text = f"{so_far.mean().item():.2f} +- {so_far.std().item() / math.sqrt(len(so_far)):.2f} nats"
            bar.set_postfix_str(text)
            if bar.disable:
                print_line(f"log p(x)  {number / len(parts):4.0%}  {text}")
    return torch.cat(log_ps)


def by_quadrature(model: VAE, test_set: BinaryImages, limit: float = 6.0) -> torch.Tensor:
    """log p(x) of each test image by quadrature, for 2 latents, tensor of shape [N] in nats, on the CPU."""
    imgs = test_set[torch.arange(len(test_set))][0].to(model.device)
    size = fit_batch(QUADRATURE_SIZE, test_set.images[0].numel())
    return quadrature_log_likelihood(imgs, model.decoder, limit=limit, chunk_size=size).cpu()


def statistics(name: str, values: torch.Tensor, test_set: BinaryImages) -> dict[str, float]:
    """
    The numbers of evaluation.json: the mean over the test images, and its standard error.
    Inputs:
        name - Name of a quantity, such as elbo.
        values - Tensor of shape [N], the quantity of each test image in nats.
        test_set - The test set.
    Outputs:
        numbers - Dict of name and name_standard_error; the same in bits per dimension under the quantity's name for it.
    """
    numbers, values = {}, values.double()  # on the CPU, since a Mac's GPU has no double precision
    bpd = elbo_to_bpd(-values, (1, test_set.images[0].numel()))
    for quantity, value in {name: values, **({IN_BPD[name]: bpd} if name in IN_BPD else {})}.items():
        numbers[quantity] = value.mean().item()
        numbers[f"{quantity}_standard_error"] = value.std().item() / math.sqrt(len(value))
    return numbers


def estimate_seconds(model: VAE, test_set: BinaryImages, iw_samples: int) -> float:
    """About how long log p(x) takes, in seconds, by the time of one batch with at most 100 samples."""
    parts, samples, times = batches(test_set), min(100, iw_samples), []
    few = BinaryImages(test_set.images[parts[0]], test_set.labels[parts[0]])
    for _ in range(2):  # the first time, everything is slower
        start = time.perf_counter()
        log_likelihoods(model, few, samples)
        times.append(time.perf_counter() - start)
    seconds = min(times) * iw_samples / samples * len(parts)
    if model.hparams.z_dim == 2:
        start = time.perf_counter()
        by_quadrature(model, test_set, limit=0.4)  # of 6, along each axis
        seconds += (time.perf_counter() - start) * (6 / 0.4) ** 2
    return seconds


def fit_batch(num_images, num_pixels):
    """Number of images of num_pixels with as many pixels in all as num_images of MNIST's; at most that, at least 1."""
    return max(min(num_images, num_images * 28 * 28 // num_pixels), 1)


def make_parser() -> Parser:
    """The parser of the flags of `python evaluate.py`."""
    parser = Parser("Evaluates a checkpoint of train_pl.py on its test set.", FLAGS)
    parser.add_argument("checkpoint", help="The checkpoint: of a run, RUN/checkpoints/best.ckpt")
    return parser


def print_beginning(results: dict, folder: Path, seconds: float):
    """Prints what is evaluated, and about how long it takes."""
    r = argparse.Namespace(**results)
    after = f"after {r.epoch or 'some'} epoch{'s' * (r.epoch != 1)}"
    images = f"{r.test_images:,} test images of {r.dataset} ({r.binarization})"
    time_needed = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    print_line(
        f"{r.model}, {r.z_dim} latent{'s' * (r.z_dim != 1)}, {after}, on {images}, on {r.device}, into {folder}: "
        f"log p(x) with {r.iw_samples:,} samples takes about {time_needed}"
    )


def print_numbers(numbers: dict):
    """Prints those numbers of evaluation.json that are there."""
    for label, name, unit, how in [
        ("test bpd", "test_bpd", "", ""),
        ("ELBO", "elbo", " nats", ""),
        ("log p(x)", "log_likelihood", " nats", f", importance-weighted, {numbers['iw_samples']:,} samples"),
        ("log p(x)", "log_likelihood_bpd", " bpd", ""),
        ("log p(x)", "log_likelihood_by_quadrature", " nats", ", by quadrature"),
    ]:
        if name in numbers:
            digits = 2 if unit == " nats" else 4
            error = numbers[f"{name}_standard_error"]
            print_line(f"{label:12}  {numbers[name]:8.{digits}f} +- {error:.{digits}f}{unit}{how}")
    if "active_units" in numbers:
        print_line(f"active units  {numbers['active_units']:8} of {numbers['z_dim']}")


def main():
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_error(parser):
        evaluate(**vars(args))


if __name__ == "__main__":
    main()

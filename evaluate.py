"""
Evaluates a trained model: `python evaluate.py CHECKPOINT`, `python evaluate.py --help`.

For any checkpoint of train_pl.py, this program computes test bpd, log p(x), active units and the latents of each image,
and saves pictures of the latent space.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import tempfile
import time
from pathlib import Path

from pictures import latent_space  # isort: skip  before Lightning, which imports matplotlib
import torch

from bmnist import load_data
from harness.checkpoints import RUN, CheckpointError, build_model, read_checkpoint
from harness.devices import pick_device, use_fast_layout
from harness.errors import (
    FlagError,
    Terminated,
    UserError,
    best_effort,
    exit_on_error,
    is_out_of_memory,
    one_line,
    print_line,
    warn,
)
from harness.files import write_text
from harness.flags import Flag, Parser, plain_value
from harness.settings import process_settings
from likelihoods import (
    check_latents_path,
    estimate_seconds,
    has_latents,
    log_likelihoods,
    posteriors,
    quadrature_log_likelihoods,
    save_latents,
    statistics,
)
from pictures.explorer import write_explorer
from sources import DATASET_CHECKSUM, KINDS, find_file
from sources.locations import file_locations, find_data_dir, run_folder
from train_pl import FLAGS as TRAINING_FLAGS
from train_pl import VAE, complete_flags
from utils import active_units

RESULTS, EXPLORER = "evaluation.json", "explorer.html"
SPLITS = ["train", "validation", "test"]  # in the order of the loaders
DATASET = TRAINING_FLAGS["data"]["dataset"]
FLAGS = {
    "evaluation": {
        "dataset": Flag(None, "Data set; if not given, the training data set", parse=DATASET.parse),
        "data_dir": Flag(None, "Directory of MNIST (missing files are downloaded); if not given, that of the training"),
        "split": Flag("test", "Images to evaluate; pictures and explorer are made only for the test set", SPLITS),
        "iw_samples": Flag(1000, "Samples per image for the importance-weighted log p(x)", minimum=1),
        "latents": Flag(None, "Write the posterior, label, ELBO and log p(x) of each image to this .npz file"),
        "out": Flag(None, "Folder for the results; by default `evaluation` in the run's folder"),
        "accelerator": dataclasses.replace(TRAINING_FLAGS["devices"]["accelerator"], help="Device for the evaluation"),
        "no_explorer": Flag(False, f"Do not write {EXPLORER}"),
        "progress_bar": Flag(False, "Show a progress bar on a terminal"),
    },
    "a checkpoint that contains only weights, such as that of train_torch.py": {
        name: TRAINING_FLAGS["model"][name] for name in ["model", "z_dim", "hidden_dims", "num_filters"]
    },
}


def evaluate(checkpoint: str | Path, **flags) -> tuple[dict, Path]:
    """
    Evaluates a checkpoint on the test set (or on another split) and saves pictures of its latent space. Results that
    take seconds are computed first and written at once; log p(x) follows. The numbers depend only on the checkpoint and
    on iw_samples (and on the amount of memory if it runs out). Torch's random numbers and the settings of the process
    are restored afterwards.
    Inputs:
        checkpoint - Path of a checkpoint of train_pl.py.
        flags - The flags of `python evaluate.py --help` by name, such as iw_samples=50, with the same defaults.
    Outputs:
        results - Dict of the content of evaluation.json: the numbers (see `statistics`), the checkpoint and the flags.
        folder - Path of the folder that contains evaluation.json and the pictures.
    Raises:
        UserError - if a flag, the checkpoint, the data or the folder is invalid; its message is one line.
    """
    args = make_parser().complete(argparse.Namespace(**flags))
    with process_settings(), torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
        return evaluate_checkpoint(Path(os.path.expanduser(checkpoint)), args)


def evaluate_checkpoint(path, args):
    """Evaluates the checkpoint at a path with a Namespace of every flag. Returns the outputs of `evaluate`."""
    start, run = time.perf_counter(), run_folder(path)
    latents = Path(os.path.expanduser(args.latents)) if args.latents else None
    if latents:
        check_latents_path(latents)
    model, dataset, flags, epoch = load_model_and_data(path, run, args)
    folder = folder_of_results(args, path, run)
    prepare_folder(folder, path, flags.dataset, args.split)
    if latents:
        check_writable(latents.parent, "--latents")
    results = {
        "checkpoint": str(path),
        "epoch": epoch + 1 if isinstance(epoch, int) else None,
        "model": model.hparams.model_name,
        "z_dim": plain_value(model.hparams.z_dim),
        **{name: vars(flags)[name] for name in ["dataset", "binarization", "objective", "train_samples", "beta"]},
        f"{args.split}_images": len(dataset),
        "iw_samples": args.iw_samples,
        "device": str(model.device),
        "torch": torch.__version__,
    }
    print_beginning(results, args.split, folder, estimate_seconds(model, dataset, args.iw_samples))
    torch.manual_seed(0)
    elbos, means, log_stds = posteriors(model, dataset)
    names_in_bpd = {"elbo": f"{args.split}_bpd", "log_likelihood": "log_likelihood_bpd"}
    results.update(statistics("elbo", elbos, dataset, names_in_bpd["elbo"]))
    results["active_units"] = int(active_units(means).sum())
    print_numbers(results, args.split)
    values = {"mean": means, "log_std": log_stds, "label": dataset.labels, "elbo": elbos}
    if latents and not has_latents(latents, means):  # such a file may already contain log p(x)
        save_latents(latents, **values)
    legend = "digit" if flags.dataset in ["mnist", "rendered"] else "label"
    name = os.path.basename(flags.dataset)  # without the folder, since the page may be published
    title = run.resolve().name if path.parent.name == "checkpoints" else path.stem
    facts = {"run": title, "legend": legend, "dataset": name}

    imgs, labels = dataset[torch.arange(len(dataset) if args.split == "test" else 0)]  # the images of the pictures

    def save_explorer():
        update_explorer(folder, model, imgs, means, labels, args.no_explorer, {**results, **facts})

    def save_pictures():
        latent_space.save_pictures(folder, model, imgs, labels, means, legend)
        save_explorer()

    def compute_log_likelihoods():
        torch.manual_seed(0)  # so that the numbers do not depend on the pictures
        values["log_likelihood"] = log_likelihoods(model, dataset, args.iw_samples, args.progress_bar)
        add("log_likelihood", values["log_likelihood"])
        if latents:
            save_latents(latents, **values)
            print_line(f"latents of {len(dataset):,} {args.split} images in {latents}")
        if args.split == "test" and (folder / EXPLORER).exists():
            save_explorer()  # again, with log p(x)

    def add(name, found):
        numbers = statistics(name, found, dataset, names_in_bpd.get(name, ""))
        results.update(numbers)
        print_numbers({"iw_samples": args.iw_samples, **numbers}, args.split)

    steps = {"pictures": save_pictures} if args.split == "test" else {}
    steps["log_likelihood"] = compute_log_likelihoods
    if results["z_dim"] == 2:
        by_grid = "log_likelihood_by_quadrature"
        steps[by_grid] = lambda: add(by_grid, quadrature_log_likelihoods(model, dataset))
    keeps = has_complete_results(folder, results)
    if not keeps:
        save_results(results, folder, start, missing=[*steps])
    try:
        for name in [*steps]:
            steps[name]()
            del steps[name]
            if not (steps and keeps):
                save_results(results, folder, start, missing=[*steps])
    except (KeyboardInterrupt, Terminated):
        print_line(f"\nnote: interrupted before {' and '.join(steps)}; the finished results are in {folder}")
        raise
    print_line(f"evaluation in {folder}, {results['seconds']} s")
    return results, folder


def load_model_and_data(path, run, args):
    """Returns a checkpoint's VAE, the images to evaluate, the flags of the training, and its epoch counted from 0."""
    checkpoint = read_checkpoint(path)
    model = use_fast_layout(build_vae(checkpoint, path, args).to(pick_device(args.accelerator)).eval())
    flags = flags_of_training(checkpoint, path, run, args)
    try:
        dataset = load_data(flags, download=args.data_dir is not None)[SPLITS.index(args.split)].dataset
    except UserError as error:
        if args.data_dir is not None or DATASET_CHECKSUM in vars(flags):
            raise
        raise UserError(f"{error} (if the data was moved, give its directory with --data_dir)") from error
    img_size, trained_size = list(dataset.images.shape[1:]), list(model.hparams.get("img_size", [28, 28]))
    if img_size != trained_size:
        raise UserError(
            f"{flags.dataset} has images of {img_size} pixels, but {path} was trained on images of {trained_size} "
            "pixels: give --dataset with images of that size"
        )
    return model, dataset, flags, checkpoint.get("epoch")


def folder_of_results(args, path, run):
    """
    Returns --out or, by default, a folder in the run's folder that is named after the split. If this folder contains
    the evaluation of another checkpoint of the run, such as best.ckpt, this evaluation is kept: the name of the new
    checkpoint, such as last, is appended to the name of the folder.
    """
    if args.out:
        return Path(os.path.expanduser(args.out))
    folder = run / ("evaluation" if args.split == "test" else f"evaluation_{args.split}")
    belongs_to_other_checkpoint = (
        os.path.basename(read_earlier_results(folder).get("checkpoint", path.name)) != path.name
    )
    return folder.with_name(f"{folder.name}_{path.stem}") if belongs_to_other_checkpoint else folder


def read_earlier_results(folder):
    """Returns the content of the evaluation.json in a folder, or an empty dict."""
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return results if isinstance(results, dict) else {}
    return {}


def has_complete_results(folder, results):
    """
    Returns whether a folder contains a complete evaluation of the same weights. Weights count as the same if the
    results that are computed before log p(x) are equal.
    """
    older = read_earlier_results(folder)
    # These fields are not compared: one file can have several paths, for example.
    unchanged_fields = {name: older.get(name) for name in ["checkpoint", "iw_samples"]}
    return "missing" not in older and {**older, **results, **unchanged_fields} == older


def save_results(results, folder, start, missing):
    """Adds the names of missing results, if any, and the seconds since the start, and writes evaluation.json."""
    results.pop("missing", None)
    results.update({"missing": missing} if missing else {}, seconds=round(time.perf_counter() - start, 1))
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def update_explorer(folder, model, imgs, means, labels, no_explorer, facts):
    """Writes the latent-space explorer (see write_explorer), or removes the one of an earlier evaluation."""
    path = folder / EXPLORER
    if no_explorer:
        path.unlink(missing_ok=True)
        return
    with best_effort(f"writing {path}"):
        try:
            plane = latent_space.plane(means, labels, facts["legend"])
            write_explorer(path, model.encoder, model.decoder, imgs, means, plane, facts)
        except Exception:
            path.unlink(missing_ok=True)
            raise


def build_vae(checkpoint, path, args):
    """Returns the VAE of a checkpoint's content. A bare state_dict needs the flags that describe the model."""
    if checkpoint.get("hyper_parameters"):
        return build_model(VAE, checkpoint, path)
    try:
        sizes = dict(hidden_dims=args.hidden_dims, num_filters=args.num_filters, z_dim=args.z_dim)
        return build_model(VAE, checkpoint, path, model_name=args.model, lr=0.0, **sizes)
    except CheckpointError as error:
        hint = "give the --model, --z_dim, --hidden_dims and --num_filters that it was trained with"
        raise CheckpointError(f"{error}: {hint}") from error


def flags_of_training(checkpoint, path, run, args):
    """
    Returns the flags that a checkpoint was trained with, as a Namespace of every flag.
    Inputs:
        checkpoint - The content of the checkpoint, from read_checkpoint.
        path, run - Paths of the checkpoint and of its run's folder.
        args - Namespace of the flags of evaluate.py. Its dataset and data_dir, if given, replace the checkpoint's.
    Raises:
        UserError - if the flags are invalid, or if the data set is unknown, does not exist any more or has changed.
    """
    run_data = checkpoint.get(RUN) if isinstance(checkpoint.get(RUN), dict) else {}
    if run_data.get("flags") is None and args.dataset is None:
        raise FlagError(f"{path} does not contain the name of its training data: give --dataset")
    saved, known = run_data.get("flags") or {}, {name for group in TRAINING_FLAGS.values() for name in group}
    try:
        flags = {name: value for name, value in saved.items() if name in known - {"init_from"}}
        if args.dataset:
            flags["dataset"] = args.dataset
        elif DATASET_CHECKSUM in saved:
            places = file_locations(run, run_data, flags["dataset"])
            flags["dataset"] = find_file(places, saved[DATASET_CHECKSUM]) or places[-1]
            if not os.path.exists(flags["dataset"]):
                raise UserError(f"the training data {places[-1]} does not exist any more: give its path with --dataset")
        flags = complete_flags(argparse.Namespace(**flags))
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} contains invalid flags ({error}): give another checkpoint") from error
    if not args.dataset and vars(flags).get(DATASET_CHECKSUM) != saved.get(DATASET_CHECKSUM):
        raise UserError(f"{flags.dataset} has changed since the training: give --dataset to evaluate on it anyway")
    content = KINDS[flags.dataset].__name__ if flags.dataset in KINDS else ""
    flags.data_dir = args.data_dir or find_data_dir(run, run_data, flags.data_dir, content)
    return flags


def prepare_folder(folder, path, dataset, split):
    """
    Makes the folder of the results. Prints a note if they replace the results of another checkpoint, data set or split.
    Raises a UserError if the folder is not writable or contains files that evaluate.py did not write.
    """
    try:
        there = [name for name in [RESULTS, EXPLORER, *latent_space.FILES] if os.path.lexists(folder / name)]
        is_file = (folder / RESULTS).is_file()
        text = (folder / RESULTS).read_text(encoding="utf-8", errors="replace") if is_file else "of others"
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): choose another folder with --out") from error
    if there and not re.match(r'\0*\Z|\{\s*"checkpoint":', text):  # after a crash the file may be empty
        raise UserError(
            f"{folder} contains {there[0]}, which evaluate.py did not write and does not overwrite: choose another "
            "folder with --out"
        )
    check_writable(folder, "--out")
    older = read_earlier_results(folder)
    is_same_data = str(older.get("dataset")) == dataset and f"{split}_images" in older
    if older and not (is_same_data and Path(str(older.get("checkpoint"))).resolve() == path.resolve()):
        about = f"{older.get('checkpoint')} on {older.get('dataset')}"
        warn(f"note: in {folder}, the evaluation of {about} is replaced")


def check_writable(folder, flag):
    """Makes a folder if it does not exist. Raises a UserError that names the flag if the folder is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder with {flag}") from error


def make_parser() -> Parser:
    """Returns the parser of the flags of `python evaluate.py`."""
    return Parser("Evaluates checkpoints of train_pl.py.", FLAGS)


def print_beginning(results: dict, split: str, folder: Path, seconds: float):
    """Prints the model, the images, the folder and the estimated time."""
    r = argparse.Namespace(**results)
    after = f"after {r.epoch or 'an unknown number of'} epoch{'s' * (r.epoch != 1)}"
    images = f"{results[f'{split}_images']:,} {split} images of {r.dataset} ({r.binarization})"
    time_needed = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    print_line(
        f"{r.model}, {r.z_dim} latent{'s' * (r.z_dim != 1)}, {after}, on {images}, on {r.device}, into {folder}: "
        f"log p(x) with {num_samples(results)} takes about {time_needed}"
    )


def num_samples(numbers):
    """Returns the number of samples per image, as a string."""
    return f"{numbers['iw_samples']:,} sample{'s' * (numbers['iw_samples'] != 1)}"


def format_with_error(numbers, name, digits, width=0):
    """Returns a number of evaluation.json, padded to a width, and its standard error, as a string."""
    return f"{numbers[name]:{width}.{digits}f} +- {numbers[f'{name}_standard_error']:.{digits}f}"


def print_numbers(numbers: dict, split: str):
    """Prints the numbers of evaluation.json that are computed so far."""
    for label, name, unit, how in [
        (f"{split} bpd", f"{split}_bpd", "", ""),
        ("ELBO", "elbo", " nats", ""),
        ("log p(x)", "log_likelihood", " nats", f", importance-weighted, {num_samples(numbers)}"),
        ("log p(x)", "log_likelihood_bpd", " bpd", ""),
        ("log p(x)", "log_likelihood_by_quadrature", " nats", ", by quadrature"),
    ]:
        if name in numbers:
            print_line(f"{label:12}  {format_with_error(numbers, name, 2 if unit == ' nats' else 4, 8)}{unit}{how}")
    if "active_units" in numbers:
        print_line(f"active units  {numbers['active_units']:8} of {numbers['z_dim']}")


def format_table(evaluations: dict[str, dict], split: str) -> list[str]:
    """Returns the lines of a table with a row for each checkpoint. evaluations is a dict from path to results."""
    rows = [["checkpoint", "data", f"{split} bpd", "ELBO, nats", "log p(x), nats", "log p(x), bpd", "active units"]]
    for path, results in evaluations.items():
        quantities = {f"{split}_bpd": 4, "elbo": 2, "log_likelihood": 2, "log_likelihood_bpd": 4}
        cells = [format_with_error(results, name, digits) for name, digits in quantities.items()]
        active = f"{results['active_units']} of {results['z_dim']}"
        rows.append([path, os.path.basename(results["dataset"]), *cells, active])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def evaluate_all(paths: list[str], flags: dict):
    """
    Evaluates checkpoints in turn and prints a table of the results. If a checkpoint cannot be evaluated, an error is
    printed on stderr, the others are evaluated, and a UserError is raised at the end. Raises a FlagError if a flag is
    invalid, or if it is valid only for a single checkpoint.
    """
    make_parser().complete(argparse.Namespace(**flags))
    if given := [name for name in ["out", "latents"] if flags[name]]:
        raise FlagError(f"--{given[0]} is valid only for a single checkpoint: leave it out, or evaluate one at a time")
    evaluations, paths, failed = {}, list({os.path.realpath(path): path for path in paths}.values()), []
    try:
        for path in paths:
            try:
                evaluations[path], _ = evaluate(path, **flags)
            except Exception as error:
                if not isinstance(error, UserError) and not is_out_of_memory(error):
                    raise
                warn(f"error: {one_line(error)}")
                failed.append(path)
            print_line("")
    finally:  # after Ctrl-C, too
        if evaluations:
            print_line("\n".join(format_table(evaluations, flags["split"])))
    if failed:
        raise UserError(f"not evaluated (see the errors above): {', '.join(failed)}")


def main():
    parser = make_parser()
    parser.add_argument("checkpoint", nargs="+", help="One or more checkpoints, such as RUN/checkpoints/best.ckpt")
    flags = vars(parser.parse_args())
    paths = flags.pop("checkpoint")
    with exit_on_error(parser):
        if len(paths) == 1:
            evaluate(paths[0], **flags)
        else:
            evaluate_all(paths, flags)


if __name__ == "__main__":
    main()

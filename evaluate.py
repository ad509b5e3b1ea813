"""
A trained model's numbers and pictures: `python evaluate.py CHECKPOINT`, `python evaluate.py --help`.

Test bpd, log p(x), active units, and what the latent space holds, for any checkpoint of train_pl.py.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from pictures import figures  # isort: skip  before Lightning, which imports matplotlib
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from tqdm import tqdm

from harness.checkpoints import RUN, CheckpointError, load_model, read_checkpoint
from harness.devices import pick_device, prepare_cpu, use_fast_layout
from harness.errors import FlagError, UserError, best_effort, exit_on_error, is_out_of_memory, is_screen, print_line
from harness.files import write_text
from harness.flags import CHECKSUM, Parser, plain_value
from pictures.explorer import Plane, write_explorer
from sources import KINDS, find_file, load_data
from train_pl import FLAGS as TRAINING_FLAGS
from train_pl import VAE, complete_flags
from utils import active_units, elbo_to_bpd, log_likelihood, manifold_latents, quadrature_log_likelihood

# Images of MNIST's size at a time; of larger ones fewer, see at_a_time.
BATCH_SIZE = 100  # test images
CHUNK_SIZE = {"cpu": 512, "gpu": 16_384}  # decoded: a GPU wants more work than the caches of a CPU hold
QUADRATURE_SIZE = 2048  # decoded for the quadrature
RESULTS = "evaluation.json"
EXPLORER = "explorer.html"
PICTURES = ["reconstructions", "interpolations", "traversals", "samples", "sample_means", "manifold", "latent_space"]


# As in train_pl.py.
FLAGS = {
    "evaluation": {
        "dataset": (None, TRAINING_FLAGS["data"]["dataset"][1], "Data; by default what it was trained on"),
        "data_dir": (None, None, "Directory of MNIST, downloaded where missing; by default that of the training"),
        "iw_samples": (1000, 1, "Samples per image of the importance-weighted log p(x)"),
        "out": (None, None, "Folder for the results; by default `evaluation` in the run's folder"),
        "accelerator": (
            "auto",
            TRAINING_FLAGS["devices"]["accelerator"][1],
            "Device; auto takes a GPU if there is one",
        ),
        "no_explorer": (False, None, f"Leave {EXPLORER} out"),
        "progress_bar": (False, None, "Show a progress bar"),
    },
    "a checkpoint that holds nothing but weights, such as that of train_torch.py": {
        name: TRAINING_FLAGS["model"][name] for name in ["model", "z_dim", "hidden_dims", "num_filters"]
    },
}


def evaluate(
    checkpoint,
    dataset=None,
    data_dir=None,
    iw_samples=1000,
    out=None,
    accelerator="auto",
    no_explorer=False,
    progress_bar=False,
    **hyperparameters,
):
    """
    Evaluates a checkpoint on its test set, and draws what the model has learned. The numbers depend on the checkpoint
    and on iw_samples alone (where memory is short, on that, too), and torch's random numbers are left as they were.
    Inputs:
        checkpoint - Path of a checkpoint of train_pl.py.
        dataset - As the flag of train_pl.py; if None, what the checkpoint was trained on.
        data_dir - Directory of MNIST; if None, that of the training, where it is only read.
        iw_samples - Number of samples per image of the importance-weighted log p(x).
        out - Folder for evaluation.json and the pictures; if None, `evaluation` in the run's folder.
        accelerator - "auto" (a GPU where there is one), "cpu" or "gpu".
        no_explorer - If True, explorer.html is left out.
        progress_bar - If True, a progress bar is shown.
        hyperparameters - Of a checkpoint that holds nothing but weights: model, z_dim, hidden_dims, num_filters.
    Outputs:
        results - Dict of what evaluation.json holds: see `likelihoods`, and where they come from.
        folder - Path of the folder.
    Raises:
        OSError - of one clear line, where a flag, the checkpoint, the data or the folder is of no use.
    """
    start = time.perf_counter()
    prepare_cpu()
    torch.backends.cudnn.deterministic = True  # as in training
    given = dict(dataset=dataset, data_dir=data_dir, iw_samples=iw_samples, out=out)
    given.update(accelerator=accelerator, no_explorer=no_explorer, progress_bar=progress_bar, **hyperparameters)
    args = make_parser().complete(argparse.Namespace(**given))
    checkpoint = Path(checkpoint).expanduser()
    device = torch.device(pick_device(args.accelerator))
    with isolate_rng():  # its initial weights are drawn
        model = use_fast_layout(load(checkpoint, args).to(device).eval())
    run = run_folder(checkpoint)
    flags, epoch = trained_with(checkpoint, run, args)
    try:
        test_set = load_data(flags, download=args.data_dir is not None)[2].dataset
    except OSError as error:
        if args.data_dir is not None or CHECKSUM in vars(flags):
            raise
        raise UserError(f"{error} (--data_dir says where it is now)") from error
    img_size, trained_size = list(test_set.images.shape[1:]), list(model.hparams.get("img_size", [28, 28]))
    if img_size != trained_size:
        raise UserError(f"{flags.dataset} has images of {img_size} pixels, {checkpoint} is for those of {trained_size}")
    folder = Path(args.out).expanduser() if args.out else run / "evaluation"
    prepare(folder)
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(0)
        results, means = likelihoods(model, test_set, args.iw_samples, args.progress_bar)
        results = {
            "checkpoint": str(checkpoint),
            "epoch": epoch,
            "model": model.hparams.model_name,
            "z_dim": plain_value(model.hparams.z_dim),
            "dataset": flags.dataset,
            "binarization": flags.binarization,
            "objective": flags.objective,
            "train_samples": flags.train_samples,
            "beta": flags.beta,
            "test_images": len(test_set),
            **results,
            "device": str(device),
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - start, 1),
        }
        # Before the pictures, so that none of them can cost it.
        write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
        imgs, labels = test_set[torch.arange(len(test_set))]
        legend = "digit" if flags.dataset in ["mnist", "rendered"] else "label"
        pictures(folder, model, imgs, labels, means, legend)
        with best_effort(f"writing {folder / EXPLORER}"):
            (folder / EXPLORER).unlink(missing_ok=True)  # of an earlier evaluation
            if not no_explorer:
                facts = {**results, "run": os.path.basename(os.path.realpath(run)), "legend": legend}
                facts["dataset"] = os.path.basename(flags.dataset)  # nobody else's business where
                shown = model.encoder, model.decoder, imgs, means, plane(means, labels, legend)
                write_explorer(folder / EXPLORER, *shown, facts)
    return results, folder


def load(path, args):
    """
    Loads the VAE of a checkpoint.
    Inputs:
        path - Path of the checkpoint.
        args - Namespace of the flags of evaluate.py, which a checkpoint that holds nothing but weights needs.
    Outputs:
        model - The VAE.
    Raises:
        CheckpointError - where the checkpoint is of no use, or the flags do not fit it.
    """
    if set(read_checkpoint(path)) != {"state_dict"}:
        return load_model(VAE, path)
    try:
        sizes = dict(hidden_dims=args.hidden_dims, num_filters=args.num_filters, z_dim=args.z_dim)
        return load_model(VAE, path, model_name=args.model, lr=0.0, **sizes)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: give --model, --z_dim, --hidden_dims and --num_filters as it was trained with"
        ) from error


def run_folder(checkpoint):
    """
    Path of the folder of the run that a checkpoint belongs to, from any working directory and by any links, of which
    its folder `checkpoints` may be one. For a checkpoint of no run it is the checkpoint's own folder.
    """
    # By the names that the user gave, the links among them; the shell knows by which ones it came here.
    by_name = os.path.normpath(os.path.join(os.environ.get("PWD", ""), checkpoint))
    if not (os.path.exists(by_name) and os.path.samefile(by_name, checkpoint)):
        by_name = checkpoint
    paths = [checkpoint, Path(by_name)]
    while paths[-1].is_symlink():
        paths.append(paths[-1].parent / os.readlink(paths[-1]))
    paths.append(Path(os.path.realpath(checkpoint)))
    for path in paths:
        run = path.parent.parent
        if path.parent.name == "checkpoints" and (run / "hparams.yaml").exists():
            return run if path is checkpoint else Path(os.path.realpath(run))
    return run if path.parent.name == "checkpoints" else path.parent


def trained_with(path, run, args):
    """
    The flags that a checkpoint was trained with.
    Inputs:
        path - Path of the checkpoint.
        run - Path of its run's folder.
        args - Namespace of the flags of evaluate.py: dataset and data_dir replace the checkpoint's.
    Outputs:
        flags - Namespace of every flag.
        epoch - Number of epochs; None where the checkpoint does not say.
    Raises:
        FlagError - where there is no data set.
        CheckpointError - where the flags are of no use.
    """
    checkpoint = read_checkpoint(path)
    kept = checkpoint.get(RUN) if isinstance(checkpoint.get(RUN), dict) else {}
    if kept.get("flags") is None and args.dataset is None:
        raise FlagError(f"{path} does not say what data it was trained on: give --dataset")
    known = {name for group in TRAINING_FLAGS.values() for name in group}
    try:
        flags = {name: value for name, value in (kept.get("flags") or {}).items() if name in known}
        if args.dataset:
            flags["dataset"] = args.dataset
        elif CHECKSUM in (kept.get("flags") or {}):
            places = [os.path.join(os.path.realpath(run), str(kept.get("dataset_from_run"))), flags.get("dataset")]
            flags["dataset"] = find_file(places, kept["flags"][CHECKSUM]) or places[-1]
            if not os.path.exists(flags["dataset"]):
                raise UserError(f"{places[-1]}, what it was trained on, is gone: give --dataset with where it is now")
        flags = complete_flags(argparse.Namespace(**flags))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds flags of no use ({error})") from error
    if not args.dataset and vars(flags).get(CHECKSUM) != (kept.get("flags") or {}).get(CHECKSUM):
        raise UserError(
            f"{flags.dataset} has changed since the training: give --dataset to evaluate on it all the same"
        )
    flags.data_dir = args.data_dir or data_dir_of(run, kept, flags.data_dir, flags.dataset)
    epoch = checkpoint.get("epoch")
    return flags, epoch + 1 if isinstance(epoch, int) else None


def data_dir_of(run, kept, data_dir, dataset="mnist"):
    """
    Where the data of a training is now.
    Inputs:
        run - Path of the run's folder, which may have been moved since, with the data or without.
        kept - Dict of what the checkpoint keeps of the run.
        data_dir - The flag as it was given, to be taken where nothing is to be found.
        dataset - The flag: what it is that data_dir holds.
    Outputs:
        data_dir - Path of the first one of these that holds it, or else that exists.
    """
    kept = {name: place for name, place in kept.items() if isinstance(place, str)}
    from_run = [os.path.join(os.path.realpath(run), kept["data_dir_from_run"])] if "data_dir_from_run" in kept else []
    places = [*from_run, kept.get("data_dir", data_dir), os.path.expanduser(data_dir)]
    content = KINDS[dataset].__name__ if dataset in KINDS else ""
    existing = [place for name in [content, ""] for place in places if os.path.isdir(os.path.join(place, name))]
    return os.path.normpath(existing[0]) if existing else data_dir


def prepare(folder):
    """Makes the folder of the results. Raises a UserError where it cannot be written, or holds files of others."""
    results = folder / RESULTS
    files = [RESULTS, EXPLORER, *(f"{name}.{kind}" for name in PICTURES for kind in ["png", "pdf"])]
    there = [name for name in files if os.path.lexists(folder / name)]
    text = results.read_text(encoding="utf-8", errors="replace") if results.is_file() else "another's"
    if there and not re.match(r'\0*\Z|\{\s*"checkpoint":', text):  # after a crash it may be empty
        raise UserError(
            f"{folder} holds {there[0]}, which evaluate.py did not make and does not overwrite: choose another folder "
            "with --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from error


def likelihoods(model, test_set, iw_samples, progress_bar):
    """
    The numbers of evaluation.json.
    Inputs:
        model - The VAE.
        test_set - The test set, see bmnist.BinaryImages.
        iw_samples, progress_bar - See evaluate.
    Outputs:
        results - Dict of numbers, all means over the test set, each with its standard error over the test images:
            test_bpd, from one sample of the posterior per image, as in training; the same as elbo, in nats;
            log_likelihood, importance-weighted, in nats and in bpd; for 2 latents the exact one by quadrature; and
            the number of active units.
        means - Tensor of shape [N,D], the means of the posteriors, on the CPU.
    """
    device = model.device
    bar = progress_bar and is_screen(sys.stderr)
    num_pixels = test_set.images[0].numel()
    chunk_size = at_a_time(CHUNK_SIZE["cpu" if device.type == "cpu" else "gpu"], num_pixels)
    neg_elbos, log_ps, means = [], [], []
    batches = torch.arange(len(test_set)).split(at_a_time(BATCH_SIZE, num_pixels))
    for indices in tqdm(batches, "log p(x)", disable=not bar):
        imgs = test_set[indices][0].to(device)
        terms = model.terms(imgs)
        neg_elbos.append(terms.L_rec + terms.L_reg)
        log_p = None
        while log_p is None:
            try:
                log_p = log_likelihood(imgs, model.encoder, model.decoder, iw_samples, chunk_size)
            except RuntimeError as error:
                if not is_out_of_memory(error) or chunk_size <= len(imgs):
                    raise
                chunk_size //= 2
        log_ps.append(log_p)
        means.append(model.encoder(imgs)[0].cpu())
    # On the CPU, since a Mac's GPU has no double precision.
    neg_elbos, log_ps, means = torch.cat(neg_elbos).cpu().double(), torch.cat(log_ps).cpu().double(), torch.cat(means)

    img_shape = imgs.shape
    results = {}

    def add(name, values):
        results[name] = values.mean().item()
        results[f"{name}_standard_error"] = values.std().item() / math.sqrt(len(values))

    add("test_bpd", elbo_to_bpd(neg_elbos, img_shape))
    add("elbo", -neg_elbos)
    add("log_likelihood", log_ps)
    add("log_likelihood_bpd", elbo_to_bpd(-log_ps, img_shape))
    results["iw_samples"] = iw_samples
    if means.shape[1] == 2:
        all_imgs = test_set[torch.arange(len(test_set))][0].to(device)
        chunk_size = at_a_time(QUADRATURE_SIZE, num_pixels)
        log_ps = quadrature_log_likelihood(all_imgs, model.decoder, chunk_size=chunk_size)
        add("log_likelihood_by_quadrature", log_ps.cpu().double())
    results["active_units"] = int(active_units(means).sum())
    return results, means


def at_a_time(num_images, num_pixels):
    """How many images of that many pixels have as many pixels as num_images of MNIST's; never more, and at least 1."""
    return max(min(num_images, num_images * 28 * 28 // num_pixels), 1)


def pictures(folder, model, imgs, labels, means, legend="digit"):
    """
    Draws the PICTURES that there are for the model, each as PNG and PDF; one that fails is a line on stderr,
    unless the disk is full.
    Inputs:
        folder - Where the pictures go, in the place of those that are there.
        model - The VAE.
        imgs, labels - The test set, [N,1,H,W] and [N]; labels that nobody knows are -1.
        means - Tensor of shape [N,D], the means of its posteriors.
        legend - What the labels are.
    """
    z_dim = means.shape[1]

    def decode(z):
        return torch.sigmoid(model.decoder(z.to(model.device))).squeeze(-3).cpu()

    def first_three():
        """Indices [3,C] of the first three test images of each label, of ten that have as many; or of the first 30."""
        of_label = [(labels == label).nonzero().squeeze(1)[:3] for label in labels.unique() if label >= 0]
        picks = [indices for indices in of_label if len(indices) == 3][:10]
        return torch.stack(picks, dim=1) if len(picks) > 1 else torch.arange(len(labels))[:30].view(3, -1)

    def reconstructions(path):
        picks = first_three()
        decoded = decode(means[picks].flatten(0, 1)).unflatten(0, picks.shape)
        figures.image_table(
            path,
            torch.stack([imgs[picks].squeeze(2), decoded], dim=1).flatten(0, 1),
            rows=["input", "reconstruction"] * 3,
            title="Test images and the means of their reconstructions",
        )

    def interpolations(path):
        start, second, _ = first_three()
        end = second.roll(-1)  # 0 to 1, 1 to 2, ..., 9 to 0
        weights = torch.linspace(0, 1, 11)
        z = torch.lerp(means[start].unsqueeze(1), means[end].unsqueeze(1), weights.view(1, -1, 1))
        between = decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        figures.image_table(
            path,
            torch.cat([imgs[start], between, imgs[end]], dim=1),
            columns=["input", *(f"{weight:.1f}" for weight in weights), "input"],
            title="Along straight lines in latent space, between two test images",
        )

    def traversals(path):
        active = active_units(means).nonzero().squeeze(1)
        active = active[means.var(dim=0)[active].argsort(descending=True)]
        if not len(active):
            return
        values = torch.linspace(-3, 3, 13)
        z = means[0].expand(len(active), len(values), -1).clone()
        z[torch.arange(len(active)), :, active] = values
        figures.image_table(
            path,
            decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]),
            rows=[f"z{unit}" for unit in active.tolist()],
            columns=[f"{value:.1f}" for value in values],
            title="One latent changes, the others stay those of the first test image",
        )

    drawn, drawn_means = (imgs.view(8, 8, *imgs.shape[-2:]).cpu() for imgs in model.sample(64))

    def samples(path):
        figures.image_table(path, drawn, title="Samples")

    def sample_means(path):
        figures.image_table(path, drawn_means, title="Means of the samples' pixels")

    def manifold(path):
        if z_dim != 2:
            return
        z = manifold_latents(20)
        axis = [f"{value:.2f}" for value in z[:20, 0]]
        figures.image_table(
            path,
            decode(z).view(20, 20, *imgs.shape[-2:]),
            rows=axis[::-1],
            columns=axis,
            xlabel="$z_0$",
            ylabel="$z_1$",
            gap=0,
            columns_below=True,
        )

    def latent_space(path):
        shown = plane(means, labels, legend)
        title = f"Posterior means of the {len(labels):,} test images, {z_dim} latent{'s' * (z_dim != 1)}"
        figures.latent_space(path, shown.places, labels, shown.axes, title, legend)

    drawings = [reconstructions, interpolations, traversals, samples, sample_means, manifold, latent_space]
    for name in PICTURES:
        for kind in ["png", "pdf"]:
            (folder / f"{name}.{kind}").unlink(missing_ok=True)  # of an earlier evaluation
    for name, draw in zip(PICTURES, drawings, strict=True):
        with best_effort(f"drawing {folder / name}"):
            draw(folder / name)


def plane(means, labels, legend="digit"):
    """
    The plane on which test images are shown: of the latents themselves where there are two, of the first two principal
    components where there are more; a single latent is shown over the label.
    Inputs:
        means - Tensor of shape [N,D], the means of the posteriors.
        labels - Tensor of shape [N].
        legend - What the labels are.
    Outputs:
        plane - A Plane.
    """
    z_dim = means.shape[1]
    if z_dim <= 2:
        center, directions, axes = torch.zeros(z_dim), torch.eye(z_dim, 2), ["$z_0$", "$z_1$"]
    else:
        variances, components = torch.linalg.eigh(means.T.double().cov())  # in ascending order
        center, directions = means.mean(dim=0), components[:, [-1, -2]].float()
        shares = variances[[-1, -2]] / variances.sum().clamp(min=1e-12)
        axes = [
            f"{order} principal component ({share:.0%} of the variance)"
            for order, share in zip(["first", "second"], shares)
        ]
    places = (means - center) @ directions
    if z_dim == 1:
        places[:, 1], axes[1] = labels, legend
    return Plane(places, labels, axes, center, directions)


def make_parser():
    """The parser of the flags of `python evaluate.py`."""
    parser = Parser("Evaluates a checkpoint of train_pl.py on its test set.", FLAGS)
    parser.add_argument("checkpoint", help="The checkpoint: of a run, RUN/checkpoints/best.ckpt")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_error(parser):
        print_results(*evaluate(**vars(args)))


def print_results(results, folder):
    """Prints what evaluate returned."""
    print_line(
        f"{results['model']}, {results['z_dim']} latent{'s' * (results['z_dim'] != 1)}, after "
        f"{results['epoch'] or 'some'} epoch{'s' * (results['epoch'] != 1)}, on "
        f"{results['test_images']:,} test images of {results['dataset']} ({results['binarization']}), "
        f"on {results['device']}"
    )
    for label, name, unit in [
        ("test bpd", "test_bpd", ""),
        ("ELBO", "elbo", " nats"),
        ("log p(x)", "log_likelihood", " nats"),
        ("log p(x)", "log_likelihood_bpd", " bpd"),
        ("log p(x)", "log_likelihood_by_quadrature", " nats"),
    ]:
        if name in results:
            digits = 2 if unit == " nats" else 4
            how = {
                "log_likelihood": f", importance-weighted, {results['iw_samples']:,} samples",
                "log_likelihood_by_quadrature": ", by quadrature",
            }.get(name, "")
            error = results[f"{name}_standard_error"]
            print_line(f"{label:12}  {results[name]:8.{digits}f} +- {error:.{digits}f}{unit}{how}")
    print_line(
        f"active units  {results['active_units']:8} of {results['z_dim']}\nevaluation in {folder}, "
        f"{results['seconds']} s"
    )


if __name__ == "__main__":
    main()

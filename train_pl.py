"""Trains a variational autoencoder on binarised MNIST: `python train_pl.py`, `python train_pl.py --help`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pictures import figures  # isort: skip  before Lightning, which imports matplotlib
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.seed import isolate_rng
from torchvision.utils import make_grid, save_image

import utils
from bmnist import load_data
from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from harness.checkpoints import build_model, load_model, read_checkpoint
from harness.errors import FlagError, best_effort, exit_on_error
from harness.flags import Flag, Parser, check_run_flags, complete_file, run_flags
from harness.run import Experiment, Run
from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from pictures.tensorboard import save_picture
from sources import DATA_FLAGS, complete_dataset, describe_data
from sources.locations import data_locations

# Titles of TensorBoard's charts, by name in VAE.quantities. Each chart shows training and validation.
CHART_TITLES = {
    "reconstruction_loss": "reconstruction loss, nats",
    "regularization_loss": "regularization loss (KL divergence), nats",
    "ELBO": "negative ELBO, nats",
    "bpd": "bits per dimension",
}
OBJECTIVES = {"elbo": {}, "iwae": {"IWAE": "negative importance-weighted bound, nats"}}  # further titles


class Terms(NamedTuple):
    """The loss of B images and its parts, computed with K samples of each posterior: see VAE.terms."""

    L_rec: torch.Tensor  # [B], reconstruction losses -log p(x|z) in nats, means over the samples
    L_reg: torch.Tensor  # [B], regularisation losses KL(q(z|x) || p(z)) in nats
    loss: torch.Tensor  # [B], the loss that training minimises, in nats
    mean: torch.Tensor  # [B,D], means of the posterior q(z|x)
    log_std: torch.Tensor  # [B,D], natural logarithms of its standard deviations
    z: torch.Tensor  # [B,K,D], samples of the posterior
    logits: torch.Tensor | None  # [B,K,C,H,W], of the pixels; None if the samples are decoded in parts


class VAE(pl.LightningModule):
    iw_samples = 1000  # samples per image for log p(x) in predict_step

    def __init__(
        self,
        model_name,
        hidden_dims,
        num_filters,
        z_dim,
        lr,
        img_size=(28, 28),
        beta=1.0,
        objective="elbo",
        train_samples=1,
    ):
        """
        Variational autoencoder (Kingma & Welling 2014) with a unit Gaussian prior, a Gaussian encoder and a
        decoder of independent Bernoulli pixels.
        Inputs:
            model_name - "MLP" or "CNN", the kind of encoder and decoder.
            hidden_dims - List of the widths of an MLP encoder's hidden layers; the decoder's are reversed.
            num_filters - Number of channels of a CNN's first encoder layers; the later ones have twice as many.
            z_dim - Dimensionality of the latent space.
            lr - Learning rate of Adam.
            img_size - Height and width of an image.
            beta - Weight of the KL divergence in the loss (Higgins et al. 2017).
            objective - What training maximises: "elbo", or "iwae", the importance-weighted bound (Burda et al. 2016).
            train_samples - Number of samples of the posterior per image in training and validation.
        """
        super().__init__()
        self.save_hyperparameters()
        if model_name == "MLP":
            self.encoder = MLPEncoder(math.prod(img_size), hidden_dims, z_dim)
            self.decoder = MLPDecoder(z_dim, hidden_dims[::-1], output_shape=[1, *img_size])
        elif model_name == "CNN":
            self.encoder = CNNEncoder(num_filters=num_filters, z_dim=z_dim, img_size=img_size)
            self.decoder = CNNDecoder(num_filters=num_filters, z_dim=z_dim, img_size=img_size)
        else:
            raise ValueError(f"model_name must be 'MLP' or 'CNN', got {model_name!r}")
        self.beta = beta  # the weight in the current epoch, see BetaWarmup
        self.train_means, self.val_means = utils.EpochMeans(), utils.EpochMeans()

    def terms(self, imgs: torch.Tensor, num_samples: int = 1) -> Terms:
        """
        Returns the Terms of each image's loss, which is L_rec + beta * L_reg or, for the objective "iwae", the negative
        importance-weighted bound (Burda et al. 2016, eq. 8).
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
            num_samples - K, the number of samples of each posterior.
        """
        mean, log_std = map(utils.full_precision, self.encoder(imgs))
        eps = torch.randn_like(mean.unsqueeze(1).expand(-1, num_samples, -1))
        z = utils.sample_reparameterize(mean.unsqueeze(1), log_std.unsqueeze(1).exp(), eps)
        logits, L_recs = utils.decode(self.decoder, z, imgs)
        L_rec, L_reg = L_recs.mean(dim=1), utils.KLD(mean, log_std)
        if self.hparams.objective == "iwae" and num_samples > 1:
            loss = -utils.importance_weighted_bound(utils.log_prior_ratio(z, eps, log_std.unsqueeze(1)) - L_recs)
        else:  # with a single sample, the importance-weighted bound is the ELBO
            loss = L_rec + self.beta * L_reg
        return Terms(L_rec, L_reg, loss, mean, log_std, z, logits)

    def quantities(self, terms: Terms, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns the quantities whose means over an epoch are logged as train_NAME and val_NAME, as a dict from name to
        one value per image, shape [B], or one value for the minibatch.
        Inputs:
            terms, imgs - The Terms of a minibatch, and its images [B,C,H,W].
        """
        neg_elbo = terms.L_rec + terms.L_reg
        quantities = {
            "reconstruction_loss": terms.L_rec,
            "regularization_loss": terms.L_reg,
            "ELBO": neg_elbo,
            "bpd": utils.elbo_to_bpd(neg_elbo, imgs.shape),
        }
        if self.hparams.objective == "iwae":
            quantities["IWAE"] = terms.loss
        return quantities

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Computes the two parts of the negative ELBO, and the negative ELBO in bits per dimension.
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
        Outputs:
            L_rec, L_reg - Means of the reconstruction and regularisation losses over the batch, in nats.
            bpd - Mean of their sum, the negative ELBO, in bits per dimension.
        """
        L_rec, L_reg = (loss.mean() for loss in self.terms(imgs)[:2])
        return L_rec, L_reg, utils.elbo_to_bpd(L_rec + L_reg, imgs.shape)

    @torch.no_grad()
    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Samples new images: first z from the prior, then each pixel from its Bernoulli distribution.
        Inputs:
            batch_size - Number of images to sample.
        Outputs:
            x_samples - Sampled images of zeros and ones, shape [B,C,H,W].
            x_mean - Means of these Bernoulli distributions, between 0 and 1, shape [B,C,H,W].
        """
        z = torch.randn(batch_size, self.hparams.z_dim, device=self.decoder.device)
        with utils.eval_mode(self.decoder):
            x_mean = torch.sigmoid(utils.full_precision(self.decoder(utils.match_dtype(z, self.decoder))))
        return torch.bernoulli(x_mean), x_mean

    @torch.no_grad()
    def reconstruct(self, imgs: torch.Tensor) -> torch.Tensor:
        """Decodes the posterior means of images [B,C,H,W]. Returns the means of the pixels, [B,C,H,W]."""
        with utils.eval_mode(self):
            means, _ = self.encoder(utils.match_dtype(imgs, self.encoder))
            return torch.sigmoid(utils.full_precision(self.decoder(means)))

    # Replaces Lightning's method: this one loads to the CPU by default, and runs no code that a file contains.
    load_from_checkpoint = classmethod(load_model)

    def configure_optimizers(self):
        if self.dtype == torch.float16:
            raise ValueError(
                "Adam's eps is 0 in float16: give the Trainer precision 16-mixed or bf16-true instead of 16-true"
            )
        # In mixed precision, Lightning refuses to clip the gradients of a fused optimiser.
        clips = self._trainer is not None and self.trainer.gradient_clip_val
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, fused=None if clips else True)

    def training_step(self, batch, batch_idx):
        imgs, _ = batch
        terms = self.terms(imgs, self.hparams.train_samples)
        quantities = self.quantities(terms, imgs)
        self.train_means.add(quantities, len(imgs))
        return {"loss": utils.elbo_to_bpd(terms.loss.mean(), imgs.shape), "bpd": quantities["bpd"].mean()}

    def validation_step(self, batch, batch_idx):
        imgs, _ = batch
        self.val_means.add(self.quantities(self.terms(imgs, self.hparams.train_samples), imgs), len(imgs))

    def test_step(self, batch, batch_idx):
        self.log("test_bpd", self.forward(batch[0])[2], batch_size=len(batch[0]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        """
        Returns the arrays of `evaluate.py --latents` for a batch of images with or without labels: a dict with mean and
        log_std [B,D] of the posterior q(z|x), elbo and log_likelihood [B] in nats, and label [B] if there are labels.
        The log_likelihood is estimated with `iw_samples` samples per image.
        """
        imgs, *labels = batch
        terms = self.terms(imgs)
        log_p = utils.log_likelihood(imgs, self.encoder, self.decoder, self.iw_samples)
        elbo = -(terms.L_rec + terms.L_reg)
        latents = {"mean": terms.mean, "log_std": terms.log_std, "elbo": elbo, "log_likelihood": log_p}
        return {**latents, "label": labels[0]} if labels else latents

    def on_train_epoch_start(self):
        self.train_means.reset()

    def on_train_epoch_end(self):
        self.log_means("train", self.train_means)

    def on_validation_epoch_start(self):
        self.val_means.reset()

    def on_validation_epoch_end(self):
        self.log_means("val", self.val_means)

    def log_means(self, stage, means):
        """Logs the means over an epoch's images in all processes, under names that begin with the stage."""
        values, num_images = means.compute()
        means.reset()  # also if a subclass replaces the hook at the start of an epoch
        for name, value in values.items():  # once per epoch: self.log in every step is slow
            self.log(f"{stage}_{name}", value, name == "bpd", on_epoch=True, sync_dist=True, batch_size=num_images)


class CosineLearningRate(pl.Callback):
    """
    Callback that lowers the learning rate along half a cosine from lr towards 0, once per epoch (Loshchilov & Hutter
    2017).
    """

    def on_train_epoch_start(self, trainer, pl_module):
        lr = pl_module.hparams.lr * (1 + math.cos(math.pi * trainer.current_epoch / trainer.max_epochs)) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr


class BetaWarmup(pl.Callback):
    """
    Callback that raises the weight of the KL divergence linearly, from 0 in the first epoch to the module's
    hyperparameter beta after num_epochs epochs (Bowman et al. 2016), and logs the weight.
    """

    def __init__(self, num_epochs):
        self.num_epochs = num_epochs

    def on_train_epoch_start(self, trainer, pl_module):
        share = min(trainer.current_epoch / self.num_epochs, 1) if self.num_epochs else 1
        pl_module.beta = pl_module.hparams.beta * share
        self.log("train_beta", pl_module.beta, sync_dist=True)  # the same in all processes


class GenerateCallback(pl.Callback):
    def __init__(self, batch_size: int = 64, every_n_epochs: int = 5, save_to_disk: bool = False):
        """
        Callback that saves pictures of samples from the model during training.
        Inputs:
            batch_size - Number of images to sample.
            every_n_epochs - Number of epochs between two sets of pictures.
            save_to_disk - If True, the pictures are also saved as PNG files in the run's log directory.
        """
        self.batch_size, self.every_n_epochs, self.save_to_disk = batch_size, every_n_epochs, save_to_disk
        self.imgs = None  # images [B,C,H,W]; if given, their reconstructions are saved, too

    def on_train_epoch_end(self, trainer, pl_module):
        if (epoch := trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.sample_and_save(trainer, pl_module, epoch)

    @rank_zero_only
    @best_effort("saving the pictures")
    def sample_and_save(self, trainer, pl_module, epoch):
        """
        Adds pictures to TensorBoard: samples, their means, the reconstructions of `imgs` if there are such images (each
        to the right of its original), and the manifold if there are 2 latents. If save_to_disk is True, all but the
        manifold are also saved as PNG files such as epoch_N_samples.png.
        Inputs:
            trainer, pl_module - The PyTorch Lightning Trainer, with any loggers, and the VAE.
            epoch - Number of epochs trained so far, for TensorBoard's x axis and the names of the files.
        """
        # The latents are the same each time, so that pictures of different epochs can be compared. The random numbers
        # of the training and the statistics of BatchNorm stay unchanged, so that pictures do not affect the training.
        with isolate_rng(), utils.eval_mode(pl_module):
            torch.manual_seed(0)
            pictures = dict(zip(["Samples", "Means"], pl_module.sample(self.batch_size)))
            if self.imgs is not None:
                imgs = self.imgs.to(pl_module.device)
                pictures["Reconstructions"] = torch.stack([imgs, pl_module.reconstruct(imgs)], dim=1).flatten(0, 1)
            for name, imgs in pictures.items():
                save_picture(trainer, name, make_grid(imgs, nrow=8, pad_value=0.5), epoch, self.save_to_disk)
            if pl_module.hparams.z_dim == 2:
                save_picture(trainer, "Manifold", utils.visualize_manifold(pl_module.decoder), epoch)


def train_vae(args: argparse.Namespace, callbacks: Sequence[pl.Callback] = ()) -> list[dict[str, float]]:
    """
    Trains a VAE, keeps the checkpoint with the lowest validation bpd, and tests this checkpoint. Raises a UserError
    with a one-line message if a flag, the data or the run's folder is invalid, or if the loss is not finite.
    Inputs:
        args - Namespace of flags, see make_parser; missing flags get their defaults.
        callbacks - Your own callbacks for the Trainer. Give the same ones to resume the run.
    Outputs:
        test_result - What trainer.test returns: a list with one dict, {"test_bpd": ...}.
    """
    args = complete_flags(args)
    callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks or ())
    if not all(isinstance(callback, pl.Callback) for callback in callbacks):
        raise FlagError(f"callbacks must be a list of pytorch_lightning.Callback, got {callbacks}")
    generate = GenerateCallback(save_to_disk=True)

    def load(args, **options):
        loaders = load_data(args, **options)
        if args.init_from:  # raises an error before the run has a folder if the weights do not fit
            make_vae(args, loaders[0].dataset.images.shape[1:])
        return loaders

    with Run(args, make_parser().defaults, make_experiment(args), [generate, *make_callbacks(args), *callbacks]) as run:
        if not run.is_finished:
            train_loader, val_loader, test_loader = run.start(load)
            generate.imgs, _ = val_loader.dataset[torch.arange(min(32, len(val_loader.dataset)))]
            pl.seed_everything(args.seed)
            model = run.prepare(make_vae(args, train_loader.dataset.images.shape[1:]))
            if run.is_new:
                generate.sample_and_save(run.trainer, model, epoch=0)
                run.trainer.validate(model, val_loader, verbose=False)
            run.fit(model, train_loader, val_loader)
            best = run.prepare(VAE.load_from_checkpoint(run.best_checkpoint))
            run.finish(run.trainer.test(best, test_loader, verbose=False))
    return run.test_result


def make_experiment(args: argparse.Namespace) -> Experiment:
    """Returns the Experiment that describes the VAE of these flags to a Run."""
    title = f"{args.model}, {args.z_dim} latents, {Path(args.dataset).name}"
    title += f", trained with beta {args.beta:g}" if args.beta != 1 else ""
    start = f" with the weights of {args.init_from}" if args.init_from else ""

    def manifold(path, run):
        save_image(utils.visualize_manifold(VAE.load_from_checkpoint(run.best_checkpoint).eval().decoder), path)

    return Experiment(
        metric="bpd",
        metric_label="bpd",
        describe=lambda loaders: f"{args.model}{start} on {describe_data(args, loaders)}",
        quantities={**CHART_TITLES, **OBJECTIVES[args.objective]},
        identifying=("model", "z_dim", "hidden_dims", "lr", "seed"),
        figures={
            "bpd_curves.png": lambda path, run: figures.training_curves(path, run, "bpd", title),
            "samples_over_training.png": figures.samples_over_training,
            **({"vae_manifold.png": manifold} if args.z_dim == 2 else {}),
        },
        keep=lambda folder: data_locations(vars(args), folder),
        if_not_finite=f"try a lower --lr than {args.lr:g}",
        memory_flags=("batch_size", "train_samples"),
        fixed_epochs="because its learning rate depends on --epochs" if args.lr_schedule == "cosine" else "",
    )


def make_callbacks(args):
    """Returns the callbacks for the flags lr_schedule, beta, beta_warmup and patience."""
    lr = [CosineLearningRate()] if args.lr_schedule == "cosine" else []
    beta = [BetaWarmup(args.beta_warmup)] if args.beta != 1 or args.beta_warmup else []
    return lr + beta + ([EarlyStopping("val_bpd", patience=args.patience)] if args.patience else [])


def make_vae(args: argparse.Namespace, img_size: tuple[int, int] = (28, 28)) -> VAE:
    """Returns the VAE for the flags and images of size img_size, untrained or with the weights of --init_from."""
    names = ["hidden_dims", "num_filters", "z_dim", "lr", "beta", "objective", "train_samples"]
    flags = {"model_name": args.model, "img_size": [*img_size], **{name: vars(args)[name] for name in names}}
    if args.init_from:
        return build_model(VAE, read_checkpoint(args.init_from), args.init_from, **flags)
    model = VAE(**flags)
    if args.init == "he":
        he_init(model.encoder.net)
        he_init(model.decoder.net)
    return model


FLAGS = {
    "model": {
        "model": Flag("MLP", "Kind of encoder and decoder", choices=["MLP", "CNN"]),
        "z_dim": Flag(20, "Dimensionality of the latent space", minimum=1),
        "hidden_dims": Flag([512], "MLP: widths of the encoder's hidden layers; the decoder's are reversed", minimum=1),
        "num_filters": Flag(32, "CNN: channels of the first encoder layers; later ones have twice as many", minimum=1),
        "init": Flag("pytorch", "MLP: initial weights; he (He et al. 2015) is better for deep ones", ["pytorch", "he"]),
        "init_from": Flag(None, "Start from the weights of this checkpoint, instead of --init"),
    },
    "training": {
        "lr": Flag(1e-3, "Learning rate of Adam", above=0),
        "lr_schedule": Flag("constant", "Learning rate: constant, or falling along a cosine", ["constant", "cosine"]),
        "batch_size": Flag(128, "Images per minibatch, over all devices and nodes", minimum=1),
        "epochs": Flag(80, "Passes over the training images", minimum=1),
        "patience": Flag(0, "Stop after this many epochs without a lower validation bpd; 0 means never", minimum=0),
        "seed": Flag(42, "Seed of the initial weights, the order of the images and the noise", minimum=0),
        "objective": Flag("elbo", "Training maximises the ELBO or the importance-weighted bound", [*OBJECTIVES]),
        "train_samples": Flag(1, "Samples of the posterior per image in training and validation", minimum=1),
        "beta": Flag(1.0, "Weight of the KL divergence in the loss, but not in the logged ELBO and bpd", minimum=0),
        "beta_warmup": Flag(0, "Epochs over which beta rises linearly from 0", minimum=0),
    },
    **DATA_FLAGS,
    **run_flags(log_dir="VAE_logs"),
}


def make_parser() -> Parser:
    """Returns the parser of the flags of `python train_pl.py`."""
    return Parser("Trains a variational autoencoder on binarised MNIST.", FLAGS)


def complete_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the flags with defaults for missing ones. Raises a FlagError that names an invalid flag."""
    args = make_parser().complete(args)
    check_run_flags(args)
    complete_dataset(args)
    complete_file(args, "init_from")
    if args.init == "he" and (args.model != "MLP" or args.init_from):
        raise FlagError(
            "--init he is valid only with --model MLP and without --init_from: leave --init he out, or give "
            "--model MLP without --init_from"
        )
    if args.objective == "iwae" and (args.beta != 1 or args.beta_warmup):
        raise FlagError(
            "--beta and --beta_warmup have no effect with --objective iwae, which has no KL divergence: leave them out"
        )
    return args


def main():
    parser = make_parser()
    with exit_on_error(parser):
        train_vae(parser.parse_args())


if __name__ == "__main__":
    main()

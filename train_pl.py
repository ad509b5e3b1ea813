"""Trains a variational autoencoder on binarised MNIST: `python train_pl.py`, `python train_pl.py --help`."""

import math
import os

import harness.figures  # noqa: F401  # isort: skip  before Lightning, which imports matplotlib
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.seed import isolate_rng
from torchvision.utils import make_grid, save_image

from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from data_sources import DATA_FLAGS, complete_dataset, load_data
from harness.checkpoints import load_model
from harness.chunks import knows_chunks
from harness.program import RUN_FLAGS, FlagError, Parser, ending, not_negative, optional
from harness.run import Run, check_run_flags
from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from objectives import OBJECTIVES, multi_sample_losses, schedules
from utils import KLD, elbo_to_bpd, sample_reparameterize, visualize_manifold

# What is logged of every epoch, as train_NAME and val_NAME: name and title of each mean over the images.
QUANTITIES = {
    "reconstruction_loss": "reconstruction loss, nats",
    "regularization_loss": "regularization loss (KL divergence), nats",
    "ELBO": "negative ELBO, nats",
    "bpd": "bits per dimension",
}


class VAE(pl.LightningModule):
    _ddp_params_and_buffers_to_ignore = ["train_sums", "val_sums", "epoch_beta"]  # each process has its own

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
            hidden_dims - List of the hidden layers' widths of an MLP encoder; the decoder gets it reversed.
            num_filters - Number of channels of a CNN's first layers.
            z_dim - Dimensionality of the latent space.
            lr - Learning rate of Adam.
            img_size - Height and width of an image.
            beta - Weight of the KL divergence in what is minimised (Higgins et al. 2017).
            objective - What is maximised: "elbo", or "iwae", the importance-weighted bound (Burda et al. 2016).
            train_samples - Number of samples of the posterior per image in training.
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
        self.randn_like = torch.randn_like  # the source of noise
        self.quantities = {**QUANTITIES, **OBJECTIVES[objective]}
        # Of the current epoch, in this process: number of images, and sums of the quantities over them.
        self.register_buffer("train_sums", torch.zeros(1 + len(self.quantities)), persistent=False)
        self.register_buffer("val_sums", torch.zeros(1 + len(self.quantities)), persistent=False)
        self.register_buffer("epoch_beta", torch.tensor(float(beta)), persistent=False)  # the current epoch's

    def losses(self, imgs, reduction="none"):
        """
        The two parts of the negative ELBO of images, with one sample of the posterior per image.
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
            reduction - "none", or "mean": the means over the batch.
        Outputs:
            L_rec - Reconstruction losses, -log p(x|z) summed over the pixels, in nats: shape [B], or a scalar.
            L_reg - Regularisation losses, KL(q(z|x) || p(z)), in nats: shape [B], or a scalar.
        """
        mean, log_std = (output.to(imgs.dtype) for output in self.encoder(imgs))  # the sums are not in bf16
        z = sample_reparameterize(mean, log_std.exp(), self.randn_like)
        pixels = F.binary_cross_entropy_with_logits(self.decoder(z).to(imgs.dtype), imgs, reduction="none")
        L_reg = KLD(mean, log_std)
        if reduction == "mean":
            return pixels.sum() / len(imgs), L_reg.mean()
        return pixels.flatten(start_dim=1).sum(dim=-1), L_reg

    def training_losses(self, imgs):
        """L_rec and L_reg as of forward, and what is minimised, in nats, see objectives.multi_sample_losses."""
        if self.hparams.train_samples > 1:
            return multi_sample_losses(self, imgs)
        L_rec, L_reg = self.losses(imgs, reduction="mean")
        return L_rec, L_reg, L_rec + self.epoch_beta * L_reg  # with one sample, the bound is the ELBO, and beta is 1

    def forward(self, imgs):
        """
        The negative ELBO of a batch of images.
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
        Outputs:
            L_rec, L_reg, bpd - Means of the losses over the batch, in nats, and of their sum in bits per dimension.
        """
        L_rec, L_reg = self.losses(imgs, reduction="mean")
        return L_rec, L_reg, elbo_to_bpd(L_rec + L_reg, imgs.shape)

    @torch.no_grad()
    def sample(self, batch_size):
        """
        Draws new images: z from the prior, then each pixel from its Bernoulli distribution.
        Inputs:
            batch_size - Number of images to draw.
        Outputs:
            x_samples - Sampled images of zeros and ones, shape [B,C,H,W].
            x_mean - The pixels' means that they were drawn from, between 0 and 1, shape [B,C,H,W].
        """
        x_mean = torch.sigmoid(self.decoder(torch.randn(batch_size, self.hparams.z_dim, device=self.decoder.device)))
        return torch.bernoulli(x_mean), x_mean

    @torch.no_grad()
    def reconstruct(self, imgs):
        """Means [B,C,H,W] of the pixels that the decoder makes of the posterior means of images [B,C,H,W]."""
        return torch.sigmoid(self.decoder(self.encoder(imgs)[0]))

    load_from_checkpoint = classmethod(load_model)  # Lightning's, on the CPU by default; it runs no code of a file

    def configure_optimizers(self):
        clips = self._trainer is not None and self.trainer.gradient_clip_val  # refused in mixed precision if fused
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, fused=None if clips else True)

    def training_step(self, batch, batch_idx):
        imgs, _ = batch
        losses = self.training_losses(imgs)
        loss = elbo_to_bpd(losses[-1], imgs.shape)  # what is minimised; what is logged is apart from it
        return {"loss": loss, "bpd": self.add_to(self.train_sums, imgs, *losses)["bpd"]}

    @knows_chunks
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            self.log_means("train", self.train_sums)

    def validation_step(self, batch, batch_idx):
        self.add_to(self.val_sums, batch[0], *self.training_losses(batch[0]))

    def on_validation_epoch_end(self):
        self.log_means("val", self.val_sums)

    def test_step(self, batch, batch_idx):
        self.log("test_bpd", self.forward(batch[0])[2], batch_size=len(batch[0]), sync_dist=True)

    @torch.no_grad()
    def add_to(self, sums, imgs, L_rec, L_reg, objective=None):
        """
        Adds the quantities of a minibatch, from its mean losses, to the sums of an epoch, and returns them. They are
        logged once per epoch: self.log in every step would cost a third of the time.
        """
        neg_elbo = L_rec + L_reg
        quantities = {
            "reconstruction_loss": L_rec,
            "regularization_loss": L_reg,
            "ELBO": neg_elbo,
            "bpd": elbo_to_bpd(neg_elbo, imgs.shape),
            "IWAE": objective,
        }
        kept = [quantities[name] for name in self.quantities]
        sums.add_(torch.stack([torch.ones_like(L_rec), *kept]), alpha=len(imgs))
        return quantities

    def log_means(self, stage, sums):
        """Logs the means over an epoch's images, of all processes, under names that begin with the stage."""
        means = dict(zip(self.quantities, sums[1:] / sums[0]))
        means["ELBO"] = means["reconstruction_loss"] + means["regularization_loss"]  # so that the curves add up
        options = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": int(sums[0])}
        sums.zero_()
        for name, mean in means.items():
            self.log(f"{stage}_{name}", mean, prog_bar=name == "bpd", **options)


class GenerateCallback(pl.Callback):
    def __init__(self, batch_size=64, every_n_epochs=5, save_to_disk=False):
        """
        Draws images from the model as it trains.
        Inputs:
            batch_size, every_n_epochs - Number of images to generate, and after every how many epochs.
            save_to_disk - If True, they are also written as PNG files into the run's log directory.
        """
        super().__init__()
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.save_to_disk = save_to_disk
        self.imgs = None  # Images [B,C,H,W] whose reconstructions are drawn, too

    def on_train_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0:
            self.sample_and_save(trainer, pl_module, epoch)

    @rank_zero_only
    @optional("drawing the pictures")
    def sample_and_save(self, trainer, pl_module, epoch):
        """
        Adds samples, means and, where there are images for it, reconstructions (each to the right of its original)
        to TensorBoard, with 2 latents the manifold too; all but that also to epoch_N_samples.png ..., if save_to_disk.
        Inputs:
            trainer - The PyTorch Lightning Trainer; its logger is TensorBoard's.
            pl_module - The VAE that is being trained.
            epoch - Number of epochs trained so far, for the x axis and the files' names.
        """
        # The same latents each time, so that pictures of different epochs compare, and without a trace in the random
        # numbers of the training, so that the pictures do not change its course.
        with isolate_rng():
            torch.manual_seed(0)
            samples, means = pl_module.sample(self.batch_size)
        pictures = {"Samples": samples, "Means": means}
        if self.imgs is not None:
            imgs = self.imgs.to(pl_module.device)
            pictures["Reconstructions"] = torch.stack([imgs, pl_module.reconstruct(imgs)], dim=1).flatten(0, 1)
        writer = trainer.logger.experiment
        for name, imgs in pictures.items():
            grid = make_grid(imgs, nrow=8, pad_value=0.5).cpu()
            writer.add_image(name, grid, epoch)
            if self.save_to_disk:
                save_image(grid, os.path.join(trainer.logger.log_dir, f"epoch_{epoch}_{name.lower()}.png"))
        if pl_module.hparams.z_dim == 2:
            writer.add_image("Manifold", visualize_manifold(pl_module.decoder).cpu(), epoch)


def train_vae(args):
    """
    Trains a VAE, keeps the checkpoint with the lowest validation bpd, and tests that one.
    Inputs:
        args - Namespace of flags, see make_parser; those that it lacks get their defaults.
    Outputs:
        test_result - What trainer.test returns: a list with one dict, {"test_bpd": ...}.
    Raises:
        OSError - of one clear line, where a flag, the data or the run's folder is of no use, or the loss is not finite.
    """
    args = complete_flags(args)
    generate = GenerateCallback(save_to_disk=True)
    quantities = {**QUANTITIES, **OBJECTIVES[args.objective]}
    with Run(args, make_parser().defaults, quantities, [generate, *schedules(args)]) as run:
        if not run.is_finished:
            train_loader, val_loader, test_loader = run.start(load_data)
            generate.imgs, _ = val_loader.dataset[torch.arange(min(32, len(val_loader.dataset)))]
            pl.seed_everything(args.seed)
            model = make_vae(args, generate.imgs.shape[-2:])
            if run.is_new:
                generate.sample_and_save(run.trainer, model, epoch=0)
                run.trainer.validate(model, val_loader, verbose=False)
            run.fit(model, train_loader, val_loader)
            run.finish(run.trainer.test(VAE.load_from_checkpoint(run.best_checkpoint), test_loader, verbose=False))
        if args.z_dim == 2:
            run.save_image(
                "vae_manifold.png", lambda: visualize_manifold(VAE.load_from_checkpoint(run.best_checkpoint).decoder)
            )
    return run.test_result


def make_vae(args, img_size=(28, 28)):
    """The untrained VAE that the flags ask for, for images of that height and width."""
    objective = args.beta, args.objective, args.train_samples
    model = VAE(args.model, args.hidden_dims, args.num_filters, args.z_dim, args.lr, list(img_size), *objective)
    if args.init == "he":
        he_init(model.encoder.net)
        he_init(model.decoder.net)
    return model


# Each flag's default, what it may be (one of a list, or a number from a smallest one on), and what it means.
FLAGS = {
    "model": {
        "model": ("MLP", ["MLP", "CNN"], "Kind of encoder and decoder"),
        "z_dim": (20, 1, "Dimensionality of the latent space"),
        "hidden_dims": ([512], 1, "MLP: widths of the encoder's hidden layers; the decoder has them reversed"),
        "num_filters": (32, 1, "CNN: channels of the layers next to the image; the others have twice that"),
        "init": ("pytorch", ["pytorch", "he"], "MLP: initial weights; with He's, deeper ones learn faster"),
    },
    "training": {
        "lr": (1e-3, 0.0, "Learning rate of Adam"),
        "lr_schedule": ("constant", ["constant", "cosine"], "Over the epochs: constant, or down along half a cosine"),
        "batch_size": (128, 1, "Images per minibatch, over all devices and nodes"),
        "epochs": (80, 1, "Passes over the training images"),
        "seed": (42, 0, "Seed of all random numbers"),
        "objective": ("elbo", list(OBJECTIVES), "What is maximised: the ELBO, or the importance-weighted bound"),
        "train_samples": (1, 1, "Samples of the posterior per image in training"),
        "beta": (1.0, not_negative, "Weight of the KL divergence in what is minimised, not in what is logged"),
        "beta_warmup": (0, 0, "Epochs over which beta rises linearly from 0"),
    },
    **DATA_FLAGS,
    **RUN_FLAGS,
}


def make_parser():
    """The parser of the flags of `python train_pl.py`."""
    return Parser("Trains a variational autoencoder on binarised MNIST.", FLAGS)


def complete_flags(args):
    """Adds the defaults of flags that a Namespace lacks. Raises a FlagError that names a flag of no use."""
    args = make_parser().complete(args)
    check_run_flags(args)
    complete_dataset(args)
    if args.init == "he" and args.model != "MLP":
        raise FlagError("--init he is for the MLP only: leave it out, or use --model MLP")
    if args.objective == "iwae" and (args.beta != 1 or args.beta_warmup):
        raise FlagError("--objective iwae has no KL divergence that --beta could weigh: leave out one of them")
    return args


def main():
    parser = make_parser()
    args = parser.parse_args()
    with ending(parser):
        train_vae(args)


if __name__ == "__main__":
    main()

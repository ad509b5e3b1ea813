"""
What a run may minimise in place of the negative ELBO with one sample of the posterior per image, and what changes over
its epochs: the learning rate and the weight of the KL divergence.
"""

import math

import pytorch_lightning as pl

from utils import KLD, importance_weighted_bound, sampled_losses

# Per objective, what is logged of every epoch beside the QUANTITIES of train_pl.py.
OBJECTIVES = {"elbo": {}, "iwae": {"IWAE": "negative importance-weighted bound, nats"}}


def multi_sample_losses(model, imgs):
    """
    The negative ELBO of a batch of images and what is minimised, with several samples of each posterior.
    Inputs:
        model - A VAE. Its hyperparameters objective and train_samples say what is computed, and epoch_beta is its beta.
        imgs - Images of shape [B,C,H,W], zeros and ones.
    Outputs:
        L_rec, L_reg - Means of the two losses over the batch and the samples, in nats, see VAE.losses.
        objective - L_rec + beta * L_reg, or the negative importance-weighted bound, a mean over the batch in nats.
    """
    mean, log_std = (output.to(imgs.dtype) for output in model.encoder(imgs))
    num_samples = model.hparams.train_samples
    L_rec, log_ratio = sampled_losses(imgs, mean, log_std, model.decoder, num_samples, model.randn_like)
    means = L_rec.mean(), KLD(mean, log_std).mean()
    if model.hparams.objective == "iwae":
        return *means, -importance_weighted_bound(log_ratio - L_rec).mean()
    return *means, means[0] + model.epoch_beta * means[1]


def schedules(args):
    """The callbacks that the flags lr_schedule, beta and beta_warmup ask for."""
    callbacks = [CosineLearningRate()] if args.lr_schedule == "cosine" else []
    if args.beta != 1 or args.beta_warmup:
        callbacks.append(BetaWarmup(args.beta_warmup))
    return callbacks


class CosineLearningRate(pl.Callback):
    """Lowers the learning rate, epoch by epoch, along half a cosine from lr towards 0 (Loshchilov & Hutter 2017)."""

    def on_train_epoch_start(self, trainer, pl_module):
        lr = pl_module.hparams.lr * (1 + math.cos(math.pi * trainer.current_epoch / trainer.max_epochs)) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr


class BetaWarmup(pl.Callback):
    """
    Raises the weight of the KL divergence, epoch by epoch, linearly from 0 to the module's hyperparameter beta, and
    logs it (Bowman et al. 2016).
    """

    def __init__(self, num_epochs):
        """
        Inputs:
            num_epochs - Number of epochs in which the weight is less than beta; with 0 it is beta from the first on.
        """
        self.num_epochs = num_epochs

    def on_train_epoch_start(self, trainer, pl_module):
        share = min(trainer.current_epoch / self.num_epochs, 1) if self.num_epochs else 1
        pl_module.epoch_beta.fill_(pl_module.hparams.beta * share)  # in place, as a captured step reads it
        self.log("train_beta", pl_module.epoch_beta, sync_dist=True)  # the same in all processes

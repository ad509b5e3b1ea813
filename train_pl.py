"""Trains a variational autoencoder on binarised MNIST: `python train_pl.py`, `python train_pl.py --help`."""
import argparse
import contextlib
import math
import os
import sys
import time

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.seed import isolate_rng
from torchvision.utils import make_grid, save_image

import checkpoints
import cuda_graph
import processes
import run_folder
import slurm_job
from bmnist import BINARIZATIONS, NUM_VAL, TRAIN_SIZES, DataError, bmnist, data_loaders
from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from mlp_encoder_decoder import MLPDecoder, MLPEncoder, he_init
from rendered_digits import rendered_digits
from utils import KLD, elbo_to_bpd, sample_reparameterize, visualize_manifold

CHOICES = {'model': ['MLP', 'CNN'], 'init': ['pytorch', 'he'], 'lr_schedule': ['constant', 'cosine'],
           'dataset': ['mnist', 'rendered'], 'binarization': BINARIZATIONS, 'train_size': TRAIN_SIZES,
           'accelerator': ['auto', 'cpu', 'gpu']}


class VAE(pl.LightningModule):

    def __init__(self, model_name, hidden_dims, num_filters, z_dim, lr):
        """
        Variational autoencoder (Kingma & Welling 2014) with a unit Gaussian prior, a Gaussian encoder and a
        decoder of independent Bernoulli pixels.
        Inputs:
            model_name - 'MLP' or 'CNN', the kind of encoder and decoder.
            hidden_dims - List of the hidden layers' widths of an MLP encoder; the decoder gets it reversed.
            num_filters - Number of channels of a CNN's first layers.
            z_dim - Dimensionality of the latent space.
            lr - Learning rate of Adam.
        """
        super().__init__()
        self.save_hyperparameters()
        if model_name == 'MLP':
            self.encoder = MLPEncoder(hidden_dims=hidden_dims, z_dim=z_dim)
            self.decoder = MLPDecoder(hidden_dims=hidden_dims[::-1], z_dim=z_dim)
        elif model_name == 'CNN':
            self.encoder = CNNEncoder(num_filters=num_filters, z_dim=z_dim)
            self.decoder = CNNDecoder(num_filters=num_filters, z_dim=z_dim)
        else:
            raise ValueError(f"model_name must be 'MLP' or 'CNN', got {model_name!r}")
        # Of the current epoch, in this process: number of images, and sums of their L_rec, L_reg and bpd.
        self.register_buffer('train_sums', torch.zeros(4), persistent=False)
        self.register_buffer('val_sums', torch.zeros(4), persistent=False)

    def forward(self, imgs):
        """
        The negative ELBO of a batch of images, with one sample of the posterior per image.
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
        Outputs:
            L_rec - Reconstruction loss, -log p(x|z) summed over the pixels: scalar, mean over the batch, in nats.
            L_reg - Regularisation loss, KL(q(z|x) || p(z)): scalar, mean over the batch, in nats.
            bpd - Their sum in bits per dimension, scalar. This is the loss that training minimises.
        """
        mean, log_std = self.encoder(imgs)
        z = sample_reparameterize(mean, log_std.exp())
        logits = self.decoder(z)
        L_rec = F.binary_cross_entropy_with_logits(logits, imgs, reduction='sum') / len(imgs)
        L_reg = KLD(mean, log_std).mean()
        bpd = elbo_to_bpd(L_rec + L_reg, imgs.shape)
        return L_rec, L_reg, bpd

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
        z = torch.randn(batch_size, self.hparams.z_dim, device=self.decoder.device)
        x_mean = torch.sigmoid(self.decoder(z))
        x_samples = torch.bernoulli(x_mean)
        return x_samples, x_mean

    @torch.no_grad()
    def reconstruct(self, imgs):
        """
        Encodes images and decodes the means of their posteriors.
        Inputs:
            imgs - Images of shape [B,C,H,W], zeros and ones.
        Outputs:
            x_mean - The means of their pixels, between 0 and 1, shape [B,C,H,W].
        """
        mean, _ = self.encoder(imgs)
        return torch.sigmoid(self.decoder(mean))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, **hyperparameters):
        """
        Lightning's, except that it loads tensors and plain values only (Lightning's would run what a file asks for).
        Inputs:
            checkpoint_path - Path of a checkpoint.
            map_location - Device of the module; the CPU where it is not given.
            hyperparameters - Arguments of __init__ that replace the checkpoint's.
        Raises:
            checkpoints.CheckpointError - where the file is not a checkpoint of this module.
        """
        return checkpoints.load_model(cls, checkpoint_path, **hyperparameters).to(map_location or 'cpu')

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, fused=True)

    def training_step(self, batch, batch_idx):
        return self.add_losses(self.train_sums, batch[0])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_last_batch:
            self.log_losses('train', self.train_sums)

    def validation_step(self, batch, batch_idx):
        self.add_losses(self.val_sums, batch[0])

    def on_validation_epoch_end(self):
        self.log_losses('val', self.val_sums)

    def test_step(self, batch, batch_idx):
        _, _, bpd = self.forward(batch[0])
        self.log('test_bpd', bpd, batch_size=len(batch[0]), sync_dist=True)

    # The losses are summed here and logged once per epoch: self.log in every step would cost a third of the time.

    def add_losses(self, sums, imgs):
        """Adds the losses of a batch of images to the sums of an epoch, in place, and returns its bpd."""
        L_rec, L_reg, bpd = self.forward(imgs)
        sums.add_(torch.stack([torch.ones_like(bpd), L_rec, L_reg, bpd]).detach(), alpha=len(imgs))
        return bpd

    def log_losses(self, stage, sums):
        """Logs the means over an epoch's images, of all processes, under names that begin with 'train' or 'val'."""
        L_rec, L_reg, bpd = sums[1:] / sums[0]
        epoch_mean = dict(on_step=False, on_epoch=True, sync_dist=True, batch_size=int(sums[0]))
        sums.zero_()
        self.log_dict({f'{stage}_reconstruction_loss': L_rec, f'{stage}_regularization_loss': L_reg,
                       f'{stage}_ELBO': L_rec + L_reg}, **epoch_mean)
        self.log(f'{stage}_bpd', bpd, prog_bar=True, **epoch_mean)


class GenerateCallback(pl.Callback):

    def __init__(self, batch_size=64, every_n_epochs=5, save_to_disk=False):
        """
        Draws images from the model as it trains.
        Inputs:
            batch_size - Number of images to generate.
            every_n_epochs - Generate them every N epochs.
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
    def sample_and_save(self, trainer, pl_module, epoch):
        """
        Adds samples, means and, where there are images for it, reconstructions (each to the right of its original)
        to TensorBoard, with 2 latent dimensions the manifold too. All but the last are written as
        epoch_N_samples.png, epoch_N_means.png and epoch_N_reconstructions.png, too, if save_to_disk is set.
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
        pictures = {'Samples': samples, 'Means': means}
        if self.imgs is not None:
            imgs = self.imgs.to(pl_module.device)
            pictures['Reconstructions'] = torch.stack([imgs, pl_module.reconstruct(imgs)], dim=1).flatten(0, 1)
        writer = trainer.logger.experiment
        for name, imgs in pictures.items():
            grid = make_grid(imgs, nrow=8, pad_value=0.5).cpu()
            writer.add_image(name, grid, epoch)
            if self.save_to_disk:
                save_image(grid, os.path.join(trainer.logger.log_dir, f'epoch_{epoch}_{name.lower()}.png'))
        if pl_module.hparams.z_dim == 2:
            writer.add_image('Manifold', visualize_manifold(pl_module.decoder).cpu(), epoch)


class CosineLearningRate(pl.Callback):
    """
    Lowers the learning rate from its initial value towards 0 along half a cosine (Loshchilov & Hutter 2017, without
    restarts). It changes between epochs alone, and depends on nothing but the epoch.
    """

    def on_train_epoch_start(self, trainer, pl_module):
        lr = pl_module.hparams.lr * (1 + math.cos(math.pi * trainer.current_epoch / trainer.max_epochs)) / 2
        for group in trainer.optimizers[0].param_groups:
            group['lr'] = lr


def train_vae(args):
    """
    Trains a VAE, keeps the checkpoint with the lowest validation bpd, and tests that one.
    Inputs:
        args - Namespace of flags, see make_parser; those that it lacks get their defaults.
    Outputs:
        test_result - What trainer.test returns: a list with one dict, {'test_bpd': ...}.
    Raises:
        ValueError - where a flag's value is of no use.
        DataError, run_folder.RunFolderError, run_folder.TrainingDiverged, checkpoints.CheckpointError - with one
            clear line each.
    """
    start = time.perf_counter()
    defaults = vars(make_parser().parse_args([]))
    args = argparse.Namespace(**{**defaults, **vars(args)})
    check_flags(args)
    torch.set_flush_denormal(True)  # tiny moments of Adam, of pixels that are hardly ever set, would slow a CPU down
    run_folder.quiet_libraries()
    name = args.run_name or slurm_job.run_name()
    trainer = make_trainer(args, name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.connected(trainer))
        if name:
            results = processes.on_rank_zero(
                trainer, lambda: run_folder.finished_results(args.log_dir, name, vars(args), defaults))
            if results:
                if trainer.is_global_zero:
                    print(f"{os.path.join(args.log_dir, name)} is finished: test bpd {results['test_bpd']:.4f}",
                          flush=True)
                return [{'test_bpd': results['test_bpd']}]
        loaders = []
        processes.on_rank_zero(trainer, lambda: loaders.extend(load_data(args)))  # before the others look for the data
        loaders = [processes.share_out(loader, trainer, args.seed) for loader in loaders or load_data(args)]
        # Only now that nothing else can be wrong; it is this run's alone until the stack is left.
        run = processes.on_rank_zero(
            trainer, lambda: stack.enter_context(run_folder.open_run(args.log_dir, name, vars(args), defaults)))
        if trainer.world_size > 1:
            stack.enter_context(processes.SharedNoise(trainer))
        return train_run(args, trainer, run, loaders, start - run.seconds)


def make_trainer(args, run_name):
    """The Trainer that the flags ask for, with every callback, and without a logger as long as it has no folder."""
    num_processes = args.devices * args.num_nodes
    # Buffers are left alone: each process sums its own losses.
    strategy = DDPStrategy(broadcast_buffers=False) if num_processes > 1 else 'auto'
    callbacks = [processes.SeedEpochs(args.seed), slurm_job.StayInQueue(), GenerateCallback(save_to_disk=True),
                 run_folder.EpochReport(vars(args), print_lines=not args.progress_bar),
                 ModelCheckpoint(filename='best', monitor='val_bpd', mode='min'),
                 ModelCheckpoint(filename='last', enable_version_counter=False)]
    if args.lr_schedule == 'cosine':
        callbacks.append(CosineLearningRate())
    try:
        return pl.Trainer(
            # A folder of the run's own, since under SLURM Lightning loads an hpc_ckpt_N.ckpt that it finds there.
            default_root_dir=os.path.expanduser(os.path.join(args.log_dir, run_name or '')),
            max_epochs=args.epochs, callbacks=callbacks,
            accelerator=args.accelerator, devices=args.devices, num_nodes=args.num_nodes, strategy=strategy,
            plugins=[checkpoints.CheckpointFiles(), *slurm_job.environment(args.devices, args.num_nodes)],
            use_distributed_sampler=False, logger=False, enable_progress_bar=args.progress_bar,
            enable_model_summary=False, num_sanity_val_steps=0)
    except (ValueError, RuntimeError) as error:  # flags that do not fit the tasks that SLURM started
        raise MisconfigurationException(str(error)) from error


def train_run(args, trainer, run, loaders, start):
    """Trains, or goes on, and leaves all results in the run's folder; what comes and goes is as in train_vae."""
    train_loader, val_loader, test_loader = loaders
    generate, report = (next(callback for callback in trainer.callbacks if isinstance(callback, kind))
                        for kind in [GenerateCallback, run_folder.EpochReport])
    trainer.logger = run_folder.EpochLogger(run.folder)
    generate.imgs, _ = val_loader.dataset[torch.arange(32)]
    trainer.log_every_n_steps = len(train_loader)
    device = trainer.strategy.root_device
    if trainer.is_global_zero:
        print(f"{args.model} on {args.dataset}, {len(train_loader.dataset):,} training images, on {device}"
              + (f" x {trainer.world_size}" if trainer.world_size > 1 else "") + f", in {run.folder}"
              + (f", continued after epoch {run.epoch}" if run.checkpoint else ""), flush=True)

    torch.backends.cudnn.deterministic = True  # so that a seed repeats itself bit for bit on a GPU, too
    pl.seed_everything(args.seed)
    model = VAE(model_name=args.model, hidden_dims=args.hidden_dims, num_filters=args.num_filters, z_dim=args.z_dim,
                lr=args.lr)
    if args.init == 'he':
        he_init(model.encoder.net)
        he_init(model.decoder.net)
    if not run.checkpoint:
        trainer.logger.set_up_dashboard(vars(args))
        generate.sample_and_save(trainer, model, epoch=0)
        trainer.validate(model, val_loader, verbose=False)
    if not args.plain and cuda_graph.suits(trainer, model, train_loader):
        train_loader, val_loader = cuda_graph.speed_up(trainer, model, train_loader, val_loader)
    loaders[0].sampler.set_epoch(run.epoch)  # Lightning does so, too, but after worker processes have begun to read
    fit_start = time.perf_counter() - run.seconds
    trainer.fit(model, train_loader, val_loader, ckpt_path=run.checkpoint)
    fit_seconds = time.perf_counter() - fit_start

    model = VAE.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    test_result = trainer.test(model, test_loader, verbose=False)
    if trainer.is_global_zero:
        test_bpd = test_result[0]['test_bpd']
        if args.z_dim == 2:
            save_image(visualize_manifold(model.decoder), os.path.join(run.folder, 'vae_manifold.png'))
        draw_figures(run.folder, args, report, generate.every_n_epochs, test_bpd)
        # Last of all: it says that the run is finished.
        run_folder.write_results(run.folder, vars(args), report, test_bpd, device, fit_seconds,
                                 time.perf_counter() - start)
        print(f"test bpd {test_bpd:.4f}\nrun folder {run.folder}", flush=True)
    return test_result


def draw_figures(log_dir, args, report, every_n_epochs, test_bpd):
    """The curves of question 1.9 and the samples of question 1.10, as PNG files in the run's folder."""
    import figures  # only now, since matplotlib would delay the start of training

    train_bpd = {0: report.first_step_bpd, **report.curve('train_bpd')}
    figures.bpd_curves(os.path.join(log_dir, 'bpd_curves.png'), train_bpd, report.curve('val_bpd'), test_bpd,
                       title=f"{args.model}, {args.z_dim} latents, {args.dataset}")
    final = args.epochs - args.epochs % every_n_epochs
    pictures = {f"epoch {epoch}" if epoch else "before training": os.path.join(log_dir, f'epoch_{epoch}_samples.png')
                for epoch in sorted({0, min(10, final), final})}
    figures.side_by_side(os.path.join(log_dir, 'samples_over_training.png'), pictures)


def load_data(args, download=True):
    """The loaders of training, validation and test set that the flags ask for; MNIST is downloaded if it may be."""
    if args.dataset == 'rendered':
        num_train = args.train_size + NUM_VAL
        images, labels = rendered_digits(num_images=num_train + 10_000)
        return data_loaders(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:],
                            args.batch_size, args.num_workers, args.binarization, args.train_size)
    return bmnist(args.data_dir, args.batch_size, args.num_workers, download and rank_zero_only.rank == 0,
                  args.binarization, args.train_size)


def make_parser():
    """The parser of the flags of `python train_pl.py`."""
    parser = argparse.ArgumentParser(description="Trains a variational autoencoder on binarised MNIST.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Model hyperparameters
    parser.add_argument('--model', default='MLP', choices=CHOICES['model'], help="Kind of encoder and decoder")
    parser.add_argument('--z_dim', default=20, type=int, help="Dimensionality of the latent space")
    parser.add_argument('--hidden_dims', default=[512], type=int, nargs='+', metavar='WIDTH',
                        help="MLP only: widths of the encoder's hidden layers; the decoder has them reversed")
    parser.add_argument('--num_filters', default=32, type=int,
                        help="CNN only: number of channels of the layers next to the image; the others have twice that")
    parser.add_argument('--init', default='pytorch', choices=CHOICES['init'],
                        help="MLP only: initial weights, PyTorch's own, or He's, with which deeper ones learn faster")
    # Optimiser hyperparameters
    parser.add_argument('--lr', default=1e-3, type=float, help="Learning rate of Adam")
    parser.add_argument('--lr_schedule', default='constant', choices=CHOICES['lr_schedule'],
                        help="Learning rate over the epochs: constant, or falling to 0 along half a cosine")
    parser.add_argument('--batch_size', default=128, type=int,
                        help="Number of images per minibatch, over all devices and nodes")
    # Other hyperparameters
    parser.add_argument('--epochs', default=80, type=int, help="Number of epochs, passes over the training images")
    parser.add_argument('--seed', default=42, type=int, help="Seed of all random numbers")
    parser.add_argument('--num_workers', default=0, type=int,
                        help="Worker processes per data loader; the images are in memory, so 0 is the fastest")
    parser.add_argument('--log_dir', default='VAE_logs', help="Directory in which the runs' folders are made")
    parser.add_argument('--run_name', help="The run's folder in the log directory; a run that is there is continued. "
                        "Default: lightning_logs/version_N, in a batch job of SLURM job_ID")
    parser.add_argument('--progress_bar', action='store_true',
                        help="Show a progress bar instead of a line per epoch; not for batch jobs")
    parser.add_argument('--dataset', default='mnist', choices=CHOICES['dataset'],
                        help="Data: MNIST, or digits rendered from fonts where there is no network (not comparable)")
    parser.add_argument('--binarization', default='threshold', choices=CHOICES['binarization'],
                        help="Pixels: 1 where the intensity exceeds 0.5; or drawn from Bernoulli(intensity), anew for "
                        "every epoch of training, as in most of the literature")
    parser.add_argument('--train_size', default=TRAIN_SIZES[0], type=int, choices=CHOICES['train_size'],
                        help="Number of training images; the 5,000 images after them validate")
    parser.add_argument('--data_dir', default='../data/',
                        help="Directory of MNIST, in its subfolder MNIST/raw; downloaded to it where missing")
    parser.add_argument('--accelerator', default='auto', choices=CHOICES['accelerator'],
                        help="Device that trains; auto takes a GPU where there is one")
    parser.add_argument('--devices', default=1, type=int, help="Number of GPUs, or of processes on a CPU, per node")
    parser.add_argument('--num_nodes', default=1, type=int, help="Number of nodes")
    parser.add_argument('--plain', action='store_true',
                        help="Train step by step on a GPU too, instead of replaying many steps at once as a CUDA graph")
    return parser


def check_flags(args):
    """Raises a ValueError that names the flag whose value is of no use."""
    for name, choices in CHOICES.items():  # argparse has checked those of a command, but nobody a notebook's
        if getattr(args, name) not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(map(str, choices))}, got {getattr(args, name)!r}")
    for name, least in [('z_dim', 1), ('num_filters', 1), ('batch_size', 1), ('epochs', 1), ('num_workers', 0),
                        ('devices', 1), ('num_nodes', 1)]:
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        raise ValueError(f"--hidden_dims must be one or more widths of at least 1, got {args.hidden_dims}")
    if args.init == 'he' and args.model != 'MLP':
        raise ValueError("--init he is for the MLP only: leave it out, or use --model MLP")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise ValueError(f"--lr must be a finite number above 0, got {args.lr}")
    if args.batch_size % (args.devices * args.num_nodes):
        raise ValueError(f"--batch_size {args.batch_size} is the minibatch over all devices: it must be a multiple of "
                         f"--devices {args.devices} x --num_nodes {args.num_nodes}")
    if args.run_name is not None and (os.path.isabs(args.run_name)
                                      or os.path.normpath(args.run_name).split(os.sep)[0] in ('.', '..')):
        raise ValueError(f"--run_name must be a folder inside the log directory, got {args.run_name!r}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")


def main():
    parser = make_parser()
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (--help lists the flags)\n")
    args = parser.parse_args()
    try:
        check_flags(args)
    except ValueError as error:
        parser.error(error)
    try:
        train_vae(args)
    except (DataError, run_folder.RunFolderError, run_folder.TrainingDiverged, checkpoints.CheckpointError,
            MisconfigurationException, OSError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")


if __name__ == '__main__':
    main()

"""Trains a VAE in plain PyTorch, with data, losses and some flags of train_pl.py: `python train_torch.py --help`."""

import argparse
import math
import os
import time

from bmnist import DataError, bmnist, data_loaders  # isort: skip  before TensorBoard, see harness/__init__.py
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from sources.rendered_digits import rendered_mnist
from utils import KLD, elbo_to_bpd, eval_mode, sample_reparameterize, visualize_manifold


class VAE(torch.nn.Module):
    """Variational autoencoder (Kingma & Welling 2014), see train_pl.VAE. Further arguments, such as lr, are ignored."""

    def __init__(self, model_name, hidden_dims, num_filters, z_dim, *args, **kwargs):
        super().__init__()
        self.z_dim = z_dim
        if model_name == "MLP":
            self.encoder = MLPEncoder(hidden_dims=hidden_dims, z_dim=z_dim)
            self.decoder = MLPDecoder(hidden_dims=hidden_dims[::-1], z_dim=z_dim)
        elif model_name == "CNN":
            self.encoder = CNNEncoder(num_filters=num_filters, z_dim=z_dim)
            self.decoder = CNNDecoder(num_filters=num_filters, z_dim=z_dim)
        else:
            raise ValueError(f"model_name must be 'MLP' or 'CNN', got {model_name!r}")

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns means, over images [B,C,H,W], of -log p(x|z) and KL(q(z|x) || p(z)) in nats, and their sum in bpd."""
        mean, log_std = self.encoder(imgs)
        logits = self.decoder(sample_reparameterize(mean, log_std.exp()))
        L_rec = F.binary_cross_entropy_with_logits(logits, imgs, reduction="none").sum() / len(imgs)
        L_reg = KLD(mean, log_std).mean()
        return L_rec, L_reg, elbo_to_bpd(L_rec + L_reg, imgs.shape)

    @torch.no_grad()
    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples images of zeros and ones. Returns them and the means of their pixels, each of shape [B,C,H,W]."""
        x_mean = torch.sigmoid(self.decoder(torch.randn(batch_size, self.z_dim, device=self.device)))
        return torch.bernoulli(x_mean), x_mean

    @property
    def device(self):
        return self.decoder.device


def sample_and_save(model, epoch, summary_writer, batch_size=64):
    """Samples images. Saves them and their means as 8x8 grids, in TensorBoard and as PNG files in its folder."""
    with eval_mode(model):
        pictures = zip(["samples", "means"], model.sample(batch_size))
    for name, imgs in pictures:
        grid = make_grid(imgs, nrow=8, pad_value=0.5)
        summary_writer.add_image(name, grid, epoch)
        save_image(grid, os.path.join(summary_writer.log_dir, f"epoch_{epoch}_{name}.png"))


def train_vae(model, train_loader, optimizer):
    """Minimises the bpd for one epoch of minibatches (imgs, labels). Returns the same averages as test_vae."""
    model.train()
    device, num_images, sums = model.device, 0, 0
    for imgs, _ in train_loader:
        L_rec, L_reg, bpd = model(imgs.to(device))
        optimizer.zero_grad()
        bpd.backward()
        optimizer.step()
        num_images += len(imgs)
        sums += len(imgs) * torch.stack([bpd, L_rec, L_reg]).detach()  # .item() would make the CPU wait for the GPU
    return tuple((sums / num_images).tolist())


@torch.no_grad()
def test_vae(model, data_loader):
    """Returns (average_bpd, average_rec_loss, average_reg_loss) over the images, as numbers, the losses in nats."""
    device, num_images, sums = model.device, 0, 0
    with eval_mode(model):
        for imgs, _ in data_loader:
            L_rec, L_reg, bpd = model(imgs.to(device))
            num_images += len(imgs)
            sums += len(imgs) * torch.stack([bpd, L_rec, L_reg])
    return tuple((sums / num_images).tolist())


def seed_everything(seed):
    """Seeds torch's random numbers. This program uses no others."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def main(args: argparse.Namespace) -> float:
    """Trains a VAE and returns the test bpd of the epoch with the lowest validation bpd. args may lack flags."""
    args = argparse.Namespace(**{**vars(parser.parse_args([])), **vars(args)})
    for name in ["z_dim", "hidden_dims", "num_filters", "lr", "batch_size", "epochs"]:
        if not 0 < torch.tensor(vars(args)[name]).min() < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0, got {vars(args)[name]}")
    torch.set_flush_denormal(True)  # Adam's moments of pixels that are rarely 1 become subnormal: slow on a CPU
    seed_everything(args.seed)
    sizes, is_mnist = (args.batch_size, args.num_workers), args.dataset == "mnist"
    loaders = bmnist(args.data_dir, *sizes) if is_mnist else data_loaders(*rendered_mnist(50_000), *sizes)
    train_loader, val_loader, test_loader = loaders
    model = VAE(args.model, args.hidden_dims, args.num_filters, args.z_dim)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    while True:
        folder = os.path.join(os.path.expanduser(args.log_dir), time.strftime("%Y_%m_%d_%H_%M_%S"))
        try:
            os.makedirs(os.path.join(folder, "checkpoints"))
            break
        except FileExistsError:  # another run started in the same second
            time.sleep(0.1)
    checkpoint, lowest = os.path.join(folder, "checkpoints", "epoch.pt"), math.inf
    with SummaryWriter(folder) as writer:
        sample_and_save(model, 0, writer)
        for epoch in range(1, args.epochs + 1):
            progress = tqdm(train_loader, f"epoch {epoch}", leave=False, disable=not args.progress_bar)
            train, val = train_vae(model, progress, optimizer), test_vae(model, val_loader)
            if not math.isfinite(train[0] + val[0]):
                raise ValueError(f"the loss of epoch {epoch} is not finite: try a smaller --lr")
            print(f"epoch {epoch:3}/{args.epochs}  train bpd {train[0]:.4f}  val bpd {val[0]:.4f}", flush=True)
            names = ["BPD", "Reconstruction Loss", "Regularization Loss", "ELBO"]
            for name, *averages in zip(names, [*train, sum(train[1:])], [*val, sum(val[1:])]):
                writer.add_scalars(name, dict(zip(["train", "val"], averages)), epoch)
            if val[0] < lowest:
                lowest = val[0]
                torch.save(model.state_dict(), checkpoint)
            if epoch % 5 == 0:
                sample_and_save(model, epoch, writer)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        test_bpd = test_vae(model, test_loader)[0]
        writer.add_scalars("BPD", {"test": test_bpd}, args.epochs)
    if args.z_dim == 2:
        save_image(visualize_manifold(model.decoder), os.path.join(folder, "vae_manifold.png"))
    print(f"test bpd {test_bpd:.4f}\nrun folder {folder}")
    return test_bpd


parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
add = parser.add_argument
add("--model", default="MLP", choices=["MLP", "CNN"], help="Kind of encoder and decoder")
add("--z_dim", default=20, type=int, help="Dimensionality of the latent space")
add("--hidden_dims", default=[512], type=int, nargs="+", help="MLP: widths of the encoder's hidden layers")
add("--num_filters", default=32, type=int, help="CNN: channels of the first encoder layers")
add("--lr", default=1e-3, type=float, help="Learning rate of Adam")
add("--batch_size", default=128, type=int, help="Images per minibatch")
add("--epochs", default=80, type=int, help="Passes over the training images")
add("--seed", default=42, type=int, help="Seed of all random numbers")
add("--num_workers", default=0, type=int, help="Worker processes per data loader")
add("--log_dir", default="VAE_logs", help="Directory for the folders of the runs")
add("--progress_bar", action="store_true", help="Show a progress bar")
add("--dataset", default="mnist", choices=["mnist", "rendered"], help="MNIST, or digits rendered from fonts")
add("--data_dir", default="../data/", help="Directory that contains MNIST/raw; missing files are downloaded")

if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except (DataError, OSError, ValueError, KeyboardInterrupt) as error:
        parser.exit(1, f"train_torch.py: error: {str(error) or 'interrupted'}\n")

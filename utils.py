"""
The mathematics of the VAE: reparameterisation, KL divergence, bits per dimension, log-likelihood, active units, the
latent manifold, and means over an epoch.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.utils import make_grid


def sample_reparameterize(mean: Tensor, std: Tensor, eps: Tensor | None = None) -> Tensor:
    """
    Samples once from each Gaussian with the reparameterisation trick, z = mean + std * eps with eps ~ N(0, 1)
    (Kingma & Welling 2014, section 2.4), so that gradients reach the mean and the standard deviation.
    Inputs:
        mean - Tensor of arbitrary shape, the means.
        std - Tensor of the same shape, the standard deviations (not their logarithms), none negative.
        eps - The noise, of the same shape, or of a larger shape for several samples, such as [B,K,D] if mean and std
            have the shape [B,1,D]. If None, the noise is sampled here.
    Outputs:
        z - The samples, a tensor of the shape of eps (of mean if eps is None).
    """
    return mean + std * (torch.randn_like(std) if eps is None else eps)


def KLD(mean: Tensor, log_std: Tensor) -> Tensor:
    """
    Computes the KL divergence of diagonal Gaussians from the unit Gaussian, KL(N(mean, std^2) || N(0, I)), in closed
    form (Kingma & Welling 2014, appendix B): the sum over the latents of (std^2 + mean^2 - 1 - log std^2) / 2.
    Inputs:
        mean - Tensor of shape [..., D], the means.
        log_std - Tensor of the same shape, the natural logarithms of the standard deviations.
    Outputs:
        KLD - Tensor of shape [...], in nats.
    """
    log_var = 2 * log_std
    # expm1(x) keeps the digits that exp(x) - 1 loses if the posterior is close to the prior.
    return 0.5 * (torch.expm1(log_var) - log_var + mean**2).sum(dim=-1)


def elbo_to_bpd(elbo: Tensor, img_shape: tuple) -> Tensor:
    """
    Converts the negative ELBO of an image into bits per dimension: elbo * log2(e) / (number of dimensions).
    Inputs:
        elbo - Tensor of shape [B], the negative ELBO of each image in nats, summed over its pixels.
        img_shape - Shape of the images, [B, C, H, W]; the number of dimensions is C * H * W.
    Outputs:
        bpd - Tensor of shape [B], in bits per dimension.
    """
    return elbo * (math.log2(math.e) / math.prod(img_shape[1:]))


def sum_softplus(logits: Tensor) -> Tensor:
    """
    Computes the log normaliser of independent Bernoulli pixels, the sum of log(1 + exp(logit)) over the pixels:
    log p(x) = x . logits - sum. The logarithm is the slowest operation, so it is computed once for a product of up to
    16 factors, each between 1 and 2.
    Inputs:
        logits - Tensor of shape [..., D].
    Outputs:
        sums - Tensor of shape [...], in nats.
    """
    factors = logits.abs().neg_().exp_().add_(1)  # log(1 + e^l) = max(l, 0) + log(1 + e^-|l|)
    products = factors.unflatten(-1, (math.gcd(logits.shape[-1], 16), -1)).prod(dim=-2)
    return logits.clamp_min(0).sum(dim=-1) + products.log_().sum(dim=-1)


def full_precision(tensor: Tensor) -> Tensor:
    """Converts a tensor to float32 if its type is shorter: in bfloat16, a sum over an image would have three digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def match_dtype(tensor: Tensor, network: nn.Module) -> Tensor:
    """Converts a tensor to the type of a network's parameters, the only one that the network accepts."""
    return tensor.to(next((param.dtype for param in network.parameters()), tensor.dtype))


def bernoulli_loss(logits: Tensor, imgs: Tensor) -> Tensor:
    """
    Computes the reconstruction loss -log p(x|z) of independent Bernoulli pixels.
    Inputs:
        logits - Decoder outputs of shape [...,C,H,W].
        imgs - Images of zeros and ones, of a shape that broadcasts to the shape of logits.
    Outputs:
        L_rec - Tensor of shape [...], in nats, summed over the pixels, in float32 or a longer type.
    """
    logits = full_precision(logits)
    x = imgs.to(logits.dtype).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(start_dim=-3).sum(dim=-1)


def decode(decoder: nn.Module, z: Tensor, imgs: Tensor, max_pixels: int = 2**23) -> tuple[Tensor | None, Tensor]:
    """
    Decodes K samples per image, with gradients. Up to max_pixels pixels are decoded at once. If there are more, the
    samples are decoded in parts, which are computed again in the backward pass, so that the memory is bounded.
    Inputs:
        decoder - Decoder network: latents [N,D] to logits [N,C,H,W].
        z - Latents of shape [B,K,D], in any precision.
        imgs - Images of shape [B,C,H,W], zeros and ones.
        max_pixels - Maximum number of pixels to decode at once. A part has at least one sample of each image.
    Outputs:
        logits - Tensor of shape [B,K,C,H,W]; None if the samples are decoded in parts.
        L_rec - Tensor of shape [B,K], the reconstruction losses, see bernoulli_loss.
    """

    def decode_part(z):
        logits = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return logits, bernoulli_loss(logits, imgs.unsqueeze(1))

    z = match_dtype(z, decoder)
    parts = z.split(max(max_pixels // imgs.numel(), 1), dim=1)
    if len(parts) == 1:
        return decode_part(z)
    losses = [checkpoint(lambda part: decode_part(part)[1], part, use_reentrant=False) for part in parts]
    return None, torch.cat(losses, dim=1)


def log_prior_ratio(z: Tensor, eps: Tensor, log_std: Tensor) -> Tensor:
    """
    Computes log p(z) - log q(z|x) of samples z = mean + std * eps of a diagonal Gaussian q, for a unit Gaussian p.
    Inputs:
        z, eps - Tensors of shape [...,D].
        log_std - Tensor of a shape that broadcasts to [...,D].
    Outputs:
        log_ratio - Tensor of shape [...], in nats.
    """
    return ((eps**2 - z**2) / 2 + log_std).sum(dim=-1)  # the factors of 2 pi of p and q cancel


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """
    Computes the importance-weighted bound of log p(x), L_K = log mean_k w_k with w_k = p(x,z_k) / q(z_k|x) (Burda,
    Grosse & Salakhutdinov 2016, eq. 8).
    Inputs:
        log_weights - Tensor of shape [...,K], log w_k in nats.
    Outputs:
        L_K - Tensor of shape [...], in nats.
    """
    return torch.logsumexp(log_weights, dim=-1) - math.log(log_weights.shape[-1])


@torch.no_grad()
def log_likelihood(
    imgs: Tensor, encoder: nn.Module, decoder: nn.Module, num_samples: int = 1000, chunk_size: int = 512
) -> Tensor:
    """
    Estimates log p(x) with importance weights: log mean_k p(x, z_k) / q(z_k|x) with K samples z_k ~ q(z|x) of the
    encoder (Burda, Grosse & Salakhutdinov 2016, eq. 8). The expectation of the estimate is a lower bound of log p(x).
    This bound is the ELBO for K = 1 and never decreases as K grows.
    Inputs:
        imgs - Images of shape [B,C,H,W], zeros and ones.
        encoder - Encoder network: images to mean and log_std of q(z|x), each [B,D].
        decoder - Decoder network: latents [N,D] to logits [N,C,H,W].
        num_samples - K, the number of samples per image, at least 1.
        chunk_size - Number of samples that are decoded at once, but at least B. It bounds the memory for any K.
    Outputs:
        log_p - Tensor of shape [B], the estimate for each image in nats.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    outputs = encoder(imgs)
    (mean, log_std), dtype = map(full_precision, outputs), outputs[0].dtype
    log_sum = torch.full((len(imgs),), -math.inf, device=imgs.device)
    x = full_precision(imgs).flatten(start_dim=1)
    samples_at_once = max(chunk_size // len(imgs), 1)
    for start in range(0, num_samples, samples_at_once):
        eps = torch.randn(min(samples_at_once, num_samples - start), *mean.shape, device=mean.device)
        z = mean + log_std.exp() * eps
        logits = full_precision(decoder(z.flatten(0, 1).to(dtype)))
        logits = logits.unflatten(0, z.shape[:2]).flatten(start_dim=2)
        log_p_x = torch.linalg.vecdot(logits, x) - sum_softplus(logits)
        log_weights = log_p_x + log_prior_ratio(z, eps, log_std)
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_weights, dim=0))
    return log_sum - math.log(num_samples)


@torch.no_grad()
def quadrature_log_likelihood(
    imgs: Tensor, decoder: nn.Module, step: float = 0.02, limit: float = 6.0, chunk_size: int = 2048
) -> Tensor:
    """
    Computes log p(x), the logarithm of the integral of p(x|z) p(z) over a 2-dimensional latent space, with the
    rectangle rule on a square grid of latents. It is exact up to the resolution of the grid and needs no encoder.
    Inputs:
        imgs - Images of shape [B,C,H,W], zeros and ones.
        decoder - Decoder network: latents [N,2] to logits [N,C,H,W], with a property `device`.
        step - Distance between neighbouring points of the grid; posteriors must be wider than this.
        limit - The grid extends from -limit to limit along each axis.
        chunk_size - Number of points that are decoded at once, which bounds the memory.
    Outputs:
        log_p - Tensor of shape [B], in nats.
    """
    axis = torch.arange(-round(limit / step), round(limit / step) + 1, device=decoder.device) * step
    x = imgs.flatten(start_dim=1)
    log_sum = torch.full((len(imgs),), -math.inf, device=imgs.device)
    for z in torch.cartesian_prod(axis, axis).split(chunk_size):
        logits = decoder(z).flatten(start_dim=1)
        log_p_x = logits @ x.T - sum_softplus(logits).unsqueeze(1)
        log_p_z = -(z**2).sum(dim=1, keepdim=True) / 2 - math.log(2 * math.pi)
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_p_x + log_p_z, dim=0))
    return log_sum + 2 * math.log(step)


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    """
    Finds the active latents, which distinguish images: the variance of their posterior mean over the images is above a
    threshold (Burda, Grosse & Salakhutdinov 2016, section 5.2).
    Inputs:
        means - Tensor of shape [N,D], the posterior means of N images.
        threshold - The variance above which a latent counts as active.
    Outputs:
        active - Boolean tensor of shape [D].
    """
    return means.var(dim=0) > threshold


def manifold_latents(grid_size: int) -> Tensor:
    """
    Returns the latents of the picture of the 2-dimensional manifold. Along each axis, they are the inverse normal CDF
    of the percentiles i / (grid_size + 1), i = 1 .. grid_size, so that every point represents the same prior mass.
    Inputs:
        grid_size - Number of points along each axis, at least 1.
    Outputs:
        z - Tensor of shape [grid_size**2, 2], in reading order: row by row from the top, each row from left to right.
            z[:, 0] increases to the right and z[:, 1] upwards.
    """
    if grid_size < 1:
        raise ValueError(f"grid_size must be at least 1, got {grid_size}")
    # In double precision, so that the points are symmetric around 0. On the CPU, since a Mac's GPU has only float32.
    percentiles = torch.arange(1, grid_size + 1, dtype=torch.float64, device="cpu") / (grid_size + 1)
    axis = torch.special.ndtri(percentiles).float()
    z1, z0 = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    return torch.stack([z0.flatten(), z1.flatten()], dim=-1)


@torch.no_grad()
def visualize_manifold(decoder: nn.Module, grid_size: int = 20) -> Tensor:
    """
    Decodes a grid of latents (see manifold_latents) of a 2-dimensional latent space into one image grid.
    Inputs:
        decoder - Decoder network: latents [B, 2] to logits [B, C, H, W], with a property `device`.
        grid_size - Number of images along each axis.
    Outputs:
        img_grid - Tensor of shape [3, H', W'], the means of the pixels (between 0 and 1) as one image grid.
    """
    with eval_mode(decoder):
        logits = decoder(match_dtype(manifold_latents(grid_size).to(decoder.device), decoder))
    return make_grid(torch.sigmoid(full_precision(logits)), nrow=grid_size)


@contextlib.contextmanager
def eval_mode(module: nn.Module):
    """Context manager that puts a module into eval mode and afterwards restores the mode of each of its submodules."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class EpochMeans:
    """
    Means of quantities over the images of an epoch, in this process; each step adds its minibatch. The sums are in
    double precision in any precision of the module (in float32 on Apple's GPU, which has no double precision). They
    stay on the module's device, because reading a number makes the CPU wait for the GPU.
    """

    updates_in_place = True  # each step adds to a tensor in place; the harness reads this attribute

    def __init__(self):
        self.reset()

    def reset(self):
        """Starts a new epoch without any sums."""
        self.names, self.sums = [], None

    @torch.no_grad()
    def add(self, quantities: dict[str, Tensor], num_images: int):
        """
        Adds the quantities of a minibatch.
        Inputs:
            quantities - Dict from name to one value per image, shape [B], or one value for the minibatch. The names and
                their order must be the same in every step of an epoch.
            num_images - Number of images in the minibatch, B.
        Raises:
            ValueError - if a quantity has another shape, or if the names differ from those of the previous step.
        """
        device = next((value.device for value in quantities.values() if torch.is_tensor(value)), "cpu")
        options = {"dtype": torch.float32, "device": device}  # with precision bf16-true, torch's default is bfloat16
        values = [torch.ones(num_images, **options)]  # their sum is the number of images
        for name, value in quantities.items():
            value = value if torch.is_tensor(value) else torch.full((), value, **options)
            if value.shape not in [(), (num_images,)]:
                raise ValueError(
                    f"the quantity {name} must be one value per image, shape [{num_images}], or a single value, got "
                    f"shape {list(value.shape)}"
                )
            values.append(full_precision(value).expand(num_images))
        if self.sums is None:
            dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
            self.names = list(quantities)
            self.sums = torch.zeros(len(values), dtype=dtype, device=device)
        elif self.names != list(quantities):
            raise ValueError(
                f"this step logs {', '.join(quantities)}, but the previous steps logged {', '.join(self.names)}: "
                "return the same quantities in every step"
            )
        self.sums += torch.stack(values).sum(dim=1, dtype=self.sums.dtype)

    def compute(self) -> tuple[dict[str, float], int]:
        """Returns the means of the epoch so far, as a dict from name to number, and the number of images."""
        if self.sums is None:
            return {}, 0
        num_images, *sums = self.sums.tolist()
        return {name: value / num_images for name, value in zip(self.names, sums)}, int(num_images)

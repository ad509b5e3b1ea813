"""The mathematics of the VAE: reparameterisation, KL divergence, bits per dimension and the latent manifold."""
import math

import torch
from torchvision.utils import make_grid


def sample_reparameterize(mean, std):
    """
    Draws one sample per Gaussian with the reparameterisation trick, z = mean + std * eps with eps ~ N(0, 1)
    (Kingma & Welling 2014, section 2.4), so that gradients reach the mean and the standard deviation.
    Inputs:
        mean - Tensor of arbitrary shape, the means.
        std - Tensor of the same shape, the standard deviations (not their logarithms), none negative.
    Outputs:
        z - Tensor of the same shape, one sample of each Gaussian.
    """
    return mean + std * torch.randn_like(std)


def KLD(mean, log_std):
    """
    KL divergence of diagonal Gaussians from the unit Gaussian, KL(N(mean, std^2) || N(0, I)), in closed form
    (Kingma & Welling 2014, appendix B): the sum over the latents of (std^2 + mean^2 - 1 - log std^2) / 2.
    Inputs:
        mean - Tensor of shape [..., D], the means.
        log_std - Tensor of the same shape, the natural logarithms of the standard deviations.
    Outputs:
        KLD - Tensor of shape [...], in nats.
    """
    log_var = 2 * log_std
    # expm1 keeps the digits that exp(x) - 1 loses for a posterior close to the prior.
    return 0.5 * (torch.expm1(log_var) - log_var + mean**2).sum(dim=-1)


def elbo_to_bpd(elbo, img_shape):
    """
    Converts the negative ELBO of an image into bits per dimension: elbo * log2(e) / (number of dimensions).
    Inputs:
        elbo - Tensor of shape [B], the negative ELBO of each image in nats, summed over its pixels.
        img_shape - Shape of the images, [B, C, H, W]; all but the batch dimension count.
    Outputs:
        bpd - Tensor of shape [B], in bits per dimension.
    """
    return elbo * (math.log2(math.e) / math.prod(img_shape[1:]))


def manifold_latents(grid_size):
    """
    The latents at which the 2-dimensional manifold is drawn: along each axis the inverse normal CDF of the
    percentiles i / (grid_size + 1), i = 1 .. grid_size, so that every point stands for the same prior mass.
    Inputs:
        grid_size - Number of points along each axis, at least 1.
    Outputs:
        z - Tensor of shape [grid_size**2, 2], in the order in which a picture is read: rows from the top, and from
            left to right in each. z[:, 0] grows to the right and z[:, 1] upwards.
    """
    if grid_size < 1:
        raise ValueError(f"grid_size must be at least 1, got {grid_size}")
    # In double precision, so that the points are symmetric around 0.
    percentiles = torch.arange(1, grid_size + 1, dtype=torch.float64) / (grid_size + 1)
    axis = torch.special.ndtri(percentiles).float()
    z1, z0 = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    return torch.stack([z0.flatten(), z1.flatten()], dim=-1)


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """
    Draws what a decoder with a 2-dimensional latent space makes of a grid of latents (see manifold_latents).
    Inputs:
        decoder - Decoder network: latents [B, 2] to logits [B, C, H, W], with a property `device`.
        grid_size - Number of images along each axis.
    Outputs:
        img_grid - Tensor of shape [3, H', W'], the means of the pixels (between 0 and 1) as one image grid.
    """
    logits = decoder(manifold_latents(grid_size).to(decoder.device))
    return make_grid(torch.sigmoid(logits), nrow=grid_size)

"""Encoder and decoder as multilayer perceptrons: linear layers with ReLU between them, none after the last."""

import math
from itertools import pairwise

import torch
import torch.nn as nn


def mlp(dims: list[int]) -> nn.Sequential:
    """Linear layers of the widths dims[0] -> dims[1] -> ... -> dims[-1], with ReLU between them."""
    layers = []
    for num_in, num_out in pairwise(dims):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def he_init(net: nn.Module):
    """
    Draws the weights of an `mlp` anew, with variances that keep the signal's scale from layer to layer: before a ReLU
    those of He et al. (2015), in the last layer those of Glorot & Bengio (2010). The biases become 0. PyTorch's own
    weights are smaller; deeper ones of them let a VAE learn at first to do without most of its latents.
    """
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    for layer in hidden:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(last.weight)
    for layer in [*hidden, last]:
        nn.init.zeros_(layer.bias)


class MLPEncoder(nn.Module):
    def __init__(self, input_dim=784, hidden_dims=[512], z_dim=20):  # noqa: B006 (the assignment's signature; only read)
        """
        Encoder q(z|x) = N(mean, diag(std^2)) with an MLP network.
        Inputs:
            input_dim - Number of input values: channels * height * width of an image.
            hidden_dims - List of the hidden layers' widths, from the first to the last.
            z_dim - Dimensionality of the latent space.
        """
        super().__init__()
        self.net = mlp([input_dim, *hidden_dims, 2 * z_dim])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Inputs:
            x - Images of shape [B,C,H,W], values between 0 and 1.
        Outputs:
            mean - Tensor of shape [B,z_dim], the means of q(z|x).
            log_std - Tensor of shape [B,z_dim], the logarithms of its standard deviations.
        """
        mean, log_std = self.net(x.flatten(start_dim=1)).chunk(2, dim=-1)
        return mean, log_std


class MLPDecoder(nn.Module):
    def __init__(self, z_dim=20, hidden_dims=[512], output_shape=[1, 28, 28]):  # noqa: B006 (as above)
        """
        Decoder p(x|z) of independent Bernoulli pixels with an MLP network.
        Inputs:
            z_dim - Dimensionality of the latent space.
            hidden_dims - List of the hidden layers' widths, from the first (next to z) to the last.
            output_shape - Shape of an image, [C,H,W].
        """
        super().__init__()
        self.output_shape = tuple(output_shape)
        self.net = mlp([z_dim, *hidden_dims, math.prod(output_shape)])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """
        Inputs:
            z - Latents of shape [B,z_dim].
        Outputs:
            x - Logits of the pixels, shape [B,*output_shape] (no sigmoid applied).
        """
        return self.net(z).unflatten(-1, self.output_shape)

    @property
    def device(self):
        """The device on which the parameters are, hence where latents must be made."""
        return next(self.parameters()).device

"""Encoder and decoder as multilayer perceptrons: linear layers with a ReLU between them."""

import math
from itertools import pairwise

import torch
import torch.nn as nn


def mlp(dims: list[int]) -> nn.Sequential:
    """Returns linear layers of the widths dims[0] -> dims[1] -> ... -> dims[-1], with a ReLU between them."""
    layers = []
    for num_in, num_out in pairwise(dims):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def he_init(net: nn.Module):
    """
    Initialises the weights of an `mlp` with variances that keep the scale of the signal from layer to layer. Layers
    before a ReLU use the variance of He et al. (2015), and the last layer that of Glorot & Bengio (2010). The biases
    become 0. PyTorch's initial weights are smaller: in deeper networks, a VAE then first learns to ignore most latents.
    """
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    for layer in hidden:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(last.weight)
    for layer in [*hidden, last]:
        nn.init.zeros_(layer.bias)


class MLPEncoder(nn.Module):
    def __init__(self, input_dim=784, hidden_dims=[512], z_dim=20):  # noqa: B006 (the assignment's signature; never changed)
        """
        Encoder q(z|x) = N(mean, diag(std^2)) with an MLP network.
        Inputs:
            input_dim - Number of input values: channels * height * width of an image.
            hidden_dims - List of the widths of the hidden layers, from the first to the last.
            z_dim - Dimensionality of the latent space.
        """
        super().__init__()
        self.net = mlp([input_dim, *hidden_dims, 2 * z_dim])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images as the parameters of their posteriors q(z|x).
        Inputs:
            x - Images of shape [B,C,H,W], values between 0 and 1.
        Outputs:
            mean - Tensor of shape [B,z_dim], the means of q(z|x).
            log_std - Tensor of shape [B,z_dim], the natural logarithms of the standard deviations of q(z|x).
        """
        mean, log_std = self.net(x.flatten(start_dim=1)).chunk(2, dim=-1)
        return mean, log_std


class MLPDecoder(nn.Module):
    def __init__(self, z_dim=20, hidden_dims=[512], output_shape=[1, 28, 28]):  # noqa: B006 (as above)
        """
        Decoder p(x|z) of independent Bernoulli pixels with an MLP network.
        Inputs:
            z_dim - Dimensionality of the latent space.
            hidden_dims - List of the widths of the hidden layers, from the first (next to z) to the last.
            output_shape - Shape of an image, [C,H,W].
        """
        super().__init__()
        self.output_shape = tuple(output_shape)
        self.net = mlp([z_dim, *hidden_dims, math.prod(output_shape)])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents.
        Inputs:
            z - Latents of shape [B,z_dim].
        Outputs:
            x - Logits of the pixels, shape [B,*output_shape] (no sigmoid applied).
        """
        return self.net(z).unflatten(-1, self.output_shape)

    @property
    def device(self):
        """The device of the parameters. Latents must be on this device."""
        return next(self.parameters()).device

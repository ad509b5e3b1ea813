"""Encoder and decoder as convolutional networks: the autoencoder of the course, adapted to MNIST's 28x28 pixels."""

import math

import torch
import torch.nn as nn


def size_after_strides(size, times):
    """Returns the size (H, W) of an image after `times` convolutions of stride 2. Each halves it, rounded up."""
    return tuple(-(-side // 2**times) for side in size)


class CNNEncoder(nn.Module):
    def __init__(self, num_input_channels=1, num_filters=32, z_dim=20, img_size=(28, 28)):
        """
        Encoder q(z|x) = N(mean, diag(std^2)) with a CNN network.
        Inputs:
            num_input_channels - Number of channels of an image.
            num_filters - Number of channels of the first two convolutions; the later ones have twice as many.
            z_dim - Dimensionality of the latent space.
            img_size - Height and width of an image.
        """
        super().__init__()
        c = num_filters
        self.net = nn.Sequential(
            nn.Conv2d(num_input_channels, c, kernel_size=3, padding=1, stride=2),  # 28x28 => 14x14
            nn.GELU(),
            nn.Conv2d(c, c, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(c, 2 * c, kernel_size=3, padding=1, stride=2),  # 14x14 => 7x7
            nn.GELU(),
            nn.Conv2d(2 * c, 2 * c, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * c, 2 * c, kernel_size=3, padding=1, stride=2),  # 7x7 => 4x4
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * c * math.prod(size_after_strides(img_size, 3)), 2 * z_dim),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images as the parameters of their posteriors q(z|x).
        Inputs:
            x - Images of shape [B,C,H,W], values between 0 and 1.
        Outputs:
            mean - Tensor of shape [B,z_dim], the means of q(z|x).
            log_std - Tensor of shape [B,z_dim], the natural logarithms of the standard deviations of q(z|x).
        """
        mean, log_std = self.net(x).chunk(2, dim=-1)
        return mean, log_std


class CNNDecoder(nn.Module):
    def __init__(self, num_input_channels=1, num_filters=32, z_dim=20, img_size=(28, 28)):
        """
        Decoder p(x|z) of independent Bernoulli pixels with a CNN network, which mirrors the encoder.
        Inputs:
            num_input_channels - Number of channels of an image.
            num_filters - Number of channels of the last two hidden layers; the earlier ones have twice as many.
            z_dim - Dimensionality of the latent space.
            img_size - Height and width of an image.
        """
        super().__init__()
        c = num_filters
        smallest = size_after_strides(img_size, 3)

        def upsample(num_in, num_out, times):
            """Returns a transposed convolution to the size of an image after `times` convolutions of stride 2."""
            # A transposed convolution makes odd sizes; an output_padding of 1 makes them even.
            even = tuple(1 - side % 2 for side in size_after_strides(img_size, times))
            return nn.ConvTranspose2d(num_in, num_out, kernel_size=3, padding=1, stride=2, output_padding=even)

        self.net = nn.Sequential(
            nn.Linear(z_dim, 2 * c * math.prod(smallest)),
            nn.GELU(),
            nn.Unflatten(-1, (2 * c, *smallest)),
            upsample(2 * c, 2 * c, times=2),  # 4x4 => 7x7
            nn.GELU(),
            nn.Conv2d(2 * c, 2 * c, kernel_size=3, padding=1),
            nn.GELU(),
            upsample(2 * c, c, times=1),  # 7x7 => 14x14
            nn.GELU(),
            nn.Conv2d(c, c, kernel_size=3, padding=1),
            nn.GELU(),
            upsample(c, num_input_channels, times=0),  # 14x14 => 28x28
        )
        # The bias is the same for all pixels. A random one would make the untrained decoder prefer black or white.
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents.
        Inputs:
            z - Latents of shape [B,z_dim].
        Outputs:
            x - Logits of the pixels, shape [B,num_input_channels,H,W] (no sigmoid applied).
        """
        return self.net(z)

    @property
    def device(self):
        """The device of the parameters. Latents must be on this device."""
        return next(self.parameters()).device

"""Means over the images of an epoch, of whatever quantities the steps name."""

import torch


class EpochMeans:
    """
    The means over an epoch's images of the quantities that its steps add, in this process. The sums are in double
    precision (on Apple's GPU, which has none, in float32), whatever the module's precision is, and stay on its device:
    reading a number in every step would make a GPU wait.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        """Begins an epoch."""
        self.names, self.sums = [], None

    @torch.no_grad()
    def add(self, quantities, num_images):
        """
        Adds the quantities of a minibatch.
        Inputs:
            quantities - Dict from name to a value per image, shape [B], or one value of the minibatch. The same names
                in the same order in every step of an epoch.
            num_images - Its number of images, B.
        Raises:
            ValueError - if a quantity has another shape, or if the names are others than in the step before.
        """
        device = next((value.device for value in quantities.values() if torch.is_tensor(value)), "cpu")
        options = {"dtype": torch.float32, "device": device}  # in a step of bf16-true, torch's default is bfloat16
        values = [torch.ones(num_images, **options)]  # their sum is the number of images
        for name, value in quantities.items():
            value = value if torch.is_tensor(value) else torch.full((), value, **options)
            if value.shape not in [(), (num_images,)]:
                raise ValueError(
                    f"the quantity {name} must have one value per image, shape [{num_images}], or a single one, got "
                    f"shape {list(value.shape)}"
                )
            values.append(value.float().expand(num_images))
        if self.sums is None:
            dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
            self.names = list(quantities)
            self.sums = torch.zeros(len(values), dtype=dtype, device=device)
        elif self.names != list(quantities):
            raise ValueError(f"a step logs {', '.join(quantities)}, the steps before it {', '.join(self.names)}")
        self.sums += torch.stack(values).sum(dim=1, dtype=self.sums.dtype)

    def compute(self):
        """The means of the epoch so far, as a dict from name to number, and the number of its images."""
        if self.sums is None:
            return {}, 0
        num_images, *sums = self.sums.tolist()
        return {name: value / num_images for name, value in zip(self.names, sums)}, int(num_images)

"""A model's latent space as one HTML file to play with: explorer.html, completed by weights, points and facts."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from harness.errors import UserError
from harness.files import write_text

TEMPLATE = Path(__file__).with_name("explorer.html")
MAX_WEIGHTS = 12_000_000  # of encoder and decoder together: a file of 32 MB
MAX_PRODUCTS = 40_000_000  # for one image: more than a tenth of a second
MAX_POINTS = 10_000
MOST_IN_TWO_PARTS = (
    100_000  # weights of a layer that is stored as good as exact, which the larger ones have no room for
)
# What the page says of the model, as evaluation.json holds it, but for the name of the run and what the labels are.
# fmt: off
FACTS = [
    "run", "legend", "model", "dataset", "binarization", "epoch", "test_images", "iw_samples", "active_units",
    *(f"{name}{error}" for name in ["test_bpd", "elbo", "log_likelihood"] for error in ["", "_standard_error"]),
]
# fmt: on
ACTIVATIONS = {nn.ReLU: "ReLU", nn.GELU: "GELU", nn.Tanh: "Tanh", nn.SiLU: "SiLU"}  # as the template calls them
IGNORED = [nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout]  # they change no number, nor the order


class ExplorerError(UserError):
    """There is no explorer for this model; the message says why."""


class Plane(NamedTuple):
    """
    A plane of the latent space, on which images are shown.
    Attributes:
        places - Tensor of shape [N,2], where each image is.
        labels - Tensor of shape [N], -1 where nobody knows.
        axes - Names of the two coordinates.
        center, directions - Tensors of shape [D] and [D,2]: latents z are at (z - center) @ directions.
    """

    places: torch.Tensor
    labels: torch.Tensor
    axes: list
    center: torch.Tensor
    directions: torch.Tensor


@torch.no_grad()
def write_explorer(path, encoder, decoder, imgs, means, plane, facts):
    """
    Writes the page.
    Inputs:
        path - The HTML file to write.
        encoder, decoder - The networks: images [B,1,H,W] to mean and log_std, each [B,D]; latents [B,D] to logits
            [B,1,H,W].
        imgs - The test set, images of shape [N,1,H,W].
        means - Tensor of shape [N,D], the means of their posteriors.
        plane - Where the images are shown, a Plane.
        facts - Dict of the plain values that the page tells, FACTS.
    Raises:
        ExplorerError - where the network is too large, or one that the page cannot compute.
    """
    num_weights = sum(weight.numel() for net in [encoder, decoder] for weight in net.parameters())
    if num_weights > MAX_WEIGHTS:
        raise ExplorerError(f"the networks have {num_weights:,} weights, more than {MAX_WEIGHTS:,}")
    few_imgs, few_means = imgs[:10].to(decoder.device), means[:10].to(decoder.device)
    networks, numbers = {}, []
    for name, net, x, y in [
        ("encoder", encoder, few_imgs, torch.cat(encoder(few_imgs), dim=-1)),
        ("decoder", decoder, few_means, decoder(few_means)),
    ]:
        networks[name], weights = layers_of(net, x, y, name)
        num_products = sum(map(products, networks[name]))
        if num_products > MAX_PRODUCTS:
            raise ExplorerError(f"the {name} takes {num_products:,} multiplications, more than {MAX_PRODUCTS:,}")
        numbers += [part for weight in weights for part in in_halves(weight.flatten().cpu())]
    classes = plane.labels[plane.labels >= 0].unique()
    shown = torch.linspace(0, len(imgs) - 1, min(len(imgs), MAX_POINTS)).long()
    places = plane.places[shown]
    low, high = places.amin(dim=0), places.amax(dim=0)
    half_span = (0.53 * (high - low)).clamp(min=1)  # that of the prior, where all posteriors are alike
    low, high = (low + high) / 2 - half_span, (low + high) / 2 + half_span
    in_bytes = [*((places - low) / (high - low) * 255).round().T, torch.searchsorted(classes, plane.labels[shown])]
    numbers += [part.to(torch.uint8).numpy() for part in in_bytes]
    data = {
        **networks,
        "most_in_two_parts": MOST_IN_TWO_PARTS,
        "img_size": list(imgs.shape[-2:]),
        "center": plane.center.tolist(),
        "directions": plane.directions.T.tolist(),
        "axes": [re.sub("[$_]", "", axis) for axis in plane.axes],
        "low": low.tolist(),
        "high": high.tolist(),
        "num_points": len(shown),
        "classes": [str(label) for label in classes.tolist()],
        "units": means.var(dim=0).argsort(descending=True).tolist(),
        "num_active": facts["active_units"],
        "largest": means.abs().amax(dim=0).tolist(),
        "facts": {name: facts[name] for name in FACTS},
    }
    write_text(path, page(data, b"".join(array.tobytes() for array in numbers)))


def in_halves(weights):
    """
    A layer's weights [N] in half precision, as a list of NumPy arrays: of few, so that they can be exact, also what the
    rounding has left of each. Raises an ExplorerError where they are too large for that.
    """
    halves = [weights.half()]
    if not halves[0].isfinite().all():
        raise ExplorerError("some weights are too large for half precision")
    if len(weights) <= MOST_IN_TWO_PARTS:
        halves.append((weights - halves[0].float()).half())
    return [half.numpy().astype("<f2") for half in halves]


def products(layer):
    """How many multiplications a layer takes for one image."""
    if "kernel_size" not in layer:
        return layer.get("num_weights", 0)
    small = layer["output" if layer["kind"] == "convolution" else "input"]
    return layer["num_weights"] * math.prod(small[1:])


def layers_of(net, x, y, name):
    """
    A network as a list of layers that the page can compute.
    Inputs:
        net - The network, a Module.
        x, y - An input of it, and the output for that, flattened or not.
        name - What it is called.
    Outputs:
        layers - List of dicts of plain values: the kind of layer, and its sizes.
        weights - List of its layers' weights and biases in their order.
    Raises:
        ExplorerError - where it does something else.
    """
    modules = [module for module in net.modules() if not list(module.children())]
    layers, weights = [], []
    different = ExplorerError(f"the {name} does something else than its layers one after the other")
    for module in modules:
        kind, before = type(module), x.flatten(start_dim=1) if isinstance(module, nn.Linear) else x
        try:
            x = module(before)
        except (RuntimeError, TypeError) as error:
            raise different from error
        if kind is nn.Linear:
            layers.append({"kind": "linear"})
        elif is_convolution(module):
            layers.append(
                {
                    "kind": "convolution" if kind is nn.Conv2d else "transposedConvolution",
                    "input": list(before.shape[1:]),
                    "output": list(x.shape[1:]),
                    **{what: list(getattr(module, what)) for what in ["kernel_size", "stride", "padding"]},
                }
            )
        elif kind in ACTIVATIONS and getattr(module, "approximate", "none") == "none":
            layers.append({"kind": ACTIVATIONS[kind]})
        elif kind not in IGNORED:
            raise ExplorerError(f"the {name} has a layer {kind.__name__}, which the page cannot compute")
        if hasattr(module, "weight"):
            bias = module.bias if module.bias is not None else module.weight.new_zeros(x.shape[1])
            weights += [module.weight, bias]
            layers[-1].update(num_weights=module.weight.numel(), num_biases=bias.numel())
    if x.numel() != y.numel() or not torch.allclose(x.flatten(), y.flatten(), rtol=1e-3, atol=1e-3):
        raise different
    return layers, weights


def is_convolution(module):
    """Whether a module is a convolution, or a transposed one, that the page can compute."""
    return (
        type(module) in [nn.Conv2d, nn.ConvTranspose2d]
        and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
        and not isinstance(module.padding, str)
    )


def page(data, numbers):
    """
    The text of the page.
    Inputs:
        data - What JSON can hold, the user's strings among them.
        numbers - Bytes.
    Outputs:
        text - The template with both. None of it can become markup or a script: in the JSON, "<" is escaped, the page
            shows it as text alone, and the policy allows the template's own script and style, and nothing else.
    """
    template = TEMPLATE.read_text(encoding="utf-8")

    def source(tag):
        """The template's own element of that kind, as a content security policy names it: by its SHA-256 checksum."""
        content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    parts = {
        "POLICY": f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "NUMBERS": base64.b64encode(numbers).decode(),
    }
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template)

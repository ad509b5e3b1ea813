"""Writes the latent-space explorer, a single HTML file: explorer.html with a model's weights, points and facts."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.files import write_text
from pictures.latent_space import Plane

TEMPLATE = Path(__file__).with_name("explorer.html")
MAX_WEIGHTS = 12_000_000  # weights of encoder and decoder together, in a file of 32 MB
MAX_PRODUCTS = 40_000_000  # multiplications per image; more take longer than a tenth of a second
MAX_POINTS = 10_000
MAX_FULL_PRECISION_WEIGHTS = 100_000  # weights of a layer; larger layers are stored in half precision
# What the page shows about the model: values of evaluation.json, the name of the run, and the kind of labels.
FACTS = ["run", "legend", "model", "dataset", "binarization", "epoch", "test_images", "iw_samples", "active_units"]
FACTS += [name + error for name in ["test_bpd", "elbo", "log_likelihood"] for error in ["", "_standard_error"]]
ACTIVATIONS = {nn.ReLU: "ReLU", nn.GELU: "GELU", nn.Tanh: "Tanh", nn.SiLU: "SiLU"}  # names in the template
IGNORED = [nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout]  # layers that change neither numbers nor their order


class ExplorerError(UserError):
    """Raised if there can be no explorer for a model. The message says why."""


@torch.no_grad()
def write_explorer(
    path: Path, encoder: nn.Module, decoder: nn.Module, imgs: Tensor, means: Tensor, plane: Plane, facts: dict
):
    """
    Writes the explorer of a model as an HTML file.
    Inputs:
        path - The HTML file to write.
        encoder, decoder - The networks: images [B,1,H,W] to mean and log_std, each [B,D]; latents [B,D] to logits
            [B,1,H,W].
        imgs - The test set, images of shape [N,1,H,W].
        means - Tensor of shape [N,D], the means of their posteriors.
        plane - The Plane on which the images are shown.
        facts - Dict of plain values. The page shows FACTS and ignores the others.
    Raises:
        ExplorerError - if a network is too large, or the page cannot compute it.
    """
    num_weights = sum(weight.numel() for net in [encoder, decoder] for weight in net.parameters())
    if num_weights > MAX_WEIGHTS:
        raise ExplorerError(f"the networks have {num_weights:,} weights, but at most {MAX_WEIGHTS:,} are possible")
    few_imgs, few_means = imgs[:10].to(decoder.device), means[:10].to(decoder.device)
    networks, numbers = {}, []
    for name, net, x, y in [
        ("encoder", encoder, few_imgs, torch.cat(encoder(few_imgs), dim=-1)),
        ("decoder", decoder, few_means, decoder(few_means)),
    ]:
        networks[name], weights = export_layers(net, x, y, name)
        num_products = sum(map(num_multiplications, networks[name]))
        if num_products > MAX_PRODUCTS:
            raise ExplorerError(
                f"the {name} needs {num_products:,} multiplications, but at most {MAX_PRODUCTS:,} are possible"
            )
        numbers += [part for weight in weights for part in split_to_half(weight.flatten().cpu())]
    classes = plane.labels[plane.labels >= 0].unique()
    shown = torch.linspace(0, len(imgs) - 1, min(len(imgs), MAX_POINTS)).long()
    places = plane.places[shown]
    low, high = places.amin(dim=0), places.amax(dim=0)
    half_span = (0.53 * (high - low)).clamp(min=1)  # at least the size of the prior, even if all posteriors are equal
    low, high = (low + high) / 2 - half_span, (low + high) / 2 + half_span
    in_bytes = [*((places - low) / (high - low) * 255).round().T, torch.searchsorted(classes, plane.labels[shown])]
    numbers += [part.to(torch.uint8).numpy() for part in in_bytes]
    data = {
        **networks,
        "max_full_precision_weights": MAX_FULL_PRECISION_WEIGHTS,
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
        "facts": {name: facts.get(name) for name in FACTS},  # facts that are not known yet are null
    }
    write_text(path, render_page(data, b"".join(array.tobytes() for array in numbers)))


def split_to_half(weights):
    """
    Converts a layer's weights [N] to a list of arrays in half precision: the rounded weights and, for up to
    MAX_FULL_PRECISION_WEIGHTS weights, the rounding errors. Raises an ExplorerError if a weight is too large.
    """
    halves = [weights.half()]
    if not halves[0].isfinite().all():
        raise ExplorerError("some weights are too large for half precision")
    if len(weights) <= MAX_FULL_PRECISION_WEIGHTS:
        halves.append((weights - halves[0].float()).half())
    return [half.numpy().astype("<f2") for half in halves]


def num_multiplications(layer):
    """Returns the number of multiplications of a layer for one image."""
    if "kernel_size" not in layer:
        return layer.get("num_weights", 0)
    small = layer["output" if layer["kind"] == "convolution" else "input"]
    return layer["num_weights"] * math.prod(small[1:])


def export_layers(net: nn.Module, x: Tensor, y: Tensor, name: str) -> tuple[list, list]:
    """
    Converts a network to a list of layers that the page can compute.
    Inputs:
        net - The network, a Module.
        x, y - An input of the network and the output for it, flattened or not.
        name - Name of the network for messages.
    Outputs:
        layers - List of dicts of plain values: the kind of each layer and its sizes.
        weights - List of the layers' weights and biases in their order.
    Raises:
        ExplorerError - if the page cannot compute the network.
    """
    layers, weights = [], []
    different = ExplorerError(f"the {name} does not simply apply its layers one after the other")
    for module in [module for module in net.modules() if not list(module.children())]:
        kind, before = type(module), x.flatten(start_dim=1) if isinstance(module, nn.Linear) else x
        try:
            x = module(before)
        except (RuntimeError, TypeError) as error:
            raise different from error
        if kind is nn.Linear:
            layers.append({"kind": "linear"})
        elif is_convolution(module):
            layers.append({"kind": "convolution" if kind is nn.Conv2d else "transposedConvolution"})
            layers[-1].update(input=list(before.shape[1:]), output=list(x.shape[1:]))
            layers[-1].update((size, list(getattr(module, size))) for size in ["kernel_size", "stride", "padding"])
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
    """Returns whether a module is a convolution or transposed convolution that the page can compute."""
    return (
        type(module) in [nn.Conv2d, nn.ConvTranspose2d]
        and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
        and not isinstance(module.padding, str)
    )


def render_page(data, numbers):
    """
    Returns the HTML of the page.
    Inputs:
        data - Data that JSON can represent, including strings of the user.
        numbers - Bytes of the weights and points.
    Outputs:
        text - The template with data and numbers. No string can become markup or a script: in the JSON, "<" is escaped;
            the page shows strings only as text; and the policy allows only the template's script and style.
    """
    template = TEMPLATE.read_text(encoding="utf-8")

    def source(tag):
        """Returns the SHA-256 checksum by which a content security policy identifies the template's script or style."""
        content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    parts = {
        "POLICY": f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "NUMBERS": base64.b64encode(numbers).decode(),
    }
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template)

"""Tests of pictures/explorer.py: `python -m unittest tests/unit/test_explorer.py`."""

import base64
import hashlib
import html.parser
import json
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from cnn_encoder_decoder import CNNDecoder, CNNEncoder
from mlp_encoder_decoder import MLPDecoder, MLPEncoder
from pictures import explorer
from pictures.explorer import ExplorerError, export_layers, write_explorer
from pictures.latent_space import plane
from tests.helpers import SeededTest


class Elements(html.parser.HTMLParser):
    """Parser of a page: `tags` with their attributes, and `texts`, the content of scripts and styles by tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag) if tag in ["script", "style"] else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


class TestExplorer(SeededTest):
    def write(self, encoder, decoder, num_images=50, size=(28, 28), **facts):
        """Writes the page of networks and random images. Returns its Elements, and keeps its path and the means."""
        imgs = torch.rand(num_images, 1, *size).round()
        labels = torch.arange(num_images) % 10
        with torch.no_grad():
            self.means, _ = encoder(imgs)
        facts = {**dict.fromkeys(explorer.FACTS, 1.5), "run": "run", "active_units": 2, "device": "mine", **facts}
        self.path = self.folder / "explorer.html"
        write_explorer(self.path, encoder, decoder, imgs, self.means, plane(self.means, labels), facts)
        return Elements(self.path.read_text(encoding="utf-8"))

    def test_the_page_contains_weights_and_points(self):
        encoder, decoder = MLPEncoder(hidden_dims=[16, 8], z_dim=3), MLPDecoder(3, [8, 16])
        with mock.patch.object(explorer, "MAX_FULL_PRECISION_WEIGHTS", 1_000):
            page = self.write(encoder, decoder)
        data, numbers = json.loads(page.texts["data"]), base64.b64decode(page.texts["numbers"])
        parameters = [*encoder.parameters(), *decoder.parameters()]
        start = 0
        for weight in parameters:
            two_parts = weight.numel() <= data["max_full_precision_weights"]
            there = np.frombuffer(numbers, "<f2", weight.numel() * (1 + two_parts), start).astype("f4")
            sums = torch.from_numpy(there.reshape(-1, *weight.shape).sum(axis=0))
            torch.testing.assert_close(sums, weight.detach(), rtol=1e-3, atol=1e-6 if two_parts else 1e-4)
            start += 2 * len(there)
        layers = [*data["encoder"], *data["decoder"]]
        sizes = [layer[what] for layer in layers if "num_weights" in layer for what in ["num_weights", "num_biases"]]
        self.assertEqual(sizes, [weight.numel() for weight in parameters])
        x, y, labels = np.frombuffer(numbers, np.uint8, offset=start).reshape(3, 50)
        low, high = np.array(data["low"]), np.array(data["high"])
        places = np.stack([x, y], axis=1) / 255 * (high - low) + low
        expected = (self.means.numpy() - data["center"]) @ np.array(data["directions"]).T
        self.assertLess(np.abs(places - expected).max() / (high - low).max(), 1 / 255)
        self.assertEqual([data["classes"][label] for label in labels], [str(number % 10) for number in range(50)])
        self.assertEqual(data["units"], self.means.var(dim=0).argsort(descending=True).tolist())
        self.assertNotIn("device", data["facts"])  # the page contains only the FACTS

    def test_a_large_test_set_is_shown_by_evenly_spread_points(self):
        with mock.patch.object(explorer, "MAX_POINTS", 25):
            few = self.write(MLPEncoder(hidden_dims=[]), MLPDecoder(20, []))
        self.assertEqual(json.loads(few.texts["data"])["num_points"], 25)
        labels = np.frombuffer(base64.b64decode(few.texts["numbers"])[-25:], np.uint8)
        self.assertEqual((labels[0], labels[-1]), (0, 49 % 10))

    def test_the_plane_is_at_least_as_large_as_the_prior(self):
        """The plane has this size even if all posteriors equal the prior."""
        encoder = MLPEncoder(hidden_dims=[], z_dim=3)
        for weight in encoder.parameters():
            weight.data.zero_()
        data = json.loads(self.write(encoder, MLPDecoder(3, [])).texts["data"])
        self.assertEqual((data["low"], data["high"]), ([-1, -1], [1, 1]))
        self.assertEqual(data["axes"][0], "first principal component (0% of the variance)")

    def test_no_string_becomes_markup(self):
        networks = MLPEncoder(hidden_dims=[], z_dim=1), MLPDecoder(1, [])
        expected = self.write(*networks).tags
        for text in ["</script><script>alert(1)</script>", "<!--<script>", "@DATA@", "\\1", "\u2028", "\udcff", '"']:
            page = self.write(*networks, run=text, dataset=text)
            self.assertEqual(page.tags, expected)
            facts = json.loads(page.texts["data"])["facts"]
            self.assertEqual((facts["run"], facts["dataset"]), (text, text))

    def test_the_policy_allows_the_page_nothing_but_its_own_script_and_style(self):
        page = self.write(MLPEncoder(hidden_dims=[]), MLPDecoder(20, []))
        policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        for tag in ["script", "style"]:
            checksum = base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode()
            self.assertEqual(rules.pop(f"{tag}-src"), f"'sha256-{checksum}'")
        nothing = dict.fromkeys(["default-src", "base-uri", "form-action"], "'none'")
        self.assertEqual(rules, {**nothing, "img-src": "data:"})
        self.assertNotRegex(self.path.read_text(encoding="utf-8"), r"@[A-Z]+@|https?:|\bon[a-z]+=")

    @torch.no_grad()
    def layers(self, net, size=28):
        """Returns the layers of a network whose input is an image."""
        x = torch.rand(5, 1, size, size)
        return export_layers(net.eval(), x, net(x), "network")[0]

    def test_networks_of_known_layers_become_lists_of_layers(self):
        convolution = nn.Conv2d(1, 2, (3, 5), padding=(1, 2), stride=2, bias=False)
        net = nn.Sequential(convolution, nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(392, 3), nn.Tanh())
        layers = self.layers(net)
        self.assertEqual([layer["kind"] for layer in layers], ["convolution", "SiLU", "linear", "Tanh"])
        self.assertEqual([explorer.num_multiplications(layer) for layer in layers], [30 * 14 * 14, 0, 392 * 3, 0])
        transposed = self.layers(nn.ConvTranspose2d(1, 2, 3, stride=2), size=7)
        self.assertEqual(explorer.num_multiplications(transposed[0]), 18 * 7 * 7)
        for size in [(28, 28), (9, 17)]:
            page = self.write(CNNEncoder(1, 4, 3, size), CNNDecoder(1, 4, 3, size), size=size)
            decoder = json.loads(page.texts["data"])["decoder"]
            self.assertEqual(decoder[-1]["output"], [1, *size])
            kinds = [layer["kind"] for layer in decoder[2::2]]
            self.assertEqual(kinds, ["transposedConvolution", "convolution"] * 2 + ["transposedConvolution"])

    def test_networks_that_the_page_cannot_compute_are_refused(self):
        class Skip(MLPEncoder):
            def forward(self, x):
                mean, log_std = super().forward(x)
                return mean + x.mean(), log_std

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        different, twice = "does not simply apply its layers one after the other", nn.Linear(784, 784)
        for layer, words in [
            (nn.LeakyReLU(), "layer LeakyReLU, which the page cannot compute"),
            (nn.GELU(approximate="tanh"), "layer GELU"),
            (nn.Conv2d(1, 2, 3, dilation=2), "layer Conv2d"),
            (nn.Conv2d(1, 1, 3, padding_mode="reflect", padding=1), "layer Conv2d"),
            (nn.Conv2d(1, 1, 3, padding="same"), "layer Conv2d"),
            (nn.Sequential(nn.Flatten(), Scaled(784, 3)), "layer Scaled"),
            (nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(784, 3))), "layer"),
            (nn.Sequential(nn.Flatten(), twice, nn.ReLU(), twice), different),
        ]:
            with self.subTest(words), self.assertRaisesRegex(ExplorerError, words):
                self.layers(layer)
        with self.assertRaisesRegex(ExplorerError, f"the encoder {different}"):
            self.write(Skip(), MLPDecoder())
        self.assertFalse(self.path.exists())

    def test_networks_that_are_too_large_are_refused(self):
        words = r"the networks have [\d,]+ weights, but at most 1,000"
        with mock.patch.object(explorer, "MAX_WEIGHTS", 1_000), self.assertRaisesRegex(ExplorerError, words):
            self.write(MLPEncoder(), MLPDecoder())
        encoder, decoder = CNNEncoder(img_size=(200, 200)), CNNDecoder(img_size=(200, 200))
        with self.assertRaisesRegex(ExplorerError, r"encoder needs [\d,]+ multiplications, but at most 40,000,000"):
            self.write(encoder, decoder, num_images=2, size=(200, 200))
        decoder = MLPDecoder()
        decoder.net[0].weight.data[0, 0] = 1e5
        with self.assertRaisesRegex(ExplorerError, "too large for half precision"):
            self.write(MLPEncoder(), decoder)

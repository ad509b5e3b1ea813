"""Runs the Python code of README.md and docs/, page by page: `python -m unittest tests/programs/test_docs.py`."""

import contextlib
import inspect
import io
import os
import re
from argparse import Namespace
from unittest import mock

import numpy as np
from PIL import Image

import bmnist
import evaluate
import sources
import train_pl
from sources import load_file
from sources.rendered_digits import rendered_mnist
from tests.helpers import REPOSITORY, SeededTest, results

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
Z_DIM = 3
data_loaders = bmnist.data_loaders


def load_few_digits(root="../data/", download=True, kind="mnist"):
    """Mock of load_mnist: returns 350 digits as the training set, 150 as the test set."""
    return rendered_mnist(350, 150)


def loaders_of_few_digits(*data, **options):
    """Mock of data_loaders: 300 of the 350 digits are for training."""
    arguments = inspect.signature(data_loaders).bind(*data, **options).arguments
    with mock.patch.multiple(bmnist, TRAIN_SIZES=[300], NUM_VAL=50):
        return data_loaders(**{**arguments, "train_size": 300})


def blocks_of(page):
    """Returns the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def shapes(line):
    """Returns the variables that a line assigns, with the shapes in its comment: '[128], [2, z_dim]' or 'each [2]'."""
    code, _, comment = line.partition("#")
    names = re.match(r"(\w+(?:, \w+)*) = ", code)
    found = [
        tuple(Z_DIM if size == "z_dim" else int(size) for size in shape.split(", "))
        for shape in re.findall(r"(?<!\w)\[((?:\d+|z_dim)(?:, (?:\d+|z_dim))*)\]", comment)
    ]
    if not names or not found:
        return []
    names = names[1].split(", ")
    return list(zip(names, found * len(names) if "each" in comment else found, strict=True))


class TestDocs(SeededTest):
    def setUp(self):
        """Trains one short run in the test's folder. All data are a few digits."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        for module, name, function in [
            (bmnist, "load_mnist", load_few_digits),
            (sources, "load_mnist", load_few_digits),
            (bmnist, "data_loaders", loaders_of_few_digits),
        ]:
            self.enter(mock.patch.object(module, name, function))
        self.enter(contextlib.redirect_stdout(io.StringIO()))
        train_pl.train_vae(Namespace(z_dim=Z_DIM, hidden_dims=[16], epochs=1, accelerator="cpu"))
        self.runs = self.folder / "VAE_logs" / "lightning_logs"

    def run_page(self, name):
        """Runs a page's blocks as one program, checks the shapes in its comments, and returns its variables."""
        namespace = {}
        for block in blocks_of(REPOSITORY / name):
            exec(compile(block, name, "exec"), namespace)
            for line in block.splitlines():
                for variable, shape in shapes(line):
                    self.assertEqual((*namespace[variable].shape,), shape, line)
        return namespace

    def test_each_page_with_python_has_a_test_here_or_needs_a_changed_package(self):
        pages = [page.name for page in PAGES if blocks_of(page)]
        with_python = ["conditional.md", "data.md", "evaluation.md", "kl.md", "latents.md", "runs.md"]
        self.assertEqual(pages, ["README.md", *with_python])
        self.assertIn('"conditional.md"', (REPOSITORY / "tests/programs/test_change_it.py").read_text())

    def test_shapes_in_comments_are_found(self):
        self.assertEqual(shapes("a, b = f(c)  # each [2, z_dim]: good"), [("a", (2, 3)), ("b", (2, 3))])
        self.assertEqual(shapes("a, b = f()  # [2] of zeros, [4, 1]"), [("a", (2,)), ("b", (4, 1))])
        self.assertEqual(shapes("f(a)  # [2]") + shapes('a = f()  # b["c"], b[0]'), [])
        lines = [line for page in PAGES for block in blocks_of(page) for line in block.splitlines()]
        self.assertGreater(len([shape for line in lines for shape in shapes(line)]), 10)

    def test_the_python_code_of_the_readme_works(self):
        names = self.run_page("README.md")
        self.assertEqual(set(names["imgs"].unique().tolist()), {0, 1})
        self.assertEqual(names["L_rec"].dim() + names["L_reg"].dim() + names["bpd"].dim(), 0)
        self.assertEqual(results(self.runs / "version_1")["hyperparameters"]["epochs"], 10)

    def test_the_python_code_of_evaluation_md_works(self):
        names = self.run_page("docs/evaluation.md")
        self.assertLess(names["results"]["elbo"], names["results"]["log_likelihood"])
        self.assertEqual(names["folder"].resolve(), (self.runs / "version_0" / "evaluation").resolve())
        self.assertTrue((self.folder / "reconstructions.png").exists())

    def test_the_python_code_of_latents_md_works(self):
        evaluate.evaluate(self.runs / "version_0/checkpoints/best.ckpt", iw_samples=5, latents="latents.npz")
        names = self.run_page("docs/latents.md")
        self.assertEqual(names["nearest"][0], 0)
        np.testing.assert_allclose(names["mean"], names["latents"]["mean"], atol=1e-4)
        for picture in ["neighbours.png", "scatter.png", "unusual.png"]:
            self.assertTrue((self.folder / picture).exists(), picture)

    def test_the_python_code_of_kl_md_works(self):
        names = self.run_page("docs/kl.md")
        ratio = 784 * names["mistaken"] / (names["L_rec"] + 784 * names["L_reg"]).mean()
        self.assertAlmostEqual(ratio.item(), 1, places=4)

    def test_the_python_code_of_data_md_works(self):
        (self.folder / "my_pictures").mkdir()
        images = rendered_mnist(1_200, 1)[0].numpy()
        for number, image in enumerate(images):
            saved = Image.fromarray(image)
            if number % 3 == 0:
                saved = saved.convert("RGB").resize((40, 30)).resize((28, 28))
            elif number % 3 == 1:
                saved = Image.fromarray(image.astype(np.uint16) * 257)
            else:
                saved = Image.merge("LA", [Image.new("L", saved.size), Image.fromarray(255 - image)])
            saved.save(f"my_pictures/{number:04}.png")
        names = self.run_page("docs/data.md")
        read = load_file("images.npz")
        self.assertEqual([part.shape for part in read[:4:2]], [(1_080, 28, 28), (120, 28, 28)])
        for name, image in zip(range(1, 9), images[1:9]):
            if name % 3:
                np.testing.assert_array_equal(names["images"][name], image)

    def test_the_python_code_of_runs_md_works(self):
        names = self.run_page("docs/runs.md")
        self.assertEqual(len(names["val_bpd"]), 2)
        self.assertEqual(names["results"]["best_epoch"], 1)

"""
Tests of tour.ipynb, without Jupyter: `python -m unittest tests/programs/test_tour.py`.

The stored outputs are those of `jupyter nbconvert --execute` in a fresh clone, without metadata and stderr. To keep the
file small, each picture is stored as PNG only, some with fewer colours, and the explorer's page as a screenshot of it.
"""

import ast
import base64
import functools
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unittest
from unittest import mock

from PIL import Image

import evaluate
import train_pl
from tests.helpers import REPOSITORY, CommandTest, TrainingTest, results
from tests.helpers.fake_data import small_loaders

NOTEBOOK = REPOSITORY / "tour.ipynb"
PICTURES = {  # the cells whose last line is a picture, and its width and height in pixels
    "curves": (700, 450),
    "samples": (724, 244),
    "before": (480, None),
    "manifold": (602, 602),
    "decode": (140, 140),
    "line": (724, 64),
    "encode": (724, 124),
    "latents": (560, 480),
    "cnn": (724, 244),
    "cnn-encode": (724, 124),
}
# The types of the stored outputs of each cell that shows something.
SHOWN = {
    "train": ["stream", "execute_result"],
    **dict.fromkeys(PICTURES, ["execute_result"]),
    "encode": ["stream", "execute_result"],
    "evaluate": ["stream"],
    "explorer": ["execute_result"],
}
KEYS = {"markdown": ["cell_type", "id", "metadata", "source"]}
KEYS["code"] = sorted([*KEYS["markdown"], "execution_count", "outputs"])


def cells(kind="code"):
    """Returns a dict from id to cell of all cells of a kind, in their order."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return {cell["id"]: cell for cell in notebook["cells"] if cell["cell_type"] == kind}


def source(cell):
    """Returns the source code of a cell."""
    return "".join(cell["source"])


def run_cell(cell, namespace):
    """Runs a cell in a namespace. Returns the value of its last line, which Jupyter shows, or None without a value."""
    tree, last = ast.parse(source(cell)), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, cell["id"], "exec"), namespace)
    return eval(compile(last, cell["id"], "eval"), namespace) if last else None


def anchors(page):
    """Returns the anchors of a page's headings: the names that can follow # in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestCells(TrainingTest):
    """Tests that run all cells in plain Python, in a folder with links to the package, on few digits."""

    makes_figures = True

    def setUp(self):
        super().setUp()
        names = ["harness", "pictures", "sources", "pretrained"]
        for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / name for name in names)]:
            (self.folder / path.name).symlink_to(path)
        for module in [train_pl, evaluate]:
            loaders = functools.partial(small_loaders, sizes=(3000, 500, 500))
            self.enter(mock.patch.object(module, "load_data", loaders))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.enter(mock.patch.object(sys, "path", sys.path[:]))
        self.enter(mock.patch.dict(sys.modules, IPython=None))  # importing IPython raises an ImportError
        self.enter(mock.patch("sys.stdout", new_callable=io.StringIO))

    def test_every_cell_runs_and_the_right_cells_show_pictures(self):
        names, values = {}, {}
        for name, cell in cells().items():
            values[name] = run_cell(cell, names)
        shown = {name for name, value in values.items() if value is not None}
        self.assertEqual(shown, {*PICTURES, "train", "explorer"})

        run = self.folder / "VAE_logs" / "tour_rendered"
        self.assertTrue((run / "checkpoints" / "best.ckpt").is_file())
        flags = results(run)["hyperparameters"]
        self.assertEqual([flags[name] for name in ["model", "z_dim", "epochs"]], ["MLP", 2, 5])
        self.assertEqual(values["train"], [{"test_bpd": results(run)["test_bpd"]}])
        self.assertLess(values["train"][0]["test_bpd"], 0.5)  # an untrained model has 1.0

        for name, (width, height) in PICTURES.items():
            with self.subTest(name):
                picture = values[name]
                self.assertIsInstance(picture, Image.Image)
                self.assertEqual(picture.size, (width, height or picture.height))
                low, high = picture.convert("L").getextrema()
                self.assertGreater(high - low, 100)
                self.assertTrue(picture._repr_png_().startswith(b"\x89PNG"))  # Jupyter calls this method

        for name, shape in {
            "samples": (24, 1, 28, 28),
            "z": (1, 2),
            "probabilities": (1, 1, 28, 28),
            "line": (12, 2),
            "decoded": (12, 1, 28, 28),
            "imgs": (2000, 1, 28, 28),
            "labels": (2000,),
            "mean": (2000, 2),
            "log_std": (2000, 2),
            "reconstructions": (2000, 1, 28, 28),
        }.items():
            self.assertEqual((*names[name].shape,), shape, name)
        self.assertEqual(set(names["imgs"].unique().tolist()), {0, 1})
        imgs = names["imgs"][:12]
        self.assertEqual((names["model"].hparams.z_dim, names["cnn"].hparams.z_dim), (2, 20))
        wrong = ((names["cnn"].reconstruct(imgs) > 0.5) != imgs.bool()).float().mean().item()
        self.assertLess(wrong, 0.1)

        self.assertEqual(names["folder"].resolve(), (run / "tour_cnn").resolve())
        frame, page = values["explorer"]._repr_html_(), (run / "tour_cnn" / "explorer.html").read_text()
        self.assertEqual(html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', frame)[1]), page)

        checkpoint = run / "checkpoints" / "best.ckpt"
        before = checkpoint.read_bytes()
        self.assertEqual(run_cell(cells()["train"], names), values["train"])  # the finished run
        self.assertEqual(checkpoint.read_bytes(), before)

    def test_missing_requirements_are_installed(self):
        with mock.patch("subprocess.run") as run:
            run_cell(cells()["package"], {})
            run.assert_not_called()
            with mock.patch("importlib.util.find_spec", lambda name: None if name == "pytorch_lightning" else name):
                run_cell(cells()["package"], {})
        install = [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
        run.assert_called_once_with(install, check=True)


class TestFirstCell(CommandTest):
    """Tests that run the first cell in a separate process, in a folder without the package."""

    def first_cell(self, repository="", then=""):
        """Runs the first cell with this URL of the repository, then more code. Returns exit code, stdout and stderr."""
        code = source(cells()["package"])
        self.assertEqual(code.count('\nREPOSITORY = ""'), 1)
        code = code.replace('\nREPOSITORY = ""', f"\nREPOSITORY = {str(repository)!r}")
        process = self.start("-c", f"{code}\n{then}")
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def test_without_the_package_the_first_cell_says_in_one_line_what_to_do(self):
        code, stdout, stderr = self.first_cell()
        message = "FileNotFoundError: train_pl.py is not here: set REPOSITORY to the URL of the git repository"
        self.assertEqual((code, stdout, stderr.splitlines()[-1]), (1, "", message))
        self.assertEqual([*self.folder.iterdir()], [])

    @unittest.skipUnless(shutil.which("git"), "git is not installed")
    def test_the_first_cell_clones_the_repository_or_finds_the_clone(self):
        remote, git = self.folder / "remote", ["git", "-c", "user.name=name", "-c", "user.email=name@localhost"]
        remote.mkdir()
        (remote / "train_pl.py").write_text("number = 7\n")
        for command in [["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "message"]]:
            subprocess.run([*git, *command], cwd=remote, check=True, timeout=60)
        then = "import train_pl; print(train_pl.number, os.path.basename(os.getcwd()))"
        self.assertEqual(self.first_cell(remote.as_uri(), then), (0, "7 vae\n", ""))
        self.assertEqual(self.first_cell(then=then), (0, "7 vae\n", ""))


class TestStoredFile(unittest.TestCase):
    """Tests of the stored file, which GitHub shows."""

    @classmethod
    def setUpClass(cls):
        cls.text = NOTEBOOK.read_text(encoding="utf-8")
        cls.notebook = json.loads(cls.text)

    def test_the_file_is_a_valid_notebook_of_less_than_a_megabyte(self):
        self.assertLess(len(self.text), 1_000_000)
        self.assertEqual(sorted(self.notebook), ["cells", "metadata", "nbformat", "nbformat_minor"])
        self.assertEqual((self.notebook["nbformat"], self.notebook["nbformat_minor"]), (4, 5))
        self.assertEqual(self.notebook["metadata"]["kernelspec"]["name"], "python3")
        self.assertLessEqual({*self.notebook["metadata"]}, {"kernelspec", "language_info"})
        ids = [cell["id"] for cell in self.notebook["cells"]]
        self.assertEqual(len(ids), len(set(ids)))
        for cell in self.notebook["cells"]:
            with self.subTest(cell["id"]):
                self.assertRegex(cell["id"], r"\A[a-z-]{1,64}\Z")
                self.assertEqual(sorted(cell), KEYS[cell["cell_type"]])
                self.assertEqual(cell["metadata"], {})
                self.assertTrue(all(isinstance(line, str) for line in cell["source"]))

    def test_all_cells_were_run_in_order_without_errors_and_have_the_right_outputs(self):
        counts = [cell["execution_count"] for cell in cells().values()]
        self.assertEqual(counts, list(range(1, len(counts) + 1)))
        outputs = {name: cell["outputs"] for name, cell in cells().items()}
        types = {name: [output["output_type"] for output in shown] for name, shown in outputs.items()}
        self.assertEqual({name: shown for name, shown in types.items() if shown}, SHOWN)
        for name, shown in outputs.items():
            for output in shown:
                with self.subTest(name):
                    self.assertEqual(output.get("name", "stdout"), "stdout")
                    if output["output_type"] == "execute_result":
                        self.assertEqual(output["execution_count"], cells()[name]["execution_count"])
                        types = ["text/plain"] if name == "train" else ["image/png", "text/plain"]
                        self.assertEqual((sorted(output["data"]), output["metadata"]), (types, {}))
        [shown] = ast.literal_eval("".join(outputs["train"][-1]["data"]["text/plain"]))
        self.assertLess(shown["test_bpd"], 0.3)

    def test_the_stored_pictures_are_valid_and_not_blank(self):
        for name, (width, height) in {**PICTURES, "explorer": (900, None)}.items():
            with self.subTest(name):
                data = cells()[name]["outputs"][-1]["data"]["image/png"]
                picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                self.assertEqual((picture.format, *picture.size), ("PNG", width, height or picture.height))
                low, high = picture.convert("L").getextrema()
                self.assertGreater(high - low, 100)

    def test_the_file_contains_no_path_of_the_machine_that_ran_it(self):
        without_pictures = re.sub(r'"image/png": "[^"]*"', "", self.text)
        self.assertLess(len(without_pictures), 30_000)
        self.assertEqual(re.findall(r"/(?:work|tmp|home|root|usr|opt)\b.*| at 0x.*|\\u001b.*", without_pictures), [])

    def test_all_cells_are_plain_python(self):
        for name, cell in cells().items():
            with self.subTest(name):
                ast.parse(source(cell))
                self.assertIsNone(re.search(r"^\s*[%!]|IPython|google\.colab", source(cell), re.MULTILINE))

    def test_every_link_leads_to_a_file_and_a_heading(self):
        links = re.findall(r"\]\(([^)\s]+)\)", "".join(map(source, cells("markdown").values())))
        self.assertGreater(len(links), 3)
        for link in links:
            path, _, anchor = link.partition("#")
            self.assertTrue((REPOSITORY / path).is_file(), link)
            if anchor:
                self.assertIn(anchor, anchors(REPOSITORY / path), link)

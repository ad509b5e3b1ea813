"""
Tests of the changes to train_pl.py that the README's section "Change it" and docs/conditional.md describe:
`python -m unittest tests/programs/test_change_it.py`.
"""

import json
import math
import re

from tests.helpers import REPOSITORY, CommandTest, metrics, results

# Runs after the Python code of docs/conditional.md, and prints the values that the test checks.
MEASURE = """
import json
images = x_mean.view(10, 12, -1)
alike = (images[0] - images[1]).abs().max().item(), (images[:, 0] - images[:, 1]).abs().max().item()
samples, means = model.sample(12, labels=torch.full((12,), 7))
test_imgs = torch.rand(20, 1, 28, 28).round()
bpds = []
for label in [0, 7]:
    torch.manual_seed(0)
    bpds.append(model(test_imgs, torch.full((20,), label))[2].item())
print(json.dumps([list(x_mean.shape), alike, list(samples.shape), samples.unique().tolist(), bpds]))
"""


def diff_blocks(text):
    """Returns the diff blocks of a page."""
    return re.findall(r"```diff\n(.*?)```", text, re.DOTALL)


def apply(block, source):
    """Applies a diff block to source code, which must contain each old line of the block exactly once."""
    to_insert, anchor = [], None
    for line in block.splitlines():
        kind, text = line[0], f"\n{line[1:]}\n"
        if kind == "+":
            if anchor is None:
                to_insert.append(text)
            else:
                source = source.replace(anchor, anchor.removesuffix("\n") + text)
                anchor = text
            continue
        if source.count(text) != 1:
            raise AssertionError(f"train_pl.py must contain this line of the page exactly once: {line}")
        source = source.replace(text, "".join(new.removesuffix("\n") for new in to_insert) + text)
        to_insert, anchor = [], text
    for line in block.splitlines():
        if line[0] == "-":
            source = source.replace(f"\n{line[1:]}\n", "\n")
    return source


class TestChangeIt(CommandTest):
    def copy_repository(self, blocks):
        """Makes a copy of the package in the test's folder, with diff blocks applied to train_pl.py."""
        source = (REPOSITORY / "train_pl.py").read_text()
        for block in blocks:
            source = apply(block, source)
        for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / name for name in ["harness", "pictures", "sources"])]:
            if path.name != "train_pl.py":
                (self.folder / path.name).symlink_to(path)
        (self.folder / "train_pl.py").write_text(source)

    def python(self, *command):
        """Runs Python in the copy. Returns its stdout. Fails if Python prints to stderr."""
        process = self.start(*command)
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ""))
        return stdout

    def train_in_the_copy(self, *flags, run_name="run"):
        """Trains one epoch on rendered digits in the copy. Returns the run's folder."""
        self.python("train_pl.py", "--dataset", "rendered", "--epochs", "1", "--run_name", run_name, *flags)
        return self.folder / "VAE_logs" / run_name

    def test_all_changes_of_the_readme_at_once_train_a_model_in_a_copy_of_the_repository(self):
        section = re.search(r"## Change it\n(.*?)\n## ", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
        blocks = diff_blocks(section)
        self.assertEqual(len(blocks), 2)
        self.copy_repository(blocks)
        run = self.train_in_the_copy("--model", "linear")
        self.assertEqual(results(run)["hyperparameters"]["model"], "linear")
        row = {name: float(value) for name, value in metrics(run)[1].items()}
        for stage in ["train", "val"]:
            self.assertTrue(0 < row[f"{stage}_KL_of_z0"] < row[f"{stage}_regularization_loss"])

    def test_the_conditional_vae_trains_and_its_decoder_generates_images_of_the_label(self):
        page = (REPOSITORY / "docs" / "conditional.md").read_text()
        blocks = diff_blocks(page)
        self.assertLess(sum(line[0] == "+" for block in blocks for line in block.splitlines()), 30)
        self.copy_repository(blocks)
        run = self.train_in_the_copy("--z_dim", 3, "--hidden_dims", 32, run_name="conditional")
        self.assertTrue(0 < results(run)["test_bpd"] < 0.7)
        for name in ["samples", "means", "reconstructions"]:
            self.assertTrue((run / f"epoch_0_{name}.png").exists(), name)
        [code] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        (self.folder / "picture.py").write_text(code + MEASURE)
        shape, (other_label, other_latents), samples, values, bpds = json.loads(self.python("picture.py"))
        self.assertEqual((shape, samples), ([120, 1, 28, 28], [12, 1, 28, 28]))
        self.assertEqual(set(values), {0, 1})
        self.assertGreater(other_label, 0.1)  # the decoder uses the label
        self.assertGreater(other_latents, 0.1)  # ... and the latents
        self.assertTrue(all(map(math.isfinite, bpds)))
        self.assertNotEqual(*bpds)
        self.assertTrue((self.folder / "conditional_samples.png").exists())

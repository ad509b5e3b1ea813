"""A test of the README's section "Change it": `python -m unittest tests/programs/test_change_it.py`."""

import re

from tests.helpers import REPOSITORY, CommandTest, metrics, results


def apply(block, source):
    """Applies a diff block to source code, which must contain each line that is not new exactly once."""
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
            raise AssertionError(f"train_pl.py must contain this line of the README once: {line}")
        source = source.replace(text, "".join(new.removesuffix("\n") for new in to_insert) + text)
        to_insert, anchor = [], text
    for line in block.splitlines():
        if line[0] == "-":
            source = source.replace(f"\n{line[1:]}\n", "\n")
    return source


class TestChangeIt(CommandTest):
    def test_all_changes_at_once_train_a_model_in_a_copy_of_the_repository(self):
        section = re.search(r"## Change it\n(.*?)\n## ", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
        blocks = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
        self.assertEqual(len(blocks), 2)
        source = (REPOSITORY / "train_pl.py").read_text()
        for block in blocks:
            source = apply(block, source)
        for line in re.findall(r"`(from \S+ import \S+)`", section):
            source = source.replace("\nimport torch\n", f"\nimport torch\n{line}\n")
        for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / name for name in ["harness", "pictures", "sources"])]:
            if path.name != "train_pl.py":
                (self.folder / path.name).symlink_to(path)
        (self.folder / "train_pl.py").write_text(source)
        flags = ["--model", "linear", "--dataset", "rendered", "--epochs", "1", "--run_name", "run"]
        process = self.start("train_pl.py", *flags)
        _, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ""))
        run = self.folder / "VAE_logs" / "run"
        self.assertEqual(results(run)["hyperparameters"]["model"], "linear")
        row = {name: float(value) for name, value in metrics(run)[1].items()}
        for stage in ["train", "val"]:
            self.assertTrue(0 < row[f"{stage}_KL_of_z0"] < row[f"{stage}_regularization_loss"])

"""Tests of what README.md and docs/ say of the code: `python -m unittest tests/unit/test_docs.py`."""

import re
import subprocess
import unittest

import train_pl
from tests.helpers import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def text_outside_of_blocks(page):
    """What a page holds but for its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What can follow # in a link to a page: a name for each of its headings."""
    headings = re.findall(r"^#+ (.*)$", text_outside_of_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows_of_flags(page):
    """List of those headings of a page below which a table has flags, with the first two cells of each flag's row."""
    sections = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    row = re.compile(r"^\| `(--.*?)` \| (.*?) \| .* \|$", re.MULTILINE)
    rows = [(heading, row.findall(text)) for heading, text in zip(sections[1::2], sections[2::2])]
    return [(heading, flags) for heading, flags in rows if flags]


def first_cells(flag):
    """How the first two cells of a table show a flag of argparse: with its choices, and its default."""
    choices = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else ""
    default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    words = {"run_name": "(numbered)"} | ({flag.dest: "off"} if flag.default is False else {})
    return f"{flag.option_strings[0]} {choices}".rstrip(), words.get(flag.dest, default)


class TestDocs(unittest.TestCase):
    maxDiff = None

    def test_tables_of_flags(self):
        """Each group has a table of its flags, in their order, with their choices and defaults."""
        groups = train_pl.make_parser()._action_groups[2:]  # after those that argparse makes
        expected = [(group.title.title(), [first_cells(flag) for flag in group._group_actions]) for group in groups]
        self.assertEqual([len(flags) for _, flags in expected], [len(flags) for flags in train_pl.FLAGS.values()])
        self.assertEqual(rows_of_flags(REPOSITORY / "docs" / "runs.md"), expected)

    def test_code_map(self):
        """It names every program and every file of the harness, and nothing else there is not."""
        table = re.search(r"^## The code\n(.*?)^(?:##|More)", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)[1]
        cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        named = []
        for cell in cells:  # a file beside another in a cell is in the same folder
            folder = ""
            for name in re.findall(r"`(.*?)`", cell):
                folder = name.rpartition("/")[0] if name.count("/") else folder
                named.append(name if "/" in name or not folder else f"{folder}/{name}")
        command = ["git", "ls-files", "*.py"]
        files = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout.split()
        files = files or [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*.py")]  # no git checkout
        there = {file for file in files if re.fullmatch(r"(harness/)?\w+\.py", file)} - {"harness/__init__.py"}
        self.assertEqual(there - set(named), set())
        self.assertEqual([name for name in named if not (REPOSITORY / name).exists()], [])

    def test_links(self):
        """Every file that a page links to or shows is there, and so is every heading."""
        count = 0
        for page in PAGES:
            text = text_outside_of_blocks(page)
            targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<\w+ [^>]*?(?:src|href)="(.*?)"', text)
            for target in targets:
                if re.match(r"https?://", target):
                    continue
                path, _, anchor = target.partition("#")
                file = page.parent / path if path else page
                self.assertTrue(file.is_file(), f"{page.name}: {target}")
                if anchor:
                    self.assertIn(anchor, anchors(file), f"{page.name}: {target}")
                count += 1
        self.assertGreater(count, 20)

    def test_files_that_are_named(self):
        """Paths in backticks that begin with a folder of the repository lead to something."""
        count = 0
        for page in PAGES:
            for path in re.findall(r"`((?:harness|tests|docs|benchmarks|slurm|\.ci)/[\w./]*)`", page.read_text()):
                self.assertTrue((REPOSITORY / path).exists(), f"{page.name}: {path}")
                count += 1
        self.assertGreater(count, 10)

    def test_first_commands(self):
        """The two that a newcomer copies, each alone on a line."""
        lines = PAGES[0].read_text().splitlines()
        for program in ["python train_pl.py --dataset rendered --epochs 5", "python -m unittest unittests.py"]:
            self.assertEqual(lines.count(f"pip install -r requirements.txt && {program}"), 1)


if __name__ == "__main__":
    unittest.main()

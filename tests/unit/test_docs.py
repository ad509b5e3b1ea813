"""Tests that README.md and docs/ agree with the code: `python -m unittest tests/unit/test_docs.py`."""

import pkgutil
import re
import subprocess
import unittest

import train_pl
from tests.helpers import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def text_outside_of_blocks(page):
    """Returns the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Returns the anchors of a page's headings: the names that can follow # in a link."""
    headings = re.findall(r"^#+ (.*)$", text_outside_of_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows_of_flags(page):
    """Returns each heading of a page that has a table of flags, with the first two cells of each flag's row."""
    sections = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    row = re.compile(r"^\| `(--.*?)` \| (.*?) \| .* \|$", re.MULTILINE)
    rows = [(heading, row.findall(text)) for heading, text in zip(sections[1::2], sections[2::2])]
    return [(heading, flags) for heading, flags in rows if flags]


def first_cells(name, flag):
    """Returns the first two cells of a flag's row in a table: the name with the choices, and the default."""
    choices = " {" + ",".join(map(str, flag.choices)) + "}" if flag.choices else ""
    shown = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    words = {name: "off" if flag.default is False else shown, "run_name": "(numbered)", "init_from": "(none)"}
    return f"--{name}{choices}", words[name]


class TestDocs(unittest.TestCase):
    maxDiff = None

    def test_the_tables_of_flags_have_all_flags_in_their_order_with_choices_and_defaults(self):
        expected = [
            (title.title(), [first_cells(name, flag) for name, flag in flags.items()])
            for title, flags in train_pl.FLAGS.items()
        ]
        self.assertEqual(rows_of_flags(REPOSITORY / "docs" / "flags.md"), expected)

    def test_the_code_map_names_every_file_of_the_package_and_nothing_that_does_not_exist(self):
        table = re.search(r"^## The code\n(.*?)^\*\*", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)[1]
        folder, named = "", []
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE):
            if cell.startswith("**"):  # the files in the following rows are in this folder
                folder = cell.strip("*`")
            for name in re.findall(r"`(.*?)`", cell):
                named.append(folder + name if (REPOSITORY / folder / name).is_file() else name)
        command = ["git", "ls-files", "*.py"]
        files = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout.split()
        files = files or [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*.py")]  # not a git checkout
        package = {file for file in files if re.fullmatch(r"((harness|sources|pictures)/)?\w+\.py", file)}
        self.assertEqual({file for file in package if not file.endswith("__init__.py")} - set(named), set())
        self.assertEqual([name for name in named if not (REPOSITORY / name).exists()], [])

    def test_the_names_in_the_readmes_path_of_a_minibatch_exist(self):
        text = PAGES[0].read_text().partition("**The path of a minibatch")[2].partition("\nMore documentation")[0]
        names = re.findall(r"`((?:\w+\.)+\w+)`", text)
        self.assertEqual(len(re.findall(r"^\d\. ", text, re.MULTILINE)), 6)
        self.assertGreater(len(names), 6)
        for name in names:
            with self.subTest(name):
                pkgutil.resolve_name(name)  # raises AttributeError or ImportError if the name does not exist

    def test_every_link_and_every_shown_file_exists(self):
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

    def test_every_path_in_backticks_that_begins_with_a_folder_of_the_repository_exists(self):
        count = 0
        for page in PAGES:
            folders = r"harness|sources|pictures|tests|docs|benchmarks|slurm|\.ci"
            for path in re.findall(rf"`((?:{folders})/[\w./]*)`", page.read_text()):
                self.assertTrue((REPOSITORY / path).exists(), f"{page.name}: {path}")
                count += 1
        self.assertGreater(count, 10)

    def test_the_first_two_commands_of_the_readme_are_on_separate_lines(self):
        lines = PAGES[0].read_text().splitlines()
        for program in ["python train_pl.py --dataset rendered --epochs 5", "python -m unittest unittests.py"]:
            install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
            self.assertEqual(lines.count(f"{install} && .venv/bin/{program}"), 1)

"""Tests of imports, sizes of files, and the format of docstrings: `python -m unittest tests/unit/test_layout.py`."""

import ast
import functools
import graphlib
import re
import subprocess
import unittest

from tests.helpers import REPOSITORY

ASSIGNMENT = {"utils", "mlp_encoder_decoder", "cnn_encoder_decoder", "bmnist"}  # the assignment's files
FOLDERS = {"sources", "pictures", "harness"}
# The modules of the repository that each program may import. A folder's name stands for all modules in the folder.
MAY_IMPORT = {
    **dict.fromkeys(["utils", "mlp_encoder_decoder", "cnn_encoder_decoder"], set()),
    "bmnist": {"sources", "harness"},
    "train_pl": {*ASSIGNMENT, *FOLDERS},
    "train_torch": {*ASSIGNMENT, "sources"},
    "evaluate": {"bmnist", "likelihoods", "train_pl", "utils", *FOLDERS},
    "likelihoods": {"bmnist", "train_pl", "utils", "harness"},
    "summary": {"train_pl", "pictures", "harness"},
    "unittests": {*ASSIGNMENT, "train_pl", "train_torch"},  # tests any solution of the assignment
}
# The modules that a folder may import from other folders: only errors, flags and the writing of files.
FOLDERS_MAY_IMPORT = {
    "sources": {"harness.errors", "harness.files", "harness.flags"},
    "pictures": {"harness.errors", "harness.files", "utils"},
    "harness": set(),
}
OF_THE_MODEL = ["bpd", "z_dim", "hidden_dims", "beta", "vae", "latent"]  # words that must not appear in harness/
MAX_LINES = {"bmnist.py": 280, "train_pl.py": 450, "evaluate.py": 450, "train_torch.py": 170, "harness/graphs.py": 260}
MAX_LINES_OF_A_FILE = 410
SECTIONS = ["Inputs:", "Attributes:", "Outputs:", "Raises:"]
# Section headings of other docstring formats, and our headings with more text on the line.
OTHER_SECTION = re.compile(
    r"(Inputs?|Args|Arguments|Param\w*|Outputs?|Returns?|Yields?|Raises|Attributes)\b[^.]*:|:\w+ .*:|-{3,}"
)
ENTRY = re.compile(r"    (\w+(?:, \w+)*) - \S")


@functools.cache
def tracked_files():
    """Returns the .py files of the repository, also new ones: a dict from relative path to syntax tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    files = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout.splitlines()
    if not files:
        raise unittest.SkipTest("this is not a git checkout")
    return {file: ast.parse((REPOSITORY / file).read_text()) for file in files if (REPOSITORY / file).exists()}


def module_name(file):
    """Returns the name under which a file is imported."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class LayoutTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.trees = tracked_files()
        cls.modules = {module_name(file): file for file in cls.trees}
        cls.package = [file for file in cls.trees if not file.startswith("tests/") and file != "unittests.py"]

    def names(self, file):
        """Yields the dotted names that a file imports anywhere: for `from a import b` both a and a.b."""
        for node in ast.walk(self.trees[file]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0, f"{file}, line {node.lineno}: use an absolute import")
                yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]

    def imports(self, file):
        """Returns the modules of the repository that a file imports, also by bare names from the same folder."""
        folder = module_name(file).rpartition(".")[0]
        names = set(self.names(file))
        return (names | {f"{folder}.{name}" for name in names}) & self.modules.keys()


class TestImports(LayoutTest):
    def test_imports_of_all_kinds_are_found(self):
        self.assertLessEqual({"utils", "sources", "harness.run", "harness.flags"}, self.imports("train_pl.py"))
        self.assertIn("pictures.figures", self.imports("summary.py"))  # within a function
        self.assertIn("harness.checkpoints", self.imports("harness/run.py"))  # from harness import checkpoints
        self.assertIn("tests.helpers", self.imports("tests/unit/test_layout.py"))

    def test_the_table_of_allowed_imports_lists_every_program(self):
        programs = {module for module in self.modules if "." not in module} - {"tests", *FOLDERS}
        self.assertLessEqual(programs, MAY_IMPORT.keys(), "add these programs to MAY_IMPORT")

    def test_programs_import_only_the_listed_modules(self):
        for module, allowed in MAY_IMPORT.items():
            if module in self.modules:
                with self.subTest(module):
                    found = {name.partition(".")[0] for name in self.imports(self.modules[module])}
                    self.assertLessEqual(found, allowed)

    def test_folders_import_only_the_listed_modules(self):
        for module, file in self.modules.items():
            folder = module.partition(".")[0]
            if folder in FOLDERS_MAY_IMPORT:
                with self.subTest(file):
                    outside = {name for name in self.imports(file) if name.partition(".")[0] != folder} - {"harness"}
                    self.assertLessEqual(outside, FOLDERS_MAY_IMPORT[folder])

    def test_the_harness_does_not_mention_the_model(self):
        for path in (REPOSITORY / "harness").iterdir():
            if path.is_file():
                with self.subTest(path.name):
                    found = re.findall("|".join(OF_THE_MODEL), path.read_text(), re.IGNORECASE)
                    self.assertEqual(found, [])

    def test_only_tests_import_the_helpers_and_nothing_imports_other_tests(self):
        """No file imports unittests.py. Files in tests/ import tests.helpers, and nothing else from tests."""
        for file in self.trees:
            imported = {name for name in self.imports(file) if name.partition(".")[0] in ["tests", "unittests"]}
            outside = {name for name in imported if name != "tests" and not name.startswith("tests.helpers")}
            self.assertEqual(outside if file.startswith("tests/") else imported, set(), file)

    def test_there_are_no_circular_imports(self):
        graph = {module: self.imports(file) - {module} for module, file in self.modules.items()}
        for folder in [
            *FOLDERS,
            "tests.helpers",
        ]:  # `from harness import run` in harness/ does not depend on harness/__init__.py
            graph = {
                module: names - {folder} if module.startswith(f"{folder}.") else names
                for module, names in graph.items()
            }
        graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the cycle

    def test_torch_distributions_is_not_used(self):
        for file in self.package:
            self.assertNotIn("torch.distributions", (REPOSITORY / file).read_text(), file)
            self.assertNotIn("torch.distributions", set(self.names(file)), file)

    def test_utils_and_train_pl_do_not_mention_cuda_graphs(self):
        for file in ["utils.py", "train_pl.py"]:
            self.assertIsNone(re.search("graph|captur", (REPOSITORY / file).read_text(), re.IGNORECASE), file)


class TestSizes(LayoutTest):
    def lines(self, path):
        """Returns the number of lines of a file, from its path relative to the repository."""
        return len((REPOSITORY / path).read_text().splitlines())

    def test_no_file_has_too_many_lines(self):
        for file in self.trees:
            if file != "unittests.py" and not file.startswith("benchmarks/"):
                with self.subTest(file):
                    self.assertLessEqual(self.lines(file), MAX_LINES.get(file, MAX_LINES_OF_A_FILE))

    def test_the_readme_is_not_too_large(self):
        self.assertLessEqual((REPOSITORY / "README.md").stat().st_size, 14_000)


class TestDocstrings(LayoutTest):
    """Tests of the docstring format: prose, then sections in a fixed order, whose entries are `name - description`."""

    def test_every_docstring_has_the_format(self):
        for file in self.package:
            for node in ast.walk(self.trees[file]):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                    with self.subTest(f"{file}, line {node.lineno}: {node.name}"):
                        self.check(node)

    def check(self, node):
        """Checks that the docstring of a function or a class has the format."""
        sections = self.sections(ast.get_docstring(node))
        allowed = [name for name in SECTIONS if name != "Attributes:" or isinstance(node, ast.ClassDef)]
        self.assertEqual(list(sections), [name for name in allowed if name in sections])
        if "Inputs:" in sections:
            self.assertEqual(sections["Inputs:"], parameters(node))

    def sections(self, docstring):
        """Returns a dict from each section to the names of its entries."""
        lines = docstring.splitlines()
        start = next((number for number, line in enumerate(lines) if line in SECTIONS), len(lines))
        for line in lines[:start]:
            self.assertIsNone(OTHER_SECTION.match(line), line)
        sections = {}
        for line in lines[start:]:
            if line in SECTIONS:
                self.assertNotIn(line, sections)
                names = sections[line] = []
            elif entry := ENTRY.match(line):
                names += entry[1].split(", ")
            else:  # continues an entry
                self.assertRegex(line, r"^ {8,}\S")
                self.assertTrue(names, line)
        for section, names in sections.items():
            self.assertTrue(names, f"{section} is empty")
        return sections

    def test_docstrings_in_another_format_are_found(self):
        """The check fails for every change that breaks the format of a correct docstring."""
        good = "Does.\nInputs:\n    a, b - Numbers,\n        large.\n    rest - Others.\nOutputs:\n    c - Sum."
        code = 'def f(a, b=1, *rest):\n    """{}"""'
        self.check(ast.parse(code.format(good)).body[0])
        for old, new in [
            ("a, b", "b, a"),
            ("a, b", "a"),
            ("b -", "b:"),
            ("Inputs:", "Args:"),
            ("Outputs:", "Returns:"),
            ("Outputs:", "Attributes:"),
            ("Outputs:\n    c - ", "Outputs: "),
            ("Outputs:\n", "Outputs:"),
            ("        large", "    large"),
            ("    rest", "  rest"),
            ("\nOutputs", "\n\nOutputs"),
            ("Sum.", "Sum.\nRaises: ValueError"),
            ("Does.\n", "Does.\nOutputs:\n    c - Sum.\n"),
            ("Sum.", "Sum.\nMore prose."),
        ]:
            self.assertIn(old, good)
            with self.assertRaises(AssertionError, msg=new):
                self.check(ast.parse(code.format(good.replace(old, new))).body[0])
        for bad in ["Does.\n\nReturns: c", "Does.\n\n:param a: A.", "Does.\n\nParameters\n----------\na : int"]:
            with self.assertRaises(AssertionError, msg=bad):
                self.check(ast.parse(code.format(bad)).body[0])


def parameters(node):
    """Returns the names of the parameters of a function, or of a class's __init__, without self and cls."""
    if isinstance(node, ast.ClassDef):
        node = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    args = node.args
    names = [arg.arg for arg in [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg] if arg]
    return [name for name in names if name not in ["self", "cls"]]

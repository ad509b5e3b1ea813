"""Tests of programs with the settings of users: `python -m unittest tests/programs/test_settings.py`."""

import os
import subprocess
import sys

from pictures import figures
from tests.helpers import REPOSITORY, CommandTest, few_digits

# A program that imports what Lightning imports, checks the environment variables, and plots a figure.
PROGRAM = """
import os
before = dict(os.environ)
from pictures import figures
import matplotlib.pyplot
assert dict(os.environ) == before, os.environ
figures.bpd_by_setting("plot", {"z_dim 2": [0.2, 0.24], "z_dim 20": [0.15]})
"""


class TestSettings(CommandTest):
    def test_figures_do_not_depend_on_matplotlibs_settings_even_if_these_are_invalid(self):
        figures.bpd_by_setting(self.folder / "plot", {"z_dim 2": [0.2, 0.24], "z_dim 20": [0.15]})
        expected = (self.folder / "plot").read_bytes()
        nowhere = self.folder / "plot" / "x"  # a file cannot contain a folder
        wanted = self.folder / "wanted"
        wanted.write_text("text.usetex: True\nsavefig.transparent: True\nlines.linewidth: 9\nno.such.key: 1\nnonsense")
        damaged = self.folder / "matplotlibrc"
        damaged.write_bytes(b"lines.linewidth: 9\n\xff\xfe")
        styles = self.folder / "stylelib"
        styles.mkdir()
        (styles / "my.mplstyle").write_bytes(b"\xff\xfe")
        nowhere_to_write = dict.fromkeys(["HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"], nowhere)
        processes = []
        settings = [
            {"MPLBACKEND": "module://of_a_notebook", "MPLCONFIGDIR": nowhere},
            {"MATPLOTLIBRC": wanted, **nowhere_to_write},
            {"MPLCONFIGDIR": self.folder},  # with damaged settings and styles
        ]
        for number, variables in enumerate(settings):
            folder = self.folder / str(number)
            folder.mkdir()
            environment = {name: value for name, value in os.environ.items() if name not in figures.SETTINGS}
            environment |= {"PYTHONPATH": str(REPOSITORY), **{name: str(value) for name, value in variables.items()}}
            command = [sys.executable, "-c", PROGRAM]
            process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)
            processes.append((variables, folder, process))
        for variables, folder, process in processes:
            with self.subTest(variables):
                self.assertEqual(process.communicate(timeout=300)[1], "")
                self.assertEqual((folder / "plot").read_bytes(), expected)

    def test_programs_run_with_the_matplotlib_backend_of_a_notebook(self):
        """A notebook passes this setting to every command that it starts."""
        variables = {"MPLBACKEND": "module://of_a_notebook", "MPLCONFIGDIR": os.devnull + "/x", "LOCAL_RANK": ""}
        variables |= few_digits(self.folder, (300, 50, 200))
        folder, left = self.train("--z_dim", "2", run=self.run_command, **variables)
        self.assertGreater(left["test_bpd"], 0)
        self.assertTrue((folder / "bpd_curves.png").exists())
        checkpoint = folder / "checkpoints" / "best.ckpt"
        code, _, error = self.run_command("evaluate.py", checkpoint, "--iw_samples", "1", **variables)
        self.assertEqual((code, error), (0, ""))

    def test_programs_run_with_the_remains_of_an_uninstalled_or_broken_tensorflow(self):
        """The remains are an empty folder, or a package that was built for another version of NumPy."""
        variables = few_digits(self.folder, (300, 50, 200))
        left = self.folder / "tensorflow"
        left.mkdir()
        for program in ["train_torch.py", "summary.py", "evaluate.py"]:
            code, _, error = self.run_command(program, "--help", **variables)
            self.assertEqual((code, error), (0, ""))
        (left / "__init__.py").write_text("raise AttributeError('_ARRAY_API not found')")
        self.train(run=self.run_command, **variables)

"""The results of many runs at a glance: `python summary.py VAE_logs/job_17_*` prints a table and draws a plot."""

import json
import os
from pathlib import Path
from statistics import mean, stdev

from harness.program import CHANGEABLE_FLAGS, Parser, UserError, ending


def read_runs(folders):
    """The contents of every results.json in folders and below them, and the folders of runs that have none."""
    finished, unfinished = [], []
    for path in sorted({path for folder in folders for path in Path(folder).rglob("hparams.yaml")}):
        results = path.with_name("results.json")
        if results.exists():
            finished.append(json.loads(results.read_text()))
        else:
            unfinished.append(str(path.parent))
    return finished, unfinished


def by_setting(results):
    """
    Groups runs that differ in nothing but the seed.
    Inputs:
        results - List of what results.json files hold.
    Outputs:
        groups - Dict from a setting, such as 'z_dim 2, lr 0.001', to its list of results; it names the flags that are
            not the same in all runs.
    """
    flags = [
        name
        for name in dict.fromkeys(name for run in results for name in run["hyperparameters"])
        if name not in CHANGEABLE_FLAGS | {"seed"}
    ]
    values = {name: [run["hyperparameters"].get(name) for run in results] for name in flags}
    varied = [name for name in flags if any(value != values[name][0] for value in values[name])]
    groups = {}
    rows = zip(results, *(values[name] for name in varied))
    for run, *setting in sorted(rows, key=lambda row: [(type(value).__name__, value) for value in row[1:]]):
        name = ", ".join(f"{name} {as_typed(value)}" for name, value in zip(varied, setting)) or "all runs"
        groups.setdefault(name, []).append(run)
    return groups


def as_typed(value):
    """A flag's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(groups):
    """Lines of text: test and best validation bpd of each setting, mean and standard deviation over its runs."""
    width = max(len("setting"), *map(len, groups))
    lines = [f"{'setting':{width}}  runs  test bpd            best validation bpd"]
    for setting, runs in groups.items():
        cells = []
        for name in ["test_bpd", "best_val_bpd"]:
            bpds = [run[name] for run in runs]
            cells.append(f"{mean(bpds):.4f}" + (f" +- {stdev(bpds):.4f}" if len(bpds) > 1 else " " * 10))
        lines.append(f"{setting:{width}}  {len(runs):4}  {'    '.join(cells)}".rstrip())
    return lines


def main():
    parser = Parser("Sums up runs: a table of test bpd by setting, and a plot of it.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Folders of runs, or folders that hold such")
    parser.add_argument("--plot", default="summary.png", help="PNG file to draw")
    args = parser.parse_args()
    with ending(parser):
        finished, unfinished = read_runs(args.folders)
        if not finished:
            raise UserError(f"there is no finished run in {' '.join(args.folders)} (no results.json)")
        groups = by_setting(finished)
        print(*table(groups), sep="\n")
        if unfinished:
            print(f"not finished: {', '.join(unfinished)}")

        from harness import figures  # only now, since matplotlib would delay the table

        try:
            bpds = {name: [run["test_bpd"] for run in runs] for name, runs in groups.items()}
            figures.bpd_by_setting(args.plot, bpds)
        except OSError as error:
            raise UserError(f"cannot write {args.plot} ({error.strerror}): choose another file with --plot") from error
        print(f"plot {os.path.abspath(args.plot)}")


if __name__ == "__main__":
    main()

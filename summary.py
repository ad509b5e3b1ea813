"""Summarises the results of many runs: `python summary.py VAE_logs/job_17_*` prints a table and saves a plot."""

import os
from statistics import mean, stdev

from harness.errors import FlagError, UserError, exit_on_error, one_line, print_line, warn
from harness.files import read_results
from harness.flags import CHECKSUM, RUNTIME_FLAGS, Parser

BPDS = ["test_bpd", "best_val_bpd"]  # the table's columns
PLOTS = [".png", ".pdf", ".svg", ".jpg", ".jpeg"]  # extensions that --plot may have


def read_runs(folders: list[str]) -> tuple[list[dict], list[str]]:
    """
    Reads the results of all runs in the given folders and below them. Links are followed; each run is read once.
    Inputs:
        folders - List of paths.
    Outputs:
        finished - List of the contents of the results.json files. Damaged files are skipped with a warning on stderr.
        unfinished - List of the folders of runs without a results.json.
    """
    finished, unfinished = [], []
    for folder in run_folders(folders):
        try:
            finished.append(read_results(folder, "bpd"))
        except FileNotFoundError:
            unfinished.append(folder)
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            warn(f"warning: {os.path.join(folder, 'results.json')} is skipped: {problem}")
    return finished, unfinished


def run_folders(folders):
    """Returns the sorted folders of runs among the given folders and below them. Links are followed."""
    seen, runs = set(), []
    for top in folders:
        for folder, below, files in os.walk(top, onerror=warn_unreadable, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()  # a link may lead back to a folder above it
            elif "hparams.yaml" in files:
                runs.append(folder)
            seen.add(real)
    return sorted(runs)


def warn_unreadable(error):
    """Warns on stderr about a folder that cannot be read. Plain files, as from a shell's *, are ignored."""
    if not isinstance(error, NotADirectoryError):
        warn(f"warning: {error.filename} is skipped: {error.strerror}")


def group_by_setting(results: list[dict]) -> dict[str, list[dict]]:
    """
    Groups runs whose flags differ only in the seed.
    Inputs:
        results - List of the contents of results.json files.
    Outputs:
        groups - Dict from a setting, such as 'z_dim 2, lr 0.001', to the list of its results. A setting consists of
            the flags that are not the same in all runs.
    """
    names_of_files = {}
    hyperparameters = [label_files(run["hyperparameters"], names_of_files) for run in results]
    flags = [
        name
        for name in dict.fromkeys(name for of_run in hyperparameters for name in of_run)
        if name not in RUNTIME_FLAGS | {"seed"}
    ]
    defaults = {}
    if any(name not in of_run for name in flags for of_run in hyperparameters):  # some are of an older version
        from train_pl import make_parser  # only if needed, since it imports torch, which takes seconds

        defaults = make_parser().defaults
    values = {name: [of_run.get(name, defaults.get(name)) for of_run in hyperparameters] for name in flags}
    varied = [name for name in flags if any(value != values[name][0] for value in values[name])]
    groups = {}
    rows = zip(results, *(values[name] for name in varied))
    for run, *setting in sorted(rows, key=lambda row: sort_key(row[1:])):
        name = ", ".join(f"{name} {format_value(value)}" for name, value in zip(varied, setting)) or "all runs"
        groups.setdefault(name, []).append(run)
    return groups


def label_files(hyperparameters, names):
    """
    Returns a run's flags; the value of a flag that names a file becomes the file's name and the start of its checksum.
    Inputs:
        hyperparameters - Dict of the flags, which is not changed.
        names - Dict from checksum to name, which is completed. A renamed file keeps the name that was found first.
    """
    flags = {name: value for name, value in hyperparameters.items() if not name.endswith(CHECKSUM)}
    for name in hyperparameters.keys() - flags.keys():
        flag, checksum = name.removesuffix(CHECKSUM), str(hyperparameters[name])
        file = f"{os.path.basename(str(flags.get(flag)))} ({checksum[:8]})"
        flags[flag] = names.setdefault(checksum, file)
    return flags


def sort_key(value):
    """Returns a key that sorts flag values of any types, first by type, then by value."""
    if isinstance(value, (list, tuple)):
        return "list", [sort_key(item) for item in value]
    return type(value).__name__, value if isinstance(value, (int, float, str)) else str(value)


def format_value(value):
    """Returns a flag's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def format_table(groups: dict[str, list[dict]]) -> list[str]:
    """Returns a table as lines, with mean and standard deviation of test and best validation bpd for each setting."""
    width = max(len("setting"), *map(len, groups))
    lines = [f"{'setting':{width}}  runs  test bpd            best validation bpd"]
    for setting, runs in groups.items():
        cells = []
        for name in BPDS:
            bpds = [run[name] for run in runs]
            cells.append(f"{mean(bpds):.4f}" + (f" +- {stdev(bpds):.4f}" if len(bpds) > 1 else " " * 10))
        lines.append(f"{setting:{width}}  {len(runs):4}  {'    '.join(cells)}".rstrip())
    return lines


def main():
    parser = Parser("Summarises runs: prints a table of the test bpd of each setting, and saves a plot of it.")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="Folders of runs, or folders that contain such folders"
    )
    parser.add_argument("--plot", default="summary.png", help=f"File of the plot ({', '.join(PLOTS)})")
    args = parser.parse_args()
    with exit_on_error(parser):
        if not args.plot.lower().endswith(tuple(PLOTS)):
            raise FlagError(f"--plot must be a file whose name ends with {', '.join(PLOTS)}, got {args.plot!r}")
        finished, unfinished = read_runs(args.folders)
        if not finished:
            raise UserError(
                f"there is no finished run in {' '.join(args.folders)} (no results.json): train a run to its end, or "
                "give another folder"
            )
        groups = group_by_setting(finished)
        print_line("\n".join(format_table(groups)))
        if unfinished:
            print_line(f"note: not finished: {', '.join(unfinished)}")
        try:
            from pictures import figures  # after the table, since importing matplotlib takes seconds

            bpds = {name: [run["test_bpd"] for run in runs] for name, runs in groups.items()}
            figures.bpd_by_setting(args.plot, bpds)
        except Exception as error:
            raise UserError(f"the plot cannot be saved ({one_line(error)}): choose another file with --plot") from error
        print_line(f"plot {os.path.abspath(args.plot)}")


if __name__ == "__main__":
    main()

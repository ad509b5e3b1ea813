"""Where a run's folder and its data are, also after both were moved."""

import contextlib
import os
from pathlib import Path


def data_locations(flags: dict, folder: str | Path) -> dict[str, str]:
    """
    Where a run's data is: as an absolute path, and as one from the run's folder, which stays right if both are moved.
    Inputs:
        flags - Dict of every flag.
        folder - The run's folder.
    Outputs:
        places - Dict of data_dir and, if the two are on one drive, data_dir_from_run; for your own file also
            dataset_from_run. Each checkpoint of the run keeps it.
    """
    data_dir, folder = os.path.realpath(os.path.expanduser(flags["data_dir"])), os.path.realpath(folder)
    file_folder, file_name = os.path.split(flags["dataset"])
    places = {"data_dir": data_dir}
    with contextlib.suppress(ValueError):  # on Windows, from one drive to another
        places["data_dir_from_run"] = os.path.relpath(data_dir, folder)
        if file_folder:
            file = os.path.join(os.path.realpath(file_folder), file_name)  # the file itself may be a link
            places["dataset_from_run"] = os.path.relpath(file, folder)
    return places


def run_folder(checkpoint: Path) -> Path:
    """
    The folder of the run that a checkpoint belongs to, from any working directory and by any links, of which its folder
    `checkpoints` may be one. For a checkpoint of no run it is the checkpoint's own folder.
    """
    for path in [checkpoint, checkpoint.absolute(), checkpoint.resolve()]:
        run = path.parent.parent
        if path.parent.name == "checkpoints" and (run / "hparams.yaml").exists():
            return run if path is checkpoint else run.resolve()
    return run if path.parent.name == "checkpoints" else path.parent


def resolve_from_run(run: Path, kept: dict, name: str) -> list[str]:
    """The path that a checkpoint keeps under a name as one from the run's folder, as a list; empty if it has none."""
    path = kept.get(name)
    return [os.path.normpath(os.path.join(os.path.realpath(run), path))] if isinstance(path, str) else []


def file_locations(run: Path, kept: dict, path: str) -> list[str]:
    """
    Paths of the file that a run was trained on, of which the first one that has its content is to be taken.
    Inputs:
        run, kept - As in find_data_dir.
        path - The flag --dataset of the run, an absolute path.
    """
    return [*resolve_from_run(run, kept, "dataset_from_run"), path]


def find_data_dir(run: Path, kept: dict, data_dir: str, content: str = "") -> str:
    """
    Finds the directory of the data that a run was trained on.
    Inputs:
        run - The run's folder, which may have been moved since, with the data or without.
        kept - Dict that a checkpoint of the run keeps, with the entries of data_locations.
        data_dir - The flag --data_dir of the run.
        content - Name of a folder that the directory contains.
    Outputs:
        data_dir - The first place that contains it, or else the first place that exists, or else the flag.
    """
    at_training = kept["data_dir"] if isinstance(kept.get("data_dir"), str) else data_dir
    places = [*resolve_from_run(run, kept, "data_dir_from_run"), at_training, os.path.expanduser(data_dir)]
    existing = [place for name in [content, ""] for place in places if os.path.isdir(os.path.join(place, name))]
    return os.path.normpath(existing[0]) if existing else data_dir

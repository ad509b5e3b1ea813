"""Finds the folder of a run and its data, even after they were moved."""

import contextlib
import os
from pathlib import Path


def data_locations(flags: dict, folder: str | Path) -> dict[str, str]:
    """
    Returns where a run's data is, as an absolute path and as a path relative to the run's folder. The relative path
    stays valid if run and data are moved together.
    Inputs:
        flags - Dict of every flag.
        folder - The run's folder.
    Outputs:
        places - Dict with data_dir and, if data and run are on the same drive, data_dir_from_run; for your own file
            also dataset_from_run. Each checkpoint of the run contains this dict.
    """
    data_dir, folder = os.path.realpath(os.path.expanduser(flags["data_dir"])), os.path.realpath(folder)
    file_folder, file_name = os.path.split(flags["dataset"])
    places = {"data_dir": data_dir}
    with contextlib.suppress(ValueError):  # on Windows, if they are on two drives
        places["data_dir_from_run"] = os.path.relpath(data_dir, folder)
        if file_folder:
            file = os.path.join(os.path.realpath(file_folder), file_name)  # not resolved: the file may be a link
            places["dataset_from_run"] = os.path.relpath(file, folder)
    return places


def run_folder(checkpoint: Path) -> Path:
    """
    Returns the folder of the run that a checkpoint belongs to, from any working directory and through any links; the
    run's folder `checkpoints` may be a link, too. If the checkpoint does not belong to a run, the result is the folder
    that contains the checkpoint, or that contains its folder `checkpoints`.
    """
    for path in [checkpoint, checkpoint.absolute(), checkpoint.resolve()]:
        run = path.parent.parent
        if path.parent.name == "checkpoints" and (run / "hparams.yaml").exists():
            return run if path is checkpoint else run.resolve()
    return run if path.parent.name == "checkpoints" else path.parent


def resolve_from_run(run: Path, run_data: dict, name: str) -> list[str]:
    """Returns the path that `run_data` contains relative to the run, as a list; the list is empty if there is none."""
    path = run_data.get(name)
    return [os.path.normpath(os.path.join(os.path.realpath(run), path))] if isinstance(path, str) else []


def file_locations(run: Path, run_data: dict, path: str) -> list[str]:
    """
    Returns the possible paths of the file that a run was trained on. The first one with the right content is valid.
    Inputs:
        run, run_data - See find_data_dir.
        path - The flag --dataset of the run, an absolute path.
    """
    return [*resolve_from_run(run, run_data, "dataset_from_run"), path]


def find_data_dir(run: Path, run_data: dict, data_dir: str, content: str = "") -> str:
    """
    Finds the directory of the data that a run was trained on.
    Inputs:
        run - The run's folder, which may have been moved since the training, with or without the data.
        run_data - Dict that a checkpoint of the run contains, with the entries of data_locations.
        data_dir - The flag --data_dir of the run.
        content - Name of a folder in the directory of the data, such as MNIST.
    Outputs:
        data_dir - The first known directory that contains `content`, or else the first one that exists, or else the
            flag.
    """
    at_training = run_data["data_dir"] if isinstance(run_data.get("data_dir"), str) else data_dir
    places = [*resolve_from_run(run, run_data, "data_dir_from_run"), at_training, os.path.expanduser(data_dir)]
    existing = [place for name in [content, ""] for place in places if os.path.isdir(os.path.join(place, name))]
    return os.path.normpath(existing[0]) if existing else data_dir

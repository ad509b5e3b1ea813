"""Finds and verifies the four files of MNIST and its relatives, and downloads missing files."""

import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import os
import shutil
import socket
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

from harness.errors import DataError, UserError, print_line
from harness.files import folder_lock

KINDS = {"mnist": MNIST, "fashion": FashionMNIST, "kmnist": KMNIST}  # a class's name is its folder's name
# MD5 and size in bytes of MNIST's unpacked files. torchvision verifies only the packed files that it downloads itself.
# The files of the other KINDS have the same names and sizes; only the MD5 of their packed files is known.
FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", 47_040_016),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", 60_008),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", 7_840_016),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", 10_008),
}
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")  # formats in which MNIST is often distributed
TIMEOUT = 20  # seconds without an answer after which a download fails; otherwise a firewall can block it for minutes
PATIENCE = 300  # seconds to wait while another process downloads; then this process downloads, too (harmless)


def load_mnist(root: str | os.PathLike = "../data/", download: bool = True, kind: str = "mnist") -> tuple[Tensor, ...]:
    """
    Finds the four files, packed with gzip or not, downloads missing files, and verifies each file.
    Inputs:
        root - Directory of the data. The files are in its subfolder MNIST/raw (or FashionMNIST/raw, KMNIST/raw).
        download - If True, missing files are downloaded.
        kind - One of KINDS.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [60000,28,28], int64 tensor of shape [60000]
        test_images, test_labels - The same for the 10,000 test images.
    Raises:
        DataError - if a file is missing and cannot be downloaded, or if its content is wrong.
    """
    root, kind_name = Path(os.path.expanduser(root)), KINDS[kind].__name__
    folder = root / kind_name / "raw"  # as in torchvision
    contents, rejected = read_files(folder, FILES, kind_name)
    if missing := [name for name in FILES if name not in contents]:
        for raw in map(Path, [os.path.abspath(root / "raw"), os.path.abspath(root)]):
            if raw.parts[-2:] == (kind_name, "raw") and any(raw.glob("*ubyte*")):
                place = f"{kind_name} must be in the folder {kind_name}/raw below {os.path.abspath(root)}"
                raise DataError(f"{place}: give --data_dir {raw.parents[1]}")
        for path in rejected:
            if path.name in missing and os.path.exists(path):  # a download would overwrite it
                problem = f"{path} is not a valid file of {kind_name}: {rejected.pop(path)}"
                hints = describe_rejected_files(folder, missing, rejected, kind_name)
                raise DataError(f"{problem}. Delete or move this file, and it is downloaded again{hints}")
        problem = "download is switched off"
        if download:
            try:
                download_files(KINDS[kind], folder, missing)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                problem = " ".join(str(error).split()) or repr(error)
            contents |= read_files(folder, missing, kind_name)[0]  # another process may have downloaded them
        if missing := [name for name in missing if name not in contents]:
            hints = describe_rejected_files(folder, missing, rejected, kind_name)
            raise DataError(
                f"{kind_name} is not complete in {folder}: missing files: {len(missing)} of 4 "
                f"({', '.join(missing)}) and could not be downloaded ({problem}){hints}. "
                f"Run `python bmnist.py --dataset {kind} --data_dir DIR` on a machine with a network, or train on "
                "rendered digits with --dataset rendered"
            )
    bytes_of_files = {name: torch.frombuffer(bytearray(contents[name]), dtype=torch.uint8) for name in FILES}
    return tuple(  # without the headers of 16 or 8 bytes
        content[16:].view(-1, 28, 28) if "images" in name else content[8:].long()
        for name, content in bytes_of_files.items()
    )


def read_files(folder: Path, names, kind_name: str) -> tuple[dict, dict]:
    """
    Reads a kind's files of these names, packed or not. Returns two dicts: the contents of valid files by name, and what
    is wrong with invalid files by path.
    """
    contents, rejected = {}, {}
    for name, end in itertools.product(names, ["", ".gz"]):
        path = folder / f"{name}{end}"
        if name not in contents and os.path.lexists(path):
            try:
                contents[name] = read_file(path, name, kind_name)
            except DataError as error:
                rejected[path] = str(error)
    return contents, rejected


def read_file(path: Path, name: str, kind_name: str) -> bytes:
    """Returns the unpacked content of a kind's file of this name. Raises a DataError if the file is invalid."""
    if os.path.isdir(path):
        raise DataError("it is a folder (move the file in it up one level)")
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"it cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror})") from error
    md5, size = FILES[name]
    found_md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found_md5 == md5 and kind_name == "MNIST":
        return content
    twin = next((twin for twin, (twin_md5, _) in FILES.items() if twin_md5 == found_md5), None)
    beginning = " ".join(content[:40].decode("latin-1").split())
    magic, found_magic = 2051 if "images" in name else 2049, int.from_bytes(content[:4], "big")
    for is_so, problem in [
        (twin, f"it contains {twin} of MNIST (files swapped?)"),
        (beginning and beginning.isprintable(), f"it is a text file that begins with {beginning!r} (a login page?)"),
        (found_magic != magic, f"it begins with the number {found_magic} instead of {magic} (another kind of file?)"),
        (len(content) != size, f"it has {len(content):,} bytes instead of {size:,} (truncated?)"),
        (kind_name == "MNIST", f"its MD5 checksum is {found_md5} instead of {md5} (damaged?)"),
        ("labels" in name and max(content[8:], default=0) > 9, "it contains a label above 9 (damaged?)"),
    ]:
        if is_so:
            raise DataError(problem)
    return content


def describe_rejected_files(folder: Path, missing, rejected, kind_name: str) -> str:
    """Returns a sentence on files that were found but not used, with the reasons; empty if there are none."""
    notes = [f"{path.name} (unpack it)" for end in ARCHIVES for path in folder.parents[1].glob(f"*{end}")]
    others = [path for path in folder.glob("[!.]*") if path.name.removesuffix(".gz") not in FILES][:100]
    names = {path: name_for_content(path, missing, kind_name) for path in others}
    notes += [f"{path.name} (rename it to {name})" for path, name in names.items() if name]
    notes += [f"{path.name} ({problem})" for path, problem in rejected.items()]
    notes += [f"{path.name} (it is not one of the missing files)" for path, name in names.items() if not name]
    more = f" and {len(notes) - 4} more" if len(notes) > 4 else ""
    return f". Found but not used: {', '.join(notes[:4])}{more}" if notes else ""


def name_for_content(path: Path, names, kind_name: str) -> str | None:
    """Returns the one of these names that matches the content of a file, or None."""
    for name in names:
        with contextlib.suppress(DataError):
            read_file(path, name, kind_name)
            return name
    return None


def download_files(kind: type[MNIST], folder: Path, names):
    """
    Downloads files of a kind, one of torchvision's classes, into a folder. Several processes may call this at the same
    time: one downloads, the others wait. A file gets its name only when it is complete and torchvision has verified it.
    Raises an OSError, RuntimeError or HTTPException, as torchvision does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        is_locked = False
        with contextlib.suppress(OSError, UserError):  # the folder cannot be locked, or another process takes too long
            stack.enter_context(folder_lock(folder, PATIENCE))
            is_locked = True
        names = [name for name in names if not os.path.isfile(folder / name)]
        if not names:
            return  # another process was faster
        print_line(f"Downloading {kind.__name__} to {folder}")
        for unfinished in folder.glob(".download*") if is_locked else []:  # of killed processes
            shutil.rmtree(unfinished, ignore_errors=True)
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(TIMEOUT)
        temporary = tempfile.TemporaryDirectory(prefix=".download", dir=folder, ignore_cleanup_errors=True)
        some = kind.__new__(kind)  # its constructor would download all files
        some.root = stack.enter_context(temporary)
        some.resources = [(packed, md5) for packed, md5 in kind.resources if packed.removesuffix(".gz") in names]
        staged = Path(some.raw_folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                some.download()
        except RuntimeError as error:
            _, rejected = read_files(staged, names, kind.__name__)
            problems = [f"{path.name}: {problem}" for path, problem in rejected.items()]
            raise RuntimeError(" ".join([str(error), *problems])) from error
        for name in names:
            os.replace(staged / name, folder / name)

"""
MNIST as binary images in memory, split into training, validation and test set; and its relatives in the same format.

Run by itself, `python bmnist.py --data_dir DIR` fetches and checks the data ahead of time (the compute nodes of a
cluster often have no network), and prints the splits; `--dataset fashion` does so for Fashion-MNIST.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import operator
import os
import shutil
import signal
import socket
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

KINDS = {"mnist": MNIST, "fashion": FashionMNIST, "kmnist": KMNIST}  # torchvision's; the class names the folder, too
# The four files, unpacked: MD5 and size in bytes. torchvision checks only the packed ones that it downloads itself. The
# files of the other KINDS have the same names and sizes; their MD5 is known packed alone.
FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", 47_040_016),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", 60_008),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", 7_840_016),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", 10_008),
}
TRAIN_SIZES = [45_000, 55_000]  # the assignment's, and all images but those of the validation set
NUM_VAL = 5_000
BINARIZATIONS = ["threshold", "stochastic"]
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")  # in which people pass MNIST on
TIMEOUT = 20  # seconds without an answer until a download is given up; by default a firewall can hold it for minutes


class DataError(OSError):
    """The data is missing or damaged; the message is one line that says which file and what to do."""


class BinaryImages(Dataset):
    """Grey images and their labels as one tensor each, from which a whole batch is indexed at once."""

    def __init__(self, images, labels):
        """
        Inputs:
            images - uint8 tensor of shape [N,H,W], intensities; kept as it is, one byte per pixel.
            labels - int64 tensor of shape [N].
        """
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Binary image(s) float32 [...,1,H,W] and label(s) int64 [...] at an index or a tensor of indices."""
        return binarize(self.images[index]), self.labels[index]

    def __getitems__(self, indices):
        """The samples at a list of indices, as a list: torch's own DataLoader and Subset ask for a batch so."""
        return list(zip(*self[torch.as_tensor(indices)]))

    def to(self, device):
        """Moves the data set to a device, and returns it."""
        vars(self).update({name: tensor.to(device) for name, tensor in vars(self).items()})
        return self


class SampledImages(BinaryImages):
    """
    Images whose pixels are each drawn from Bernoulli(intensity / 255), as in most of the literature (Salakhutdinov &
    Murray 2008). `images` holds the drawn ones, as intensities 0 and 255.
    """

    def __init__(self, images, labels, seed=0):
        """
        Inputs:
            images, labels - As in BinaryImages; the images are left as they are.
            seed - Seed of the first draw, see redraw.
        """
        super().__init__(images.clone(), labels)
        self.grey = images.flatten().gt(0).logical_and_(images.flatten() < 255).nonzero().squeeze(1)
        self.intensities = images.flatten()[self.grey]  # the other pixels are what they are
        self.redraw(seed)

    def redraw(self, seed):
        """Draws all pixels anew, in place; the same seed gives the same ones again on the same kind of device."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        # Of 255 equally likely numbers, `intensity` are below it.
        numbers = torch.empty_like(self.intensities).random_(0, 255, generator=generator)
        self.images.view(-1)[self.grey] = torch.where(numbers < self.intensities, 255, 0).to(torch.uint8)


class ImageLoader(DataLoader):
    """
    A DataLoader of BinaryImages that indexes each minibatch at once, in the order of its sampler:
    dataset[order[i : i + batch_size]]. With worker processes, a collate_fn, drop_last or a batch_sampler it
    does what any DataLoader does.
    """

    def __init__(self, dataset, batch_size=1, redraws=False, **options):
        """
        Inputs:
            dataset, batch_size - As in torch's DataLoader.
            redraws - If True, the images of SampledImages are drawn again for each pass: from the sampler's
                `draw_seed()` if it has one, else from torch's global random numbers.
            options - As in torch's DataLoader.
        """
        self.redraws = redraws
        super().__init__(dataset, batch_size, **options)

    @property
    def indexes_at_once(self):
        """Whether the minibatches are dataset[order[i : i + batch_size]], without anything else in between."""
        is_plain = self.collate_fn is default_collate and type(self).__iter__ is ImageLoader.__iter__
        return is_plain and self.batch_size is not None and not (self.num_workers or self.drop_last)

    def order(self):
        """The order of the images in a pass, int64 [N]."""
        order = self.sampler.order() if hasattr(self.sampler, "order") else torch.tensor(list(self.sampler))
        return order.to(self.dataset.images.device)

    def redraw(self):
        """Begins a pass: draws its images, if they are to be drawn again."""
        if self.redraws:
            draw_seed = getattr(self.sampler, "draw_seed", None)
            self.dataset.redraw(draw_seed() if draw_seed else torch.randint(2**62, ()).item())

    def __iter__(self):
        self.redraw()
        if not self.indexes_at_once:
            return super().__iter__()
        # A DataLoader draws a seed for its workers in each pass, also if it has none. So does this one: the random
        # numbers that follow do not depend on num_workers.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return map(self.dataset.__getitem__, self.order().split(self.batch_size))


def binarize(images):
    """Intensities uint8 [...,H,W] to pixels float32 [...,1,H,W]: 1 where intensity / 255 > 0.5, else 0."""
    pixels = torch.empty(images.shape, device=images.device)
    return torch.gt(images, 127, out=pixels).unsqueeze(-3)  # without zeros and ones of another type in between


def data_loaders(
    train_images,
    train_labels,
    test_images,
    test_labels,
    batch_size=128,
    num_workers=0,
    binarization="threshold",
    train_size=45_000,
    sampler=None,
):
    """
    Splits and binarises grey images: the first 45,000 or 55,000 train, the next 5,000 validate, the test images test.
    Inputs:
        train_images, train_labels - uint8 tensor of shape [N,H,W], int64 tensor of shape [N]
        test_images, test_labels - the same for the test images
        batch_size - Number of images per batch; the last batch of an epoch may be smaller.
        num_workers - Number of worker processes of each loader. With the images in memory, 0 is the fastest.
        binarization - "threshold", or "stochastic": each pixel is drawn from Bernoulli(intensity), anew for every pass
            over the training set, and always the same for validation and test.
        train_size - Number of training images, 45,000 or 55,000; None: all but the last tenth, which validates (but
            5,000 at most).
        sampler - Function of (dataset, shuffle) that returns a sampler, an iterable of indices; if None, torch's own.
    Outputs:
        train_loader, val_loader, test_loader - The first one is shuffled. Their batches are (imgs, labels): float32
            [B,1,H,W] of zeros and ones, and int64 [B].
    Raises:
        ValueError - where binarization or train_size is none of the possible values.
    """
    if binarization not in BINARIZATIONS or train_size not in [*TRAIN_SIZES, None]:
        raise ValueError(
            f"binarization must be one of {BINARIZATIONS} and train_size one of {TRAIN_SIZES}, got "
            f"{binarization!r} and {train_size!r}"
        )
    Images = SampledImages if binarization == "stochastic" else BinaryImages
    batch_size, num_workers = operator.index(batch_size), operator.index(num_workers)  # NumPy's or a tensor's
    num_val = NUM_VAL
    if train_size is None:
        num_val = min(len(train_images) // 10, NUM_VAL)
        train_size = len(train_images) - num_val
    val_end = train_size + num_val
    splits = [
        (Images(train_images[:train_size], train_labels[:train_size]), True),
        (Images(train_images[train_size:val_end], train_labels[train_size:val_end]), False),
        (Images(test_images, test_labels), False),
    ]
    loaders = []
    for split, is_train in splits:
        options = {"num_workers": num_workers, "redraws": is_train and binarization == "stochastic"}
        options |= {"shuffle": is_train} if sampler is None else {"sampler": sampler(split, is_train)}
        loaders.append(ImageLoader(split, batch_size, **options))
    return tuple(loaders)


def bmnist(
    root="../data/",
    batch_size=128,
    num_workers=0,
    download=True,
    binarization="threshold",
    train_size=45_000,
    kind="mnist",
):
    """
    Returns data loaders for MNIST, binarised with a fixed threshold (the assignment's choice, simple and reproducible)
    or by sampling from the intensities (as in most of the literature).
    Inputs:
        root - Directory of the data; the files are in its subfolder MNIST/raw, or that of another kind.
        batch_size - Number of images per batch
        num_workers - Number of worker processes of each loader
        download - If True, MNIST is downloaded where it is missing.
        binarization, train_size - See data_loaders.
        kind - "mnist", or one of its relatives, "fashion" (Xiao et al. 2017) or "kmnist" (Clanuwat et al. 2018).
    Outputs:
        train_loader, val_loader, test_loader - See data_loaders.
    Raises:
        DataError - where a file is missing and cannot be downloaded, or is not MNIST's.
    """
    return data_loaders(*load_mnist(root, download, kind), batch_size, num_workers, binarization, train_size)


def load_mnist(root="../data/", download=True, kind="mnist"):
    """
    Finds the four files of MNIST, packed with gzip or not, downloads those that are missing, and checks each one.
    Inputs:
        root, download, kind - As in bmnist.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [60000,28,28], int64 tensor of shape [60000]
        test_images, test_labels - the same for the 10,000 test images
    Raises:
        DataError - As in bmnist.
    """
    root = Path(os.path.expanduser(root))
    kind_name = KINDS[kind].__name__
    folder = root / kind_name / "raw"  # where torchvision keeps them
    contents, rejected = read_files(folder, kind_name)
    if missing := [name for name in FILES if name not in contents]:
        check_data_dir(root, kind_name)
        for path, problem in rejected.items():
            if path.name in missing and os.path.exists(path):  # a download would write over it
                remedy = "Delete it, and it will be downloaded again"
                if os.path.isdir(path) or not os.access(path, os.R_OK):
                    remedy = f"Mend that or move it away, and {kind_name} will be downloaded"
                del rejected[path]
                others = not_taken(root, kind_name, missing, rejected)
                raise DataError(f"{path} is not {kind_name}'s: {problem}. {remedy}{others}")
        problem = "download is switched off"
        if download:
            try:
                download_files(KINDS[kind], folder, missing)
                contents |= read_files(folder, kind_name, missing)[0]
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                problem = " ".join(str(error).split()) or repr(error)
        if missing := [name for name in missing if name not in contents]:
            of_kind = "" if kind == "mnist" else f" --dataset {kind}"
            raise DataError(
                f"{kind_name} is not complete in {folder}: of its four files, {len(missing)} are missing "
                f"({', '.join(missing)}) and could not be downloaded ({problem})"
                f"{not_taken(root, kind_name, missing, rejected)}. Run `python bmnist.py{of_kind} --data_dir DIR` "
                "where there is a network, or train on the embedded stand-in with --dataset rendered"
            )
    bytes_of_files = (torch.frombuffer(bytearray(contents[name]), dtype=torch.uint8) for name in FILES)
    train_images, train_labels, test_images, test_labels = bytes_of_files
    return (
        train_images[16:].view(-1, 28, 28),  # after a head of four numbers
        train_labels[8:].long(),
        test_images[16:].view(-1, 28, 28),
        test_labels[8:].long(),
    )


def read_files(folder, kind_name, names=FILES):
    """
    Reads files of MNIST or a relative, packed or not, whoever packed them; nothing is written.
    Inputs:
        folder - Path of the folder.
        kind_name - "MNIST" or the relative's name, as torchvision's class has it.
        names - The files' names, unpacked.
    Outputs:
        contents - Dict from name to content, of those that are there with the right content.
        rejected - Dict from path to what is wrong, of those that were found and not taken.
    """
    contents, rejected = {}, {}
    for name in names:
        for path in [folder / name, folder / f"{name}.gz"]:
            if name not in contents and os.path.lexists(path):
                try:
                    contents[name] = checked(read_file(path), name, kind_name)
                except DataError as error:
                    rejected[path] = str(error)
    return contents, rejected


def read_file(path):
    """The content of a file, unpacked, or a DataError that says why there is none."""
    if not os.path.exists(path):
        raise DataError(f"it is a link to {os.readlink(path)}, where there is nothing")
    if not os.path.isfile(path):
        raise DataError("it is a folder" if os.path.isdir(path) else "it is no file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror})") from error
    try:
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (EOFError, OSError, zlib.error) as error:
        if path.suffix != ".gz":
            return content
        raise DataError(f"it cannot be unpacked ({error})") from error


def checked(content, name, kind_name="MNIST"):
    """The content of a kind's file of that name, or a DataError that says what is wrong with it."""
    md5, size = FILES[name]
    found_md5, found_magic = md5_of(content), int.from_bytes(content[:4], "big")
    if found_md5 == md5 and kind_name == "MNIST":
        return content
    magic = 2051 if "images" in name else 2049
    beginning = " ".join(content[:40].decode("latin-1").split())
    twins = [name for name in FILES if FILES[name][0] == found_md5]
    if twins:
        problem = f"it holds {twins[0]}{'' if kind_name == 'MNIST' else ' of MNIST'} (files swapped?)"
    elif beginning and beginning.isprintable():
        problem = f"it is a text that begins with {beginning!r} (a login or an error page?)"
    elif found_magic != magic:
        problem = f"it begins with the number {found_magic} instead of {magic} (not an unpacked file of this kind?)"
    elif len(content) != size:
        problem = f"it has {len(content):,} bytes instead of {size:,} (truncated?)"
    elif kind_name != "MNIST" and "labels" in name and max(content[8:]) > 9:
        problem = f"it holds a label {max(content[8:])}, which is above 9 (damaged?)"
    elif kind_name != "MNIST":
        return content
    else:
        problem = f"its MD5 checksum is {found_md5} instead of {md5} (damaged?)"
    raise DataError(problem)


def md5_of(content):
    """The MD5 checksum of bytes, also where a machine's rules forbid it for secrets."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def check_data_dir(root, kind_name):
    """Raises a DataError where root is the folder MNIST or MNIST/raw with the files, and not the one that holds it."""
    root = Path(os.path.abspath(root))
    for data_dir, inner in zip(root.parents, [kind_name, f"{kind_name}/raw"]):
        raw = data_dir / kind_name / "raw"
        if data_dir / inner == root and any((raw / f"{name}{end}").exists() for name in FILES for end in ["", ".gz"]):
            raise DataError(
                f"{kind_name}'s files are looked for in {kind_name}/raw below {root}: give --data_dir {data_dir}"
            )


def not_taken(root, kind_name, missing, rejected):
    """
    Looks for what was brought along and not taken: files of another name, or beside the folder that they belong in.
    Inputs:
        root - Directory of the data.
        kind_name - As in read_files.
        missing - The names of the files that are missing.
        rejected - As read_files returns it.
    Outputs:
        sentence - What was found, with the reasons, or nothing where nothing was found.
    """
    folder = root / kind_name / "raw"
    names = {md5: name for name, (md5, _) in FILES.items() if name in missing and kind_name == "MNIST"}
    remedies, reasons = [], [f"{path.name} ({problem})" for path, problem in rejected.items()]
    places = [f"{kind_name}/raw/*", f"{kind_name}/raw/*ubyte*/*ubyte*", "*ubyte*", "*/*ubyte*"]
    places += [f"*{end}" for end in ARCHIVES]
    for path in itertools.islice(itertools.chain.from_iterable(map(root.glob, places)), 1_000):
        in_place, name = path.parent == folder, path.name.removesuffix(".gz")
        if path in rejected or path.name.startswith(".") or (in_place and name in FILES and name not in missing):
            continue
        if path.name.endswith(ARCHIVES):
            reasons.append(f"{path.name} (unpack it)")
            continue
        try:
            name = names.get(md5_of(read_file(path)))
        except DataError as problem:
            reasons.append(f"{path.name} ({problem})")
            continue
        if name is None:
            reasons.append(f"{path.name} (it holds none of the missing files)")
        else:
            remedies.append(
                f"{path.name} (rename it to {name})" if in_place else f"{path} (move it to {folder / name})"
            )
    notes = remedies + reasons
    more = f" and {len(notes) - 4} more" if len(notes) > 4 else ""
    return f". Found and not taken: {', '.join(notes[:4])}{more}" if notes else ""


@contextlib.contextmanager
def one_at_a_time(path):
    """
    A context that one process is in at a time.
    Inputs:
        path - The file to lock.
    Outputs:
        locked - False where that is not possible: on Windows, or a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            # The library filelock would wait for ever on some file systems without locks.
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True


def some_files(kind, root, names):
    """
    torchvision's download of some of a kind's files.
    Inputs:
        kind - torchvision's class.
        root - Directory in which it makes its folder, raw_folder.
        names - The files' names, unpacked.
    Outputs:
        some - An object of that class, whose method download downloads them.
    """
    some = kind.__new__(kind)  # its constructor would download them all
    some.root = root
    some.resources = [(packed, md5) for packed, md5 in kind.resources if packed.removesuffix(".gz") in names]
    return some


def download_files(kind, folder, names):
    """
    Downloads files of MNIST or a relative into a folder. Several processes may do so at once: one downloads, the others
    wait for it, or, on a file system without locks, each one downloads. Each file appears under its name only when it
    is complete and torchvision has verified it.
    Inputs:
        kind - torchvision's class.
        folder - Path of the folder.
        names - The names of the files that are missing there.
    Raises:
        OSError, RuntimeError, HTTPException - whatever torchvision met.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / ".lock") as locked:
        missing = [name for name in names if not os.path.isfile(folder / name)]
        if not missing:
            return  # another process was faster
        print_line(f"Downloading {kind.__name__} to {folder}")
        if locked:
            for unfinished in folder.glob(".download*"):  # left by a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        default_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            with tempfile.TemporaryDirectory(prefix=".download", dir=folder, ignore_cleanup_errors=True) as unfinished:
                download = some_files(kind, unfinished, missing)
                staged = Path(download.raw_folder)
                try:
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        download.download()
                except RuntimeError as error:
                    _, rejected = read_files(staged, kind.__name__, missing)
                    problems = [f"{path.name}: {problem}" for path, problem in rejected.items()]
                    raise RuntimeError(" ".join([str(error), *problems])) from error
                for name in missing:
                    os.replace(staged / name, folder / name)
        finally:
            socket.setdefaulttimeout(default_timeout)


def print_line(text):
    """Prints lines, if they can be: into a pipe that is closed they cannot, and the data are there all the same."""
    try:
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"nothing can be printed here ({error.strerror})", file=sys.__stderr__)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def terminate(signum, frame):
    """A handler of SIGTERM: one line, and the exit code that a shell expects."""
    print("bmnist.py: terminated", file=sys.__stderr__)  # the other one may be redirected at that moment
    sys.exit(128 + signum)


def main():
    parser = argparse.ArgumentParser(
        description="Fetches MNIST or a relative, checks it and prints its splits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="../data/", help="Directory of the data, which go to MNIST/raw in it")
    parser.add_argument("--dataset", default="mnist", choices=KINDS, help="Or Fashion-MNIST, or Kuzushiji-MNIST")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, terminate)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name can be printed on any terminal
    try:
        loaders = bmnist(args.data_dir, kind=args.dataset)
    except OSError as error:
        sys.exit(f"bmnist.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("bmnist.py: interrupted")
    name = KINDS[args.dataset].__name__
    print_line(f"{name} in {Path(os.path.expanduser(args.data_dir)) / name / 'raw'}: all four files verified")
    for name, loader in zip(["train", "validation", "test"], loaders):
        images = loader.dataset.images
        print_line(f"{name:10}  {len(images):6,} images  ink {binarize(images).mean().item():.2%}")


if __name__ == "__main__":
    main()

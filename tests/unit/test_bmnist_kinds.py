"""Tests of MNIST's relatives in bmnist.py: `python -m unittest tests/unit/test_bmnist_kinds.py`."""

import contextlib
import gzip
import hashlib
import io
import sys
import unittest
from unittest import mock

import torch
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

import bmnist
from tests.helpers import SeededTest, known_files, mirror, small_mnist

NAMES = {"fashion": "FashionMNIST", "kmnist": "KMNIST"}


class TestKinds(SeededTest):
    """On small stand-ins, whose files have the sizes of MNIST's stand-in and another content."""

    def setUp(self):
        self.mnist, _, _, _ = small_mnist()
        self.content, self.images = {}, {}
        for kind, number in [("fashion", 1), ("kmnist", 2)]:
            parts = {}
            for name, content in self.mnist.items():
                head = 16 if "images" in name else 8
                body = content[head:]
                parts[name] = content[:head] + (bytes(255 - byte for byte in body) if head == 16 else body)
                parts[name] = parts[name][:-number] + bytes(number)
            self.content[kind] = parts
        for patch in [
            mock.patch.object(bmnist, "FILES", known_files(self.mnist)),
            *(mock.patch.object(kind, "mirrors", []) for kind in [MNIST, FashionMNIST, KMNIST]),
        ]:
            patch.start()
            self.addCleanup(patch.stop)

    def write(self, kind, **changes):
        """Writes a kind's four files, with changes by the beginning of their names (_ for -)."""
        raw = self.folder / NAMES[kind] / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name, content in self.content[kind].items():
            (raw / name).write_bytes(changes.get(name[: name.index("-idx")].replace("-", "_"), content))

    def load(self, kind, download=False):
        """The four tensors, and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return bmnist.load_mnist(self.folder, download, kind), output.getvalue()

    def assert_content(self, kind, data):
        """That the tensors are those of the files."""
        for name, tensor in zip(bmnist.FILES, data, strict=True):
            content = self.content[kind][name]
            expected = torch.tensor(list(content[16 if "images" in name else 8 :]))
            self.assertTrue(torch.equal(tensor.flatten().long(), expected))

    def test_they_are_torchvisions(self):
        self.assertEqual(bmnist.KINDS, {"mnist": MNIST, "fashion": FashionMNIST, "kmnist": KMNIST})
        for kind in bmnist.KINDS.values():
            self.assertEqual([name.removesuffix(".gz") for name, _ in kind.resources], list(bmnist.FILES))

    def test_reads_what_is_there(self):
        for kind in NAMES:
            self.write(kind)
            self.assert_content(kind, self.load(kind)[0])
            images = self.folder / NAMES[kind] / "raw" / "train-images-idx3-ubyte"
            images.with_suffix(".gz").write_bytes(gzip.compress(images.read_bytes()))
            images.unlink()
            self.assert_content(kind, self.load(kind)[0])

    def test_download(self):
        """Of what is missing, by torchvision's class, which checks it; into a folder of its own."""
        for kind, dataset in [("fashion", FashionMNIST), ("kmnist", KMNIST)]:
            packed = {f"{name}.gz": gzip.compress(content) for name, content in self.content[kind].items()}
            resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
            damaged = {**packed, "t10k-labels-idx1-ubyte.gz": gzip.compress(self.mnist["t10k-labels-idx1-ubyte"], 1)}
            for served in [damaged, packed]:
                with (
                    mirror(served) as (address, requests),
                    mock.patch.multiple(dataset, mirrors=[address], resources=resources),
                ):
                    if served is damaged:
                        with self.assertRaisesRegex(bmnist.DataError, "t10k-labels.*could not be downloaded"):
                            self.load(kind, download=True)
                        continue
                    data, output = self.load(kind, download=True)
            self.assert_content(kind, data)
            raw = self.folder / NAMES[kind] / "raw"
            self.assertEqual(output, f"Downloading {NAMES[kind]} to {raw}\n")
            self.assertEqual(set(requests), set(packed))
            self.assertEqual({path.name for path in raw.iterdir() if path.name != ".lock"}, set(bmnist.FILES))
        self.assertFalse((self.folder / "MNIST").exists())

    def test_files_of_no_use(self):
        good = self.content["fashion"]
        images, labels = good["train-images-idx3-ubyte"], good["t10k-labels-idx1-ubyte"]
        for changes, words in [
            (dict(train_images=images[:-9]), "train-images.* is not FashionMNIST's: it has .*truncated"),
            (dict(train_images=self.mnist["train-images-idx3-ubyte"]), "it holds train-images-idx3-ubyte of MNIST"),
            (dict(train_images=good["t10k-images-idx3-ubyte"]), "it has .* bytes instead of .*truncated"),
            (dict(t10k_labels=labels[:-1] + b"\x0a"), "it holds a label 10, which is above 9"),
            (dict(t10k_labels=b"<html>"), "it is a text"),
            (dict(t10k_labels=b"\0\0\x08\x03" + labels[4:]), "begins with the number 2051 instead of 2049"),
        ]:
            self.write("fashion", **changes)
            with self.assertRaisesRegex(bmnist.DataError, words):
                self.load("fashion")

    def test_missing(self):
        with self.assertRaisesRegex(bmnist.DataError, "^KMNIST is not complete in .*bmnist.py --dataset kmnist"):
            self.load("kmnist")
        self.write("kmnist")
        with self.assertRaisesRegex(bmnist.DataError, f"in KMNIST/raw below .*: give --data_dir {self.folder}$"):
            bmnist.load_mnist(self.folder / "KMNIST", download=False, kind="kmnist")

    def test_command(self):
        self.write("fashion")
        words = ["bmnist.py", "--data_dir", str(self.folder), "--dataset", "fashion"]
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.object(bmnist.signal, "signal"),
            mock.patch.multiple(bmnist, TRAIN_SIZES=[45_000], NUM_VAL=10),
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            bmnist.main()
        first, *splits = output.getvalue().splitlines()
        self.assertEqual(first, f"FashionMNIST in {self.folder}/FashionMNIST/raw: all four files verified")
        self.assertEqual([line.split()[0] for line in splits], ["train", "validation", "test"])


if __name__ == "__main__":
    unittest.main()

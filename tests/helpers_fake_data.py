"""Small stand-ins for data: MNIST's files and a server that has them, and few rendered digits."""

import contextlib
import gzip
import hashlib
import http.server
import inspect
import os
import threading
from pathlib import Path

import numpy as np
import torch

from sources import mnist_files
from sources.rendered_digits import rendered_digits

REPOSITORY = Path(__file__).resolve().parent.parent


def own_images(number, height=20, width=14):
    """Digits of another size than MNIST's, as a NumPy array."""
    digits = rendered_digits(number)[0].repeat(1, 2, 2)[:, 4 : 4 + height, 4 : 4 + width]
    return digits.numpy()


def write_npz(folder, name="own.npz", **arrays):
    """The path of a file of 200 training and 100 test images, with changes; None leaves an array out."""
    arrays = {"train_images": own_images(200), "test_images": own_images(100), **arrays}
    path = folder / name
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def idx(tensor):
    """The bytes of an IDX file, MNIST's format, of a uint8 tensor."""
    head = (0x0800 + tensor.dim()).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return head + tensor.to(torch.uint8).numpy().tobytes()


def small_mnist(num_train=60, num_test=10):
    """A small stand-in for MNIST: its four files, unpacked, by name; the same packed; and the images and labels."""
    images, labels = rendered_digits(num_train + num_test)
    parts = [images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]]
    content = dict(zip(mnist_files.FILES, map(idx, parts)))
    # Packed once: gzip writes the time into its header.
    packed = {f"{name}.gz": gzip.compress(data) for name, data in content.items()}
    return content, packed, images, labels


def known_files(content):
    """What mnist_files.FILES is for a stand-in: MD5 and size by name."""
    return {name: (hashlib.md5(data).hexdigest(), len(data)) for name, data in content.items()}


def resources(packed):
    """What the attribute `resources` of torchvision's class is for a stand-in: names and MD5 of the packed files."""
    return [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]


@contextlib.contextmanager
def mirror(packed, write=None):
    """
    A local HTTP server as MNIST's only mirror.
    Inputs:
        packed - Dict from name to content of the files that it has.
        write - Function of (name, content, file to write the answer to); the default writes all of it.
    Outputs:
        address, requests - Its URL, and the list of the names that it was asked for.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            content = packed.get(name, b"")
            requests.append(name)
            self.send_response(200 if name in packed else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if write:
                write(name, content, self.wfile)
            else:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # notices shutdown at once
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


def use_stand_in(address, resources, files, **sizes):
    """
    Makes a process use a stand-in for MNIST.
    Inputs:
        address, resources, files - Its only mirror, see mirror, resources and known_files.
        sizes - New values of sources.TRAIN_SIZES and sources.NUM_VAL; only before bmnist is imported.
    """
    import sources
    from sources import mnist_files

    mnist_files.MNIST.mirrors, mnist_files.MNIST.resources = [address], resources
    mnist_files.FILES = files
    vars(sources).update(sizes)


def stand_in_code(*args, **sizes):
    """Lines of Python that call use_stand_in and import bmnist: for another process."""
    return f"{inspect.getsource(use_stand_in)}use_stand_in(*{args}, **{sizes})\nimport bmnist\n"


def few_digits(folder, sizes=(300, 50, 50)):
    """Variables of the environment with which a process of Python trains on few digits, and finds the repository."""
    num_train, num_val, num_test = sizes
    (folder / "sitecustomize.py").write_text(  # Python runs it first
        "import sources\n"
        "from sources import rendered_digits\n"
        "rendered_mnist = sources.rendered_mnist\n"
        f"few = lambda num_train: rendered_mnist(num_train, {num_test})\n"
        "sources.rendered_mnist = rendered_digits.rendered_mnist = few\n"
        f"sources.TRAIN_SIZES, sources.NUM_VAL = [{num_train}], {num_val}\n"  # before bmnist is imported
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}

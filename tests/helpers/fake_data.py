"""Stand-ins for data: loaders of a few rendered digits, a small MNIST on a local mirror, and your own .npz file."""

import contextlib
import gzip
import hashlib
import http.server
import threading
from unittest import mock

import numpy as np
import torch

import bmnist
from sources import mnist_files
from sources.rendered_digits import rendered_digits


def small_loaders(args, download=True, sampler=None, sizes=(300, 50, 50)):
    """Loaders of rendered digits, as load_data returns them: 300 to train on, 50 to validate, 50 to test."""
    num_train, num_val, num_test = sizes
    images, labels = rendered_digits(sum(sizes))
    test = slice(num_train + num_val, None)
    options = {name: getattr(args, name) for name in ["num_workers", "binarization"] if hasattr(args, name)}
    options["batch_size"] = args.batch_size // (getattr(args, "devices", 1) * getattr(args, "num_nodes", 1))
    with mock.patch.multiple(bmnist, TRAIN_SIZES=[num_train], NUM_VAL=num_val):
        data = images, labels, images[test], labels[test]
        return bmnist.data_loaders(*data, train_size=num_train, sampler=sampler, **options)


def own_images(number, height=20, width=14):
    """Digits of another size than MNIST's, as a NumPy array."""
    return rendered_digits(number)[0].repeat(1, 2, 2)[:, 4 : 4 + height, 4 : 4 + width].numpy()


def write_npz(folder, name="own.npz", **arrays):
    """The path of a file of 200 training and 100 test images, with changes; None leaves an array out."""
    arrays = {"train_images": own_images(200), "test_images": own_images(100), **arrays}
    np.savez(folder / name, **{name: array for name, array in arrays.items() if array is not None})
    return folder / name


def idx(tensor):
    """The bytes of an IDX file, MNIST's format, of a uint8 tensor."""
    head = (0x0800 + tensor.dim()).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return head + tensor.to(torch.uint8).numpy().tobytes()


def small_mnist(num_train=60, num_test=10):
    """A small stand-in for MNIST: the content of its four files by name; the same compressed; images and labels."""
    images, labels = rendered_digits(num_train + num_test)
    parts = [images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]]
    content = dict(zip(mnist_files.FILES, map(idx, parts)))
    packed = {f"{name}.gz": gzip.compress(data) for name, data in content.items()}  # once: gzip writes the time
    return content, packed, images, labels


def known_files(content):
    """The value of mnist_files.FILES for a stand-in: MD5 and size by name."""
    return {name: (hashlib.md5(data).hexdigest(), len(data)) for name, data in content.items()}


def known_resources(packed):
    """The value of the attribute `resources` of torchvision's class for a stand-in: names and MD5."""
    return [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]


@contextlib.contextmanager
def mirror(packed, write=None):
    """
    A context with a local HTTP server as MNIST's only mirror, with the files `packed` (content by name). `write`, if
    given, is a function of (name, content, output file) that answers. Yields its URL and the list of requested names.
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
            write(name, content, self.wfile) if write else self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # sees shutdown at once
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


def stand_in_code(address, resources, files, **sizes):
    """
    Lines of Python, for another process, that import bmnist and make it use a stand-in for MNIST: its only mirror, see
    mirror, known_resources and known_files. sizes are the values of sources.TRAIN_SIZES and sources.NUM_VAL.
    """
    return (
        "import sources.mnist_files\n"
        f"sources.mnist_files.MNIST.mirrors, sources.mnist_files.MNIST.resources = [{address!r}], {resources!r}\n"
        f"sources.mnist_files.FILES = {files!r}\n"
        f"vars(sources).update({sizes!r})\n"
        "sizes = sources.TRAIN_SIZES\n"
        "sources.DATA_FLAGS['data']['train_size'] = sources.Flag(sizes[0], 'few', sizes)\n"
        "import bmnist\n"  # only now: it takes these sizes
    )

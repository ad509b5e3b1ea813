"""Mock data: loaders of a few rendered digits, a small MNIST on a local mirror, and a user's .npz file."""

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
    """Returns the loaders of load_data for rendered digits: by default 300 training, 50 validation, 50 test images."""
    num_train, num_val, num_test = sizes
    images, labels = rendered_digits(sum(sizes))
    test = slice(num_train + num_val, None)
    options = {name: getattr(args, name) for name in ["num_workers", "binarization"] if hasattr(args, name)}
    options["batch_size"] = args.batch_size // (getattr(args, "devices", 1) * getattr(args, "num_nodes", 1))
    with mock.patch.multiple(bmnist, TRAIN_SIZES=[num_train], NUM_VAL=num_val):
        data = images, labels, images[test], labels[test]
        return bmnist.data_loaders(*data, train_size=num_train, sampler=sampler, **options)


def own_images(number, height=20, width=14):
    """Returns digits of another size than MNIST's, as a NumPy array."""
    return rendered_digits(number)[0].repeat(1, 2, 2)[:, 4 : 4 + height, 4 : 4 + width].numpy()


def write_npz(folder, name="own.npz", **arrays):
    """Writes a file of 200 training and 100 test images, and returns its path. An array that is None is not written."""
    arrays = {"train_images": own_images(200), "test_images": own_images(100), **arrays}
    np.savez(folder / name, **{name: array for name, array in arrays.items() if array is not None})
    return folder / name


def idx(tensor):
    """Returns the bytes of a uint8 tensor in IDX, the format of MNIST's files."""
    head = (0x0800 + tensor.dim()).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return head + tensor.to(torch.uint8).numpy().tobytes()


def small_mnist(num_train=60, num_test=10):
    """
    Makes a small mock of MNIST. Returns a dict with the contents of its four files, a dict with the compressed
    contents, the images and the labels.
    """
    images, labels = rendered_digits(num_train + num_test)
    parts = [images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]]
    content = dict(zip(mnist_files.FILES, map(idx, parts)))
    packed = {
        f"{name}.gz": gzip.compress(data) for name, data in content.items()
    }  # only once, because gzip writes the time into the file
    return content, packed, images, labels


def known_files(content):
    """Returns the value of mnist_files.FILES for mock files: a dict from name to MD5 and size."""
    return {name: (hashlib.md5(data).hexdigest(), len(data)) for name, data in content.items()}


def known_resources(packed):
    """Returns the attribute `resources` of torchvision's class for mock files: a list of names and MD5."""
    return [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]


@contextlib.contextmanager
def mirror(packed, write=None):
    """
    Context manager that runs a local HTTP server with the files `packed` (a dict from name to content), as MNIST's only
    mirror. If `write` is given, this function of (name, content, output file) writes the answers. Yields the server's
    URL and a list, to which the server adds each requested name.
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
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # shutdown takes at most 0.01 s
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()


def mock_mnist_code(address, resources, files, **sizes):
    """
    Returns Python code for another process. The code imports bmnist and replaces MNIST by mock files on a single
    mirror, see mirror, known_resources and known_files. `sizes` are the values of sources.TRAIN_SIZES and
    sources.NUM_VAL.
    """
    return (
        "import sources.mnist_files\n"
        f"sources.mnist_files.MNIST.mirrors, sources.mnist_files.MNIST.resources = [{address!r}], {resources!r}\n"
        f"sources.mnist_files.FILES = {files!r}\n"
        f"vars(sources).update({sizes!r})\n"
        "sizes = sources.TRAIN_SIZES\n"
        "sources.DATA_FLAGS['data']['train_size'] = sources.Flag(sizes[0], 'few', sizes)\n"
        "import bmnist\n"  # only now, because the import reads these sizes
    )

"""
The programs as a user runs them, in processes of their own: `python -m unittest discover tests`, a few minutes.
Real MNIST is tested where it is found, in ../shared/data or ../data beside the repository.
"""
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MNIST_DIR = next((path for path in [REPOSITORY.parent / 'shared' / 'data', REPOSITORY.parent / 'data']
                  if (path / 'MNIST' / 'raw').is_dir()), None)
sys.path.insert(0, str(REPOSITORY))

import bmnist  # noqa: E402
from rendered_digits import rendered_digits  # noqa: E402
from train_pl import VAE  # noqa: E402
from unittests import idx  # noqa: E402

NO_NETWORK = dict.fromkeys(['http_proxy', 'https_proxy'], 'http://127.0.0.1:9')  # nobody listens there


class CommandTest(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def start(self, *command, **variables):
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.folder, env={**os.environ, **variables},
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run_command(self, *command, **variables):
        """Exit code, stdout and stderr of a Python program of the repository."""
        process = self.start(REPOSITORY / command[0], *command[1:], **variables)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    def train(self, *flags, **variables):
        """Trains one epoch on rendered digits, or what the flags say, and returns the run's folder and its results."""
        flags = ['--dataset', 'rendered', '--epochs', '1', *flags]
        code, stdout, stderr = self.run_command('train_pl.py', *flags, **variables)
        self.assertEqual((code, stderr), (0, ''))
        folder = self.folder / re.search(r'run folder (.*)\n\Z', stdout)[1]
        return folder, json.loads((folder / 'results.json').read_text())

    def assert_one_line(self, result, code, *parts):
        """The command failed with this exit code, and its only line on stderr has all the parts."""
        self.assertEqual((result[0], result[2].count('\n')), (code, 1), result)
        for part in parts:
            self.assertIn(str(part), result[2])


class TestTraining(CommandTest):

    def test_same_weights_with_any_number_of_workers(self):
        weights = []
        for num_workers in ['0', '1', '2']:
            folder, _ = self.train('--num_workers', num_workers, '--hidden_dims', '64')
            weights.append(torch.load(folder / 'checkpoints' / 'last.ckpt', weights_only=True)['state_dict'].values())
        self.assertTrue(all(map(torch.equal, weights[0], weights[1])))
        self.assertTrue(all(map(torch.equal, weights[0], weights[2])))

    def test_two_processes_reach_the_bpd_of_one(self):
        bpds = {}
        for devices in ['1', '2']:
            for seed in ['1', '2', '3']:
                _, results = self.train('--accelerator', 'cpu', '--hidden_dims', '64', '--epochs', '4', '--seed', seed,
                                        '--devices', devices, OMP_NUM_THREADS='1')
                bpds[devices, seed] = results['test_bpd']
        for seed in ['1', '2', '3']:
            self.assertAlmostEqual(bpds['1', seed], bpds['2', seed], delta=0.001)

    def test_processes_disconnect(self):
        """From a script of one's own. Gloo's threads, where they still run, at times abort the end of Python."""
        (self.folder / 'script.py').write_text(
            "import argparse, torch, train_pl\n"
            "train_pl.train_vae(argparse.Namespace(dataset='rendered', epochs=1, accelerator='cpu', devices=2))\n"
            "print('connected:', torch.distributed.is_initialized())\n")
        process = self.start('script.py', PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS='1')
        stdout, stderr = process.communicate(timeout=600)
        self.assertEqual((process.returncode, stderr), (0, ''))
        self.assertEqual(re.findall('connected: .*', stdout), ['connected: False'] * 2)

    def test_interrupt(self):
        process = self.start(REPOSITORY / 'train_pl.py', '--dataset', 'rendered', '--hidden_dims', '64')
        for line in process.stdout:
            if line.startswith('epoch   2/80'):
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate(timeout=120)
        self.assertEqual((process.returncode, stderr), (1, ''))
        epoch, folder = re.search(r'Interrupted in epoch (\d+). (.*) stays usable', stdout).groups()
        VAE.load_from_checkpoint(self.folder / folder / 'checkpoints' / 'best.ckpt').sample(2)
        last = torch.load(self.folder / folder / 'checkpoints' / 'last.ckpt', weights_only=True)
        self.assertIn(last['epoch'] + 1, [int(epoch) - 1, int(epoch)])
        rows = (self.folder / folder / 'metrics.csv').read_text().splitlines()[1:]
        self.assertIn(len(rows), [int(epoch), int(epoch) + 1])  # the first is epoch 0

    def test_tensorboard_shows_the_run(self):
        folder, results = self.train('--z_dim', '2')
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        server = self.start('-m', 'tensorboard.main', '--logdir', folder.parent, '--host', '127.0.0.1', '--port', port)
        self.addCleanup(server.communicate)
        self.addCleanup(server.kill)

        def ask(plugin):
            with urllib.request.urlopen(f'http://127.0.0.1:{port}/data/plugin/{plugin}') as answer:
                return json.load(answer)

        for _ in range(120):
            time.sleep(0.5)
            try:
                if 'test_bpd' in ask('scalars/tags').get('version_0', {}):
                    break
            except OSError:
                self.assertIsNone(server.poll(), 'TensorBoard ended')
        self.assertIn('val_bpd', ask('scalars/tags')['version_0'])
        self.assertEqual(set(ask('images/tags')['version_0']), {'Samples', 'Means', 'Reconstructions', 'Manifold'})
        curve = ask('scalars/scalars?tag=val_bpd&run=version_0')
        self.assertEqual([step for _, step, _ in curve], [0, 1])
        self.assertAlmostEqual(ask('scalars/scalars?tag=test_bpd&run=version_0')[0][2], results['test_bpd'], places=5)

    def test_bad_flags(self):
        self.assert_one_line(self.run_command('train_pl.py', '--z_dim', '0', '--log_dir', 'logs'), 2, '--z_dim')
        self.assert_one_line(self.run_command('train_pl.py', '--no_such_flag', '--log_dir', 'logs'), 2, 'no_such_flag')
        (self.folder / 'file').touch()
        self.assert_one_line(self.run_command('train_pl.py', '--dataset', 'rendered', '--log_dir', 'file'), 1, 'file')
        self.assertEqual(os.listdir(self.folder), ['file'])

    def test_no_data(self):
        result = self.run_command('train_pl.py', '--data_dir', 'data', '--log_dir', 'logs', **NO_NETWORK)
        self.assert_one_line(result, 1, Path('data/MNIST/raw'), *bmnist.FILES, 'refused', '--dataset rendered')
        self.assertFalse((self.folder / 'logs').exists())


class TestBenchmarks(CommandTest):
    """That they run and write what they say; not what they measure."""

    def assert_written(self, name, *flags):
        code, stdout, stderr = self.run_command(f'benchmarks/{name}.py', '--rounds', '1', *flags)
        self.assertEqual((code, stderr), (0, ''))
        path, = self.folder.glob(f'{name}_*.json')
        self.assertEqual(path.with_suffix('.png').read_bytes()[:8], b'\x89PNG\r\n\x1a\n')
        return stdout, json.loads(path.read_text())

    def test_speed(self):
        stdout, measured = self.assert_written('speed', '--dataset', 'rendered', '--whole_run', '1')
        for way, row in measured['summary'].items():
            self.assertRegex(stdout, rf'(?m)^{way} .*{re.escape(measured["ways"][way])}$')
            self.assertTrue(row['min'] > 0 and row['memory_mib'] > 100, row)
        self.assertEqual(measured['summary']['bare loop']['ratio'], 1)
        self.assertGreater(measured['whole_run']['process'], measured['whole_run']['fit'])
        self.assertGreater(min(measured['start']['first step']), 1)

    def test_growth(self):
        _, measured = self.assert_written('growth', '--batch_sizes', '500', '--widths', '16', '--num_images', '200000')
        self.assertTrue(all(measured[name][0]['seconds'] > 0 for name in ['batch size', 'hidden width']))
        images = measured['images'][0]
        self.assertEqual((images['images'], images['bytes_per_pixel']), (200_000, 1))
        self.assertLess(images['process_mib'] * 2**20 / (784 * 200_000), 1.3)  # no second copy


class TestDownload(CommandTest):
    """Real processes that download a small stand-in for MNIST from a local server."""

    def setUp(self):
        super().setUp()
        images, labels = rendered_digits(70)
        self.content = dict(zip(bmnist.FILES, [idx(images[:60]), idx(labels[:60]), idx(images[60:]), idx(labels[60:])]))
        packed = {f'{name}.gz': gzip.compress(content) for name, content in self.content.items()}
        self.stalled, self.go_on = threading.Event(), threading.Event()
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = packed[self.path[1:]]
                self.send_response(200)
                self.send_header('Content-Length', str(len(content)))
                self.end_headers()
                self.wfile.write(content[:40])
                if 't10k-labels' in self.path:
                    test.stalled.set()
                    test.go_on.wait(60)
                with contextlib.suppress(ConnectionError):  # the client was killed
                    self.wfile.write(content[40:])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in {**self.content, **packed}.items()}
        self.program = (
            f'import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import bmnist\n'
            f'bmnist.MNIST.mirrors = ["http://127.0.0.1:{server.server_port}/"]\n'
            f'bmnist.MNIST.resources = {[(name, md5[name]) for name in packed]}\n'
            f'bmnist.FILES = { {name: (md5[name], len(content)) for name, content in self.content.items()} }\n'
            f'print(len(bmnist.bmnist("data")[0].dataset))')

    def assert_complete(self):
        folder = self.folder / 'data' / 'MNIST' / 'raw'
        left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}
        self.assertEqual(left, self.content)

    def test_eight_processes_at_once(self):
        self.go_on.set()
        processes = [self.start('-c', self.program, OMP_NUM_THREADS='1') for _ in range(8)]
        outputs = [process.communicate(timeout=300) for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * 8, outputs)
        self.assertEqual(sum('Downloading' in stdout for stdout, _ in outputs), 1)
        self.assert_complete()

    def test_killed_while_it_downloads(self):
        process = self.start('-c', self.program)
        self.assertTrue(self.stalled.wait(60))
        process.kill()
        process.communicate()
        self.go_on.set()
        self.assertEqual([name for name in bmnist.FILES if (self.folder / 'data/MNIST/raw' / name).exists()], [])
        stdout, stderr = self.start('-c', self.program).communicate(timeout=120)
        self.assertEqual((stdout.splitlines()[-1], stderr), ('60', ''))
        self.assert_complete()


@unittest.skipUnless(MNIST_DIR, 'there is no MNIST in ../shared/data or ../data')
class TestMNIST(CommandTest):

    def test_fetch_command(self):
        code, stdout, stderr = self.run_command('bmnist.py', '--data_dir', MNIST_DIR, **NO_NETWORK)
        self.assertEqual((code, stderr), (0, ''))
        self.assertEqual(stdout.splitlines()[1:], ['train       45,000 images  ink 13.26%',
                                                   'validation   5,000 images  ink 13.23%',
                                                   'test        10,000 images  ink 13.42%'])

    def test_bad_files(self):
        data = self.folder / 'data'
        raw = data / 'MNIST' / 'raw'
        shutil.copytree(MNIST_DIR / 'MNIST' / 'raw', raw)
        raw.chmod(0o755)
        for path in raw.iterdir():
            path.chmod(0o644)
        with open(raw / 'train-images-idx3-ubyte', 'r+b') as file:
            file.truncate(20_000_000)
        self.assert_one_line(self.run_command('train_pl.py', '--data_dir', data, '--log_dir', 'logs'), 1,
                             raw / 'train-images-idx3-ubyte', 'truncated')
        shutil.copy(MNIST_DIR / 'MNIST' / 'raw' / 'train-images-idx3-ubyte', raw / 'train-images-idx3-ubyte')
        for train, test in [('train-images-idx3-ubyte', 't10k-images-idx3-ubyte'),
                            ('train-labels-idx1-ubyte', 't10k-labels-idx1-ubyte')]:
            os.rename(raw / train, raw / 'spare')
            os.rename(raw / test, raw / train)
            os.rename(raw / 'spare', raw / test)
        self.assert_one_line(self.run_command('bmnist.py', '--data_dir', data), 1, 'swapped', 'train-images-idx3-ubyte')
        self.assertFalse((self.folder / 'logs').exists())

    def test_mlp(self):
        _, results = self.train('--dataset', 'mnist', '--data_dir', MNIST_DIR, '--epochs', '2')
        self.assertEqual(results['dataset'], 'mnist')
        self.assertTrue(1.0 < results['first_step_bpd'] < 1.1)
        self.assertLess(results['final_train_bpd'], 0.21)  # 0.206 after 2 epochs, 0.146 after 80
        self.assertLess(results['test_bpd'], 0.195)

    def test_cnn(self):
        _, results = self.train('--dataset', 'mnist', '--data_dir', MNIST_DIR, '--model', 'CNN', '--epochs', '1')
        self.assertTrue(0.99 < results['first_step_bpd'] < 1.1)
        self.assertLess(results['test_bpd'], 0.32)


if __name__ == '__main__':
    unittest.main()

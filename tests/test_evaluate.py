"""What evaluate.py makes of checkpoints: `python -m unittest tests/test_evaluate.py`, two minutes."""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import shutil
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.distributions as D
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parent))  # to be run by its name, too

import bmnist
import evaluate
import train_pl
from checkpoints import CheckpointError
from evaluate import FlagError
from rendered_digits import rendered_digits
from test_end_to_end import MNIST_DIR, CommandTest
from utils import log_likelihood, quadrature_log_likelihood

PICTURES = {'reconstructions', 'interpolations', 'traversals', 'samples', 'sample_means', 'latent_space'}


def small_loaders(args, download=True):
    """Loaders of rendered digits: 300 to train on, 100 to validate, 400 to test; they remember what is asked for."""
    small_loaders.asked = args, download
    images, labels = rendered_digits(800)
    Images = bmnist.SampledImages if args.binarization == 'stochastic' else bmnist.BinaryImages
    return tuple(bmnist.DataLoader(Images(images[split], labels[split]), args.batch_size, shuffle=split.start == 0,
                                   collate_fn=bmnist.already_a_batch)
                 for split in [slice(0, 300), slice(300, 400), slice(400, 800)])


class TestEvaluate(CommandTest):

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        for patch in [mock.patch.object(train_pl, 'load_data', small_loaders),
                      mock.patch.object(evaluate, 'load_data', small_loaders),
                      mock.patch.object(evaluate, 'quadrature_log_likelihood',
                                        functools.partial(quadrature_log_likelihood, step=0.1))]:
            patch.start()
            self.addCleanup(patch.stop)

    def trained(self, **flags):
        """A trained model's checkpoint."""
        flags = {**dict(run_name='run', log_dir=str(self.folder), hidden_dims=[32], z_dim=3, epochs=3, lr=0.01,
                        dataset='rendered', accelerator='cpu'), **flags}
        with contextlib.redirect_stdout(io.StringIO()):
            train_pl.train_vae(argparse.Namespace(**flags))
        return self.folder / flags['run_name'] / 'checkpoints' / 'best.ckpt'

    def evaluate(self, checkpoint, **choices):
        return evaluate.evaluate(checkpoint, **{'iw_samples': 20, 'accelerator': 'cpu', **choices})

    def test_numbers(self):
        for flags in [dict(), dict(model='CNN', num_filters=4), dict(binarization='stochastic')]:
            checkpoint = self.trained(**flags, run_name='-'.join(['run', *map(str, flags)]))
            state = torch.get_rng_state()
            results, folder = self.evaluate(checkpoint)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            self.assertEqual(folder, checkpoint.parent.parent / 'evaluation')
            self.assertEqual(json.loads((folder / 'evaluation.json').read_text()), results)
            again, _ = self.evaluate(checkpoint, out=self.folder / 'again')
            for run in [results, again]:
                del run['seconds']
            self.assertEqual(results, again)

            model = train_pl.VAE.load_from_checkpoint(checkpoint)
            imgs, _ = small_loaders(small_loaders.asked[0])[2].dataset[torch.arange(400)]
            with torch.no_grad():
                mean, log_std = model.encoder(imgs)
                posterior = D.Normal(mean, log_std.exp())
                log_p_x = torch.stack([D.Bernoulli(logits=model.decoder(posterior.sample())).log_prob(imgs)
                                       for _ in range(50)])
            elbos = log_p_x.sum(dim=(2, 3, 4)) - D.kl_divergence(posterior, D.Normal(0., 1.)).sum(dim=1)
            error = results['elbo_standard_error']
            self.assertAlmostEqual(results['elbo'], elbos.mean().item(), delta=error / 2)  # on the same images
            self.assertAlmostEqual(error / (elbos[0].std().item() / 20), 1, delta=0.05)
            self.assertAlmostEqual(results['test_bpd'] * -784 * math.log(2), results['elbo'], places=3)
            trained_bpd = json.loads((checkpoint.parent.parent / 'results.json').read_text())['test_bpd']
            self.assertAlmostEqual(results['test_bpd'], trained_bpd, delta=results['test_bpd_standard_error'] / 2)
            self.assertGreater(results['log_likelihood'], results['elbo'])
            estimates = log_likelihood(imgs, model.encoder, model.decoder, num_samples=20)
            self.assertAlmostEqual(results['log_likelihood'], estimates.mean().item(), delta=error / 2)
            self.assertAlmostEqual(results['log_likelihood_bpd'] * -784 * math.log(2), results['log_likelihood'],
                                   places=3)
            self.assertEqual(results['active_units'], (mean.var(dim=0) > 0.01).sum().item())
            self.assertEqual([results[name] for name in ['epoch', 'z_dim', 'dataset', 'test_images', 'iw_samples']],
                             [3, 3, 'rendered', 400, 20])

    def test_two_latents(self):
        results, _ = self.evaluate(self.trained(z_dim=2, lr=1e-3), iw_samples=1000)
        self.assertAlmostEqual(results['log_likelihood'], results['log_likelihood_by_quadrature'], delta=0.3)

    def test_pictures(self):
        for z_dim, names in [(1, PICTURES), (2, PICTURES | {'manifold'}), (5, PICTURES)]:
            checkpoint = self.trained(z_dim=z_dim, run_name=f'run {z_dim}')
            _, folder = self.evaluate(checkpoint, iw_samples=1)
            self.assertEqual({path.name for path in folder.iterdir()},
                             {'evaluation.json', *(f'{name}.{kind}' for name in names for kind in ['png', 'pdf'])})
            for name in names:
                picture = imread(folder / f'{name}.png')
                self.assertTrue(min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.1, name)
                self.assertEqual((folder / f'{name}.pdf').read_bytes()[:5], b'%PDF-')

    def test_what_pictures_show(self):
        tables = {}
        checkpoint = self.trained()
        with torch.no_grad():
            model = train_pl.VAE.load_from_checkpoint(checkpoint)
            model.encoder.net[-1].weight[1] = 0  # the second latent of three knows nothing
        with mock.patch.object(evaluate.figures, 'image_table', lambda name, images, **labels: tables.update(
                {Path(name).name: (images, labels)})), mock.patch.object(evaluate.figures, 'latent_space') as plane:
            imgs, labels = small_loaders(small_loaders.asked[0])[2].dataset[torch.arange(400)]
            with torch.no_grad():
                means, _ = model.encoder(imgs)
                evaluate.pictures(self.folder, model, imgs, labels, means)
                decoded = torch.sigmoid(model.decoder(means)).squeeze(1)
        images, _ = tables['reconstructions']
        self.assertEqual(images.shape, (6, 10, 28, 28))
        for row in [0, 2, 4]:
            for digit in range(10):
                index = (labels == digit).nonzero()[row // 2, 0]
                self.assertTrue(torch.equal(images[row, digit], imgs[index, 0]))
                torch.testing.assert_close(images[row + 1, digit], decoded[index])
        images, _ = tables['interpolations']
        first, second = (labels == 3).nonzero()[0, 0], (labels == 4).nonzero()[1, 0]
        torch.testing.assert_close(images[3, [0, 1, -2, -1]],
                                   torch.stack([imgs[first, 0], decoded[first], decoded[second], imgs[second, 0]]))
        with torch.no_grad():
            middle = torch.sigmoid(model.decoder(means[torch.stack([first, second])].mean(dim=0)))
        torch.testing.assert_close(images[3, 6], middle.squeeze(0))
        images, drawn = tables['traversals']
        order = ['z0', 'z2'] if means[:, 0].var() > means[:, 2].var() else ['z2', 'z0']
        self.assertEqual((images.shape[:2], drawn['rows']), ((2, 13), order))
        z = means[0].clone()
        z[2] = 1.5
        with torch.no_grad():
            torch.testing.assert_close(images[drawn['rows'].index('z2'), drawn['columns'].index('1.5')],
                                       torch.sigmoid(model.decoder(z)).squeeze(0))
        points, names = plane.call_args.args[1], plane.call_args.args[3]
        _, _, v = torch.linalg.svd(means - means.mean(dim=0))
        torch.testing.assert_close(points.abs(), ((means - means.mean(dim=0)) @ v[:2].T).abs(), atol=1e-4, rtol=1e-4)
        self.assertRegex(names[0], r'^first principal component \(\d+% of the variance\)')

    def test_no_active_unit(self):
        checkpoint = self.trained()
        saved = torch.load(checkpoint, weights_only=True)
        for weight in list(saved['state_dict'])[2:4]:  # the encoder's last layer
            saved['state_dict'][weight].zero_()
        torch.save(saved, checkpoint)
        results, folder = self.evaluate(checkpoint)
        self.assertEqual(results['active_units'], 0)
        self.assertFalse((folder / 'traversals.png').exists())

    def test_what_it_was_trained_on(self):
        checkpoint = self.trained(binarization='stochastic', data_dir='there')
        for choices, expected in [(dict(), ('rendered', 'there', False)),
                                  (dict(dataset='mnist', data_dir='here'), ('mnist', 'here', True))]:
            self.evaluate(checkpoint, **choices)
            flags, download = small_loaders.asked
            self.assertEqual((flags.dataset, flags.data_dir, download), expected)
            self.assertEqual(flags.binarization, 'stochastic')

    def test_older_and_moved_checkpoints(self):
        checkpoint = self.trained()
        saved = torch.load(checkpoint, weights_only=True)
        moved = self.folder / 'model.ckpt'
        shutil.copy(checkpoint, moved)
        self.assertEqual(self.evaluate(moved)[1], self.folder / 'evaluation')
        del saved['callbacks']['EpochReport']['flags']
        torch.save(saved, moved)
        with self.assertRaisesRegex(FlagError, 'model.ckpt does not say .* --dataset'):
            self.evaluate(moved)
        self.assertEqual(self.evaluate(moved, dataset='rendered')[0]['dataset'], 'rendered')
        for flags in ['mnist', {'dataset': 'faces'}, {'batch_size': 'many'}, {'hidden_dims': None}]:
            saved['callbacks']['EpochReport']['flags'] = flags
            torch.save(saved, moved)
            with self.assertRaisesRegex(CheckpointError, 'model.ckpt holds flags of no use'):
                self.evaluate(moved)

    def test_bad_choices(self):
        checkpoint = self.trained()
        for choices, message in [(dict(iw_samples=0), '--iw_samples must be at least 1, got 0'),
                                 (dict(dataset='faces'), '--dataset must be one of mnist, rendered'),
                                 (dict(accelerator='tpu'), '--accelerator must be one of')]:
            with self.assertRaisesRegex(FlagError, message):
                self.evaluate(checkpoint, **choices)
        if not torch.cuda.is_available():
            with self.assertRaisesRegex(FlagError, 'there is no CUDA GPU here'):
                self.evaluate(checkpoint, accelerator='gpu')
        self.assertFalse((checkpoint.parent.parent / 'evaluation').exists())


class TestCommand(CommandTest):

    def test_command(self):
        run, trained = self.train('--hidden_dims', '16', '--binarization', 'stochastic', '--train_size', '55000',
                                  '--lr_schedule', 'cosine')
        checkpoint = run / 'checkpoints' / 'best.ckpt'
        code, stdout, stderr = self.run_command('evaluate.py', checkpoint, '--iw_samples', '2', '--progress_bar')
        self.assertEqual(code, 0)
        self.assertRegex(stderr, 'log p.x.: 100%')
        results = json.loads((run / 'evaluation' / 'evaluation.json').read_text())
        self.assertRegex(stdout, r'MLP, 20 latents, after 1 epochs, on 10,000 test images of rendered \(stochastic\)')
        self.assertRegex(stdout, rf"test bpd +{results['test_bpd']:.4f} \+- 0\.000\d\n")
        self.assertRegex(stdout, rf"log p\(x\) +{results['log_likelihood']:.2f} \+- 0\.\d\d nats, importance-weighted")
        self.assertRegex(stdout, r'active units +\d+ of 20\n')
        self.assertAlmostEqual(results['test_bpd'], trained['test_bpd'], delta=0.002)

        before = sorted(self.folder.rglob('*'))
        wrong = self.folder / 'logs' / 'wrong.ckpt'
        self.assert_one_line(self.run_command('evaluate.py', wrong), 1, wrong, 'No such file')
        self.assert_one_line(self.run_command('evaluate.py', checkpoint, '--iw_samples', '0'), 2, '--iw_samples')
        self.assert_one_line(self.run_command('evaluate.py', checkpoint, '--dataset', 'mnist'), 1, 'MNIST')
        self.assert_one_line(self.run_command('evaluate.py', run / 'results.json'), 1, 'no checkpoint')
        self.assert_one_line(self.run_command('evaluate.py'), 2, 'checkpoint')
        self.assertEqual(sorted(self.folder.rglob('*')), before)

    def test_malicious_checkpoint(self):
        made = self.folder / 'made'

        class Exploit:
            def __reduce__(self):
                return os.mkdir, (str(made),)

        torch.save({'epoch': 1, 'state_dict': Exploit(), 'hyper_parameters': {}, 'callbacks': {}},
                   self.folder / 'bad.ckpt')
        self.assert_one_line(self.run_command('evaluate.py', self.folder / 'bad.ckpt'), 1, 'bad.ckpt is refused')
        self.assertEqual([path.name for path in self.folder.iterdir()], ['bad.ckpt'])

    @unittest.skipUnless(MNIST_DIR, 'there is no MNIST in ../shared/data or ../data')
    def test_mnist(self):
        run, trained = self.train('--dataset', 'mnist', '--data_dir', MNIST_DIR, '--hidden_dims', '16')
        code, stdout, stderr = self.run_command('evaluate.py', run / 'checkpoints' / 'best.ckpt', '--iw_samples', '2')
        self.assertEqual((code, stderr), (0, ''))
        results = json.loads((run / 'evaluation' / 'evaluation.json').read_text())
        self.assertAlmostEqual(results['test_bpd'], trained['test_bpd'], delta=0.002)
        self.assertEqual((results['dataset'], results['binarization']), ('mnist', 'threshold'))


if __name__ == '__main__':
    unittest.main()

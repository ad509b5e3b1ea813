"""Tests of harness/processes.py: `python -m unittest tests/unit/test_processes.py`."""

import os
from types import SimpleNamespace
from unittest import mock

import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

import bmnist
from harness import processes, slurm
from tests.helpers import SeededTest
from utils import sample_reparameterize


def two_processes():
    """The Trainers of two processes, the second of which gets what the first one has sent, and the list of it."""
    sent = []
    first = SimpleNamespace(is_global_zero=True, strategy=mock.Mock(broadcast=lambda x: sent.append(x) or x))
    second = SimpleNamespace(is_global_zero=False, strategy=mock.Mock(broadcast=lambda x: sent[-1]))
    return first, second, sent


TORCHRUN = dict(TORCHELASTIC_RUN_ID="x", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", WORLD_SIZE="4")
MANUAL = dict(MASTER_ADDR="n1", MASTER_PORT="9", NODE_RANK="0", LOCAL_RANK="1", WORLD_SIZE="2")


class TestEnvironment(SeededTest):
    def environment(self, variables, devices=1, num_nodes=1, run_name=None, tasks=(1, 1)):
        """The environment of a run, in a process with these variables and no others."""
        with (
            mock.patch.dict(os.environ, variables, clear=True),
            mock.patch.object(rank_zero_only, "rank", 1),
            mock.patch.object(slurm, "tasks", return_value=tasks),
            mock.patch.object(slurm, "environment", lambda: SLURMEnvironment(auto_requeue=False)),
        ):
            environment = processes.environment(devices, num_nodes, run_name)
            self.rank, self.left = rank_zero_only.rank, dict(os.environ)
            self.starts_others = not environment.creates_processes_externally
        return environment

    def test_a_single_process_is_the_first(self):
        """Whatever is in its environment; only what torchrun or srun has started cannot be a single one."""
        for variables in [
            {},
            *({name: value} for name, value in {**TORCHRUN, **MANUAL, "SLURM_PROCID": "1"}.items()),
            MANUAL,
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            *({**TORCHRUN, "LOCAL_WORLD_SIZE": value} for value in ["", "0", "x"]),
            dict(
                SLURM_NTASKS="4", SLURM_PROCID="1", SLURM_LOCALID="1", JSM_NAMESPACE_RANK="1", OMPI_COMM_WORLD_RANK="1"
            ),
        ]:
            environment = self.environment(variables)
            self.assertEqual((type(environment), environment.global_rank(), self.rank), (LightningEnvironment, 0, 0))
        self.assertIsInstance(self.environment({}, run_name="x", tasks=(2, 2)), LightningEnvironment)
        self.assertEqual(self.rank, 0)

    def test_what_was_started(self):
        self.assertIsInstance(self.environment(TORCHRUN, 2, 2), TorchElasticEnvironment)
        self.assertIsInstance(self.environment({}, 2, 2, tasks=(2, 2)), SLURMEnvironment)
        self.assertIsInstance(self.environment({}, 2, 2, "x", tasks=(2, 2)), SLURMEnvironment)
        self.assertIsInstance(self.environment(TORCHRUN, 2, 2, tasks=(4, 1)), TorchElasticEnvironment)  # srun torchrun

    def test_lightning_starts_the_others(self):
        """On one node, whatever others have left; but not in the processes that it or somebody has started."""
        for variables in [
            {},
            *({name: value} for name, value in {**TORCHRUN, **MANUAL}.items()),
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"},
            dict(MASTER_ADDR="nowhere", MASTER_PORT="1", NODE_RANK="1", GROUP_RANK="2", WORLD_SIZE="8", RANK="3"),
        ]:
            self.assertIsInstance(self.environment(variables, devices=2), LightningEnvironment)
            self.assertTrue(self.starts_others)
            self.assertLessEqual(self.left.keys(), {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"})
        self.assertIsInstance(self.environment(MANUAL, devices=2), LightningEnvironment)
        self.assertFalse(self.starts_others)
        self.assertEqual(self.left, MANUAL)
        self.environment({**MANUAL, "LOCAL_RANK": "0", "NODE_RANK": "1"}, num_nodes=2)
        self.assertFalse(self.starts_others)
        without_local_rank = {name: value for name, value in MANUAL.items() if name != "LOCAL_RANK"}
        self.environment({**without_local_rank, "WORLD_SIZE": "4"}, devices=2, num_nodes=2)  # one process per node
        self.assertTrue(self.starts_others)

    def test_what_cannot_work(self):
        for variables, devices, num_nodes, message in [
            (TORCHRUN, 1, 1, "torchrun has started 4 processes: give --devices 2 --num_nodes 2 .*TORCHELASTIC_RUN_ID"),
            (TORCHRUN, 4, 1, "torchrun has started 4 processes: give --devices 2 --num_nodes 2"),
            ({}, 1, 2, "srun or torchrun.*MASTER_ADDR, MASTER_PORT, NODE_RANK$"),
            (dict(MASTER_ADDR="n1", MASTER_PORT="9", WORLD_SIZE="2"), 1, 2, "environment NODE_RANK$"),
            ({**MANUAL, "WORLD_SIZE": "4"}, 2, 1, "WORLD_SIZE=4 .* does not fit --devices 2 --num_nodes 1"),
            ({**MANUAL, "LOCAL_RANK": "2"}, 2, 1, "LOCAL_RANK=2 .* does not fit"),
            ({**MANUAL, "LOCAL_RANK": "x"}, 2, 1, "LOCAL_RANK=x .* unset LOCAL_RANK"),
            ({**MANUAL, "NODE_RANK": "1"}, 2, 1, "NODE_RANK=1 .* does not fit"),
        ]:
            with self.assertRaisesRegex(ValueError, message):
                self.environment(variables, devices, num_nodes)


class TestSampler(SeededTest):
    def setUp(self):
        self.dataset = bmnist.BinaryImages(torch.zeros(23, 2, 2, dtype=torch.uint8), torch.arange(23))

    def sampler(self, shuffle=True, world_size=1, rank=0, seed=3):
        trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        return processes.sampler(self.dataset, shuffle, trainer, seed)

    def test_shares_make_the_minibatches_of_one_process(self):
        for shuffle in [True, False]:
            orders = set()
            for epoch in range(2):
                batches = {}
                for world_size in [1, 2, 4]:
                    labels_of = []
                    for rank in range(world_size):
                        sampler = self.sampler(shuffle, world_size, rank)
                        if shuffle:
                            sampler.set_epoch(epoch)
                        loader = DataLoader(self.dataset, 8 // world_size, sampler=sampler)
                        labels_of.append([labels.tolist() for _, labels in loader])
                    batches[world_size] = [sorted(sum(parts, [])) for parts in zip(*labels_of, strict=True)]
                orders.add(str(batches[1]))
                for world_size in [2, 4]:
                    last, expected = batches[world_size][2], batches[1][2]
                    self.assertEqual(batches[world_size][:2], batches[1][:2])
                    if shuffle:  # one comes twice, so that the shares are as long
                        self.assertEqual(len(last), 8)
                        self.assertLessEqual(set(expected), set(last))
                    else:
                        self.assertEqual(last, expected)
                self.assertEqual(sorted(sum(batches[1], [])), list(range(23)))
            self.assertEqual(len(orders), 2 if shuffle else 1)

    def test_order_and_draws_depend_on_seed_and_epoch_alone(self):
        orders, draw_seeds = set(), set()
        for seed in [3, 4]:
            for epoch in range(3):
                seen = set()
                for world_size, rank in [(1, 0), (2, 0), (2, 1), (1, 0)]:
                    sampler = self.sampler(True, world_size, rank, seed)
                    torch.manual_seed(len(orders))
                    sampler.set_epoch(epoch)
                    seen.add(sampler.draw_seed())
                self.assertEqual(len(seen), 1)
                draw_seeds |= seen
                orders.add(str(list(sampler)))
        self.assertEqual((len(orders), len(draw_seeds)), (6, 6))


class TestRandomNumbers(SeededTest):
    def test_seeds(self):
        seeds = {processes.derived_seed(seed, epoch) for seed in range(9) for epoch in range(9)}
        self.assertEqual(len(seeds), 81)

    def test_each_epoch_begins_with_its_own(self):
        """And validation before the first one, and the test, whatever was drawn before."""

        def drawn(hook, seed=3, epoch=0, fn="fit"):
            torch.rand(seed)
            trainer = SimpleNamespace(current_epoch=epoch, state=SimpleNamespace(fn=fn))
            hooks = processes.RunHooks(seed)
            hooks.setup(trainer, None, fn)
            getattr(hooks, hook)(trainer, None)
            return torch.rand(()).item()

        start = "on_train_epoch_start"
        epochs = [drawn(start, seed=seed, epoch=epoch) for seed in [3, 4] for epoch in range(3)]
        self.assertEqual(epochs, [drawn(start, seed=seed, epoch=epoch) for seed in [3, 4] for epoch in range(3)])
        others = [drawn("on_validation_start", fn="validate", seed=seed) for seed in [3, 4]]
        self.assertEqual(others, [drawn("on_test_start", fn="test", seed=seed) for seed in [3, 4]])
        self.assertEqual(len({*epochs, *others}), 8)
        self.assertNotEqual(drawn("on_validation_start"), drawn("on_validation_start"))  # within an epoch

    def test_shares_of_the_noise(self):
        mean, std = torch.randn(2, 12, 5)
        torch.manual_seed(1)
        expected = sample_reparameterize(mean, std)
        for world_size in [1, 2, 3]:
            for rank in range(world_size):
                torch.manual_seed(1)
                with processes.SharedNoise(rank, world_size):
                    z = sample_reparameterize(mean[rank::world_size], std[rank::world_size])
                torch.testing.assert_close(z, expected[rank::world_size], rtol=0, atol=0)

    def test_noise_is_like_the_share(self):
        for share in [torch.zeros(4, 2, 3, dtype=torch.float64), torch.zeros(4, device="meta")]:
            with processes.SharedNoise(1, 2):
                noise = torch.randn_like(share)
            self.assertEqual((noise.shape, noise.dtype, noise.device), (share.shape, share.dtype, share.device))


class TestRankZero(SeededTest):
    def test_on_rank_zero(self):
        first, second, _ = two_processes()
        self.assertEqual(processes.on_rank_zero(first, lambda *args: args, 5, 6), (5, 6))
        self.assertEqual(processes.on_rank_zero(second, None), (5, 6))
        with self.assertRaises(ZeroDivisionError):
            processes.on_rank_zero(first, lambda: 1 / 0)
        with self.assertRaises(SystemExit) as caught:
            processes.on_rank_zero(second, None)
        self.assertEqual(caught.exception.code, 1)

    def test_rank_zero_first(self):
        """The first process is through when it sends, and the second works only once it has that."""
        first, second, sent = two_processes()
        worked = []
        with processes.rank_zero_first(first):
            self.assertEqual(sent, [])
            worked.append("first")
        self.assertEqual(len(sent), 1)
        second.strategy.broadcast = lambda x: worked.append("received") or sent[-1]
        with processes.rank_zero_first(second):
            worked.append("second")
        self.assertEqual(worked, ["first", "received", "second"])

    def test_error_of_rank_zero_ends_all(self):
        first, second, _ = two_processes()
        with self.assertRaises(ZeroDivisionError), processes.rank_zero_first(first):
            raise ZeroDivisionError
        worked = []
        with self.assertRaises(SystemExit) as caught, processes.rank_zero_first(second):
            worked.append("second")
        self.assertEqual((caught.exception.code, worked), (1, []))

    def test_error_of_another_process_is_its_own(self):
        first, second, _ = two_processes()
        with processes.rank_zero_first(first):
            pass
        with self.assertRaises(ZeroDivisionError), processes.rank_zero_first(second):
            raise ZeroDivisionError


class TestConnected(SeededTest):
    def test_connected(self):
        """The processes are started at once, and disconnected at the end, unless there is an error."""
        trainer = mock.Mock()
        with mock.patch.object(processes, "disconnect") as disconnect:
            with processes.connected(trainer):
                trainer.strategy.launcher.launch.assert_called_once_with(trainer.strategy.setup_environment)
                disconnect.assert_not_called()
            disconnect.assert_called_once_with()
            with self.assertRaises(ZeroDivisionError), processes.connected(trainer):
                raise ZeroDivisionError
            disconnect.assert_called_once_with()

    def test_a_single_process_needs_no_start(self):
        with processes.connected(SimpleNamespace(strategy=SimpleNamespace(launcher=None))):
            self.assertFalse(torch.distributed.is_initialized())

    def test_disconnect(self):
        for is_connected in [False, True]:
            with mock.patch.multiple(
                torch.distributed,
                is_initialized=mock.Mock(return_value=is_connected),
                destroy_process_group=mock.DEFAULT,
            ) as patched:
                processes.disconnect()
            self.assertEqual(patched["destroy_process_group"].call_count, int(is_connected))

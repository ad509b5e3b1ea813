"""Tests of harness/processes.py: `python -m unittest tests/unit/test_processes.py`."""

import itertools
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
    """Returns mock Trainers of two processes and the sent values. The second process receives what the first sends."""
    sent = []
    first = SimpleNamespace(is_global_zero=True, strategy=mock.Mock(broadcast=lambda x: sent.append(x) or x))
    second = SimpleNamespace(is_global_zero=False, strategy=mock.Mock(broadcast=lambda x: sent[-1]))
    return first, second, sent


TORCHRUN = dict(TORCHELASTIC_RUN_ID="x", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", WORLD_SIZE="4")
MANUAL = dict(MASTER_ADDR="n1", MASTER_PORT="9", NODE_RANK="0", LOCAL_RANK="1", WORLD_SIZE="2")


class TestEnvironment(SeededTest):
    def environment(self, variables, devices=1, num_nodes=1, run_name=None, tasks=(1, 1)):
        """Returns the environment of a run in a process that has only these environment variables."""
        with (
            mock.patch.dict(os.environ, variables, clear=True),
            mock.patch.object(rank_zero_only, "rank", 1),
            mock.patch.object(slurm, "srun_tasks", return_value=tasks),
            mock.patch.object(slurm, "cluster_environment", lambda: SLURMEnvironment(auto_requeue=False)),
        ):
            environment = processes.cluster_environment(devices, num_nodes, run_name)
            self.rank, self.left = rank_zero_only.rank, dict(os.environ)
            self.starts_others = not environment.creates_processes_externally
        return environment

    def test_a_single_process_is_rank_zero_even_if_environment_variables_say_otherwise(self):
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
            with self.subTest(variables):
                environment = self.environment(variables)
                found = type(environment), environment.global_rank(), self.rank
                self.assertEqual(found, (LightningEnvironment, 0, 0))
        self.assertIsInstance(self.environment({}, run_name="x", tasks=(2, 2)), LightningEnvironment)
        self.assertEqual(self.rank, 0)

    def test_the_processes_that_torchrun_or_srun_has_started_train_one_run(self):
        self.assertIsInstance(self.environment(TORCHRUN, 2, 2), TorchElasticEnvironment)
        self.assertIsInstance(self.environment({}, 2, 2, tasks=(2, 2)), SLURMEnvironment)
        self.assertIsInstance(self.environment({}, 2, 2, "x", tasks=(2, 2)), SLURMEnvironment)
        self.assertIsInstance(self.environment(TORCHRUN, 2, 2, tasks=(4, 1)), TorchElasticEnvironment)  # srun torchrun

    def test_on_one_node_lightning_starts_the_other_processes_even_if_old_environment_variables_exist(self):
        for variables in [
            {},
            *({name: value} for name, value in {**TORCHRUN, **MANUAL}.items()),
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"},
            dict(MASTER_ADDR="nowhere", MASTER_PORT="1", NODE_RANK="1", GROUP_RANK="2", WORLD_SIZE="8", RANK="3"),
        ]:
            with self.subTest(variables):
                self.assertIsInstance(self.environment(variables, devices=2), LightningEnvironment)
                self.assertTrue(self.starts_others)
                self.assertLessEqual(self.left.keys(), {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"})

    def test_a_process_that_was_started_by_hand_finds_the_others_through_environment_variables(self):
        without_local_rank = {name: value for name, value in MANUAL.items() if name != "LOCAL_RANK"}
        for variables, devices, num_nodes, starts_others in [
            (MANUAL, 2, 1, False),
            ({**MANUAL, "LOCAL_RANK": "0", "NODE_RANK": "1"}, 1, 2, False),
            ({**without_local_rank, "WORLD_SIZE": "4"}, 2, 2, True),  # one process per node
        ]:
            with self.subTest(variables):
                self.assertIsInstance(self.environment(variables, devices, num_nodes), LightningEnvironment)
                self.assertEqual((self.starts_others, self.left), (starts_others, variables))

    def test_environment_variables_and_processes_that_do_not_match_the_flags_are_refused(self):
        for variables, devices, num_nodes, message in [
            (TORCHRUN, 1, 1, "torchrun has started 4 processes: give --devices 2 --num_nodes 2 .*TORCHELASTIC_RUN_ID"),
            (TORCHRUN, 4, 1, "torchrun has started 4 processes: give --devices 2 --num_nodes 2"),
            ({}, 1, 2, "srun or torchrun.*MASTER_ADDR, MASTER_PORT, NODE_RANK$"),
            (dict(MASTER_ADDR="n1", MASTER_PORT="9", WORLD_SIZE="2"), 1, 2, "environment variables NODE_RANK$"),
            ({**MANUAL, "WORLD_SIZE": "4"}, 2, 1, "WORLD_SIZE=4 .* is invalid for --devices 2 --num_nodes 1"),
            ({**MANUAL, "LOCAL_RANK": "2"}, 2, 1, "LOCAL_RANK=2 .* is invalid for"),
            ({**MANUAL, "LOCAL_RANK": "x"}, 2, 1, "LOCAL_RANK=x .* unset LOCAL_RANK"),
            ({**MANUAL, "NODE_RANK": "1"}, 2, 1, "NODE_RANK=1 .* is invalid for"),
        ]:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                self.environment(variables, devices, num_nodes)


class TestSampler(SeededTest):
    def setUp(self):
        self.dataset = bmnist.BinaryImages(torch.zeros(23, 2, 2, dtype=torch.uint8), torch.arange(23))

    def sampler(self, shuffle=True, world_size=1, rank=0, seed=3):
        trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        return processes.sampler(self.dataset, shuffle, trainer, seed)

    def test_the_shares_of_the_processes_make_up_the_minibatches_of_one_process(self):
        """With shuffling, an image comes twice in the last minibatch, so that all shares have the same length."""
        for shuffle in [True, False]:
            batches = {}
            for world_size in [1, 2, 4]:
                shares = []
                for rank in range(world_size):
                    loader = DataLoader(self.dataset, 8 // world_size, sampler=self.sampler(shuffle, world_size, rank))
                    shares.append([labels.tolist() for _, labels in loader])
                batches[world_size] = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
            self.assertEqual(sorted(sum(batches[1], [])), list(range(23)))
            for world_size in [2, 4]:
                self.assertEqual(batches[world_size][:2], batches[1][:2])
                last, expected = batches[world_size][2], batches[1][2]
                self.assertEqual(len(last), 8 if shuffle else 7)
                self.assertLessEqual(set(expected), set(last))

    def test_the_order_and_the_seed_for_sampled_images_depend_only_on_seed_and_epoch(self):
        orders, resampling_seeds = set(), set()
        for seed, epoch in itertools.product([3, 4], range(3)):
            seen = set()
            for world_size, rank in [(1, 0), (2, 0), (2, 1), (1, 0)]:
                sampler = self.sampler(True, world_size, rank, seed)
                torch.manual_seed(len(orders))
                sampler.set_epoch(epoch)
                seen.add(sampler.resampling_seed())
            self.assertEqual(len(seen), 1)
            resampling_seeds |= seen
            orders.add(str(list(sampler)))
        self.assertEqual((len(orders), len(resampling_seeds)), (6, 6))


class TestRandomNumbers(SeededTest):
    def test_every_epoch_the_first_validation_and_the_test_start_with_their_own_random_numbers(self):
        def sampled(hook, seed=3, epoch=0, fn="fit"):
            torch.rand(seed)
            trainer = SimpleNamespace(current_epoch=epoch, state=SimpleNamespace(fn=fn))
            hooks = processes.RunHooks(seed)
            hooks.setup(trainer, None, fn)
            getattr(hooks, hook)(trainer, None)
            return torch.rand(()).item()

        start = "on_train_epoch_start"
        epochs = [sampled(start, seed=seed, epoch=epoch) for seed in [3, 4] for epoch in range(3)]
        self.assertEqual(epochs, [sampled(start, seed=seed, epoch=epoch) for seed in [3, 4] for epoch in range(3)])
        others = [sampled("on_validation_start", fn="validate", seed=seed) for seed in [3, 4]]
        self.assertEqual(others, [sampled("on_test_start", fn="test", seed=seed) for seed in [3, 4]])
        self.assertEqual(len({*epochs, *others}), 8)
        self.assertNotEqual(sampled("on_validation_start"), sampled("on_validation_start"))  # within an epoch

    def test_the_shares_of_the_noise_make_up_the_noise_of_one_process(self):
        mean, std = torch.randn(2, 12, 5, dtype=torch.float64)
        torch.manual_seed(1)
        expected = sample_reparameterize(mean, std)
        for world_size in [1, 2, 3]:
            for rank in range(world_size):
                torch.manual_seed(1)
                with processes.SharedNoise(rank, world_size):
                    z = sample_reparameterize(mean[rank::world_size], std[rank::world_size])
                torch.testing.assert_close(z, expected[rank::world_size], rtol=0, atol=0)
        with processes.SharedNoise(1, 2):
            self.assertEqual(torch.randn_like(torch.zeros(4, device="meta")).device.type, "meta")


class TestRanks(SeededTest):
    def test_all_ranks_get_the_result_of_rank_zero_or_end(self):
        first, second, _ = two_processes()
        self.assertEqual(processes.on_rank_zero(first, lambda *args: args, 5, 6), (5, 6))
        self.assertEqual(processes.on_rank_zero(second, None), (5, 6))
        with self.assertRaises(ZeroDivisionError):
            processes.on_rank_zero(first, lambda: 1 / 0)
        with self.assertRaises(SystemExit) as caught:
            processes.on_rank_zero(second, None)
        self.assertEqual(caught.exception.code, 1)

    def test_the_other_ranks_wait_until_rank_zero_has_finished(self):
        first, second, sent = two_processes()
        second.strategy.broadcast = lambda x: events.append("received") or sent[-1]
        events = []
        with processes.rank_zero_first(first):
            events.append(f"rank 0, {len(sent)} sent")
        with processes.rank_zero_first(second):
            events.append(f"rank 1, {len(sent)} sent")
        self.assertEqual(events, ["rank 0, 0 sent", "received", "rank 1, 1 sent"])

    def test_an_error_of_rank_zero_ends_the_other_ranks_before_they_run_the_block(self):
        first, second, _ = two_processes()
        with self.assertRaises(ZeroDivisionError), processes.rank_zero_first(first):
            raise ZeroDivisionError
        with self.assertRaises(SystemExit) as caught, processes.rank_zero_first(second):
            self.fail("rank 1 has begun")
        self.assertEqual(caught.exception.code, 1)

    def test_the_processes_do_not_disconnect_after_an_error(self):
        """One of them may be in the middle of a collective operation."""
        group = processes.process_group(mock.Mock())
        with mock.patch.object(processes, "disconnect") as disconnect, self.assertRaises(ZeroDivisionError), group:
            raise ZeroDivisionError
        disconnect.assert_not_called()

"""Tests of harness/cuda_graph.py on a CPU: `python -m unittest tests/unit/test_cuda_graph.py`."""

import operator
import unittest
from unittest import mock

import pytorch_lightning as pl
import torch

from harness import cuda_graph
from tests.helpers import ChunksTest
from train_pl import VAE


class TestRefusal(unittest.TestCase):
    def test_no_use(self):
        refusal = cuda_graph.Refusal("batch_idx")
        for use in [
            *(bool, int, float, len, list, str, hash, abs, round, range, operator.index, operator.neg),
            *(lambda x: x % 2, lambda x: 2 * x, lambda x: x == 0, lambda x: x >= 3, lambda x: x // 2, lambda x: f"{x}"),
            *(lambda x: x.current_epoch, lambda x: x.bit_length(), lambda x: [1, 2][x], lambda x: x in [1]),
            *(lambda x: torch.ones(2) * x, lambda x: x + torch.ones(2), lambda x: {x: 1}, lambda x: x and 1),
        ]:
            with self.assertRaisesRegex(cuda_graph.CaptureError, "^training_step uses batch_idx, which a graph"):
                use(refusal)
        self.assertIsNotNone(refusal)


class TestNames(unittest.TestCase):
    @unittest.skipUnless(torch.version.cuda, "this torch is built without CUDA")
    def test_this_torch_has_them(self):
        """What torch has no public function for."""
        for names in [{"_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"}, {"_cuda_releasePool"}]:
            self.assertTrue(names & set(dir(torch._C)), names)


class TestCapture(unittest.TestCase):
    """The calls to torch.cuda, on mocks of them."""

    def setUp(self):
        names = ["Stream", "CUDAGraph", "current_stream", "set_stream", "stream", "graph", "graph_pool_handle"]
        self.generator = mock.MagicMock()
        self.sync_modes = []
        self.allocator = mock.MagicMock()
        for patch in [
            mock.patch.multiple(
                torch.cuda,
                default_generators=[None, self.generator],
                current_device=lambda: 1,
                get_sync_debug_mode=lambda: 0,
                set_sync_debug_mode=self.sync_modes.append,
                **{name: mock.MagicMock() for name in names},
            ),
            mock.patch.multiple(
                torch._C,
                _cuda_endAllocateToPool=self.allocator.end,
                _cuda_releasePool=self.allocator.release,
                create=True,
            ),
            mock.patch.object(cuda_graph, "FAILED", []),
        ]:
            patch.start()
            self.addCleanup(patch.stop)
        torch.cuda.graph.return_value.__exit__.return_value = False  # lets errors pass
        torch.cuda.stream.return_value.__exit__.return_value = False

    def test_capture(self):
        """In the first run nothing may wait for the GPU."""
        modes = []

        def function(number):
            modes.append(self.sync_modes[-1])
            return number + len(modes)

        results = cuda_graph.run_and_capture(function, torch.tensor(5))
        self.assertEqual(results, (6, torch.cuda.CUDAGraph().replay, 7))
        self.assertEqual((modes, self.sync_modes), (["error", 0], ["error", 0]))
        for untouched in [self.generator.graphsafe_set_state, torch.cuda.set_stream, self.allocator.end]:
            untouched.assert_not_called()

    def test_a_run_that_failed(self):
        with self.assertRaises(ZeroDivisionError):
            cuda_graph.run_and_capture(lambda number: 1 / 0, torch.tensor(5))
        self.assertEqual(self.sync_modes, ["error", 0])
        torch.cuda.graph.assert_not_called()
        torch.cuda.current_stream().wait_stream.assert_called_once_with(torch.cuda.Stream())  # before it is undone

    def test_a_capture_that_failed(self):
        """Nothing waits for its end: neither stream nor random numbers nor the allocator."""
        pool = torch.cuda.graph_pool_handle()
        for has_ended, calls in [
            (None, [mock.call.end(1, pool), mock.call.release(1, pool)]),
            (RuntimeError("not currently recording to mempool_id"), [mock.call.end(1, pool)]),
        ]:
            self.allocator.reset_mock()
            self.allocator.end.side_effect = has_ended
            function = mock.Mock(side_effect=[1, RuntimeError("not permitted when stream is capturing\nCUDA kernel")])
            with self.assertRaisesRegex(RuntimeError, "not permitted"):
                cuda_graph.run_and_capture(function, torch.tensor(5))
            self.generator.graphsafe_set_state.assert_called_with(self.generator.clone_state())
            torch.cuda.set_stream.assert_called_with(torch.cuda.current_stream())
            self.assertEqual(self.allocator.mock_calls, calls)
            self.assertEqual(cuda_graph.FAILED, [torch.cuda.CUDAGraph()])

    def test_why(self):
        """Of the error that came first: what ends a capture then raises another."""
        for first, expected in [
            (cuda_graph.CaptureError("training_step uses batch_idx"), "^training_step uses batch_idx$"),
            (torch.OutOfMemoryError("CUDA out of memory."), "^the GPU has too little memory for graphs"),
            (
                RuntimeError("not permitted when stream is capturing\nCUDA"),
                "^training_step waits for the GPU, as .item",
            ),
            (RuntimeError("called a synchronizing CUDA operation"), "^training_step waits for the GPU"),
            (RuntimeError("no kernel image"), "^RuntimeError: no kernel image"),
            (KeyError("beta"), "^KeyError: 'beta'"),
        ]:
            try:
                try:
                    raise first
                finally:
                    raise RuntimeError("operation failed due to a previous error during capture")
            except RuntimeError as error:
                self.assertRegex(cuda_graph.explain(error), expected)
                self.assertNotIn("\n", cuda_graph.explain(error))


def small_vae():
    """An untrained VAE; an old Lightning makes none in a method that calls super()."""
    return VAE("MLP", [16], 4, 2, 1e-3)


class TestSteps(ChunksTest):
    def setUp(self):
        super().setUp()
        self.model = small_vae()
        self.model.trainer = self.trainer = object()
        train_set = torch.utils.data.TensorDataset((torch.rand(12, 1, 28, 28) > 0.5).float(), torch.zeros(12))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.5)
        self.steps = cuda_graph.Steps(self.model, self.optimizer, train_set, 4, pl.plugins.Precision())

    def test_learning_rate_reaches_the_graph(self):
        (group,) = self.optimizer.param_groups
        captured = []

        def minibatches(indices, numbers):
            captured.append((group["lr"], group["capturable"]))
            return indices.sum()

        with mock.patch.object(self.steps, "run", minibatches):
            for size in [4, 3]:
                self.steps.capture(torch.arange(size))
            graphs_read = captured.copy()
            group["lr"] = 0.25
            self.assertEqual(self.steps.replay(torch.full([4], 2)), 8)
        self.assertEqual([(lr.item(), capturable) for lr, capturable in graphs_read], [(0.25, True)] * 2)
        self.assertEqual((group["lr"], group["capturable"]), (0.25, False))
        self.assertIs(self.model.trainer, self.trainer)

    def test_numbers_of_the_minibatches(self):
        numbers = []

        def training_step(batch, batch_idx):
            numbers.append(batch_idx)
            return self.model(batch[0])[2]

        self.model.training_step = training_step
        self.steps.run(torch.arange(12), range(3, 9))
        self.assertEqual(numbers, [3, 4, 5])

    def test_gradients_are_set_to_zero_after_the_step(self):
        """As Lightning does: what training_step leaves in them is gone, too."""
        weight = next(self.model.parameters())

        def training_step(batch, batch_idx):
            loss = self.model(batch[0])[2]
            weight.grad = torch.full_like(weight, 1e6)
            return loss

        self.model.training_step = training_step
        self.steps.run(torch.arange(4), range(1))
        self.assertLess(weight.grad.abs().max(), 1e3)

    def test_settings_come_back(self):
        """After an error, too."""
        (group,) = self.optimizer.param_groups
        for step in [lambda batch, batch_idx: batch_idx + 1, lambda batch, batch_idx: self.model.current_epoch]:
            self.model.training_step = step
            with self.assertRaisesRegex(cuda_graph.CaptureError, "batch_idx|self.trainer"):
                self.steps.capture(torch.arange(12))
            self.assertEqual((group["lr"], group["capturable"]), (0.5, False))
            self.assertIs(self.model.trainer, self.trainer)
            self.assertEqual(torch.get_float32_matmul_precision(), "highest")
            self.assertEqual(self.steps.graphs, {})


if __name__ == "__main__":
    unittest.main()

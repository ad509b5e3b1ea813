"""
Tests of where things are computed: `python -m unittest tests/unit/test_devices.py`.

GPUs are fake: torch's FakeTensorMode runs an operator on tensors that have a shape and a device and no values, and
raises an error where two of them are on different devices.
"""

import argparse
import contextlib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bmnist
import evaluate
import train_torch
import utils
from harness import devices, report
from harness.errors import UserError
from tests.helpers import REPOSITORY, SeededTest, small_loaders
from train_pl import VAE

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
GPUS = [torch.device("cuda", 0), torch.device("mps", 0)]


class NoDouble(TorchDispatchMode):
    """Finds a tensor in double precision on a GPU: Apple's has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                raise TypeError(f"{func} made a tensor in double precision")
        return output


class TestEveryTensorIsOnTheGPU(SeededTest):
    def fake(self, tensor, device):
        """A tensor without values on a device that need not be there."""
        return FakeTensor(self.mode, tensor.detach().to("meta"), device)

    def setUp(self):
        self.mode = FakeTensorMode()
        for patch in [  # what would wait for values
            mock.patch.object(torch.Tensor, "item", lambda tensor: 0.5),
            mock.patch.object(torch.Tensor, "__int__", lambda tensor: 1),
            # A torch without Apple's GPU cannot take single images out of a batch there.
            mock.patch.object(utils, "make_grid", lambda imgs, nrow: imgs),
        ]:
            patch.start()
            self.addCleanup(patch.stop)

    def move(self, model, device):
        """Moves a module to a fake GPU."""
        for part in model.modules():
            for name, tensor in part._parameters.items():
                part._parameters[name] = torch.nn.Parameter(self.fake(tensor, device), requires_grad=False)
            for name, tensor in part._buffers.items():
                part._buffers[name] = self.fake(tensor, device)
        model._device = device  # as LightningModule.to has it
        return model

    def check(self, function, *classes):
        """Calls a function of (device, model, images on the device) for every kind of GPU and model."""
        for device in GPUS:
            for kind in ["MLP", "CNN"]:
                for vae in classes:
                    with self.subTest(device=device, kind=kind, vae=vae):
                        model = self.move(vae(kind, [16, 8], 4, 2, 1e-3), device)
                        imgs = self.fake(torch.zeros(6, 1, 28, 28), device)
                        no_double = NoDouble() if device.type == "mps" else contextlib.nullcontext()
                        with self.mode, no_double, torch.no_grad():
                            function(device, model, imgs)

    def test_the_mode_sees_it(self):
        """A tensor on another device is found."""

        def step(device, model, imgs):
            noise = mock.patch.object(torch, "randn_like", lambda tensor: torch.randn(tensor.shape))
            with noise, self.assertRaisesRegex(Exception, "devices"):
                model.training_step((imgs, None), 0)

        self.check(step, VAE)

    def test_training(self):
        def steps(device, model, imgs):
            output = model.training_step((imgs, None), 0)
            self.assertEqual((output["loss"].device, output["bpd"].device), (device, device))
            model.validation_step((imgs, None), 0)

        self.check(steps, VAE)

    def test_forward_and_samples(self):
        def forward(device, model, imgs):
            tensors = [*model(imgs), *model.sample(3), utils.visualize_manifold(model.decoder)]
            if isinstance(model, VAE):
                tensors += [*model.terms(imgs), model.reconstruct(imgs)]
            self.assertEqual({tensor.device for tensor in tensors}, {device})

        self.check(forward, VAE, train_torch.VAE)

    def test_likelihoods(self):
        def likelihoods(device, model, imgs):
            log_p = utils.log_likelihood(imgs, model.encoder, model.decoder, num_samples=5, chunk_size=12)
            exact = utils.quadrature_log_likelihood(imgs, model.decoder, step=1.0)
            self.assertEqual((log_p.device, log_p.shape, exact.device), (device, (6,), device))

        self.check(likelihoods, VAE, train_torch.VAE)

    def test_evaluation(self):
        """Of images on the CPU; its numbers are made there, since a Mac's GPU has no double precision."""
        cpu = torch.device("cpu")
        tensors = torch.zeros(6, 28, 28, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
        test_set = bmnist.BinaryImages(*(self.fake(tensor, cpu) for tensor in tensors))

        def likelihoods(device, model, imgs):
            coarse = functools.partial(utils.quadrature_log_likelihood, step=1.0)
            with mock.patch.object(evaluate, "quadrature_log_likelihood", coarse):
                results, means = evaluate.likelihoods(model, test_set, iw_samples=5, progress_bar=False)
            self.assertEqual((means.device, results["active_units"], model.device), (cpu, 1, device))
            self.assertIn("log_likelihood_by_quadrature", results)

        self.check(likelihoods, VAE)

    @unittest.skipIf(VERSION < (2, 10), "an older torch looks for the GPU to index a fake tensor")
    def test_images(self):
        """Thresholded and drawn ones, which a generator of the GPU draws."""
        device = GPUS[0]
        for binarization in bmnist.BINARIZATIONS:
            loader, *_ = small_loaders(argparse.Namespace(batch_size=40, binarization=binarization))
            images = loader.dataset
            vars(images).update({name: self.fake(tensor, device) for name, tensor in vars(images).items()})
            generator = mock.Mock()
            generator.return_value.manual_seed.return_value = None
            with self.mode, mock.patch.object(torch, "Generator", generator):
                if binarization == "stochastic":
                    images.redraw(1)
                    generator.assert_called_once_with(device)
                imgs, labels = images[torch.arange(3, device=device)]
            self.assertEqual((imgs.device, labels.device, imgs.shape), (device, device, (3, 1, 28, 28)))


class TestPickDevice(SeededTest):
    """Which device computes, on machines of several kinds."""

    def pick(self, accelerator, error=None, warning=None, names=(), **machine):
        """What is picked, or the error; and what is printed. An error is that of the first computation on a GPU."""

        def is_available():
            if warning:
                warnings.warn(warning, stacklevel=1)
            return bool(machine.get("num_gpus"))

        driver = Path(tempfile.mkdtemp(dir=self.folder))
        for number, name in enumerate(names):
            (driver / str(number)).mkdir()
            (driver / str(number) / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 24\n")
        computed = mock.Mock(side_effect=error)
        with (
            mock.patch.object(torch.backends.mps, "is_available", lambda: machine.get("is_mac", False)),
            mock.patch.multiple(
                torch.cuda,
                is_available=is_available,
                device_count=lambda: machine.get("num_gpus", 0),
                get_device_name=lambda number: f"NVIDIA Tesla K{80 + number}",
                get_device_capability=lambda number: (3, 7),
                get_arch_list=lambda: ["sm_75", "sm_90"],
            ),
            mock.patch.object(devices.torch, "ones", computed),
            mock.patch.object(devices, "GPUS_OF_THE_DRIVER", driver),
            mock.patch.dict(os.environ, machine.get("variables", {})),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            warnings.catch_warnings(record=True) as caught,
        ):
            try:
                kind = devices.pick_device(accelerator, machine.get("num_processes", 1))
            except UserError as raised:
                kind = str(raised)
        self.assertEqual(caught, [])
        self.assertLessEqual(stderr.getvalue().count("\n"), 1)
        self.device = computed.call_args and computed.call_args.kwargs["device"]
        return kind, stderr.getvalue()

    def test_usual_machines(self):
        for accelerator, machine, expected in [
            ("auto", {}, "cpu"),
            ("cpu", dict(num_gpus=1), "cpu"),
            ("auto", dict(num_gpus=1), "cuda"),
            ("gpu", dict(num_gpus=2), "cuda"),
            ("auto", dict(is_mac=True), "mps"),
            ("gpu", dict(is_mac=True), "mps"),
            ("gpu", {}, "--accelerator gpu: there is no GPU here; use auto or cpu"),
        ]:
            self.assertEqual(self.pick(accelerator, **machine), (expected, ""))

    def test_a_gpu_that_is_too_old(self):
        error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")
        words = (
            rf"torch {re.escape(torch.__version__)} cannot use NVIDIA Tesla K80, of compute capability 3.7; it "
            r"supports sm_75, sm_90 \(CUDA error: no kernel image is available for execution on the device\)"
        )
        kind, printed = self.pick("auto", error, num_gpus=1)
        self.assertEqual(kind, "cpu")
        self.assertRegex(printed, f"^on the CPU: {words}")
        kind, printed = self.pick("gpu", error, num_gpus=1)
        self.assertRegex(kind, f"^--accelerator gpu: {words}.*; use auto or cpu$")
        self.assertEqual(printed, "")

    def test_a_driver_that_is_too_old(self):
        """torch takes it for a machine without GPUs, and warns; the driver's files name them."""
        warning = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
        kind, printed = self.pick("auto", warning=warning, names=["NVIDIA A100-SXM4-40GB", "NVIDIA T4"])
        self.assertEqual(kind, "cpu")
        self.assertRegex(
            printed, "^on the CPU: torch .* cannot use NVIDIA A100-SXM4-40GB .*The NVIDIA driver .* too old"
        )
        kind, _ = self.pick("gpu", warning=warning, names=["NVIDIA A100-SXM4-40GB"])
        self.assertRegex(kind, "^--accelerator gpu: torch .* cannot use NVIDIA A100.* too old.*; use auto or cpu$")
        self.assertEqual(self.pick("auto", warning="CUDA initialization: Found no NVIDIA driver"), ("cpu", ""))

    def test_torch_without_cuda(self):
        with mock.patch.object(torch.version, "cuda", None):
            kind, printed = self.pick("auto", names=["NVIDIA T4"])
        self.assertEqual(kind, "cpu")
        self.assertRegex(printed, r"^on the CPU: torch .* cannot use NVIDIA T4 \(it is built without CUDA\)\n$")

    def test_each_process_tries_its_own(self):
        for variables, num_processes, number in [
            ({}, 4, 0),
            (dict(LOCAL_RANK="2"), 4, 2),
            (dict(SLURM_LOCALID="1"), 4, 1),
            (dict(LOCAL_RANK="2"), 1, 0),  # left by another program
            (dict(LOCAL_RANK="5"), 8, 1),
        ]:
            self.pick("auto", num_gpus=4, num_processes=num_processes, variables=variables)
            self.assertEqual(self.device, torch.device("cuda", number))


class TestEvaluation(SeededTest):
    def test_too_little_memory(self):
        """Fewer images are decoded at once, down to one sample of each."""
        test_set = small_loaders(argparse.Namespace(batch_size=50))[2].dataset
        model, sizes, most = VAE("MLP", [4], 4, 3, 1e-3), [], 0
        errors = itertools.cycle(
            [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
        )

        def log_likelihood(imgs, encoder, decoder, num_samples, chunk_size):
            sizes.append(chunk_size)
            if chunk_size > most:
                raise next(errors)
            return torch.zeros(len(imgs))

        with (
            mock.patch.multiple(evaluate, log_likelihood=log_likelihood, BATCH_SIZE=10),
            mock.patch.dict(evaluate.CHUNK_SIZE, cpu=64),
            torch.no_grad(),
        ):
            most = 20
            evaluate.likelihoods(model, test_set, 5, progress_bar=False)
            self.assertEqual(sizes, [64, 32, 16, 16, 16, 16, 16])
            most = 1
            with self.assertRaisesRegex(RuntimeError, "memory"):
                evaluate.likelihoods(model, test_set, 5, progress_bar=False)
            others, errors = len(sizes), itertools.repeat(RuntimeError("something else"))
            with self.assertRaisesRegex(RuntimeError, "something else"):
                evaluate.likelihoods(model, test_set, 5, progress_bar=False)
            self.assertEqual(sizes[others:], [64])
        self.assertEqual(sizes[others - 1], 8)
        self.assertEqual(evaluate.CHUNK_SIZE["gpu"], 16_384)

    def test_large_images(self):
        """Fewer of them at a time, so that they take no more memory than MNIST's."""
        numbers = []
        for sides in [(28, 28), (56, 56), (7, 7), (280, 2800)]:
            test_set = bmnist.BinaryImages(torch.zeros(7, *sides, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64))
            model = VAE("MLP", [1], 4, 2, 1e-3, sides)
            with (
                mock.patch.multiple(evaluate, BATCH_SIZE=4, QUADRATURE_SIZE=16),
                mock.patch.dict(evaluate.CHUNK_SIZE, cpu=8),
                mock.patch.object(evaluate, "log_likelihood", return_value=torch.zeros(7)) as log_likelihood,
                mock.patch.object(evaluate, "quadrature_log_likelihood", return_value=torch.zeros(7)) as quadrature,
                torch.no_grad(),
            ):
                evaluate.likelihoods(model, test_set, 5, progress_bar=False)
            imgs, *_, chunk_size = log_likelihood.call_args_list[0].args
            numbers.append((len(imgs), chunk_size, quadrature.call_args.kwargs["chunk_size"]))
        self.assertEqual(numbers, [(4, 8, 16), (1, 2, 4), (4, 8, 16), (1, 1, 1)])


class TestQuiet(SeededTest):
    def test_warnings_of_torch(self):
        with warnings.catch_warnings(record=True) as caught:
            report.quiet_libraries()
            for text in [
                "The AccumulateGrad node's stream does not match the stream of the node that produced the gradient",
                "Please use the new API settings to control TF32 behavior, such as torch.backends",
                "of another kind",
            ]:
                warnings.warn(text, stacklevel=1)
        self.assertEqual([str(warning.message) for warning in caught], ["of another kind"])

    def test_what_a_mac_cannot_do_runs_on_its_cpu(self):
        code = "import harness, os; print(os.environ['PYTORCH_ENABLE_MPS_FALLBACK'])"
        for value in [None, "0"]:
            environment = {**os.environ, **({"PYTORCH_ENABLE_MPS_FALLBACK": value} if value else {})}
            if value is None:
                environment.pop("PYTORCH_ENABLE_MPS_FALLBACK", None)
            command = [sys.executable, "-c", code]
            run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
            self.assertEqual(run.stdout.strip(), value or "1", run.stderr)


class FastLayoutTest(SeededTest):
    def test_a_state_of_another_layout_goes_on(self):
        """As one does that an older version, or a GPU, has left in a checkpoint: fused Adam would mix it up."""
        results = []
        for layouts in [[torch.contiguous_format] * 2, [torch.contiguous_format, torch.channels_last]]:
            torch.manual_seed(0)
            conv = torch.nn.Conv2d(3, 5, 3)
            state = None
            for layout in layouts:
                conv.to(memory_format=layout)
                optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, fused=True)
                if state:
                    optimizer.load_state_dict(state)
                devices.match_layout([optimizer])
                conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
                optimizer.step()
                state = optimizer.state_dict()
            results.append(conv.weight.detach())
        torch.testing.assert_close(*results)

    def test_convolutions_on_a_cpu(self):
        model = VAE("CNN", [8], 4, 2, 1e-3)
        self.assertIs(devices.use_fast_layout(model), model)
        self.assertTrue(model.encoder.net[2].weight.is_contiguous(memory_format=torch.channels_last))


if __name__ == "__main__":
    unittest.main()

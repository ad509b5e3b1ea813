"""
Tests of harness/devices.py, and of the device of every tensor: `python -m unittest tests/unit/test_devices.py`.

GPUs are fake: torch's FakeTensorMode runs operators on tensors that have a shape and a device but no values, and raises
an error if two of them are on different devices.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bmnist
import likelihoods
import train_torch
import utils
from harness import devices
from harness.errors import UserError
from tests.helpers import SeededTest, printed_lines, small_loaders
from train_pl import VAE

GPUS = [torch.device("cuda", 0), torch.device("mps", 0)]


class NoDouble(TorchDispatchMode):
    """Context manager that raises an error for a float64 tensor on a GPU: Apple's GPU does not support float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                raise TypeError(f"{func} made a tensor in double precision")
        return output


class TestEveryTensorIsOnTheGPU(SeededTest):
    def fake(self, tensor, device):
        """Returns a tensor without values, on a device that need not exist."""
        return FakeTensor(self.mode, tensor.detach().to("meta"), device)

    def setUp(self):
        self.mode = FakeTensorMode()
        # These methods need the values of a tensor, so a meta tensor has none
        self.enter(mock.patch.multiple(torch.Tensor, item=lambda tensor: 0.5, __int__=lambda tensor: 1))
        # torch without support for Apple's GPU cannot index single images of a batch on it.
        self.enter(mock.patch.object(utils, "make_grid", lambda imgs, nrow: imgs))

    def move(self, model, device):
        for part in model.modules():
            for name, tensor in part._parameters.items():
                part._parameters[name] = torch.nn.Parameter(self.fake(tensor, device), requires_grad=False)
            for name, tensor in part._buffers.items():
                part._buffers[name] = self.fake(tensor, device)
        model._device = device  # LightningModule.to sets it
        return model

    def check(self, function, *classes):
        """Calls a function with (device, model, images on the device) for every kind of GPU and model."""
        for device, kind, vae in itertools.product(GPUS, ["MLP", "CNN"], classes):
            with self.subTest(device=device, kind=kind, vae=vae):
                model = self.move(vae(kind, [16, 8], 4, 2, 1e-3), device)
                imgs = self.fake(torch.zeros(6, 1, 28, 28), device)
                no_double = NoDouble() if device.type == "mps" else contextlib.nullcontext()
                with self.mode, no_double, torch.no_grad():
                    function(device, model, imgs)

    def test_a_tensor_on_another_device_is_found(self):
        def step(device, model, imgs):
            noise = mock.patch.object(torch, "randn_like", lambda tensor: torch.randn(tensor.shape))
            with noise, self.assertRaisesRegex(Exception, "devices"):
                model.training_step((imgs, None), 0)

        self.check(step, VAE)

    def test_training_validation_samples_and_the_manifold_stay_on_the_gpu(self):
        def compute(device, model, imgs):
            tensors = [*model(imgs), *model.sample(3), utils.visualize_manifold(model.decoder)]
            if isinstance(model, VAE):
                tensors += [*model.terms(imgs), model.reconstruct(imgs), *model.training_step((imgs, None), 0).values()]
                model.validation_step((imgs, None), 0)
            self.assertEqual({tensor.device for tensor in tensors}, {device})

        self.check(compute, VAE, train_torch.VAE)

    def test_an_evaluation_moves_its_numbers_to_the_cpu(self):
        """Apple's GPU does not support float64."""
        cpu = torch.device("cpu")
        tensors = torch.zeros(6, 28, 28, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
        test_set = bmnist.BinaryImages(*(self.fake(tensor, cpu) for tensor in tensors))

        def numbers(device, model, imgs):
            coarse = functools.partial(utils.quadrature_log_likelihood, step=1.0)
            with mock.patch.object(likelihoods, "quadrature_log_likelihood", coarse):
                found = [
                    *likelihoods.posteriors(model, test_set),
                    likelihoods.quadrature_log_likelihoods(model, test_set),
                ]
            found.append(likelihoods.log_likelihoods(model, test_set, iw_samples=5))
            self.assertEqual(({values.device for values in found}, model.device), ({cpu}, device))

        self.check(numbers, VAE)


class TestPickDevice(SeededTest):
    def pick(self, accelerator, error=None, warning=None, names=(), **machine):
        """
        Returns the result of pick_device on a machine, or the message of its error, and what is printed. `error` is the
        error of the first computation on the GPU, `warning` is what torch warns when it looks for a GPU, and `names`
        are the driver's names of the GPUs.
        """

        def is_available():
            if warning:
                warnings.warn(warning, stacklevel=1)
            return bool(machine.get("num_gpus"))

        names_of_variables = os.environ.keys() - {
            "CUDA_VISIBLE_DEVICES",
            "SLURM_JOB_ID",
            "SLURM_GPUS_ON_NODE",
            "SLURM_JOB_GPUS",
        }
        environment = {name: os.environ[name] for name in names_of_variables}
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
            mock.patch.object(torch.version, "cuda", machine.get("cuda", "13.0")),
            mock.patch.object(devices.torch, "ones", computed),
            mock.patch.object(devices, "GPUS_OF_THE_DRIVER", driver),
            mock.patch.dict(os.environ, {**environment, **machine.get("variables", {})}, clear=True),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            warnings.catch_warnings(record=True) as caught,
        ):
            try:
                kind = devices.pick_device(accelerator, machine.get("num_processes", 1))
            except UserError as raised:
                kind = str(raised)
        self.assertEqual(caught, [])
        self.device = computed.call_args and computed.call_args.kwargs["device"]
        return kind, stderr.getvalue()

    def test_a_gpu_is_used_if_there_is_one_unless_the_cpu_is_requested(self):
        for accelerator, machine, expected in [
            ("auto", {}, "cpu"),
            ("cpu", dict(num_gpus=1), "cpu"),
            ("auto", dict(num_gpus=1), "cuda"),
            ("gpu", dict(num_gpus=2), "cuda"),
            ("auto", dict(is_mac=True), "mps"),
            ("gpu", dict(is_mac=True), "mps"),
            ("gpu", {}, "--accelerator gpu: this machine has no GPU; use auto or cpu"),
        ]:
            with self.subTest(accelerator=accelerator, **machine):
                self.assertEqual(self.pick(accelerator, **machine), (expected, ""))

    def test_the_message_names_a_gpu_that_torch_cannot_use_and_the_reason(self):
        """If the driver is too old, torch finds no GPU and warns; the driver's files contain the names of the GPUs."""
        message = "CUDA error: no kernel image is available for execution on the device"
        too_old = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
        names = ["NVIDIA A100-SXM4-40GB", "NVIDIA T4"]
        for machine, gpu, reason in [
            (
                dict(num_gpus=1, error=RuntimeError(f"{message}\nCUDA kernel errors")),
                "NVIDIA Tesla K80, compute capability 3.7; it supports sm_75, sm_90",
                message,
            ),
            (dict(names=names, warning=too_old), names[0], too_old),
            (dict(names=names, cuda=None), names[0], "this torch is built without CUDA"),
            (
                dict(names=names, cuda=None, variables={"CUDA_VISIBLE_DEVICES": "0"}),
                names[0],
                "this torch is built without CUDA",
            ),
        ]:
            with self.subTest(reason):
                words = (
                    f"torch {torch.__version__} cannot use {gpu} ({reason}): install a version of torch that supports "
                    "this GPU and its driver"
                )
                self.assertEqual(self.pick("auto", **machine), ("cpu", f"warning: using the CPU: {words}\n"))
                self.assertEqual(self.pick("gpu", **machine), (f"--accelerator gpu: {words}; use auto or cpu", ""))
        self.assertEqual(self.pick("auto", warning="CUDA initialization: Found no NVIDIA driver"), ("cpu", ""))

    def test_if_no_gpu_is_visible_to_the_process_the_message_says_what_to_do(self):
        """There is no message if the user has hidden the GPU, unless the user requests a GPU nevertheless."""
        names, hidden = ["NVIDIA A100-SXM4-40GB"], "CUDA_VISIBLE_DEVICES"
        for variables, remedy, is_told in [
            ({}, "start the container with --gpus all (Docker) or --nv (Apptainer)", True),
            ({"SLURM_JOB_ID": "7"}, "request a GPU from SLURM with --gpus=1", True),
            ({"SLURM_JOB_ID": "7", hidden: "NoDevFiles"}, "request a GPU from SLURM with --gpus=1", True),
            ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", hidden: "5"}, f"unset {hidden}, which is '5'", True),
            ({hidden: "5"}, f"unset {hidden}, which is '5'", True),
            ({hidden: ""}, f"unset {hidden}, which is ''", False),
            ({hidden: "-1"}, f"unset {hidden}, which is '-1'", False),
        ]:
            container = "start the container with --gpus all (Docker) or --nv (Apptainer)"
            for warning, found in [(None, remedy), ("CUDA initialization: Found no NVIDIA driver on your", container)]:
                words = f"this machine has {names[0]}, but no GPU is visible to this process: {found}"
                machine = dict(names=names, variables=variables, warning=warning)
                with self.subTest(**machine):
                    message = f"warning: using the CPU: {words}\n" if is_told else ""
                    self.assertEqual(self.pick("auto", **machine), ("cpu", message))
                    self.assertEqual(self.pick("gpu", **machine), (f"--accelerator gpu: {words}; use auto or cpu", ""))

    def test_each_process_must_see_as_many_gpus_as_the_flag_devices_says(self):
        with mock.patch.object(torch.cuda, "device_count", return_value=2):
            devices.check_number_of_gpus(2, 2)
            with self.assertRaisesRegex(UserError, "--devices 3 needs as many GPUs, .* sees 2: give --devices 2, or"):
                devices.check_number_of_gpus(3, 1)
            with self.assertRaisesRegex(UserError, "sees 2: give srun --gpus-per-node=3 instead of --gpus-per-task"):
                devices.check_number_of_gpus(3, 3)

    def test_each_process_tries_its_own_gpu(self):
        for variables, num_processes, number in [
            ({}, 4, 0),
            (dict(LOCAL_RANK="2"), 4, 2),
            (dict(SLURM_LOCALID="1"), 4, 1),
            (dict(LOCAL_RANK="2"), 1, 0),  # left behind by another program
            (dict(LOCAL_RANK="5"), 8, 1),
        ]:
            with self.subTest(variables, num_processes=num_processes):
                self.pick("auto", num_gpus=4, num_processes=num_processes, variables=variables)
                self.assertEqual(self.device, torch.device("cuda", number))


class TestMemoryOfAnEvaluation(SeededTest):
    def test_after_out_of_memory_fewer_samples_are_decoded_at_once(self):
        test_set = small_loaders(argparse.Namespace(batch_size=50))[2].dataset
        model, cpu_error = VAE("MLP", [4], 4, 3, 1e-3), RuntimeError("DefaultCPUAllocator: can't allocate memory")

        def log_likelihood(imgs, encoder, decoder, num_samples, chunk_size):
            sizes.append(chunk_size)
            if chunk_size > most:
                raise error
            return torch.zeros(len(imgs))

        self.enter(mock.patch.multiple(likelihoods, log_likelihood=log_likelihood, BATCH_SIZE=10))
        self.enter(mock.patch.dict(likelihoods.DECODE_BATCH_SIZE, cpu=64))
        for error, most, expected in [
            (torch.OutOfMemoryError("CUDA out of memory"), 20, [64, 32, 16, 16, 16, 16, 16]),
            (cpu_error, 20, [64, 32, 16, 16, 16, 16, 16]),
            (cpu_error, 1, [64, 32, 16, 8]),
            (RuntimeError("something else"), 20, [64]),
        ]:
            sizes = []
            fails = self.assertRaises(RuntimeError) if len(expected) < 5 else contextlib.nullcontext()
            with self.subTest(error=error, most=most), printed_lines(), fails as caught, torch.no_grad():
                likelihoods.log_likelihoods(model, test_set, 5)
            self.assertEqual((sizes, caught and str(caught.exception)), (expected, caught and str(error)))

    def test_larger_images_need_no_more_memory_than_those_of_mnist(self):
        for num_images, height, width, expected in [(8, 28, 28, 8), (8, 7, 7, 8), (8, 56, 56, 2), (8, 280, 2800, 1)]:
            with self.subTest(height=height, width=width):
                self.assertEqual(likelihoods.scale_batch_size(num_images, height * width), expected)


class TestCPU(SeededTest):
    def setUp(self):
        self.enter(mock.patch.dict(os.environ))
        for name in ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"]:
            os.environ.pop(name, None)
        self.cgroups = self.folder / "cgroups"
        self.enter(mock.patch.multiple(devices, CGROUPS=self.cgroups, CGROUP_OF_PROCESS=self.folder / "cgroup"))

    def pick(self, threads="auto", before=None, cores=6, torch_threads=5):
        """Returns the number of threads on a machine with these cores, on which torch's default is torch_threads."""
        with (
            mock.patch.object(os, "sched_getaffinity", lambda pid: set(range(cores)), create=True),
            mock.patch.object(torch, "get_num_threads", lambda: torch_threads),
        ):
            return devices.pick_threads(threads, before)

    def test_a_run_uses_all_cores_that_it_may_use_unless_a_flag_a_variable_or_the_resumed_run_limits_them(self):
        for machine, variables, expected in [
            ({}, {}, 5),
            (dict(cores=3), {}, 3),
            (dict(cores=64, torch_threads=64), {}, devices.DEFAULT_THREADS),
            (dict(threads=7), {}, 7),
            (dict(threads=7, before="cpu, 2 threads"), dict(OMP_NUM_THREADS="5"), 7),
            (dict(before="cpu, 2 threads"), {}, 2),
            (dict(before="cpu, 16 threads"), {}, 5),
            (dict(before="cpu, 16 threads", cores=64, torch_threads=64), {}, 16),
            (dict(before="NVIDIA H200"), {}, 5),
            ({}, dict(SLURM_CPUS_PER_TASK="2"), 2),
            ({}, dict(SLURM_CPUS_PER_TASK="", SLURM_CPUS_ON_NODE="3"), 3),
            ({}, dict(SLURM_CPUS_PER_TASK="2", OMP_NUM_THREADS="5"), 5),
        ]:
            with self.subTest(**machine, **variables), mock.patch.dict(os.environ, variables):
                self.assertEqual(self.pick(**machine), expected)

    def test_a_container_gets_as_many_threads_as_its_control_group_has_cores(self):
        """The limit of the group itself or of a parent group counts. There are two versions of control groups."""
        quota, period = "cpu/x/cpu.cfs_quota_us", "cpu/x/cpu.cfs_period_us"
        for text, files, expected in [
            ("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf),
            ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),
            ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
            ("0::/hidden", {"cpu.max": "50000 100000"}, 0.5),
            ("4:memory:/x\n3:cpu,cpuacct:/x", {quota: "200000", period: "100000"}, 2),
            ("3:cpu:/x", {quota: "-1", period: "100000"}, math.inf),
            ("nonsense", {}, math.inf),
        ]:
            with self.subTest(text, files=files):
                shutil.rmtree(self.cgroups, ignore_errors=True)
                devices.CGROUP_OF_PROCESS.write_text(text + "\n")
                for name, content in files.items():
                    path = self.cgroups / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content + "\n")
                self.assertEqual(devices.cgroup_quota(), expected)
                self.assertEqual(self.pick(), max(1, int(min(expected, 5))))

    def test_a_cpu_has_bfloat16_if_linux_lists_it(self):
        with mock.patch.object(devices, "CPU_INFO", self.folder / "cpuinfo"):
            self.assertTrue(devices.has_bf16("cpu"))  # an unknown system, as there is no such file
            for text, expected in [("flags : fpu avx512f\n", False), ("flags : avx512_bf16 fma\n", True)]:
                with self.subTest(text):
                    devices.CPU_INFO.write_text(text)
                    self.assertEqual(devices.has_bf16("cpu"), expected)


class TestLayout(SeededTest):
    def test_the_state_of_adam_gets_the_layout_of_its_weights(self):
        """A checkpoint of an older version or of a GPU may have another layout, which fused Adam would misread."""
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
                devices.match_optimizer_layout([optimizer])
                conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
                optimizer.step()
                state = optimizer.state_dict()
            results.append(conv.weight.detach())
        torch.testing.assert_close(*results)

    def test_weights_of_convolutions_are_channels_last_on_a_cpu(self):
        model = VAE("CNN", [8], 4, 2, 1e-3)
        self.assertIs(devices.use_fast_layout(model), model)
        self.assertTrue(model.encoder.net[2].weight.is_contiguous(memory_format=torch.channels_last))

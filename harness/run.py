"""A training run: started or continued in its folder, trained by its Trainer, finished with its results."""

import contextlib
import functools
import glob
import json
import os
import platform
import re
import shlex
import sys
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchvision.utils import save_image

from harness import checkpoints, graphs, processes, report, slurm, threads
from harness.devices import has_bf16, matmul_precision, pick_device, prepare_cpu, use_fast_layout
from harness.files import atomic_write, write_text
from harness.folder import RunError, finished_results, open_folder
from harness.program import (
    CHECKSUM,
    MAKE_ROOM,
    DiskFullError,
    FlagError,
    UserError,
    best_effort,
    is_disk_full,
    is_out_of_memory,
    is_screen,
    one_line,
    print_line,
    sigterm_raises,
    warn,
)

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}  # Lightning's names
FIGURES = ["bpd_curves.png", "samples_over_training.png", "vae_manifold.png"]
NO_WORKERS = "give --num_workers 0, which is the fastest, since the images are in memory"
WORKERS_FAILED = r"DataLoader worker|shared memory|shm|[Tt]oo many open files|ancdata"  # what torch says then


class Run:
    """
    A training run, and a context in which its processes are connected and its folder is theirs alone:

        with Run(args, defaults, quantities, callbacks) as run:
            if run.is_finished: ...
            loaders = run.start(load_data)
            run.fit(model, train_loader, val_loader)
            run.finish(run.trainer.test(...))

    Inputs:
        args - Namespace of every flag.
        defaults - Dict of every flag's default, which a run of an older version was trained with where it lacks a flag.
        quantities - Dict from the names of the module's main quantities, logged as train_NAME and val_NAME, to titles.
        callbacks - The module's own callbacks for the Trainer.
    Attributes:
        trainer - The Trainer, with all callbacks; its logger is TensorBoard's once the run is started.
        is_finished, test_result - Whether there is nothing to train, and what trainer.test gave at the time.
        is_new - False where the run is continued.
        folder, best_checkpoint - Paths of the run's folder, and of the checkpoint with the lowest validation bpd.
    Raises:
        UserError - where the run cannot be started or continued; nothing is changed then.
    """

    def __init__(self, args, defaults, quantities, callbacks):
        self.started_at = time.perf_counter()
        self.cores = threads.look_at_cores()
        prepare_cpu()
        torch.backends.cudnn.deterministic = True  # so that a seed repeats itself bit for bit on a GPU, too
        report.quiet_libraries()
        self.args = args
        self.flags, self.defaults = vars(args), defaults
        self.quantities = quantities
        self.log_dir = os.path.expanduser(args.log_dir)
        self.name = args.run_name or slurm.run_name()
        self.report = report.EpochReport(self.flags, list(quantities), print_lines=not shows_bar(args))
        self.trainer = make_trainer(args, os.path.join(self.log_dir, self.name or ""), [*callbacks, self.report])

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(sigterm_raises())
            stack.enter_context(processes.connected(self.trainer))
            self.find_results()
            self.stack = stack.pop_all()
        return self

    def find_results(self):
        """Sets is_finished and, if it is so, says it and draws the figures that a killed process left out."""
        results = None
        if self.name:
            self.folder = os.path.join(self.log_dir, self.name)
            results = processes.on_rank_zero(self.trainer, finished_results, self.folder, self.flags, self.defaults)
        self.is_finished = results is not None
        if self.is_finished:
            self.print(f"{self.folder} is finished: test bpd {results['test_bpd']:.4f}")
            self.test_result = [{"test_bpd": results["test_bpd"]}]
            self.draw_figures(results["test_bpd"])

    def __exit__(self, kind, error, traceback):
        launcher = self.trainer.strategy.launcher
        if error is not None and hasattr(launcher, "procs"):  # the processes that this one has started
            others = launcher.procs.copy()
            launcher.procs.clear()  # Lightning watches them: it would kill this process, too, before it says why
            for other in others:
                other.kill()
        self.stack.__exit__(kind, error, traceback)
        if isinstance(error, UserError):
            return
        is_of_workers = isinstance(error, (RuntimeError, OSError)) and re.search(WORKERS_FAILED, str(error))
        if is_of_workers and self.args.num_workers:
            raise RunError(
                f"the worker processes that load the images failed ({one_line(error)}): {NO_WORKERS}"
            ) from error
        if is_out_of_memory(error):
            sizes = {name: self.flags.get(name, 1) for name in ["batch_size", "train_samples"]}
            what = " and ".join(["this model", *(f"--{name} {size}" for name, size in sizes.items() if size > 1)])
            raise RunError(
                f"the memory is too small for {what} ({one_line(error)}): make one of them smaller"
            ) from error
        if is_disk_full(error):
            raise DiskFullError(f"cannot write to {self.log_dir} ({error.strerror}); {MAKE_ROOM}") from error

    def print(self, text):
        """Prints in the first process alone, and at once."""
        if self.trainer.is_global_zero:
            print_line(text)

    def start(self, load_data):
        """
        Loads the data, then makes the run's folder, or makes it that of the epoch to continue from.
        Inputs:
            load_data - Function of (args, download, sampler) that returns the loaders of training, validation and test
                set. `download` is True in the first process alone; `sampler` is a function of (dataset, shuffle) that
                returns a sampler of this process's share, see processes.sampler.
        Outputs:
            train_loader, val_loader, test_loader - What load_data returned.
        """
        sampler = functools.partial(processes.sampler, trainer=self.trainer, seed=self.args.seed)
        with processes.rank_zero_first(self.trainer):  # which may download them
            loaders = load_data(self.args, download=self.trainer.is_global_zero, sampler=sampler)
        if not hasattr(loaders[0].sampler, "set_epoch"):  # a run that continues could not go on where it was
            raise RunError(
                "load_data must make the training loader's sampler by the function `sampler` that it is given"
            )
        # The first pass of a Trainer begins before its epoch does, the others after: if they drew from the global
        # random numbers, an epoch would differ between a run that was interrupted and one that was not.
        loaders[0].generator = torch.Generator()
        sha256 = vars(self.args).get(CHECKSUM)
        if sha256 != processes.shared(self.trainer, sha256):
            raise RunError(f"--dataset {self.args.dataset} is another file here than in the first process")
        processes.on_rank_zero(self.trainer, check_shares, len(loaders[1].dataset), self.trainer.world_size)
        if self.args.num_workers:
            check_shared_memory(self.args.num_workers, loaders[0])
        # Only now that nothing else can be wrong.
        self.place = processes.on_rank_zero(self.trainer, self.open_folder)
        self.folder, self.is_new = self.place.folder, not self.place.checkpoint
        if self.args.threads != "auto" or (self.device.type == "cpu" and self.trainer.world_size == 1):
            self.stack.enter_context(threads.threads_of_run(self.args.threads, self.place.device, self.cores))
        if self.trainer.world_size > 1:
            self.stack.enter_context(processes.SharedNoise(self.trainer.global_rank, self.trainer.world_size))
        self.report.device = self.device_name
        self.trainer.logger = report.EpochLogger(self.folder)
        self.trainer.logger.set_up_dashboard(self.flags, self.quantities)
        num_processes = self.trainer.world_size
        images = f"{len(loaders[0].dataset):,} training images"
        if hasattr(self.args, CHECKSUM):  # of a file, whose sizes nobody knows by heart
            size = "x".join(map(str, loaders[0].dataset.images.shape[1:]))
            images += f" of {size}, the {len(loaders[1].dataset):,} after them validate"
        self.print(
            f"{self.args.model} on {self.args.dataset}, {images}, on {self.device}"
            + (f" x {num_processes}" if num_processes > 1 else "")
            + f", in {self.folder}"
            + ("" if self.is_new else f", continued after epoch {self.place.epoch}")
        )
        if self.place.device not in [None, self.device_name]:
            self.print(
                f"The epochs before were trained on {self.place.device}, the next ones are on {self.device_name}: "
                "from here on the numbers are those of a run that never stopped but for their rounding"
            )
        return loaders

    def open_folder(self):
        """Makes or finds the run's folder, which is this process's alone until the context is left."""
        return self.stack.enter_context(
            open_folder(self.log_dir, self.name, self.flags, self.defaults, self.quantities)
        )

    @property
    def device(self):
        """The torch.device that trains."""
        return self.trainer.strategy.root_device

    @property
    def device_name(self):
        """What trains, as far as the numbers depend on it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    @property
    def best_checkpoint(self):
        """Path of the checkpoint with the lowest validation bpd."""
        return os.path.join(self.folder, "checkpoints", checkpoints.BEST)

    def prepare(self, model):
        """Lays the weights of a module out as the device computes fastest. Returns the module."""
        return use_fast_layout(model) if self.device.type == "cpu" else model

    def fit(self, model, train_loader, val_loader):
        """Trains a model, from the epoch on that the run has reached."""
        trainer = self.trainer
        train_loader.sampler.set_epoch(self.place.epoch)  # Lightning does so once it has begun to read
        loaders = train_loader, val_loader
        fit_start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(matmul_precision("high"))  # TF32
            if graphs.has_graphs(self.device) and not self.args.no_cuda_graph and trainer.world_size == 1:
                loaders = stack.enter_context(graphs.graphed(trainer, model, *loaders))
            trainer.log_every_n_steps = len(loaders[0])
            trainer.fit(model, *loaders, ckpt_path=self.place.checkpoint)
        trainer.strategy.barrier()  # the first process has written the checkpoints that all read
        if trainer.interrupted:
            raise RunError("training was interrupted")
        self.fit_seconds = time.perf_counter() - fit_start

    def finish(self, test_result):
        """
        Leaves the results in the run's folder: results.json says that the run is finished. Then it draws the figures.
        Inputs:
            test_result - What trainer.test returned for the best checkpoint.
        """
        test_bpd = test_result[0]["test_bpd"]
        if self.trainer.is_global_zero:
            for name in FIGURES:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))  # of fewer epochs
            results = json.dumps(self.results(test_bpd), indent=2) + "\n"
            write_text(os.path.join(self.folder, "results.json"), results, sync=True)
            for path in glob.glob(os.path.join(glob.escape(self.folder), "results_[0-9]*.json")):
                os.remove(path)  # of fewer epochs, too
        self.print(
            f"test bpd {test_bpd:.4f}\n"
            f"curves and pictures: tensorboard --logdir {shlex.quote(self.log_dir)} --samples_per_plugin images=1000\n"
            f"run folder {self.folder}"
        )
        self.test_result = test_result
        self.draw_figures(test_bpd)

    def draw_figures(self, test_bpd):
        """Draws the figures of the finished run. None of them can cost it its results any more."""
        self.draw("bpd_curves.png", functools.partial(self.report.draw_curves, test_bpd))
        self.draw("samples_over_training.png", self.report.draw_samples)

    def draw(self, name, function):
        """
        Draws a figure of the finished run, unless it is there.
        Inputs:
            name - Name of the PNG file in the run's folder.
            function - Function that draws it, given its path.
        """
        path = os.path.join(self.folder, name)
        if self.trainer.is_global_zero and not os.path.exists(path):
            with best_effort(f"drawing {path}"):
                function(path)

    def save_image(self, name, function):
        """Draws, like `draw`, the image of shape [C,H,W] that a function returns."""

        def save(path):
            with atomic_write(path) as unfinished:
                save_image(function(), unfinished, format="png")

        self.draw(name, save)

    def results(self, test_bpd):
        """What results.json holds. Its seconds begin, in a continued run, with those of the epochs before."""
        val_bpd = self.report.curve("val_bpd")
        del val_bpd[0]  # untrained
        best_epoch = min(val_bpd, key=val_bpd.get)
        return {
            "test_bpd": test_bpd,
            "best_val_bpd": val_bpd[best_epoch],
            "best_epoch": best_epoch,
            "final_train_bpd": self.report.history[-1].get("train_bpd"),
            "first_step_bpd": self.report.first_step_bpd,
            "dataset": self.args.dataset,
            "seed": self.args.seed,
            "hyperparameters": self.flags,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch_lightning": pl.__version__,
            },
            "device": self.device_name,
            "fit_seconds": round(self.place.seconds + self.fit_seconds, 1),
            "seconds": round(self.place.seconds + time.perf_counter() - self.started_at, 1),
        }


class NoProfiler(PassThroughProfiler):
    """Measures nothing, as Lightning's default, whose new context for each of a step's 45 actions takes longer."""

    def profile(self, action_name):
        return contextlib.nullcontext()


def make_trainer(args, root_dir, callbacks):
    """
    The Trainer that the flags ask for, without a logger as long as the run has no folder.
    Inputs:
        args - Namespace of every flag.
        root_dir - The run's own folder: under SLURM, Lightning loads an hpc_ckpt_N.ckpt that it finds there.
        callbacks - The module's own callbacks and the report; those that keep the run alive are added.
    Outputs:
        trainer - The Trainer.
    Raises:
        RunError - where the flags do not fit the machine, or the processes that were started.
    """
    callbacks = [
        processes.RunHooks(args.seed),
        *([slurm.StayInQueue()] if slurm.job_id() else []),
        *callbacks,
        *([TQDMProgressBar()] if shows_bar(args) else []),  # not rich's, where that is installed
        checkpoints.BestAndLast(monitor="val_bpd"),
    ]
    try:
        kind = pick_device(args.accelerator, args.devices * args.num_nodes)
        if args.precision == "bf16" and not has_bf16(kind):
            warn("--precision bf16 is slower here than 32: this processor has no arithmetic for it")
        with without_variables("PL_TRAINER_"):  # by which Lightning lets the environment change a Trainer
            return pl.Trainer(
                default_root_dir=root_dir,
                max_epochs=args.epochs,
                callbacks=callbacks,
                accelerator=kind,
                devices=args.devices,
                num_nodes=args.num_nodes,
                strategy="ddp" if args.devices * args.num_nodes > 1 else "auto",
                precision=PRECISIONS[args.precision],
                plugins=[
                    checkpoints.CheckpointFiles(),
                    processes.environment(args.devices, args.num_nodes, args.run_name),
                ],
                use_distributed_sampler=False,
                logger=False,
                profiler=NoProfiler(),
                enable_progress_bar=shows_bar(args),
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise RunError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def without_variables(prefix):
    """A context without the variables of the environment whose names begin with a prefix; a line says which."""
    variables = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefix)}
    try:
        yield
    finally:
        os.environ.update(variables)
    if variables and rank_zero_only.rank == 0:
        warn(f"{', '.join(variables)} in the environment: without effect, a run is what its flags say")


def check_shared_memory(num_workers, loader):
    """
    Checks that the worker processes of two data loaders have room for the minibatches that they send: where they have
    not, torch waits for them for ever.
    Inputs:
        num_workers - Number of worker processes of each loader.
        loader - One of the data loaders.
    Raises:
        RunError - where there is less.
    """
    imgs, labels = loader.dataset[torch.arange(min(loader.batch_size, len(loader.dataset)))]
    needed = 2 * num_workers * (loader.prefetch_factor + 1) * (imgs.nbytes + labels.nbytes)
    try:
        torch.empty(needed, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise RunError(
            f"the shared memory is too small for --num_workers {num_workers} ({one_line(error)}): {NO_WORKERS}"
        ) from error


def shows_bar(args):
    """Whether there is a progress bar."""
    return args.progress_bar and is_screen(sys.stdout)


def check_shares(num_val, num_processes):
    """Raises a RunError where there is no validation image for each process."""
    if num_val < num_processes:
        raise RunError(
            f"{num_val} validation images are too few for {num_processes} processes: lower --devices or --num_nodes"
        )


def check_run_flags(args):
    """
    Checks the flags that say where a run is and what computes it.
    Inputs:
        args - Namespace of every flag.
    Raises:
        FlagError - where a value is of no use.
    """
    if args.batch_size % (args.devices * args.num_nodes):
        raise FlagError(
            f"--batch_size {args.batch_size} is the minibatch over all devices: it must be a multiple of "
            f"--devices {args.devices} x --num_nodes {args.num_nodes}"
        )
    name = args.run_name
    log_dir = os.path.join(os.path.realpath(os.path.expanduser(args.log_dir)), "")
    if name and os.path.isdir(name) and not os.path.isdir(os.path.join(log_dir, name)):
        path = os.path.realpath(name)  # from the working directory, as a shell completes it
        if path.startswith(log_dir):
            raise FlagError(f"--run_name {name} is not found from the log directory: give {path.removeprefix(log_dir)}")
    if name is not None and (
        os.path.isabs(name) or os.path.splitdrive(name)[0] or os.path.normpath(name).split(os.sep)[0] in (".", "..")
    ):
        raise FlagError(f"--run_name must be a folder inside the log directory, got {name!r}")
    if name is not None and not name.isprintable():
        raise FlagError(f"--run_name must be a name that can be printed, got {name!r}")

"""A training run: started or continued in its folder, trained by its Trainer, finished with its results."""

import contextlib
import functools
import json
import os
import platform
import time
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from harness import checkpoints, cuda_graph, processes, report, slurm
from harness.files import UNFINISHED, write_text
from harness.program import CHANGEABLE_FLAGS, FlagError, UserError, plain_values

LOCK_TIMEOUT = 10  # seconds; data loader workers of a process that was killed hold its lock until they notice


class RunError(UserError):
    """The run cannot be started or continued."""


class Place(NamedTuple):
    """Where a run is, and how far it has come."""

    folder: str
    checkpoint: str | None  # the checkpoint to continue from
    epoch: int  # its number of epochs, 0 without one
    seconds: float  # that these epochs took


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
        quantities - Dict from the name of what the module logs in each epoch, as train_NAME and val_NAME, to its title.
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
        # Tiny moments of Adam, of pixels that are hardly ever set, would slow a CPU down.
        torch.set_flush_denormal(True)
        torch.backends.cudnn.deterministic = True  # so that a seed repeats itself bit for bit on a GPU, too
        report.quiet_libraries()
        self.args = args
        self.flags, self.defaults = plain_values(vars(args)), defaults
        self.quantities = quantities
        self.log_dir = os.path.expanduser(args.log_dir)
        self.name = args.run_name or slurm.run_name()
        self.report = report.EpochReport(self.flags, list(quantities), print_lines=not args.progress_bar)
        self.trainer = make_trainer(args, os.path.join(self.log_dir, self.name or ""), [*callbacks, self.report])
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.stack.enter_context(processes.connected(self.trainer))
        results = None
        if self.name:
            folder = os.path.join(self.log_dir, self.name)
            results = processes.on_rank_zero(self.trainer, finished_results, folder, self.flags, self.defaults)
        self.is_finished = results is not None
        if self.is_finished:
            self.test_result = [{"test_bpd": results["test_bpd"]}]
            self.print(f"{folder} is finished: test bpd {results['test_bpd']:.4f}")
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def print(self, text):
        """Prints in the first process alone, and at once."""
        if self.trainer.is_global_zero:
            print(text, flush=True)

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
        # Only now that nothing else can be wrong.
        self.place = processes.on_rank_zero(self.trainer, self.open_folder)
        self.folder, self.is_new = self.place.folder, not self.place.checkpoint
        self.best_checkpoint = os.path.join(self.folder, "checkpoints", checkpoints.BEST)
        self.trainer.logger = report.EpochLogger(self.folder)
        if self.is_new:
            self.trainer.logger.set_up_dashboard(self.flags, self.quantities)
        num_processes = self.trainer.world_size
        self.print(
            f"{self.args.model} on {self.args.dataset}, {len(loaders[0].dataset):,} training images, on {self.device}"
            + (f" x {num_processes}" if num_processes > 1 else "")
            + f", in {self.folder}"
            + ("" if self.is_new else f", continued after epoch {self.place.epoch}")
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

    def fit(self, model, train_loader, val_loader):
        """Trains a model, from the epoch on that the run has reached."""
        trainer = self.trainer
        trainer.log_every_n_steps = len(train_loader)
        train_loader.sampler.set_epoch(self.place.epoch)  # Lightning does so once it has begun to read
        loaders = train_loader, val_loader
        if not self.args.plain and cuda_graph.can_capture(trainer, model, train_loader):
            loaders = cuda_graph.train_in_chunks(trainer, model, *loaders)
        fit_start = time.perf_counter()
        trainer.fit(model, *loaders, ckpt_path=self.place.checkpoint)
        self.fit_seconds = time.perf_counter() - fit_start

    def finish(self, test_result):
        """
        Leaves the results in the run's folder, results.json last of all: it says that the run is finished.
        Inputs:
            test_result - What trainer.test returned for the best checkpoint.
        """
        if not self.trainer.is_global_zero:
            return
        test_bpd = test_result[0]["test_bpd"]
        report.draw_figures(self.folder, self.report, test_bpd)
        write_text(os.path.join(self.folder, "results.json"), json.dumps(self.results(test_bpd), indent=2) + "\n")
        self.print(f"test bpd {test_bpd:.4f}\nrun folder {self.folder}")

    def results(self, test_bpd):
        """What results.json holds. Its seconds begin, in a continued run, with those of the epochs before."""
        val_bpd = self.report.curve("val_bpd")
        del val_bpd[0]  # untrained
        best_epoch = min(val_bpd, key=val_bpd.get)
        device = f"{self.device.type}, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        return {
            "test_bpd": test_bpd,
            "best_val_bpd": val_bpd[best_epoch],
            "best_epoch": best_epoch,
            "final_train_bpd": self.report.history[-1]["train_bpd"],
            "first_step_bpd": self.report.first_step_bpd,
            "dataset": self.args.dataset,
            "seed": self.args.seed,
            "hyperparameters": self.flags,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch_lightning": pl.__version__,
            },
            "device": device,
            "fit_seconds": round(self.place.seconds + self.fit_seconds, 1),
            "seconds": round(self.place.seconds + time.perf_counter() - self.started_at, 1),
        }


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
        RunError - where the flags do not fit the machine, or the tasks that SLURM started.
    """
    callbacks = [
        processes.SeedEpochs(args.seed),
        processes.SharedNoise(),
        slurm.StayInQueue(),
        *callbacks,
        ModelCheckpoint(filename="best", monitor="val_bpd", mode="min"),
        ModelCheckpoint(filename="last", enable_version_counter=False),
    ]
    # Buffers are left alone: each process sums its own losses.
    strategy = DDPStrategy(broadcast_buffers=False) if args.devices * args.num_nodes > 1 else "auto"
    try:
        return pl.Trainer(
            default_root_dir=root_dir,
            max_epochs=args.epochs,
            callbacks=callbacks,
            accelerator=args.accelerator,
            devices=args.devices,
            num_nodes=args.num_nodes,
            strategy=strategy,
            plugins=[checkpoints.CheckpointFiles(), *slurm.environment(args.devices, args.num_nodes)],
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=args.progress_bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise RunError(" ".join(str(error).split())) from error


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
    if name is not None and (os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] in (".", "..")):
        raise FlagError(f"--run_name must be a folder inside the log directory, got {name!r}")
    if args.seed >= 2**32:
        raise FlagError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")


def finished_results(folder, flags, defaults):
    """
    The results of a finished run. Changes nothing.
    Inputs:
        folder - The run's folder.
        flags, defaults - Dicts of every flag, and of its default, see Run.
    Outputs:
        results - What results.json holds; None where the run is unfinished or new.
    Raises:
        RunError - where the folder is another one's: other hyperparameters, or no run at all.
    """
    if not os.path.isdir(folder) or set(os.listdir(folder)) <= {".lock", f"hparams.yaml{UNFINISHED}"}:
        return None  # new, or it was killed at once
    try:
        with open(os.path.join(folder, "hparams.yaml")) as file:
            there = {**defaults, **yaml.safe_load(file)}
    except FileNotFoundError:
        raise RunError(f"{folder} is there already, but holds no run: choose another --run_name") from None
    differences = [
        f"--{flag} was {there[flag]}, is {flags[flag]}"
        for flag in flags
        if flag in there and flag not in CHANGEABLE_FLAGS and there[flag] != flags[flag]
    ]
    if differences:
        raise RunError(
            f"{folder} holds a run with other hyperparameters ({'; '.join(differences)}): "
            "give the same ones to continue it, or choose another --run_name"
        )
    path = os.path.join(folder, "results.json")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


@contextlib.contextmanager
def open_folder(log_dir, name, flags, defaults, quantities):
    """
    Makes the folder of a run, or finds where to continue it, and keeps it to this process while the context lasts.
    Inputs:
        log_dir - Directory of all runs.
        name - The run's folder in it; if None, `lightning_logs/version_N` with the next free N, as Lightning does.
        flags, defaults, quantities - See Run; the values of the flags are plain ones.
    Outputs:
        place - A Place. What its folder holds is that of the epochs up to its checkpoint.
    Raises:
        RunError - where the folder cannot be made, is in use, or is another one's (see finished_results).
    """
    try:
        folder = os.path.join(log_dir, name) if name else numbered_folder(log_dir)
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, ".lock"), timeout=LOCK_TIMEOUT)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder} is in use by another process: wait for it, or choose another --run_name for this one"
        ) from None
    except OSError as error:
        raise RunError(
            f"cannot write to the log directory {log_dir} ({error.strerror}); choose another one with --log_dir"
        ) from error
    with lock:
        if finished_results(folder, flags, defaults):
            raise RunError(f"{folder} was finished by another process just now")
        path, checkpoint = checkpoints.newest_checkpoint(os.path.join(folder, "checkpoints"))
        write_text(os.path.join(folder, "hparams.yaml"), yaml.safe_dump(flags))
        try:
            history = checkpoint[checkpoints.RUN]["history"] if checkpoint else []
        except LookupError:
            raise RunError(
                f"{path} is of an older version, whose runs cannot be continued: choose another --run_name"
            ) from None
        report.return_to_epoch(folder, history, quantities)
        yield Place(folder, path, max(len(history) - 1, 0), sum(row["seconds"] for row in history))


def numbered_folder(log_dir):
    """Makes the next free folder `<log_dir>/lightning_logs/version_N`, for this process alone."""
    version = TensorBoardLogger(log_dir).version
    while True:
        folder = os.path.join(log_dir, "lightning_logs", f"version_{version}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            version += 1  # another process was faster

"""Where a run lives and what it leaves there: its folder, the lines and figures of each epoch, results.json."""
import csv
import json
import logging
import math
import os
import platform
import time
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger


class RunFolderError(RuntimeError):
    """The run's folder cannot be made."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class EpochLogger(TensorBoardLogger):
    """
    TensorBoard logger whose x axis is the number of epochs trained, so that the curves of training, validation and
    test share one axis. EpochReport sets `epoch`; it is 0 until training begins.
    """

    epoch = 0

    def log_metrics(self, metrics, step=None):
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, self.epoch)


def new_run(log_dir):
    """
    Makes the folder of a new run, `<log_dir>/lightning_logs/version_N` with the next free N, as Lightning numbers
    them, but for this process alone, also when several start at once.
    Outputs:
        logger - The run's EpochLogger; the folder is logger.log_dir.
    Raises:
        RunFolderError - where the folder cannot be made.
    """
    log_dir = os.path.expanduser(log_dir)
    version = TensorBoardLogger(log_dir).version
    while True:
        logger = EpochLogger(log_dir, version=version, default_hp_metric=False)
        try:
            os.makedirs(logger.log_dir)
            return logger
        except FileExistsError:
            version += 1  # another process was faster
        except OSError as error:
            raise RunFolderError(f"cannot write to the log directory {log_dir} ({error.strerror}); "
                                 "choose another one with --log_dir") from error


def quiet_libraries():
    """Leaves the output to the epoch lines: errors and real warnings still come through."""
    for name in ["pytorch_lightning", "lightning_fabric"]:  # start-up notes and tips
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # how it is getting on with its font cache
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the images are in memory
    # Names that Lightning uses and newer versions of torch call old.
    warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning|lightning_fabric")


class EpochReport(pl.Callback):
    """
    Keeps the metrics of every epoch, in `history` (a list of dicts) and in the run's metrics.csv, and prints a line
    for each. Epoch 0 is the untrained model: `trainer.validate` before `trainer.fit`.
    Stops a run whose loss is no longer finite, before that epoch's weights replace the last good checkpoint.
    """

    columns = ["epoch", *(f"{stage}_{name}" for stage in ["train", "val"]
                          for name in ["reconstruction_loss", "regularization_loss", "ELBO", "bpd"]), "seconds"]

    def __init__(self, print_lines=True):
        super().__init__()
        self.print_lines = print_lines
        self.history = []
        self.first_step_bpd = None  # the very first minibatch of training, before any update

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.report(trainer, epoch=0)

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = time.perf_counter()
        trainer.logger.epoch = trainer.current_epoch + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.first_step_bpd is None:
            self.first_step_bpd = outputs["loss"].item()

    def on_train_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch + 1
        for name in ["train_bpd", "val_bpd"]:
            value = trainer.callback_metrics[name].item()
            if not math.isfinite(value):
                kept = f"the checkpoints of the epochs before are kept in {trainer.logger.log_dir}"
                raise TrainingDiverged(
                    f"{name} became {value} in epoch {epoch}: try a lower --lr than {pl_module.hparams.lr:g} "
                    f"({kept if epoch > 1 else 'no checkpoint was written yet'})")
        self.report(trainer, epoch)

    def report(self, trainer, epoch):
        """Adds the metrics that the trainer holds as an epoch to the history, to metrics.csv and to stdout."""
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name in self.columns}
        self.history.append({"epoch": epoch, **metrics, "seconds": round(time.perf_counter() - self.start, 3)})
        with open(os.path.join(trainer.logger.log_dir, "metrics.csv"), "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if epoch == 0:
                writer.writeheader()
            writer.writerow(self.history[-1])
        if self.print_lines:
            bpds = "  ".join(f"{stage} bpd {metrics[f'{stage}_bpd']:.4f}" if f"{stage}_bpd" in metrics else " " * 16
                             for stage in ["train", "val"])
            print(f"epoch {epoch:3}/{trainer.max_epochs}  {bpds}  {self.history[-1]['seconds']:.1f} s", flush=True)

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, KeyboardInterrupt):
            epoch = trainer.logger.epoch
            checkpoints = "checkpoints of the best and the last complete one" if epoch > 1 else "no checkpoint yet"
            print(f"\nInterrupted in epoch {epoch}. {trainer.logger.log_dir} stays usable: "
                  f"metrics, curves and pictures of the epochs before, {checkpoints}", flush=True)

    def curve(self, name):
        """Dict from epoch to the value of a metric, for the epochs that have it."""
        return {row["epoch"]: row[name] for row in self.history if name in row}


def write_results(folder, args, report, test_bpd, device, fit_seconds, seconds):
    """
    Writes results.json, all or nothing.
    Inputs:
        folder - The run's folder.
        args - Dict of every flag.
        report - The run's EpochReport.
        test_bpd - Test bpd of the checkpoint with the lowest validation bpd.
        device - torch.device that trained.
        fit_seconds - Wall time of trainer.fit.
        seconds - Wall time of the run, from the reading of the data to the test.
    """
    val_bpd = report.curve("val_bpd")
    del val_bpd[0]  # untrained
    best_epoch = min(val_bpd, key=val_bpd.get)
    is_gpu = device.type == "cuda"
    results = {
        "test_bpd": test_bpd,
        "best_val_bpd": val_bpd[best_epoch],
        "best_epoch": best_epoch,
        "final_train_bpd": report.history[-1]["train_bpd"],
        "first_step_bpd": report.first_step_bpd,
        "dataset": args["dataset"],
        "seed": args["seed"],
        "hyperparameters": args,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "pytorch_lightning": pl.__version__},
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {torch.get_num_threads()} threads",
        "fit_seconds": round(fit_seconds, 1),
        "seconds": round(seconds, 1),
    }
    path = os.path.join(folder, "results.json")
    with open(path + ".tmp", "w") as file:
        json.dump(results, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)

"""What a run reports: the line of each epoch, metrics.csv, TensorBoard, the figures at the end."""

import contextlib
import csv
import glob
import io
import logging
import math
import os
import re
import sys
import threading
import time
import warnings

import torch
from PIL import Image
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from harness.checkpoints import LAST, RUN, read_checkpoint
from harness.files import UNFINISHED, atomic_write, write_text
from harness.program import RUNTIME_FLAGS, Terminated, UserError, best_effort, say, warn
from pictures import figures

TELLING_FLAGS = {"model", "z_dim", "hidden_dims", "lr", "seed"}  # what TensorBoard's table of runs shows first
STAGES = ["train", "val"]  # of which each epoch has metrics
SLOWER = 3  # times the fastest epoch: one that is worth a word
EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin
NEW_FILE = Event(file_version="brain.Event:2")  # what such a file begins with
START_AGAIN = Event(session_log=SessionLog(status=SessionLog.START))  # what was logged from step 0 on is void
DASHBOARD = ("_hparams_/", "custom_scalars__config__")  # what set_up_dashboard writes, at each start


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


class EpochReport(Checkpoint):
    """
    Keeps the metrics of every epoch, in `history` (a list of dicts) and in the run's metrics.csv, and prints a line
    for each. Epoch 0 is the untrained model: `trainer.validate` before `trainer.fit`.
    Stops a run whose loss is no longer finite, before that epoch's weights replace the last good checkpoint.

    A Checkpoint for Lightning, which calls those after all others: what the module logs at the end of an epoch is
    there by then. In the list of callbacks it comes before those that write checkpoints.
    """

    def __init__(self, flags, quantities, print_lines=True):
        """
        Inputs:
            flags - Dict of every flag, kept in each checkpoint for whoever finds it.
            quantities - Names of the quantities that come first in metrics.csv; others that are logged follow by name.
            print_lines - If False, the epochs' lines are not printed.
        """
        super().__init__()
        self.flags = flags
        self.quantities = quantities
        self.print_lines = print_lines
        self.device = None  # what trains, as in results.json
        self.history = []
        self.first_step_bpd = None  # the very first minibatch of training, before any update
        self.fastest = math.inf  # seconds of an epoch, in this process

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint[RUN] = {
            "flags": self.flags,
            "history": self.history,
            "first_step_bpd": self.first_step_bpd,
            "device": self.device,
            **places_of_data(self.flags, trainer.logger.log_dir),
        }

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.history, self.first_step_bpd = checkpoint[RUN]["history"], checkpoint[RUN]["first_step_bpd"]

    def on_fit_start(self, trainer, pl_module):
        trainer.logger.epoch = len(self.history) - 1
        if trainer.logger.epoch > 0:  # it continues: see return_to_epoch
            trainer.logger.log_metrics({name: self.history[-1][name] for name in metric_names(self.history[-1])})

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.begin_epoch(trainer)

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.report(trainer, epoch=0)

    def on_train_epoch_start(self, trainer, pl_module):
        self.begin_epoch(trainer)
        trainer.logger.epoch = trainer.current_epoch + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == batch_idx == 0 and "bpd" in outputs:
            self.first_step_bpd = trainer.strategy.reduce(outputs["bpd"].detach()).item()

    def on_train_epoch_end(self, trainer, pl_module):
        epoch, metrics = trainer.current_epoch + 1, trainer.callback_metrics
        for name in [name for name in ["train_bpd", "val_bpd"] if name in metrics]:
            value = metrics[name].item()
            if not math.isfinite(value):
                if not trainer.is_global_zero:
                    sys.exit(1)
                kept = f"the checkpoints of the epochs before are kept in {trainer.logger.log_dir}"
                raise TrainingDiverged(
                    f"{name} became {value} in epoch {epoch}: try a lower --lr than {pl_module.hparams.lr:g} "
                    f"({kept if epoch > 1 else 'no checkpoint was written yet'})"
                )
        self.report(trainer, epoch)

    def begin_epoch(self, trainer):
        """Takes the time, and keeps what the trainer holds of earlier epochs."""
        self.start = time.perf_counter()
        self.earlier = dict(trainer.callback_metrics)

    def report(self, trainer, epoch):
        """Adds the metrics of an epoch, that is those which the trainer did not hold before it, to the history."""
        logged = {
            name: value for name, value in trainer.callback_metrics.items() if value is not self.earlier.get(name)
        }
        metrics = {name: logged[name].item() for name in metric_names(logged)}
        self.history.append({"epoch": epoch, **metrics, "seconds": round(time.perf_counter() - self.start, 3)})
        if not trainer.is_global_zero:
            return
        write_metrics(trainer.logger.log_dir, self.history, self.quantities)
        trainer.logger.flush()  # what was logged so far is on disk ahead of this epoch's checkpoint
        if self.print_lines:
            bpds = "  ".join(
                f"{stage} bpd {metrics[f'{stage}_bpd']:.4f}" if f"{stage}_bpd" in metrics else " " * 16
                for stage in STAGES
            )
            print_line(f"epoch {epoch:3}/{trainer.max_epochs}  {bpds}  {self.history[-1]['seconds']:.1f} s")
        if epoch:
            self.look_for_company(self.history[-1]["seconds"])

    def look_for_company(self, seconds):
        """Says once, of an epoch on a CPU, that others seem to have begun to work there."""
        threads = torch.get_num_threads()
        is_slow = seconds > max(SLOWER * self.fastest, self.fastest + 1)
        if is_slow and threads > 1 and (self.device or "").startswith("cpu"):
            warn(
                f"that epoch took {seconds / self.fastest:.0f} times as long as the fastest one: beside other programs "
                f"{threads} threads wait for each other. Stop the run, and continue it with --threads 1"
            )
            self.fastest = math.nan  # which nothing is slower than
        self.fastest = min(self.fastest, seconds)

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, (KeyboardInterrupt, Terminated)) and trainer.is_global_zero:
            exception.already_reported = True
            epoch, folder = trainer.logger.epoch, trainer.logger.log_dir
            is_there = os.path.exists(os.path.join(folder, "checkpoints", LAST))
            checkpoints = "checkpoints of the best and the last complete one" if is_there else "no checkpoint yet"
            name = os.path.relpath(folder, trainer.default_root_dir)  # '.' if it was given
            print_line(
                f"\nInterrupted in epoch {epoch}. {folder} stays usable: metrics, curves and pictures of the epochs "
                f"before, {checkpoints}. The same command{'' if name == '.' else f' and --run_name {name}'} "
                "continues it"
            )

    def draw_curves(self, test_bpd, path):
        """
        Draws the curves of question 1.9.
        Inputs:
            test_bpd - Test bpd of the checkpoint with the lowest validation bpd.
            path - The PNG file, in the run's folder.
        """
        self.read_history(os.path.dirname(path))
        train_bpd = self.curve("train_bpd")
        if self.first_step_bpd is not None:
            train_bpd = {0: self.first_step_bpd, **train_bpd}
        title = f"{self.flags['model']}, {self.flags['z_dim']} latents, {os.path.basename(self.flags['dataset'])}"
        if self.flags.get("beta", 1) != 1:
            title += f", trained with beta {self.flags['beta']:g}"
        figures.bpd_curves(path, train_bpd, self.curve("val_bpd"), test_bpd, title)

    def draw_samples(self, path):
        """Draws the samples of question 1.10: before training, after 10 epochs, and the last ones in path's folder."""
        folder = os.path.dirname(path)
        drawn = [re.fullmatch(r"epoch_(\d+)_samples.png", name) for name in os.listdir(folder)]
        epochs = sorted(int(match[1]) for match in drawn if match)
        after_10 = [epoch for epoch in epochs if epoch <= 10][-1:]
        pictures = {
            f"epoch {epoch}" if epoch else "before training": os.path.join(folder, f"epoch_{epoch}_samples.png")
            for epoch in sorted({*epochs[:1], *after_10, *epochs[-1:]})
        }
        figures.side_by_side(path, pictures)

    def read_history(self, folder):
        """Takes the history from the last checkpoint in a finished run's folder, unless it has just been trained."""
        if not self.history:
            path = os.path.join(folder, "checkpoints", LAST)
            self.on_load_checkpoint(None, None, read_checkpoint(path))

    def curve(self, name):
        """Dict from epoch to the value of a metric, for the epochs that have it."""
        return {row["epoch"]: row[name] for row in self.history if name in row}


def places_of_data(flags, folder):
    """
    Where a run's data is: as an absolute path, and as one from the run's folder, which holds where both are moved.
    Inputs:
        flags - Dict of every flag.
        folder - The run's folder.
    Outputs:
        places - Dict of data_dir and, where the two are on one drive, data_dir_from_run; of a file of one's own also
            dataset_from_run.
    """
    data_dir, folder = os.path.realpath(os.path.expanduser(flags["data_dir"])), os.path.realpath(folder)
    file_folder, file_name = os.path.split(flags["dataset"])
    places = {"data_dir": data_dir}
    with contextlib.suppress(ValueError):  # Windows
        places["data_dir_from_run"] = os.path.relpath(data_dir, folder)
        if file_folder:
            file = os.path.join(os.path.realpath(file_folder), file_name)  # which may itself be a link
            places["dataset_from_run"] = os.path.relpath(file, folder)
    return places


def metric_names(names):
    """Those names of a dict that begin with a stage, such as train_bpd."""
    return [name for name in names if name.startswith(tuple(f"{stage}_" for stage in STAGES))]


def write_metrics(folder, history, quantities):
    """
    Writes metrics.csv, a row for each epoch: the quantities of training and validation, then whatever else was logged
    under such names, then the seconds.
    """
    columns = ["epoch", *(f"{stage}_{name}" for stage in STAGES for name in quantities)]
    others = {name for row in history for name in metric_names(row)} - set(columns)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *sorted(others), "seconds"])
    writer.writeheader()
    writer.writerows(history)
    write_text(os.path.join(folder, "metrics.csv"), text.getvalue())


def return_to_epoch(folder, history, quantities):
    """
    Makes a run's folder that of the last epoch of a history: metrics.csv and what TensorBoard shows, without what was
    logged later. Of the epoch itself its metrics are dropped, too, since not all of them may be there: EpochReport
    logs them again.
    """
    for path in glob.glob(os.path.join(glob.escape(folder), "**", f"*{UNFINISHED}"), recursive=True):
        os.remove(path)  # left by a process that was killed
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"{EVENTS}*")))
    if paths:
        # In a new file, at whose beginning a TensorBoard that watches the run forgets what it has read of it. It still
        # looks for the last one of the others.
        copy = os.path.join(folder, f"{EVENTS}{int(time.time()):010d}")
        # Twice: TensorBoard takes the first one that it sees in a run for the run's beginning.
        write_events(copy, [NEW_FILE, START_AGAIN, START_AGAIN, *kept_events(paths, len(history) - 1)])
        for path in {*paths} - {copy, paths[-1]}:
            os.remove(path)
        if paths[-1] != copy:
            write_events(paths[-1], [NEW_FILE])
    write_metrics(folder, history, quantities)


def write_events(path, events):
    """Writes one of TensorBoard's files."""
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def kept_events(paths, epoch):
    """The scalars and images in event files, in the order of their names, up to an epoch; see return_to_epoch."""
    events = []
    for path in paths:
        for record in RawEventFileLoader(path).Load():
            event = Event.FromString(record)
            if event.session_log == START_AGAIN.session_log:
                events.clear()  # a process that was killed as it copied these has left both files
            tags = [value.tag for value in event.summary.value if not value.tag.startswith(DASHBOARD)]
            again = any(tag.startswith(("train_", "val_", "test_")) for tag in tags)
            if tags and (event.step < epoch or event.step == epoch and not again):
                events.append(event)
    return events


class EpochLogger(TensorBoardLogger):
    """
    TensorBoard logger of a run's folder, whose x axis is the number of epochs trained, so that the curves of training,
    validation and test share one axis. EpochReport sets `epoch`; it is 0 until training begins.
    """

    epoch = 0
    has_failed = False

    def __init__(self, folder):
        super().__init__(folder, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def set_up_dashboard(self, flags, quantities):
        """
        Tells TensorBoard the flags that define the run, for a row of its table of hyperparameters with the test bpd,
        and to draw training and validation in one chart (its tab Custom Scalars).
        Inputs:
            flags - Dict of every flag.
            quantities - Dict from the name of each quantity that has a chart to its title; the last one comes first.
        """
        flags = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in flags.items()
            if name not in RUNTIME_FLAGS
        }
        summaries = hparams(flags, {"test_bpd": None})
        # TensorBoard sorts them by name, but for those by which runs differ, and shows the first five.
        plugin_data = summaries[0].value[0].metadata.plugin_data
        table = HParamsPluginData.FromString(plugin_data.content)
        for info in table.experiment.hparam_infos:
            info.differs = info.name in TELLING_FLAGS
        plugin_data.content = table.SerializeToString()
        for summary in summaries:
            self.experiment.file_writer.add_summary(summary)
        charts = {
            title: ["Multiline", [f"{stage}_{name}" for stage in STAGES]]
            for name, title in reversed(quantities.items())
        }
        self.experiment.add_custom_scalars({"Training and validation": charts})
        self.experiment.flush()

    @property
    def log_dir(self):
        return self.save_dir

    def log_metrics(self, metrics, step=None):
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}
        self.unless_it_fails(super().log_metrics, metrics, self.epoch)

    @rank_zero_only
    def flush(self):
        """Writes all that was logged so far to the disk."""
        self.unless_it_fails(self.experiment.flush)

    def finalize(self, status):
        with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
            self.unless_it_fails(super().finalize, status)

    def unless_it_fails(self, function, *args):
        """Calls a function that logs. Once one has failed, the run goes on without; a full disk ends it."""
        if not self.has_failed:
            self.has_failed = True
            with best_effort(f"logging to TensorBoard's files in {self.log_dir}"):
                function(*args)
                self.has_failed = False


def log_picture(writer, name, picture, epoch):
    """
    Adds a picture to TensorBoard as a PNG file. (SummaryWriter.add_image would have it encoded for itself alone.)
    Inputs:
        writer - What a logger calls its experiment.
        name - Tag of the picture.
        picture - Tensor of shape [3,H,W] of values between 0 and 1.
        epoch - Number of epochs trained so far.
    Outputs:
        png - Bytes of the PNG file.
    """
    pixels = picture.mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png", compress_level=1)  # 6, the default, takes three times as long
    if isinstance(writer, SummaryWriter):
        height, width, depth = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=depth, encoded_image_string=file.getvalue())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), epoch)
    else:
        writer.add_image(name, picture.cpu(), epoch)
    return file.getvalue()


def report_error_of_thread(args):
    """In the place of threading.excepthook: the error of TensorBoard's thread is raised where something is logged."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


def quiet_libraries():
    """Leaves the output to the epoch lines: errors and real warnings still come through."""
    for name in ["pytorch_lightning", "lightning_fabric"]:  # start-up notes and tips
        logging.getLogger(name).setLevel(logging.WARNING)
    threading.excepthook = report_error_of_thread
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # how it is getting on with its font cache
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the images are in memory
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a continued run's
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # on a login node, too
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # NumPy's: Run switches them off
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")  # of DDP, which means it so
    warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")  # torch's own
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")  # see harness/graphs.py
    warnings.filterwarnings("ignore", message="GPU available but not used")  # --accelerator cpu means it so
    # Names that Lightning uses and newer versions of torch call old.
    warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning|lightning_fabric")

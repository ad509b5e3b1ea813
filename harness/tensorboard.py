"""TensorBoard: one logger per run, whose x axis is the number of epochs trained."""

import contextlib

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from harness.errors import best_effort
from harness.flags import RUNTIME_FLAGS

STAGES = ["train", "val"]  # each epoch has metrics of these stages, named STAGE_NAME


class EpochLogger(TensorBoardLogger):
    """
    TensorBoard logger of a run's folder. The curves of training, validation and test share one x axis, the number of
    epochs trained. EpochReport sets `epoch`; it is 0 until training begins.
    Inputs:
        folder - The run's folder.
        first_epoch - The first epoch that is logged. If a killed process has logged this epoch or later ones,
            TensorBoard hides these values at once or, with its data server, when the epoch is logged again.
    """

    epoch = 0
    has_failed = False

    def __init__(self, folder, first_epoch=0):
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=first_epoch)
        self.logged = {}  # dict from the name of a metric to the epoch of its last value

    @rank_zero_only
    def set_up_dashboard(self, flags, experiment):
        """
        Sets up two of TensorBoard's tabs: HParams gets a row with the flags that define the run and test_METRIC, and
        Custom Scalars gets a chart with training and validation of each quantity. See run.Experiment.
        """
        self.log_unless_failed(self.write_dashboard, flags, experiment)

    def write_dashboard(self, flags, experiment):
        """Writes the summaries of set_up_dashboard."""
        flags = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in flags.items()
            if name not in RUNTIME_FLAGS
        }
        summaries = hparams(flags, {f"test_{experiment.metric}": None})
        # TensorBoard shows the first five flags: those that are marked as different between runs, then the others by
        # name.
        plugin_data = summaries[0].value[0].metadata.plugin_data
        table = HParamsPluginData.FromString(plugin_data.content)
        for info in table.experiment.hparam_infos:
            info.differs = info.name in experiment.identifying
        plugin_data.content = table.SerializeToString()
        for summary in summaries:
            self.experiment.file_writer.add_summary(summary)
        charts = {
            title: ["Multiline", [f"{stage}_{name}" for stage in STAGES]]
            for name, title in reversed(experiment.quantities.items())
        }
        self.experiment.add_custom_scalars({"Training and validation": charts})
        self.experiment.flush()

    @property
    def log_dir(self):
        return self.save_dir

    def log_metrics(self, metrics, step=None):
        """Logs metrics of the current epoch, each only once: EpochReport logs them before Lightning does."""
        new = {name for name in metrics if name != "epoch" and self.logged.get(name) != self.epoch}
        self.logged.update(dict.fromkeys(new, self.epoch))
        self.log_unless_failed(
            super().log_metrics, {name: metrics[name] for name in metrics if name in new}, self.epoch
        )

    @rank_zero_only
    def flush(self):
        """Writes everything that was logged so far to the disk."""
        self.log_unless_failed(self.experiment.flush)

    def save(self):
        self.log_unless_failed(super().save)

    @rank_zero_only
    def close(self):
        """Closes the writer of the files and ends its thread."""
        with contextlib.suppress(OSError):
            self.experiment.close()

    def finalize(self, status):
        with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
            self.log_unless_failed(super().finalize, status)

    def log_unless_failed(self, function, *args):
        """Calls a function that logs. After a failure, the run continues without logging; a full disk ends the run."""
        if not self.has_failed:
            self.has_failed = True
            with best_effort(f"logging to TensorBoard's files in {self.log_dir}"):
                function(*args)
                self.has_failed = False

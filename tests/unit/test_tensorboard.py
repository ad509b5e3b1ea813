"""Tests of harness/tensorboard.py and pictures/tensorboard.py: `python -m unittest tests/unit/test_tensorboard.py`."""

import argparse
import io
import time
from unittest import mock

import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.transforms.functional import pil_to_tensor

from harness.tensorboard import EpochLogger
from pictures.tensorboard import encode, save_picture
from tests.helpers import SeededTest, summaries


class TestTensorBoard(SeededTest):
    def train(self, attempt, epochs):
        """Logs a curve and pictures, like a process that trains these epochs in an attempt of a run."""
        with mock.patch("time.time", return_value=time.time() + 10 * attempt):
            logger = EpochLogger(str(self.folder), first_epoch=epochs[0])
            for logger.epoch in epochs:
                logger.log_metrics({"val_bpd": attempt})
                trainer = argparse.Namespace(loggers=[logger])
                save_picture(trainer, "Samples", torch.full((3, 1, 1), attempt / 255), logger.epoch)
            logger.flush()

    def shown(self, accumulator=None):
        """Returns what TensorBoard shows, as a dict from an epoch to the attempts that logged its point and picture."""
        accumulator = (accumulator or EventAccumulator(str(self.folder), {"images": 0})).Reload()
        shown = {}
        for event in accumulator.Scalars("val_bpd"):
            shown.setdefault(event.step, []).append(event.value)
        for event in accumulator.Images("Samples"):
            shown[event.step].append(Image.open(io.BytesIO(event.encoded_image_string)).getpixel((0, 0))[0])
        return shown

    def test_tensorboard_hides_the_epochs_that_a_killed_process_logged_and_that_are_trained_again(self):
        """A TensorBoard that is already open hides them, too. A process without a checkpoint starts at epoch 0."""
        watching, attempts = EventAccumulator(str(self.folder), {"images": 0}), {}
        self.enter(self.assertLogs("tensorboard", "WARNING"))  # TensorBoard warns that it drops points
        for attempt, epochs in [(1, range(0, 2)), (2, range(0, 5)), (3, range(3, 6)), (4, range(5, 7))]:
            self.train(attempt, epochs)
            attempts = {epoch: attempts.get(epoch, attempt) for epoch in range(epochs[0])} | dict.fromkeys(
                epochs, attempt
            )
            expected = {epoch: [attempt] * 2 for epoch, attempt in attempts.items()}
            with self.subTest(f"attempt {attempt}"):
                self.assertEqual(self.shown(watching), expected)
                self.assertEqual(self.shown(), expected)
                curve = [
                    (step, int(part.tensor.float_val[0])) for step, part in summaries(self.folder) if "val" in part.tag
                ]
                self.assertEqual(curve, [*attempts.items()])

    def test_each_metric_is_logged_once_per_epoch(self):
        """EpochReport logs the metrics of an epoch before Lightning logs them again."""
        logger = EpochLogger(str(self.folder))
        for logger.epoch in [0, 1]:
            logger.log_metrics({"val_bpd": 1.0})
            logger.log_metrics({"val_bpd": 1.0, "lr": 0.5, "epoch": 7}, step=100)
        logger.flush()
        points = [(summary.tag, step) for step, summary in summaries(self.folder)]
        self.assertEqual(points, [("val_bpd", 0), ("lr", 0), ("val_bpd", 1), ("lr", 1)])

    def test_a_picture_is_the_same_in_tensorboard_and_in_a_file_with_any_loggers_or_without_loggers(self):
        """Another logger whose writer has add_image gets the tensor. The file is in the first logger's folder."""
        pixels = torch.randint(1, 256, (3, 4, 6), dtype=torch.uint8)
        picture, other = (pixels - 0.4) / 255, mock.Mock(log_dir=None)
        png = encode(picture)
        torch.testing.assert_close(pil_to_tensor(Image.open(io.BytesIO(png))), pixels)
        for number, (kinds, place) in enumerate(
            [(["tensorboard"], "1/tensorboard"), (["csv", "tensorboard"], "1/csv"), ([], ""), (["other"], "")]
        ):
            folder = self.folder / str(number)
            loggers = {
                "csv": CSVLogger(folder, "1", "csv"),
                "tensorboard": EpochLogger(str(folder / "1" / "tensorboard")),
                "other": other,
            }
            trainer = argparse.Namespace(loggers=[loggers[kind] for kind in kinds], default_root_dir=folder)
            trainer.logger = next(iter(trainer.loggers), None)
            save_picture(trainer, "Samples", picture, 5)
            self.assertEqual([*folder.rglob("*.png")], [])
            save_picture(trainer, "Samples", picture, 6, save_to_disk=True)
            self.assertEqual([*folder.rglob("*.png")], [folder / place / "epoch_6_samples.png"])
            self.assertEqual((folder / place / "epoch_6_samples.png").read_bytes(), png)
            if "tensorboard" in kinds:
                loggers["tensorboard"].flush()
                events = EventAccumulator(str(folder / "1" / "tensorboard")).Reload().Images("Samples")
                found = [(event.step, event.height, event.width, event.encoded_image_string) for event in events]
                self.assertEqual(found, [(step, 4, 6, png) for step in [5, 6]])
        self.assertEqual(
            other.experiment.add_image.mock_calls, [mock.call("Samples", picture, step) for step in [5, 6]]
        )

    def test_the_table_of_runs_shows_the_identifying_flags_first_and_charts_have_both_stages(self):
        experiment = argparse.Namespace(
            metric="error", identifying=("lr",), quantities={"loss": "Loss", "error": "Error"}
        )
        logger = EpochLogger(str(self.folder))
        logger.set_up_dashboard({"depth": [1, 2], "lr": 0.1, "log_dir": "logs"}, experiment)
        logger.flush()
        found = {summary.tag: summary for _, summary in summaries(self.folder)}
        table = HParamsPluginData.FromString(found["_hparams_/experiment"].metadata.plugin_data.content).experiment
        self.assertEqual({info.name: info.differs for info in table.hparam_infos}, {"depth": False, "lr": True})
        self.assertEqual([info.name.tag for info in table.metric_infos], ["test_error"])
        layout = Layout.FromString(found["custom_scalars__config__"].tensor.string_val[0])
        charts = [(chart.title, [*chart.multiline.tag]) for chart in layout.category[0].chart]
        self.assertEqual(charts, [("Error", ["train_error", "val_error"]), ("Loss", ["train_loss", "val_loss"])])

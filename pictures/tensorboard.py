"""Saves pictures during training: in TensorBoard, and as PNG files."""

import io
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def save_picture(trainer, name: str, picture: Tensor, epoch: int, save_to_disk: bool = False):
    """
    Adds a picture to TensorBoard, if the Trainer has a TensorBoard logger, and saves it as epoch_N_name.png. The file
    is in the folder of the first logger. If there is no logger, or the first one has no folder, the file is in the
    Trainer's default_root_dir.
    Inputs:
        trainer - The PyTorch Lightning Trainer, with any loggers.
        name - Tag of the picture.
        picture - Tensor of shape [3,H,W] of values between 0 and 1.
        epoch - N, the number of epochs trained so far.
        save_to_disk - If False, the PNG file is not written.
    """
    png = encode(picture)
    for logger in list(trainer.loggers) or [trainer.logger]:
        writer = getattr(logger, "experiment", None)
        if isinstance(writer, SummaryWriter):  # its add_image would encode the picture again
            height, width = picture.shape[1:]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), epoch)
        elif hasattr(writer, "add_image"):
            writer.add_image(name, picture.cpu(), epoch)
    if save_to_disk:
        folder = Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"epoch_{epoch}_{name.lower()}.png").write_bytes(png)


def encode(picture: Tensor) -> bytes:
    """Encodes a picture [3,H,W] as the content of a PNG file."""
    pixels, file = picture.mul(255).round().byte().permute(1, 2, 0).cpu(), io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png", compress_level=1)  # 6, the default, takes three times as long
    return file.getvalue()

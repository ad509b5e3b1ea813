"""Pictures in TensorBoard."""

import io

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def log_picture(writer, name: str, picture: Tensor, epoch: int) -> bytes:
    """
    Adds a picture to TensorBoard as a PNG file, and returns the file's bytes. (SummaryWriter.add_image would have it
    encoded for itself alone.)
    Inputs:
        writer - What a logger calls its experiment.
        name - Tag of the picture.
        picture - Tensor of shape [3,H,W] of values between 0 and 1.
        epoch - Number of epochs trained so far.
    """
    pixels = picture.mul(255).round().byte().permute(1, 2, 0).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png", compress_level=1)  # 6, the default, takes three times as long
    if isinstance(writer, SummaryWriter):
        height, width, depth = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=depth, encoded_image_string=file.getvalue())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), epoch)
    else:
        writer.add_image(name, picture.cpu(), epoch)
    return file.getvalue()

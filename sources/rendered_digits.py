"""
Renders digits in MNIST's format from the fonts that matplotlib ships: training data if MNIST cannot be downloaded.

The images follow MNIST's rules: 28x28 pixels from 0 (paper) to 255 (ink). A digit keeps its proportions, fits into a
box of 20x20 pixels, and has its centre of mass within half a pixel of pixel (14, 14). Rendering 60,000 images takes
about a second on one core.

Each digit of each font is rendered once, large, and converted to a distance field: how far each point lies inside the
ink. An image is a random affine map of this field. A number that is added to the distance, before the distance is
converted to grey, sets the width of the pen (Green, "Improved Alpha-Tested Magnification for Vector Textures and
Special Effects", SIGGRAPH 2007).
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from harness.errors import DataError

# Fonts with ten plain digits, and the width of their thinnest strokes in em. Not included: a zero with a dot in it
# (DejaVuSansMono), old-style figures (cmmi10), symbols, and slanted variants, since the random shear slants all digits.
FONTS = {
    "DejaVuSans": 0.06,
    "DejaVuSans-Bold": 0.105,
    "DejaVuSerif": 0.045,
    "STIXGeneral": 0.025,
    "STIXGeneralItalic": 0.025,
    "cmr10": 0.03,
    "cmss10": 0.05,
    "cmtt10": 0.05,
}
EM = 88  # pixels: the size in which the glyphs are rendered
CANVAS = 96  # pixels: each side of the square on which they are rendered
FIELD = 48  # samples: each side of a distance field
IMAGES_PER_BLOCK = 1_000  # images that are rendered at a time; this bounds the memory

# Each parameter is sampled uniformly between two limits for each image. The limits make images as varied as MNIST's.
LIMITS = {
    "stretch": (0.9, 1.3),  # width relative to the font's: handwriting is wider than type
    "shear": (-0.15, 0.45),  # pixels to the right per pixel up: handwriting leans to the right
    "rotation": (-0.15, 0.15),  # radians clockwise, far too small to turn a 6 into a 9
    "shift_x": (-0.5, 0.5),  # pixels: MNIST's digits are centred to the nearest pixel
    "shift_y": (-0.5, 0.5),  # pixels
    "box": (18.5, 19.5),  # pixels: longer side of the digit, measured to the middle of its grey edge
    "pen": (1.1, 2.1),  # pixels: width of the digit's thinnest stroke
}
EDGE = 1.2  # pixels: width of the grey edge between paper and ink

SYSTEM_DATA = Path("/usr/share/matplotlib/mpl-data")  # the fonts of Debian's and Ubuntu's matplotlib


def font_path(name: str) -> Path:
    """
    Returns the file of one of matplotlib's FONTS. Raises a DataError if it is missing, since a font of the same name
    from elsewhere may have other digits. matplotlib is not imported, because this takes longer and makes its settings
    folder.
    """
    spec = importlib.util.find_spec("matplotlib")
    # If a folder named matplotlib is found instead of the package, spec.origin is None.
    own_data = [Path(spec.origin).parent / "mpl-data"] if spec and spec.origin else []
    for data in [*own_data, SYSTEM_DATA]:
        if (path := data / "fonts" / "ttf" / f"{name}.ttf").is_file():
            return path
    problem = f"rendered digits need matplotlib's font {name}.ttf, which is missing"
    raise DataError(f"{problem}: run `pip install --force-reinstall matplotlib`")


def render_glyph(font, digit):
    """Renders one large digit, its centre of mass in the middle. Returns its ink, a bool array [CANVAS, CANVAS]."""
    image = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(image).text((CANVAS / 2, CANVAS / 2), str(digit), fill=255, font=font, anchor="mm")
    ink = np.asarray(image) > 127
    to_middle = (CANVAS - 1) / 2 - np.argwhere(ink).mean(axis=0)
    return np.roll(ink, to_middle.round().astype(int), axis=(0, 1))


def distance_to(mask):
    """
    Returns the distances in pixels, float32 [FIELD,FIELD], to the nearest point of a mask, bool [CANVAS,CANVAS].
    Squared distances need one pass per axis (Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled Functions",
    2012).
    """
    samples = np.linspace(0, CANVAS - 1, FIELD, dtype=np.float32)
    steps = (samples[:, None] - np.arange(CANVAS, dtype=np.float32)) ** 2
    squares = np.where(mask, np.float32(0), np.float32(1e6))
    for _ in range(2):
        squares = (squares[:, None, :] + steps).min(axis=-1).T
    return np.sqrt(squares)


@functools.cache
def glyphs():
    """
    Renders the G = 10 * len(FONTS) glyphs; the index of digit d of font f is 10 * f + d. The unit of length is half the
    side of the canvas, and (0, 0) is its middle.
    Outputs:
        fields - Tensor of shape [G,FIELD,FIELD], distances to the outline, positive inside.
        corners - Tensor of shape [G,32,2], (x, y) of the outermost ink in 32 directions.
        hairlines - Tensor of shape [G], the widths of the thinnest strokes.
    Raises:
        DataError - if a font is missing.
    """
    fields, corners, hairlines = [], [], []
    angles = np.arange(32) * (2 * np.pi / 32)
    for name, thinnest in FONTS.items():
        # The Raqm layout needs the library libraqm, which is not on every machine.
        font = ImageFont.truetype(str(font_path(name)), EM, layout_engine=ImageFont.Layout.BASIC)
        for digit in range(10):
            ink = render_glyph(font, digit)
            points = np.argwhere(ink)[:, ::-1] - (CANVAS - 1) / 2
            outermost = (points @ np.stack([np.cos(angles), np.sin(angles)])).argmax(axis=0)
            fields.append(distance_to(~ink) - distance_to(ink))
            corners.append(points[outermost])
            hairlines.append(thinnest * EM)
    tables = (torch.tensor(np.stack(table), dtype=torch.float32) for table in (fields, corners, hairlines))
    return tuple(table / ((CANVAS - 1) / 2) for table in tables)


def render(glyph, stretch, shear, rotation, shift_x, shift_y, box, pen):
    """Renders images, uint8 [N,28,28], of glyphs, int64 [N]. The other arguments are float [N], in LIMITS' units."""
    fields, corners, hairlines = (table[glyph] for table in glyphs())

    # A glyph is stretched, sheared, then rotated: (x, y) moves to scale * (xx x + xy y, yx x + yy y). y points down.
    cos, sin = rotation.cos(), rotation.sin()
    xx, xy, yx, yy = cos * stretch, -cos * shear - sin, sin * stretch, cos - sin * shear
    x_min, x_max = (xx[:, None] * corners[..., 0] + xy[:, None] * corners[..., 1]).aminmax(dim=1)
    y_min, y_max = (yx[:, None] * corners[..., 0] + yy[:, None] * corners[..., 1]).aminmax(dim=1)
    size = torch.maximum(x_max - x_min, y_max - y_min)

    # The pen adds `added` pixels on each side of a stroke. Two equations determine `scale` and `added`:
    # scale * size + 2 * added = box and scale * hairline + 2 * added = pen.
    # Stretching widens strokes by sqrt(stretch) on average. The pen is the width of the thinnest stroke, so that no
    # stroke breaks.
    hairlines = hairlines * stretch.sqrt()
    scale = (box - pen) / (size - hairlines)
    added = (pen - scale * hairlines) / 2

    # grid_sample needs the point of the glyph for each pixel: the inverse of the map. Its determinant is
    # scale^2 * stretch.
    pixels = torch.arange(28) - 14
    x, y = pixels - shift_x[:, None, None], pixels[:, None] - shift_y[:, None, None]
    xx, xy, yx, yy = (entry[:, None, None] / (scale * stretch)[:, None, None] for entry in (xx, xy, yx, yy))
    grid = torch.stack([yy * x - xy * y, xx * y - yx * x], dim=1).movedim(1, -1)
    distance = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=True)[:, 0]
    # Distances in pixels become shades of grey: 127.5 at the end of the added ink, and 255 / EDGE more per pixel.
    contrast, middle = scale * stretch.sqrt() * (255 / EDGE), added * (255 / EDGE) + 127.5
    return (distance * contrast[:, None, None] + middle[:, None, None]).clamp(0, 255).to(torch.uint8)


def rendered_digits(num_images: int = 60_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    Renders digits in MNIST's format. Every slice of them is a random sample with about equally many of each digit.
    Inputs:
        num_images - Number of images. A smaller number returns the first images of a larger number.
        seed - The same seed gives the same images.
    Outputs:
        images - uint8 tensor of shape [num_images,28,28], 0 (paper) to 255 (ink).
        labels - int64 tensor of shape [num_images].
    Raises:
        ValueError - if num_images is below 1.
        DataError - if matplotlib's fonts are missing.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(list(LIMITS.values())).T
    images = torch.empty(num_images, 28, 28, dtype=torch.uint8)
    labels = torch.empty(num_images, dtype=torch.int64)
    # One thread: a second one saves little on an idle machine, and under CPU contention the two wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for some_images, some_labels in zip(
            images.split(IMAGES_PER_BLOCK), labels.split(IMAGES_PER_BLOCK), strict=True
        ):
            # Sampled for a whole block even if it has fewer images, so that an image does not depend on num_images.
            glyph = torch.randint(10 * len(FONTS), (IMAGES_PER_BLOCK,), generator=generator)[: len(some_images)]
            values = (
                torch.rand(IMAGES_PER_BLOCK, len(LIMITS), generator=generator)[: len(some_images)] * (high - low) + low
            )
            some_images.copy_(render(glyph, *values.T))
            some_labels.copy_(glyph % 10)
    finally:
        torch.set_num_threads(threads)
    return images, labels


def rendered_mnist(num_train: int = 60_000, num_test: int = 10_000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Renders digits as the two parts of MNIST.
    Inputs:
        num_train, num_test - Numbers of images.
    Outputs:
        train_images, train_labels - uint8 tensor of shape [num_train,28,28], int64 tensor of shape [num_train]
        test_images, test_labels - The same for the test images.
    """
    images, labels = rendered_digits(num_train + num_test)
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]

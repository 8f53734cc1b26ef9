"""Image files: selection in a folder, and pixels as a viewer shows them."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from kd_common.errors import UserError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF", "AVIF", "JPEG2000")
"""Pillow's names of the supported formats. Others, such as EPS, would start another program on the file."""

CHECKED = 500
"""Number of images of a split whose headers are read before a run, in less than a tenth of a second."""

CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""Files that file managers write into folders; macOS adds files that start with `._`."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that turn the stored pixels of each EXIF orientation upright."""


@cache
def endings() -> frozenset[str]:
    """Return the endings of the files that are read, in lower case."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)


@cache
def _decoders() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)  # an older Pillow has no AVIF


def is_clutter(name: str) -> bool:
    """Return whether a file manager wrote the file of this name."""
    return name in CLUTTER or name.startswith("._")


def find_images(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder and in its sub-folders, linked ones included, and the paths that are left out.

    Files without the ending of an image, hidden files and folders, and broken links are left out. Files that file
    managers create are in neither list.

    Args:
        folder: Where to look.
        above: Device and inode of the folders that lead here.

    Raises:
        UserError: If a link leads back to a folder that holds it.
        OSError: If a folder cannot be read.
    """
    status = folder.stat()
    here = (*above, (status.st_dev, status.st_ino))
    if here[-1] in above:
        raise UserError(f"a link leads from {folder} back to a folder that holds it: remove the link")
    images: list[Path] = []
    left_out: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if is_clutter(entry.name):
                continue
            if entry.name.startswith("."):
                left_out.append(path)
            elif entry.is_dir():
                more, rest = find_images(path, here)
                images += more
                left_out += rest
            else:
                is_image = path.suffix.lower() in endings() and entry.is_file()
                (images if is_image else left_out).append(path)
    return images, left_out


def warn_of_left_out(folder: Path, left_out: Sequence[Path]) -> None:
    """Warn of files and folders that are not used, if there are any."""
    if left_out:
        kinds = Counter(path.suffix.lower() or path.name for path in left_out).most_common()
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds[:5]) + (", ..." if len(kinds) > 5 else "")
        warnings.warn(
            f"{folder}: {len(left_out)} files or folders are left out ({counts}), such as {min(left_out)}: they are "
            f"hidden, in no class, broken links or without the ending of an image ({', '.join(sorted(endings()))})",
            stacklevel=2,
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file and read its header; errors inside name the file.

    Raises:
        OSError: If the file cannot be read.
        UserError: If it is damaged, or no single image.
    """
    try:
        with Image.open(path, formats=_decoders()) as image:
            # The further images of an MPO are previews and depth maps of the first.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise UserError("it holds several frames or pages, of which one would be taken")
            if image.mode.startswith(("I", "F")) and not _has_16_bits(image):
                raise UserError(f"its pixels are numbers whose white is not defined, Pillow's mode {image.mode}")
            yield image
    except Exception as error:  # Pillow's decoders report damage with any kind of error
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
            raise
        raise UserError(f"{path} is not a usable image ({error}): save it anew, replace or delete it") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns the pixels upright. Damaged EXIF data turn nothing, as in viewers."""
    try:
        # Pillow's PNG reader would decode all pixels here to search for data behind them.
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        return TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # the data may be of any kind
        return None


def header_size(path: Path) -> tuple[int, int]:
    """Return the width and height of the upright image, from the file's header.

    Raises:
        UserError: If the header is damaged, or the file no single image.
        OSError: If the file cannot be read.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = image.format != "TIFF" and _turn(image) in list(TURNS.values())[3:]  # Pillow turns TIFF itself
        return (height, width) if turned else (width, height)


def spread(count: int) -> range:
    """Return at most `CHECKED` evenly spaced numbers below `count`."""
    return range(0, count, max(1, -(-count // CHECKED)))


def read_rgb(path: Path) -> Tensor:
    """Return the image in a file as a viewer shows it: upright by its EXIF orientation, transparent parts on white.

    16-bit greys keep their upper 8 bits. Colour profiles are not applied.

    Args:
        path: The file.

    Returns:
        Shape (3, H, W), uint8.

    Raises:
        UserError: If the file is damaged, too large, no single image, wholly transparent, or if its pixels have no
            defined black and white.
        OSError: If the file cannot be read.
    """
    with _opened(path) as image:
        image.load()
        upright = _turn(image)
        rgb = _eight_bits(image)
        if rgb.has_transparency_data:
            rgb = rgb.convert("RGBA")
            if rgb.getchannel("A").getextrema()[1] == 0:
                raise UserError("it is wholly transparent")
            rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb)
        rgb = rgb.convert("RGB")
        return F.pil_to_tensor(rgb if upright is None else rgb.transpose(upright))


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether an image is grey from 0, black, to 65,535, white."""
    tags = getattr(image, "tag_v2", {})
    black_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 1
    filled = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)) == (16,)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return sixteen and black_is_zero and filled and "transparency" not in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of one byte a channel; Pillow's own conversion cuts 16 bits off at 255."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I") else image

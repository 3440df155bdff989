"""Image files and image bytes as RGB pixels, with nothing read that a data set has no business naming."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from amvl_fast.errors import AMVLError

# A file of a few kilobytes may claim any size. Pillow only warns from here on, and refuses twice as many.
MAX_PIXELS = 89_478_485
# Pillow's other formats are rare in data sets, less tested, or run programs (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# Two characters at least, so that a drive letter is told as the missing file that it is.
URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
UNREADABLE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)


def confined(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The file that an image path of a data set means: ``root / name``.

    The path is looked at as it is written, and symbolic links are followed: who puts one below `root` means it.

    Raises:
        ValueError: `name` is a URL, has a part ``..``, is an absolute path outside of `root`, or `root` is None.
    """
    if URL.match(name):
        raise ValueError("it is a URL, and images are read from local files alone")
    if root is None:
        raise ValueError("it is a path, and no image_root says where it starts from")
    base = Path(os.path.abspath(root))
    if ".." in Path(name).parts:
        raise ValueError("its path has a part '..'")
    if not (base / name).is_relative_to(base):
        raise ValueError(f"it lies outside of image_root, {base}")
    return Path(root) / name


def read_image(source: str | bytes, root: str | os.PathLike[str] | None = None) -> Image.Image:
    """An image as RGB, upright; the first frame of an animated one.

    Args:
        source: the bytes of an image file, or its path, see `confined`.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: see `UNREADABLE`; it is missing, truncated,
            no image, too large (`MAX_PIXELS`), of an unknown range of values, or not where images may be.
    """
    with _open(source, root) as image:
        image.load()
        _require_size(image)  # icons hold several sizes, and loading chooses
        ImageOps.exif_transpose(image, in_place=True)  # phones store photographs lying on their side
        if image.mode.startswith("I;16"):  # converting would clip all but the darkest 256 values to white
            levels = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def peek_image(source: str | bytes, root: str | os.PathLike[str] | None = None) -> None:
    """Check what an image's header tells; raises as `read_image`."""
    _open(source, root).close()


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file, anywhere, as RGB, upright.

    Raises:
        AMVLError: the file is missing or cannot be read.
    """
    try:
        return read_image(Path(path).name, Path(path).parent)
    except UNREADABLE as error:
        raise AMVLError(f"The image {path} cannot be read ({error}): give the path of an image file.") from error


def _open(source: str | bytes, root: str | os.PathLike[str] | None) -> Image.Image:
    file = io.BytesIO(source) if isinstance(source, bytes) else confined(source, root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of what is refused below
        image = Image.open(file, formats=FORMATS)
    try:
        _require_size(image)
        if image.mode in ("I", "F"):  # no saying which values are black and white
            raise ValueError(f"its pixel mode is {image.mode!r}; save it with 8 or 16 bits a channel")
    except ValueError:
        image.close()
        raise
    return image


def _require_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all")

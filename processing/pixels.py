"""Pixels as the model sees them: any picture -> RGB, 8 bits -> a square.

    load_rgb     decode, EXIF rotation, alpha on white, 16 bits to 8
    fit_square   shorter side to `size`, centre crop

Data preparation and the image processor both come through here, so that what is trained on and what is asked at
inference cannot drift apart. What is done to each kind of picture:

- a file with several frames: its first one; a PIL image: the frame it stands on
- EXIF orientation: applied
- transparency (alpha channel, transparent palette entries or colour): laid on white
- grey with 16 bits (modes I;16 and I): 0..65535 becomes 0..255; float grey (mode F): 0..1 becomes 0..255; values
  outside these ranges have no scale that we could know, and are refused
- CMYK, YCbCr, HSV, palette, bilevel: Pillow's conversion; colour profiles are not applied

What comes back holds pixels only: no EXIF (and no place where it was taken), no profile.
"""

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class PictureError(ValueError):
    """A picture that cannot become pixels.

    Attributes:
        reason: "not an image", "truncated", "unreadable" or "too large".
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def load_rgb(
    picture: str | os.PathLike | bytes | BinaryIO | Image.Image, max_pixels: int | None = None
) -> Image.Image:
    """The picture as a new 8-bit RGB image, upright, without metadata.

    Args:
        picture: a file name, the bytes of a file, an open binary file, or a PIL image, which is left as it is.
        max_pixels: largest width x height to decode, judged by the header before any pixel is. Files above
            178,956,970 pixels are refused even without it, by Pillow's own guard against decompression bombs.

    Raises:
        PictureError: with its `reason`, whatever is wrong inside the picture.
        OSError: the file cannot be opened at all.
    """
    if isinstance(picture, str | os.PathLike):
        with open(picture, "rb") as file:
            return load_rgb(file, max_pixels)
    try:
        if isinstance(picture, Image.Image):
            _require_size(picture, max_pixels)
            return _rgb(ImageOps.exif_transpose(picture))
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            _require_size(image, max_pixels)
            if image.format == "EPS":
                raise PictureError("unreadable", "PostScript is a program that draws; it is not run")
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("not an image", "Pillow recognises no picture format in it") from error
    except Image.DecompressionBombError as error:
        raise PictureError("too large", str(error)) from error
    except Exception as error:  # Pillow's decoders let pass whatever damaged bytes made them trip over
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise PictureError(reason, str(error) or type(error).__name__) from error


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, resized to `size` x `size`.

    Bicubic both ways, with antialiasing when it shrinks. A picture that has this size already keeps its pixels.
    """
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _require_size(image: Image.Image, max_pixels: int | None) -> None:
    if not image.width * image.height:
        raise PictureError("unreadable", f"{image.width}x{image.height} pixels are none")
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise PictureError("too large", f"{image.width}x{image.height} is more than {max_pixels:,} pixels")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    image = image.convert("RGB")
    image.info.clear()
    return image


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W)
    white = 1.0 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # false for nan too
        raise PictureError("unreadable", f"grey values from {low} to {high}, not from 0 to {white}")
    if image.mode == "F":
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        grey = np.rint(np.linspace(0, 255, 65536)).astype(np.uint8)[values]
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)

"""UniTokImageProcessor: pictures to the pixels that the tokenizer reads, and back.

RGB, upright by EXIF, transparency on white, the largest centred square resized to the model's size, [-1, 1]. It runs on
Pillow alone; no torchvision. The same pixel functions prepare training data (`pixels`).
"""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, ImageInput, PILImageResampling

from ..configuration.refusal_unitok import require_size
from .pixels import fit_square, load_rgb


MOST_PIXELS_PER_SIDE = 2**14  # a file of a hundred bytes can ask for 10⁹


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL pictures of (B, 3, H, W) in [-1, 1], clamped and rounded to 8 bits."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


class UniTokImageProcessor(PilBackend):
    """Image processor of UniTok models; arguments as any of transformers' image processors.

    The default size is 64x64; a model's own is in its `processor_config.json`.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 64}
    crop_size = {"height": 64, "width": 64}
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    model_input_names = ["pixel_values"]

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs) -> np.ndarray:
        """One picture as (3, H, W); a PIL image is made upright RGB first, transparency on white."""
        if isinstance(image, Image.Image) and do_convert_rgb:
            image = load_rgb(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """In single precision, as in training: the last bit can decide which code is nearest."""
        return image.astype(np.float32) * np.float32(scale)

    def _preprocess(
        self, images: list[np.ndarray], do_resize, size, do_center_crop, crop_size, do_rescale, **kwargs
    ) -> BatchFeature:
        for name, asked in (
            ("size", size if do_resize else None),
            ("crop_size", crop_size if do_center_crop else None),
        ):
            for side, value in dict(asked or {}).items():
                if value is not None:
                    require_size(f"{side} of {name}", value, MOST_PIXELS_PER_SIDE)
        for image in images:
            if do_rescale and image.dtype.kind == "f" and 0 < image.max() <= 1:
                raise ValueError(
                    "a picture of floats up to 1 would become black; pass do_rescale=False, or values from 0 to 255"
                )
        side = crop_size.height if do_resize and do_center_crop else None
        if side is not None and side == crop_size.width == size.shortest_edge:
            do_resize = do_center_crop = False
            images = [
                np.asarray(fit_square(Image.fromarray(image.transpose(1, 2, 0)), side)).transpose(2, 0, 1)
                if image.dtype == np.uint8 and image.shape[0] == 3
                else self.center_crop(self.resize(image, size, kwargs["resample"]), crop_size)
                for image in images
            ]
        return super()._preprocess(
            images,
            do_resize=do_resize,
            size=size,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            **kwargs,
        )

    def postprocess(self, images: torch.Tensor | list[torch.Tensor], **kwargs) -> BatchFeature:
        """`pixel_values`: PIL pictures of (B, 3, H, W) in [-1, 1], or of a list of (3, H, W)."""
        return BatchFeature({"pixel_values": to_pictures(torch.stack(list(images)))})

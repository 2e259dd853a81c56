"""The preprocessing of pictures for the encoders of metrics, as in their training: resized, cropped, normalised.

Pillow resizes, as in transformers' processors of that name, since the filters of other libraries round otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from personalize_jax.runtime.errors import UserError

FILE = "preprocessor_config.json"
_SQUARE = {"ViTImageProcessor": True, "CLIPImageProcessor": False}  # whether a single size means both sides


class Preprocessing(NamedTuple):
    """The preprocessing of a picture.

    Attributes:
        size: (height, width) after resizing; or a number, the shorter side, where the proportions stay.
        resample: Pillow's filter.
        crop: the side of the square cut from the middle; None for no crop.
        mean: the mean of each colour, in [0, 1].
        deviation: the standard deviation of each colour, in [0, 1].
    """

    size: int | tuple[int, int]
    resample: int
    crop: int | None
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint's `preprocessor_config.json`, as `ViTImageProcessor` and `CLIPImageProcessor` do.

        Raises:
            UserError: the file is missing or damaged, or describes another preprocessing.
        """
        file = folder / FILE
        try:
            return cls.from_config(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); download the model with it.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} cannot be read as a processor's configuration ({error!r}); restore it.") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the preprocessing from the content of such a file.

        Raises:
            UserError: the file describes another processor, or switches a step off.
        """
        name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        if not name:
            raise UserError(f"{FILE} has no image_processor_type; add the one that the model was published with.")
        name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        if name not in _SQUARE:
            raise UserError(f"{FILE} describes a {name}; give a model with one of {', '.join(_SQUARE)}.")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise UserError(f"{FILE} switches {step} off; give a model whose pictures are prepared in full.")
        crop = config.get("do_center_crop", not _SQUARE[name])
        return cls(
            size=_size(config["size"], _SQUARE[name]),
            resample=int(config["resample"]),
            crop=_crop(config["crop_size"]) if crop else None,
            mean=tuple(config["image_mean"]),
            deviation=tuple(config["image_std"]),
        )

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Prepare pictures.

        Args:
            images: uint8 [H, W, 3], each of its own size.

        Returns:
            float32 [B, H', W', 3].
        """
        x_BHWC = np.stack([self._resized(Image.fromarray(image)) for image in images]).astype(np.float32) / 255
        return (x_BHWC - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)

    def _resized(self, image: Image.Image) -> np.ndarray:
        if isinstance(self.size, int):
            short = min(image.size)
            # Integers throughout: the longer side is cut to the pixel below.
            width, height = (self.size if side == short else int(self.size * side / short) for side in image.size)
        else:
            height, width = self.size
        resized = np.asarray(image.resize((width, height), self.resample))
        if self.crop is None:
            return resized
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return resized[top : top + self.crop, left : left + self.crop]


def _size(size: int | Mapping[str, int], square: bool) -> int | tuple[int, int]:
    if isinstance(size, int):
        return (size, size) if square else size
    return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])


def _crop(size: int | Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size["height"] != size["width"]:
        raise UserError(f"{FILE} crops to {size['height']} x {size['width']} pixels; only squares are supported.")
    return size["height"]

"""Reads the image files of a subject as RGB pixels, cropped to a square or whole.

A file that cannot be used is refused by its header where possible, so that no image is decoded in vain and no small
file can ask for gigabytes of memory.
"""

import contextlib
import hashlib
import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

MAX_IMAGES = 20
MAX_PIXELS = 100_000_000
MIN_SIDE = 16
MAX_ENLARGEMENT = 2  # beyond it the photo looks blurred, and a warning says so
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# The exceptions that Pillow's decoders raise on damaged bytes.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)

_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SubjectImage(NamedTuple):
    """One image of a subject.

    Attributes:
        path: the image's file.
        sha256: SHA-256 of the file, in hexadecimal.
        pixels: sRGB, uint8 [R, R, 3].
    """

    path: Path
    sha256: str
    pixels: np.ndarray


def load_images(source: Path | Sequence[Path], resolution: int) -> list[SubjectImage]:
    """Read the images of one subject, each cropped to its centre square and resized with antialiasing.

    Images are turned upright by their EXIF orientation, and converted to sRGB where they embed a colour profile.
    Transparency is composited over white, so that a cut-out subject stands before a plain background; channels of 16
    bits become 8 by scaling, not by clipping.

    A warning names images that are the same picture, or that are enlarged to more than twice their size.

    Args:
        source: a folder, whose JPEG, PNG and WebP files are read in order of name (hidden files are skipped, and a
            warning names files of other kinds); or one file, or several, which are read in the given order.
        resolution: R, the side of the returned images in pixels.

    Returns:
        1 to 20 images.

    Raises:
        UserError: no image or too many, or one that is missing, unreadable, damaged, animated, too small or too large.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}; a positive number of pixels was expected")
    paths = list_images(source)
    if len(paths) > MAX_IMAGES:
        raise UserError(
            f"{len(paths)} images were given, at most {MAX_IMAGES} are expected; keep sharp and varied ones."
        )
    images = [_load_image(path, resolution) for path in paths]
    _warn_of_duplicates(images)
    return images


def read_image(path: Path) -> np.ndarray:
    """Read one image whole and at its own size, upright and in sRGB as `load_images` does: uint8 [H, W, 3].

    Raises:
        UserError: the image is missing, unreadable, damaged, animated or too large.
    """
    with _opened(path) as (_, image):
        upright, profile = _decode(path, image)
        return np.array(_to_srgb(path, upright, profile))


def from_pixels(name: str, pixels: np.ndarray, resolution: int) -> SubjectImage:
    """Crop and resize an image that is already decoded, uint8 [H, W, 3], as `load_images` does.

    Raises:
        UserError: the image is too small.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    path = Path(name)
    return SubjectImage(path, digest, _square_pixels(path, Image.fromarray(pixels), resolution))


def list_images(source: Path | Sequence[Path]) -> list[Path]:
    """List the JPEG, PNG and WebP files of a folder in order of name; or the one file, or several, that are given.

    Raises:
        UserError: no file was given, or the folder holds no images or cannot be read.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise UserError(f"No images were given; name a folder or 1 to {MAX_IMAGES} JPEG, PNG or WebP files.")
        return [Path(path) for path in source]
    folder = Path(source)
    try:
        if not folder.is_dir():
            return [folder]
        visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); check its name and permissions.") from error
    images = [path for path in visible if path.suffix.lower() in SUFFIXES]
    others = [path.name for path in visible if path.suffix.lower() not in SUFFIXES]
    ignored = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not images:
        raise UserError(
            f"{folder} holds no images{f' (only {ignored})' if ignored else ''}; "
            f"put 1 to {MAX_IMAGES} JPEG, PNG or WebP files of the subject there."
        )
    if ignored:
        logger.warning("Ignored in %s, being neither JPEG, PNG nor WebP: %s.", folder, ignored)
    return images


def _warn_of_duplicates(images: Sequence[SubjectImage]) -> None:
    first_of: dict[bytes, Path] = {}
    for image in images:
        first = first_of.setdefault(image.pixels.tobytes(), image.path)
        if first is not image.path:
            logger.warning("%s is the same picture as %s; leave it out or give another one.", image.path, first)


def _load_image(path: Path, resolution: int) -> SubjectImage:
    with _opened(path) as (file, image):
        pixels = _square_pixels(path, image, resolution)
        file.seek(0)
        return SubjectImage(path, hashlib.file_digest(file, "sha256").hexdigest(), pixels)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader, Image.Image]]:
    """Open a file and its image, of which only the header is read."""
    try:
        if not path.is_file():  # also keeps devices and pipes from being read for ever
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; name a folder or 1 to {MAX_IMAGES} JPEG, PNG or WebP files.")
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions, or leave it out.") from error
    with file, _open_image(path, file) as image:
        yield file, image


def _open_image(path: Path, file: io.BufferedReader) -> Image.Image:
    """Read the header, whatever the file is called, and refuse an image that should not be decoded."""
    too_large = f"{path} has more than {MAX_PIXELS // 10**6} megapixels, the most that is read; scale it down first."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise UserError(too_large) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} is not a JPEG, PNG or WebP image, whatever its name says; convert it or leave it out."
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); copy it again from its source, or leave it out.") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(too_large)
    # Phone cameras write MPO: a JPEG followed by a preview or depth map, of which the first frame is the photo.
    frames = getattr(image, "n_frames", 1)
    if image.format != "MPO" and frames > 1:
        raise UserError(f"{path} is an animation of {frames} frames, a still image is expected; export a frame.")
    return image


def _square_pixels(path: Path, image: Image.Image, resolution: int) -> np.ndarray:
    """The centre square of an opened image, resized: uint8 [R, R, 3]."""
    width, height = image.size if _orientation(image) < 5 else image.size[::-1]
    side = min(width, height)
    if side < MIN_SIDE:
        raise UserError(
            f"{path} is {width}x{height} pixels, at least {MIN_SIDE}x{MIN_SIDE} are expected; use a larger image."
        )
    if resolution > MAX_ENLARGEMENT * side:
        logger.warning(
            "%s shows %dx%d pixels, which are enlarged to %dx%d and look blurred; give a larger image if there is one.",
            path,
            side,
            side,
            resolution,
            resolution,
        )
    scale = _shrink_while_decoding(image, 2 * resolution / side)  # twice the resolution, for the filter
    upright, profile = _decode(path, image)
    left, top = (width - side) / 2, (height - side) / 2
    crop = (left * scale, top * scale, (left + side) * scale, (top + side) * scale)
    square = upright.resize((resolution, resolution), Image.Resampling.LANCZOS, box=crop, reducing_gap=3.0)
    return np.array(_to_srgb(path, square, profile))


def _decode(path: Path, image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """Decode the whole image, upright and opaque; its colours are those of the embedded ICC profile, if any."""
    orientation = _orientation(image)
    try:
        image.load()
        profile = image.info.get("icc_profile")
        image = _flatten(image)
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); copy it again from its source, or leave it out.") from error
    if orientation in _TURN_UPRIGHT:
        image = image.transpose(_TURN_UPRIGHT[orientation])
    return image, profile


def _shrink_while_decoding(image: Image.Image, least: float) -> float:
    """Let a JPEG decode straight to 1/2, 1/4 or 1/8 of its size, not below `least`, and return that scale."""
    if least >= 1:
        return 1.0
    width = image.width
    drafted = image.draft(None, (math.ceil(width * least), math.ceil(image.height * least)))
    if drafted is None:  # other formats only decode in full
        return 1.0
    _, (_, _, exact_width, _) = drafted  # image.width is this rounded up
    return exact_width / width


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:  # photographs with broken EXIF blocks are common, and their pixels are sound
        return 1
    return orientation if orientation in _TURN_UPRIGHT else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Bring any mode to L, RGB or CMYK at 8 bits; CMYK stays until the colour profile is applied."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion would clip at 255
        return Image.fromarray(np.round(np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_srgb(path: Path, image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return cast(Image.Image, converted)  # None only where an image is converted in place
        except (ImageCms.PyCMSError, OSError, ValueError):
            logger.warning("The colour profile in %s does not fit the image; its colours are taken as sRGB.", path)
    return image.convert("RGB")

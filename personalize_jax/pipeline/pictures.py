"""PNG files that name their prompt and seed."""

import hashlib
import io
import re
import struct
import unicodedata
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing

MAX_NAME = 80

# What Pillow's decoder raises on damaged bytes; a header may also claim an absurd size.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


def save_png(pixels: np.ndarray, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a picture, whole or not at all; the same picture and metadata give the same bytes.

    Args:
        pixels: uint8 [H, W, 3] RGB.
        file: the file to write or replace; missing folders are made.
        metadata: such as prompt, seed and identifier, kept as text chunks (tEXt, or iTXt beyond Latin-1).

    Raises:
        OSError: the file cannot be written.
    """
    data = encode_png(pixels, metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(data)


def read_png(file: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read a picture that `save_png` wrote: uint8 [H, W, 3], and its metadata.

    Raises:
        UserError: the file is damaged, or no RGB PNG.
        OSError: it cannot be read at all.
    """
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()  # the checksums, which decoding alone ignores
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            assert isinstance(image, PngImageFile)
            mode, pixels, metadata = image.mode, np.array(image), dict(image.text)
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged, or no PNG file; delete it, so that it is sampled again.") from error
    if mode != "RGB":
        raise UserError(
            f"{file} is a PNG file of mode {mode}, RGB was expected; delete it, so that it is sampled again."
        )
    return pixels, {key: str(value) for key, value in metadata.items()}


def encode_png(pixels: np.ndarray, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a PNG file of uint8 [H, W, 3] pixels, with metadata as text chunks."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; uint8 [H, W, 3] was expected")
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def file_name(prompt: str, seed: int) -> str:
    """The name for a picture of a prompt, at most 80 ASCII letters, digits, dashes and one dot; never a path.

    Different prompts get different names: where letters are lost or cut, a digest of the prompt is added.
    """
    placed = prompt.lower().replace("[v]", "V")
    plain = unicodedata.normalize("NFKD", placed).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-zV0-9]+", "-", plain).strip("-")
    suffix = f"-{seed:04d}.png"
    if slug.replace("-", " ").replace("V", "[V]") != prompt or len(slug + suffix) > MAX_NAME:
        suffix = f"-{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}{suffix}"
    return (slug[: MAX_NAME - len(suffix)].rstrip("-") or "picture") + suffix

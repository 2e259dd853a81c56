"""Images of every kind become upright, undistorted sRGB squares; what cannot is refused in one sentence."""

import hashlib
import io
import logging
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.images import MAX_IMAGES, load_images, read_image

RESOLUTION = 32


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth 64x64 picture without symmetry, uint8."""
    y, x = np.mgrid[0:64, 0:64] / 63
    return np.round(255 * np.stack([x, y, (1 - x) * (1 - y)], axis=-1)).astype(np.uint8)


def load(path, resolution=RESOLUTION):
    [image] = load_images(path, resolution)
    assert image.pixels.shape == (resolution, resolution, 3)
    assert image.pixels.dtype == np.uint8
    return image.pixels.astype(int)


def save(path, array_or_image, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(path, **options)
    return path


def refusal(source) -> str:
    with pytest.raises(UserError) as error:
        load_images(source, RESOLUTION)
    message = str(error.value)
    assert "\n" not in message
    assert "; " in message  # what is wrong; what to do
    return message


def png(width, height, rows=b"", color_type=2):
    """A PNG file by its specification: the header says width and height, whatever the rows are."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- what comes out ---


def test_folder_is_read_in_order_of_name_and_hashed(tmp_path, picture, caplog):
    save(tmp_path / "b.png", picture)
    save(tmp_path / "a.PNG", 255 - picture)
    save(tmp_path / "c.webp", picture, lossless=True)
    (tmp_path / ".hidden.png").write_text("not an image")
    (tmp_path / "notes.txt").write_text("sit, stay")
    with caplog.at_level(logging.WARNING, "absl"):
        images = load_images(tmp_path, 64)
    assert [image.path.name for image in images] == ["a.PNG", "b.png", "c.webp"]
    assert images[1].sha256 == hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest()
    np.testing.assert_array_equal(images[0].pixels, 255 - picture)
    np.testing.assert_array_equal(images[1].pixels, picture)
    np.testing.assert_array_equal(images[2].pixels, picture)
    assert "notes.txt" in caplog.text and ".hidden" not in caplog.text


def test_files_keep_the_given_order_and_content_decides_not_the_name(tmp_path, picture):
    first = save(tmp_path / "z.jpg", picture, format="PNG")
    second = save(tmp_path / "a", 255 - picture, format="PNG")
    images = load_images([first, second], 64)
    np.testing.assert_array_equal(images[0].pixels, picture)
    np.testing.assert_array_equal(images[1].pixels, 255 - picture)


TURNS = {  # how a picture stored with this orientation was turned away from upright (EXIF 2.3, tag 274), undone again
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_every_exif_orientation_gives_the_upright_pixels(tmp_path, picture, orientation, suffix):
    wide = np.concatenate([picture, picture[:, ::-1]], axis=1)[:, :100]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
    upright = load(save(tmp_path / f"upright{suffix}", wide, **options))
    stored = np.ascontiguousarray(TURNS[orientation](wide))
    turned = load(save(tmp_path / f"turned{suffix}", stored, exif=exif, **options))
    np.testing.assert_allclose(turned, upright, atol=3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", TURNS)
def test_whole_images_are_upright_and_keep_their_size(tmp_path, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = picture[:40]
    stored = np.ascontiguousarray(TURNS[orientation](wide))
    pixels = read_image(save(tmp_path / "turned.png", stored, exif=exif))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, wide)


def test_whole_images_are_read_as_squares_are(tmp_path, picture):
    """Colours, transparency and damage are dealt with in one place for both."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgba = np.concatenate([picture, picture[..., :1]], axis=-1)
    for pixels, suffix, options in (
        (picture, ".jpg", {"progressive": True, "icc_profile": srgb}),
        (rgba, ".png", {}),
        (picture[..., 0], ".png", {}),
    ):
        file = save(tmp_path / f"a{suffix}", pixels, **options)
        np.testing.assert_array_equal(read_image(file), load(file, 64))
    with pytest.raises(UserError, match="missing.png does not exist; "):
        read_image(tmp_path / "missing.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored(tmp_path, picture):
    path = save(tmp_path / "a.jpg", picture, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert np.abs(load(path, 64) - picture.astype(int)).mean() < 4


COLOUR, GREY = Image.new("RGB", (40, 40), (200, 60, 20)), Image.new("L", (40, 40), 120)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.new("1", (40, 40), 1), ".png"),
        (GREY, ".png"),
        (GREY, ".jpg"),
        (GREY.convert("LA"), ".png"),
        (Image.fromarray(np.full((40, 40), 120 * 257, np.uint16)), ".png"),
        (COLOUR.convert("P", palette=Image.Palette.ADAPTIVE), ".png"),
        (COLOUR, ".png"),
        (COLOUR, ".jpg"),
        (COLOUR, ".webp"),
        (COLOUR.convert("RGBA"), ".png"),
        (COLOUR.convert("RGBA"), ".webp"),
        (COLOUR.convert("CMYK"), ".jpg"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_modes_keep_their_colours(tmp_path, image, suffix):
    options = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}.get(suffix, {})
    pixels = load(save(tmp_path / f"a{suffix}", image, **options))
    colour = {"1": (255,) * 3, "L": (120,) * 3, "LA": (120,) * 3, "I;16": (120,) * 3}.get(image.mode, (200, 60, 20))
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=3 if suffix == ".jpg" else 0)


def test_sixteen_bits_are_scaled_over_their_whole_range(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    pixels = load(save(tmp_path / "a.png", ramp), 64)
    np.testing.assert_allclose(pixels[:, :, 1], ramp / 257, atol=0.51)


def test_sixteen_bit_rgb(tmp_path):
    rows = b"".join(b"\0" + np.full((20, 3), [65535, 32896, 0], ">u2").tobytes() for _ in range(20))
    data = png(20, 20, rows)
    header = data[16:24] + bytes([16]) + data[25:29]  # 16 bits a channel
    data = data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(load(tmp_path / "a.png")[5, 5], [255, 128, 0])


def test_transparency_shows_white_and_hides_what_lies_beneath(tmp_path):
    pixels = np.full((40, 40, 4), [255, 0, 0, 255], np.uint8)
    pixels[:, 20:] = [0, 255, 0, 0]
    pixels[20:, :20, 3] = 128
    out = load(save(tmp_path / "a.png", pixels), 40)
    np.testing.assert_array_equal(out[5, 5], [255, 0, 0])
    np.testing.assert_array_equal(out[5, 35], [255, 255, 255])
    np.testing.assert_allclose(out[35, 5], [255, 127, 127], atol=1)


def test_palette_with_a_transparent_colour_shows_white(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 20, 10))
    out = load(save(tmp_path / "a.png", image, transparency=0), 20)
    np.testing.assert_array_equal(out[2, 2], [255, 255, 255])
    np.testing.assert_array_equal(out[17, 2], [0, 0, 255])


def test_embedded_profiles_are_applied(tmp_path, caplog):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (20, 20), (200, 60, 20))
    same = load(save(tmp_path / "srgb.png", image, icc_profile=srgb))
    np.testing.assert_allclose(same[3, 3], [200, 60, 20], atol=1)
    # sRGB with its red and blue primaries exchanged: what is stored as red is shown as blue.
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    np.testing.assert_allclose(
        load(save(tmp_path / "swapped.png", image, icc_profile=swapped))[3, 3], [20, 60, 200], 0, 2
    )
    for name, profile in (("wrong.png", lab), ("damaged.png", b"no profile")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "absl"):
            unprofiled = load(save(tmp_path / name, image, icc_profile=profile))
        np.testing.assert_array_equal(unprofiled[3, 3], [200, 60, 20])
        assert name in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1601, 1003)])
def test_a_circle_in_the_middle_stays_a_circle_in_the_middle(tmp_path, suffix, size):
    width, height = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    disc = np.hypot(x - width / 2, y - height / 2) < 0.4 * min(size)
    image = Image.fromarray(np.where(disc, 0, 255).astype(np.uint8))
    ink = 1 - load(save(tmp_path / f"a{suffix}", image), 64)[:, :, 0] / 255
    y, x = np.mgrid[0:64, 0:64] + 0.5
    centre_x, centre_y = (ink * x).sum() / ink.sum(), (ink * y).sum() / ink.sum()
    np.testing.assert_allclose([centre_x, centre_y], 32, atol=0.1)
    np.testing.assert_allclose(ink.sum(), np.pi * (0.4 * 64) ** 2, rtol=0.02)
    spread_x, spread_y = (ink * (x - centre_x) ** 2).sum(), (ink * (y - centre_y) ** 2).sum()
    np.testing.assert_allclose(spread_x / spread_y, 1, rtol=0.01)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_shrinking_averages_instead_of_aliasing(tmp_path, suffix):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = load(save(tmp_path / f"a{suffix}", stripes, **({"subsampling": 0} if suffix == ".jpg" else {})))[4:-4, 4:-4]
    np.testing.assert_allclose(inner, 127.5, atol=4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((80, 80), (0, 0, 80)),  # a square is taken as it is
        ((120, 80), (20, 0, 80)),
        ((80, 120), (0, 20, 80)),
    ],
)
def test_the_centre_square_is_taken(tmp_path, size, expected):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    left, top, side = expected
    out = load(save(tmp_path / "a.png", noise), side)
    np.testing.assert_array_equal(out, noise[top : top + side, left : left + side])


def test_the_square_of_a_large_jpeg_is_in_its_full_pixels(tmp_path):
    image = Image.new("RGB", (1203, 901), "white")
    image.paste("black", (376, 225, 827, 676))
    path = save(tmp_path / "a.jpg", image, quality=95)
    ink = 255 - load(path, 32)
    np.testing.assert_allclose(ink[[*range(7), *range(25, 32)]], 0, atol=6)  # but for the filter's ringing at the edges
    np.testing.assert_allclose(ink[9:23, 9:23], 255, atol=6)
    np.testing.assert_allclose(ink.sum() / 3 / 255, 16 * 16, rtol=0.02)


def test_phone_photos_with_a_second_frame_use_the_first(tmp_path, picture):
    first, second = Image.fromarray(picture), Image.fromarray(255 - picture)
    path = save(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(load(path, 64) - picture.astype(int)).mean() < 4


def test_duplicates_are_named(tmp_path, picture, caplog):
    save(tmp_path / "a.png", picture)
    save(tmp_path / "b.png", 255 - picture)
    save(tmp_path / "c.webp", picture, lossless=True)
    with caplog.at_level(logging.WARNING, "absl"):
        assert len(load_images(tmp_path, 64)) == 3
    [record] = caplog.records
    assert re.search(r"c\.webp is the same picture as .*a\.png", record.getMessage())


@pytest.mark.parametrize(("side", "warned"), [(32, False), (31, True), (64, False)])
def test_photos_far_below_the_resolution_are_named(tmp_path, picture, caplog, side, warned):
    with caplog.at_level(logging.WARNING, "absl"):
        load(save(tmp_path / "a.png", picture[:side, :side]), 64)
    assert [bool(re.search(r"a\.png shows 31x31 pixels.*64x64", r.getMessage())) for r in caplog.records] == [
        True
    ] * warned


# --- what is refused ---


def test_no_images(tmp_path):
    assert "no images" in refusal(tmp_path)
    assert "No images" in refusal([])
    (tmp_path / "IMG_1.heic").write_bytes(b"")
    assert "IMG_1.heic" in refusal(tmp_path)


def test_missing_folder_or_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal([tmp_path / "nowhere.png"])
    assert "is not a file" in refusal([tmp_path])
    assert "cannot be read" in refusal(tmp_path / ("long" * 100))
    assert "cannot be read" in refusal([tmp_path / ("long" * 100)])


def test_text_named_jpg(tmp_path):
    (tmp_path / "dog.jpg").write_text("woof")
    assert "dog.jpg is not a JPEG, PNG or WebP image" in refusal(tmp_path)


def test_other_image_formats(tmp_path, picture):
    assert "not a JPEG, PNG or WebP" in refusal(save(tmp_path / "a.png", picture, format="GIF"))


def test_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    assert "a.png is not" in refusal(tmp_path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_files_cut_short(tmp_path, format, kept):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=format)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[: int(kept * buffer.tell())])
    message = refusal(tmp_path)
    assert "a.jpg is damaged" in message or (format == "WEBP" and "a.jpg is not a JPEG, PNG or WebP" in message)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_animations(tmp_path, picture, format):
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    path = save(tmp_path / "a.png", frames[0], format=format, save_all=True, append_images=frames[1:])
    assert ("not a JPEG, PNG or WebP" if format == "GIF" else "animation of 2 frames") in refusal(path)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_too_small(tmp_path, size):
    message = refusal(save(tmp_path / "a.png", Image.new("RGB", size)))
    assert f"{size[0]}x{size[1]}" in message and "16x16" in message


def test_smallest_image_is_read(tmp_path):
    load(save(tmp_path / "a.png", Image.new("RGB", (16, 16))))


@pytest.mark.parametrize("size", [(30000, 30000), (10001, 10000), (2**31 - 1, 2**31 - 1)])
def test_too_large_is_refused_from_the_header(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))  # decoding would find it cut short
    assert "100 megapixels" in refusal(tmp_path)


def test_too_many(tmp_path, picture):
    for n in range(MAX_IMAGES + 1):
        save(tmp_path / f"{n}.png", picture)
    message = refusal(tmp_path)
    assert "21" in message and "20" in message
    assert len(load_images(sorted(tmp_path.iterdir())[:MAX_IMAGES], RESOLUTION)) == MAX_IMAGES


def test_unreadable_file(tmp_path, picture, monkeypatch):
    path = save(tmp_path / "a.png", picture)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    assert "cannot be read (Permission denied)" in refusal(path)


def test_resolution_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="resolution is 0"):
        load_images(tmp_path, 0)

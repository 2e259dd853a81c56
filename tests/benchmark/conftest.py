import numpy as np
import pytest
from PIL import Image

from personalize_jax.benchmark.dreambooth import SUBJECTS


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """What a copy of the DreamBooth dataset looks like: photos of different sizes, one of them lying on its side."""
    folder = tmp_path_factory.mktemp("dreambooth") / "dataset"
    rng = np.random.default_rng(0)
    for i, name in enumerate(SUBJECTS):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            colour = rng.integers(256, size=3, dtype=np.uint8)  # one: JPEG keeps it nearly
            pixels = np.broadcast_to(colour, (20 + i, 24 + k, 3))
            exif = Image.Exif()
            exif[0x0112] = 6 if name == "dog" else 1
            Image.fromarray(pixels.copy()).save(folder / name / f"{k:02d}.jpg", progressive=True, exif=exif)
    (folder / "prompts_and_classes.txt").write_text("Classes\n")
    return folder

"""Pictures of every kind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOS = Path(__file__).parents[2] / ".." / "shared" / "dreambooth" / "dataset"


@pytest.fixture(scope="module")
def pictures():
    """Tall, wide, square, small and large ones, and photographs where they are at hand."""
    rng = np.random.default_rng(0)
    shapes = ((41, 30), (30, 53), (32, 32), (9, 12), (120, 70))
    made = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    files = sorted(PHOTOS.glob("*/00.jpg"))[:3]
    return made + [np.asarray(Image.open(file).convert("RGB")) for file in files]

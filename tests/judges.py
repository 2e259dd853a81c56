"""Judges that need no weights: they see pictures as their mean colours and texts as the colours they name."""

import numpy as np

from personalize_jax.scoring import Judges

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


def embed(images):
    means = np.array([image.reshape(-1, 3).mean(0) for image in images]) + 1e-6
    return means / np.linalg.norm(means, axis=1, keepdims=True)


class Clip:
    """Remembers the texts that it was given."""

    def __init__(self):
        self.texts_seen = []
        self.images = embed

    def texts(self, texts):
        self.texts_seen += texts
        named = [next((COLOURS[word] for word in text.split() if word in COLOURS), (1, 1, 1)) for text in texts]
        return np.array(named) / np.linalg.norm(named, axis=1, keepdims=True)


def distance(a, b):
    return np.abs(a.astype(float) - b).mean((1, 2, 3)) / 255


def judges(probe=None):
    return Judges(embed, {"first": Clip(), "second": Clip()}, distance, probe)


def plain(colour, size=32):
    """A picture of one colour."""
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8) * 255, (size, size, 3)).copy()

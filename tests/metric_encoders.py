"""Metric encoders that need no weights, which see pictures as their mean colours and texts as the colours they name.

And a metric that needs no encoder, and that no registry lists.
"""

import numpy as np

from personalize_jax.metrics.metric import Metric

BRIGHTNESS = Metric(
    name="brightness",
    definition="mean of a picture's pixels",
    unit="share, 0 to 1",
    better="lower",
    table="subject",
    in_figure=True,
    roles=("subject",),
    score=lambda subject, rows: [subject.pictures[i].pixels.mean() / 255 for i in rows],
)
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


def metric_encoders(probe=None):
    """Two CLIPs, of which the second is called "second"; a probe where one is given."""
    encoders = {"dino": embed, "clip": Clip(), "clip (second)": Clip(), "distance": distance}
    return encoders | ({} if probe is None else {"probe": probe})


def plain(colour, size=32):
    """A picture of one colour."""
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8) * 255, (size, size, 3)).copy()

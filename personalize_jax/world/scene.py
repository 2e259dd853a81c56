"""The scenes of the rendered world, and how they are sampled.

A scene is a subject (one particular dog) and a view of it (its place, the camera, the light). Scenes are plain numpy
arrays, one row an image; they are the exact ground truth of the picture rendered from them.
"""

from typing import Literal, NamedTuple

import jax
import numpy as np

CLASSES = (
    "dog",
    "cat",
    "bear plushie",
    "duck toy",
    "robot toy",
    "car",
    "teapot",
    "vase",
    "candle",
    "boot",
    "backpack",
    "can",
)
CLASSES_WITH_HEAD = CLASSES[:5]
COLOURS = {
    "red": (0.86, 0.09, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (1.00, 0.87, 0.12),
    "green": (0.15, 0.62, 0.20),
    "blue": (0.12, 0.32, 0.90),
    "purple": (0.50, 0.15, 0.75),
    "pink": (1.00, 0.55, 0.75),
    "brown": (0.40, 0.22, 0.09),
    "black": (0.08, 0.08, 0.09),
    "white": (0.96, 0.96, 0.95),
    "gray": (0.45, 0.46, 0.48),
}
PATTERNS = ("plain", "striped", "spotted", "two-tone")
FINISHES = ("matte", "shiny")
ACCESSORIES = ("none", "wearing a red hat", "wearing a santa hat", "wearing a black top hat")
CONTEXTS = (  # as worded in the prompt lists of the DreamBooth dataset
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a dirt road",
    "on top of a white rug",
)
LABELS = {  # values by property, of those that are one of a list
    "class_id": CLASSES,
    "body_colour": tuple(COLOURS),
    "accent_colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "finish": FINISHES,
    "context": CONTEXTS,
    "accessory": ACCESSORIES,
}

PATTERN_PROBABILITIES = (0.4, 0.2, 0.2, 0.2)
SHINY_PROBABILITY = 0.12
ACCESSORY_PROBABILITY = 0.12

# Every class shows its front to the same picture side, so that a small network need not learn mirror images.
# Classes whose front tells more than their side turn further towards the camera.
YAW_RANGE = dict.fromkeys(CLASSES, (0.20, 0.85)) | {
    "cat": (0.40, 1.00),
    "bear plushie": (0.70, 1.20),
    "robot toy": (0.75, 1.20),
    "backpack": (0.70, 1.15),
}

Split = Literal["train", "heldout", "test"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "test")


class Subject(NamedTuple):
    """One particular object of a class, the same in all its views; every array has a leading [N]."""

    class_id: np.ndarray  # int32 [N], index into CLASSES
    shape: np.ndarray  # float32 [N, 4] in [0, 1], proportions; each class has its own four
    body_colour: np.ndarray  # int32 [N], index into COLOURS
    accent_colour: np.ndarray  # int32 [N], never the body colour
    colour_jitter: np.ndarray  # float32 [N, 2, 3], added to the body's and the accent's rgb in [0, 1]
    pattern: np.ndarray  # int32 [N], index into PATTERNS; on the body, in the accent colour
    pattern_phase: np.ndarray  # float32 [N, 3] in [0, 1]: scale, direction, shift
    finish: np.ndarray  # int32 [N], index into FINISHES


class View(NamedTuple):
    """The place of a subject, the camera and the light; every array has a leading [N]; angles in radians."""

    yaw: np.ndarray  # float32 [N]; 0 shows the right-facing profile, pi/2 the front
    pitch: np.ndarray  # float32 [N], camera looking down
    distance: np.ndarray  # float32 [N], camera to subject, in world units (a dog is about 1.2 high)
    offset: np.ndarray  # float32 [N], subject to the right of the picture's centre, world units
    sun: np.ndarray  # float32 [N, 2], azimuth and elevation
    tint: np.ndarray  # float32 [N] in [-1, 1], cold to warm light
    roll: np.ndarray  # float32 [N]
    context: np.ndarray  # int32 [N], index into CONTEXTS
    context_phase: np.ndarray  # float32 [N] in [0, 1), which of the many such places
    accessory: np.ndarray  # int32 [N], index into ACCESSORIES; 0 for classes without a head


class Scene(NamedTuple):
    """A batch of scenes, on which alone their images depend."""

    subject: Subject
    view: View


def select(scenes: Scene, rows: slice | np.ndarray) -> Scene:
    """The scenes of some rows."""
    return jax.tree.map(lambda column: column[rows], scenes)


def split_of(subject: Subject) -> np.ndarray:
    """The split that each subject belongs to: int32 [N], index into SPLITS.

    It depends on class, colours and pattern together (80%, 10%, 10% of the combinations), so that no split has a
    look-alike of another split's subject.
    """
    key = (subject.class_id.astype(np.uint64) * 16 + subject.body_colour.astype(np.uint64)) * 16
    key = (key + subject.accent_colour.astype(np.uint64)) * 4 + subject.pattern.astype(np.uint64)
    mixed = (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # the mixer of splitmix64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    tenth = (mixed >> np.uint64(33)) % np.uint64(10)
    return np.select([tenth < 8, tenth == 8], [0, 1], 2).astype(np.int32)


def sample_subjects(
    rng: np.random.Generator, n: int, split: Split = "train", class_id: int | np.ndarray | None = None
) -> Subject:
    """Sample n subjects of one split, of all classes equally or of the given class (a number, or one for each).

    Raises:
        ValueError: the split is none of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    classes = rng.integers(len(CLASSES), size=n) if class_id is None else np.broadcast_to(class_id, (n,))
    # Mostly lighter and darker shades: a gray that leans to purple would be hard to name.
    shade, tinge = rng.normal(scale=0.03, size=(n, 2, 1)), rng.normal(scale=0.01, size=(n, 2, 3))
    subject = Subject(
        class_id=classes.astype(np.int32),
        shape=rng.random((n, 4), np.float32),
        body_colour=np.zeros(n, np.int32),
        accent_colour=np.zeros(n, np.int32),
        colour_jitter=np.clip(shade + tinge, -0.08, 0.08).astype(np.float32),
        pattern=np.zeros(n, np.int32),
        pattern_phase=rng.random((n, 3), np.float32),
        finish=(rng.random(n) < SHINY_PROBABILITY).astype(np.int32),
    )
    pending = np.arange(n)
    while pending.size:  # combinations of other splits are sampled again
        body = rng.integers(len(COLOURS), size=pending.size)
        subject.body_colour[pending] = body
        subject.accent_colour[pending] = (body + rng.integers(1, len(COLOURS), size=pending.size)) % len(COLOURS)
        subject.pattern[pending] = rng.choice(len(PATTERNS), size=pending.size, p=PATTERN_PROBABILITIES)
        pending = np.flatnonzero(split_of(subject) != SPLITS.index(split))
    return subject


def sample_views(
    rng: np.random.Generator,
    subject: Subject,
    context: int | np.ndarray | None = None,
    accessory: int | np.ndarray | None = None,
) -> View:
    """Sample one view of each subject; context and accessory are given (a number, or one for each) or random.

    Raises:
        ValueError: an accessory is given for a class without a head.
    """
    n = len(subject.class_id)
    has_head = subject.class_id < len(CLASSES_WITH_HEAD)
    if accessory is None:
        worn = has_head & (rng.random(n) < ACCESSORY_PROBABILITY)
        accessory = np.where(worn, rng.integers(1, len(ACCESSORIES), n), 0)
    if np.any((np.broadcast_to(accessory, (n,)) > 0) & ~has_head):
        raise ValueError(f"Accessories are worn on heads; only {', '.join(CLASSES_WITH_HEAD)} have one.")
    context = rng.integers(len(CONTEXTS), size=n) if context is None else context
    accessory = np.broadcast_to(accessory, (n,)).astype(np.int32)

    def uniform(low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
        return rng.uniform(low, high, n).astype(np.float32)

    yaw_range = np.array([YAW_RANGE[name] for name in CLASSES])[subject.class_id]
    return View(
        yaw=uniform(yaw_range[:, 0], yaw_range[:, 1]),
        pitch=uniform(0.14, 0.36),
        distance=uniform(2.4, 2.8) + np.float32(0.3) * (accessory > 0),  # a step back keeps hats in the picture
        offset=uniform(-0.1, 0.1),
        sun=np.stack([uniform(-1.2, 0.6), uniform(0.6, 1.2)], axis=1),
        tint=uniform(-1.0, 1.0),
        roll=uniform(-0.05, 0.05),
        context=np.broadcast_to(context, (n,)).astype(np.int32),
        context_phase=uniform(0.0, 1.0),
        accessory=accessory,
    )

"""Renders photos of a subject of the held-out split, which pretraining never saw.

python -m personalize_jax.world.photos --class_noun=dog --index=0 --out=photos/
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from personalize_jax.pipeline.pictures import save_png
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.render import render
from personalize_jax.world.scene import (
    CLASSES,
    COLOURS,
    CONTEXTS,
    PATTERNS,
    Scene,
    Subject,
    sample_subjects,
    sample_views,
)

SEED = 2023
RESOLUTION = 128
# Photos are taken in these contexts only, so that pictures in the others show whether a method learnt the subject apart
# from its photos.
PHOTO_CONTEXTS = (
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a blue house in the background",
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "on top of a dirt road",
    "on top of a white rug",
)


class HeldoutSubject(NamedTuple):
    """A subject and photos of it.

    Attributes:
        subject: the subject's true properties, arrays of length 1.
        photos: uint8 [N, 128, 128, 3], each in another context.
    """

    subject: Subject
    photos: np.ndarray

    @property
    def class_noun(self) -> str:
        """The subject's class noun."""
        return CLASSES[int(self.subject.class_id[0])]

    @property
    def description(self) -> str:
        """The subject's true properties in words."""
        body, accent = (tuple(COLOURS)[int(c[0])] for c in (self.subject.body_colour, self.subject.accent_colour))
        return f"{body} {PATTERNS[int(self.subject.pattern[0])]} {self.class_noun} with {accent} accents"


def heldout_subject(class_noun: str, index: int, num_photos: int = 5) -> HeldoutSubject:
    """Render photos of the index-th held-out subject of a class, without accessories; deterministic.

    Args:
        class_noun: one of the world's classes.
        index: the number of the subject in its class, from 0.
        num_photos: the number of photos, each in another context.

    Raises:
        UserError: the world has no such class.
    """
    if class_noun not in CLASSES:
        raise UserError(f"The world has no {class_noun!r}; give one of {', '.join(CLASSES)}.")
    rng = np.random.default_rng([SEED, CLASSES.index(class_noun), index])
    subject = sample_subjects(rng, 1, split="heldout", class_id=CLASSES.index(class_noun))
    return HeldoutSubject(subject, _render_views(rng, subject, PHOTO_CONTEXTS, num_photos)[..., :3])


def unseen_views(subject: Subject, count: int) -> np.ndarray:
    """Render further views of a subject, in contexts that no photo shows; deterministic.

    Returns:
        uint8 [count, 128, 128, 4], the fourth channel the object's mask.
    """
    rng = np.random.default_rng([SEED, len(CLASSES), int(subject.class_id[0]), count])  # no subject has this seed
    return _render_views(rng, subject, [c for c in CONTEXTS if c not in PHOTO_CONTEXTS], count)


def _render_views(rng: np.random.Generator, subject: Subject, places: Sequence[str], count: int) -> np.ndarray:
    """Views of one subject, going through the places in random order: uint8 [count, 128, 128, 4]."""
    repeated = jax.tree.map(lambda a: np.repeat(a, count, 0), subject)
    chosen = rng.permutation(places)[np.arange(count) % len(places)]
    contexts = np.array([CONTEXTS.index(context) for context in chosen], np.int32)
    return render(Scene(repeated, sample_views(rng, repeated, context=contexts, accessory=0)), RESOLUTION)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_enum("class_noun", None, CLASSES, "The subject's class noun.")
    flags.DEFINE_integer("index", 0, "The number of the subject in its class.", lower_bound=0)
    flags.DEFINE_integer("num_photos", 5, "The number of photos.", lower_bound=1, upper_bound=20)
    flags.DEFINE_string("out", None, "Folder for the photos.")


def main(_: list[str]) -> None:
    """Render the photos into a folder."""
    arguments = flags.FLAGS
    shown = heldout_subject(arguments.class_noun, arguments.index, arguments.num_photos)
    for i, photo in enumerate(shown.photos):
        save_png(photo, Path(arguments.out) / f"{i:02d}.png", {"subject": shown.description})
    print(f"{shown.description}: {len(shown.photos)} photos in {arguments.out}")


if __name__ == "__main__":
    command.run(main, define_flags, required=("class_noun", "out"))

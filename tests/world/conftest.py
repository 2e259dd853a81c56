import jax
import numpy as np
import pytest

from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, CONTEXTS, Scene, sample_subjects, sample_views

RESOLUTION = 32


@pytest.fixture(scope="session")
def gallery():
    """Every class in every context, plain and matte and without hats: (scenes, uint8 [216, 32, 32, 4])."""
    rng = np.random.default_rng(7)
    class_id = np.repeat(np.arange(len(CLASSES)), len(CONTEXTS))
    context = np.tile(np.arange(len(CONTEXTS)), len(CLASSES))
    subjects = sample_subjects(rng, len(class_id), class_id=class_id)
    subjects = subjects._replace(pattern=np.zeros_like(subjects.pattern), finish=np.zeros_like(subjects.finish))
    scenes = Scene(subjects, sample_views(rng, subjects, context=context, accessory=0))
    return scenes, render(scenes, RESOLUTION)


@pytest.fixture(scope="session")
def take():
    """Selects rows of scenes."""
    return lambda scenes, rows: jax.tree.map(lambda a: a[np.atleast_1d(rows)], scenes)

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.world.render import BOUND_CENTRE, BOUND_RADIUS
from personalize_jax.world.scene import CLASSES, CLASSES_WITH_HEAD
from personalize_jax.world.shapes import HATS, SHAPES, hat
from personalize_jax.world.solids import box, cylinder, limb, ring, sphere, union

RNG = np.random.default_rng(0)
POINTS = RNG.uniform([-1.5, -0.2, -1.5], [1.5, 2.2, 1.5], (4000, 3)).astype(np.float32)
PROPORTIONS = [np.array(corner, np.float32) for corner in ((0, 0, 0, 0), (1, 1, 1, 1), (0.5,) * 4, (1, 0, 1, 0))]


def components(points):
    return tuple(jnp.asarray(points[:, i]) for i in range(3))


@functools.cache
def compiled(name):
    return jax.jit(lambda points, shape: SHAPES[name](components(points), shape))


def nearest(name, shape, points):
    """Distances of all points to an object; any number of points up to POINTS' is compiled once."""
    padded = np.resize(points, POINTS.shape)
    parts = compiled(name)(padded, shape)
    return np.minimum.reduce([np.broadcast_to(d, len(padded)) for d in parts[:4]])[: len(points)]


def test_solids_measure_true_distances():
    p = components(POINTS)
    x, y, z = POINTS.astype(np.float64).T
    np.testing.assert_allclose(
        sphere(p, (0.1, 0.2, 0.3), 0.5), np.linalg.norm(POINTS - [0.1, 0.2, 0.3], axis=1) - 0.5, atol=1e-4
    )
    np.testing.assert_allclose(ring(p, (0, 0, 0), 1.0, 0.2), np.hypot(np.hypot(x, z) - 1.0, y) - 0.2, atol=1e-4)
    segment = np.linalg.norm(POINTS - np.clip(y, 0, 1)[:, None] * [0, 1, 0], axis=1) - 0.3
    np.testing.assert_allclose(limb(p, (0, 0, 0), (0, 1, 0), 0.3), segment, atol=1e-4)
    half = np.array([0.5, 0.6, 0.7])
    excess = np.abs(POINTS) - half
    cuboid = np.linalg.norm(np.maximum(excess, 0), axis=1) + np.minimum(excess.max(axis=1), 0)
    np.testing.assert_allclose(box(p, (0, 0, 0), tuple(half), 0.0), cuboid, atol=1e-4)
    across, along = np.hypot(x, z) - 0.5, np.abs(y) - 0.8
    drum = np.hypot(np.maximum(across, 0), np.maximum(along, 0)) + np.minimum(np.maximum(across, along), 0)
    np.testing.assert_allclose(cylinder(p, (0, 0, 0), 0.5, 0.8, 0.0), drum, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_rays_cannot_step_through_an_object(name):
    """A step of the distance's length in any direction must not end inside."""
    for shape in PROPORTIONS:
        distance = nearest(name, shape, POINTS)
        directions = RNG.normal(size=POINTS.shape)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        ends = (POINTS + 0.95 * distance[:, None] * directions).astype(np.float32)
        assert nearest(name, shape, ends[distance > 0.02]).min() > -0.02


@pytest.mark.parametrize("name", CLASSES)
def test_objects_stay_in_the_ball_that_is_searched(name):
    away = np.linalg.norm(POINTS - [0, BOUND_CENTRE, 0], axis=1) > BOUND_RADIUS
    for shape in PROPORTIONS:
        assert nearest(name, shape, POINTS[away & (POINTS[:, 1] > 0)]).min() > 0


@pytest.mark.parametrize("name", CLASSES_WITH_HEAD)
def test_hats_touch_their_heads_and_stay_in_the_ball(name):
    away = np.linalg.norm(POINTS - [0, BOUND_CENTRE, 0], axis=1) > BOUND_RADIUS + 0.1
    for shape, measures in itertools.product(PROPORTIONS, HATS.values()):
        crown = compiled(name)(POINTS, shape).crown
        worn = np.asarray(union(*hat(components(POINTS), crown, measures)))
        assert np.maximum(worn, nearest(name, shape, POINTS)).min() < 0.05
        assert worn[away].min() > 0

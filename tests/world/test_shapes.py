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


def nearest(name, points, shape):
    parts = SHAPES[name](components(points), shape)
    return np.asarray(union(*(jnp.broadcast_to(d, (len(points),)) for d in parts[:4])))


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
@pytest.mark.parametrize("shape", PROPORTIONS, ids=str)
def test_rays_cannot_step_through_an_object(name, shape):
    """A step of the distance's length in any direction must not end inside."""
    distance = nearest(name, POINTS, shape)
    outside = distance > 0.02
    directions = RNG.normal(size=POINTS.shape)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    after = nearest(name, (POINTS + 0.95 * distance[:, None] * directions).astype(np.float32)[outside], shape)
    assert after.min() > -0.02


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shape", PROPORTIONS, ids=str)
def test_objects_stay_in_the_ball_that_is_searched(name, shape):
    away = np.linalg.norm(POINTS - [0, BOUND_CENTRE, 0], axis=1) > BOUND_RADIUS
    assert nearest(name, POINTS[away & (POINTS[:, 1] > 0)], shape).min() > 0


@pytest.mark.parametrize("name", CLASSES_WITH_HEAD)
@pytest.mark.parametrize("shape", PROPORTIONS, ids=str)
def test_hats_touch_their_heads_and_stay_in_the_ball(name, shape):
    parts = SHAPES[name](components(POINTS), shape)
    for measures in HATS.values():
        worn = np.asarray(union(*hat(components(POINTS), parts.crown, measures)))
        head = nearest(name, POINTS, shape)
        assert np.minimum.reduce(np.maximum(worn, head)) < 0.05
        away = np.linalg.norm(POINTS - [0, BOUND_CENTRE, 0], axis=1) > BOUND_RADIUS + 0.1
        assert worn[away].min() > 0

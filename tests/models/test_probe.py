import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.probe import ProbeNetwork

PROPERTIES = (("kind", 5), ("colour", 3))


@pytest.fixture(scope="module")
def apply_and_params():
    network = ProbeNetwork(PROPERTIES, channels=(16, 16, 32), blocks=(1, 1, 1))
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.jit(network.apply), {"params": jax.tree.unflatten(structure, noisy)}  # no layer is zero any more


@pytest.fixture(scope="module")
def pictures():
    return jax.random.uniform(jax.random.key(2), (4, 32, 32, 3), minval=-1.0)


def test_every_property_has_its_logits(apply_and_params, pictures):
    apply, params = apply_and_params
    logits = apply(params, pictures)
    assert {name: value.shape for name, value in logits.items()} == {"kind": (4, 5), "colour": (4, 3)}


def test_pictures_are_read_one_by_one(apply_and_params, pictures):
    apply, params = apply_and_params
    together = apply(params, pictures)
    alone = apply(params, pictures[2:3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2:3], b, rtol=1e-4, atol=1e-5), together, alone)


def test_every_pixel_and_every_parameter_counts(apply_and_params, pictures):
    apply, params = apply_and_params

    def total(params, x):
        return sum(jnp.sum(jnp.square(v)) for v in apply(params, x).values())

    by_params, by_pixels = jax.jit(jax.grad(total, argnums=(0, 1)))(params, pictures)
    assert np.all(np.abs(by_pixels) > 0)
    silent = {jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(by_params) if not np.any(g)}
    assert not silent

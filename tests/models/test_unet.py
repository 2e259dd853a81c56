import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.params import flatten, unflatten
from personalize_jax.models.unet import UNet, sinusoidal_embedding
from tests import tiny

B, SIDE, LENGTH, WIDTH = 2, 16, 3, 8
KWARGS = {"channels": (16, 64), "patch": 2, "down_blocks": (1, 1), "up_blocks": (2, 1), "attention": (False, True)}


def inputs(seed=0, super_resolution=False):
    rng = np.random.default_rng(seed)
    z, low = rng.normal(size=(2, B, SIDE, SIDE, 3)).astype(np.float32)
    text = rng.normal(size=(B, LENGTH, WIDTH)).astype(np.float32)
    basic = {
        "z_BHWC": z,
        "t_B": np.array([0.2, 0.7], np.float32),
        "text_BLD": text,
        "mask_BL": np.array([[True, True, False], [True, False, False]]),
    }
    return basic | ({"low_res_BHWC": low, "level_B": np.array([0.1, 0.4], np.float32)} if super_resolution else {})


@pytest.fixture(scope="module", params=[False, True], ids=["base", "super_resolution"])
def network(request):
    """(apply, inputs): the network with random parameters, compiled, and an input."""
    unet, given = UNet(**KWARGS, super_resolution=request.param), inputs(super_resolution=request.param)
    params = tiny.random_params(lambda key: unet.init(key, **given))
    apply = jax.jit(lambda given: unet.apply(params, **given))
    return apply, given


def change(network, name, value):
    """How much each picture of the answer changes with an input."""
    apply, given = network
    return np.abs(apply({**given, name: value}) - apply(given)).max((1, 2, 3))


def test_answer_has_the_shape_of_the_noisy_picture(network):
    apply, given = network
    answer = apply(given)
    assert answer.shape == (B, SIDE, SIDE, 3) and answer.dtype == jnp.float32
    assert np.all(np.isfinite(answer))


def test_every_input_matters_to_its_own_picture_alone(network):
    _, given = network
    for name, value in given.items():
        other = value.copy()
        other[0] = ~other[0] if name == "mask_BL" else other[0] + 0.3
        changed = change(network, name, other)
        assert changed[0] > 1e-4, name
        assert changed[1] < 1e-6, name


def test_masked_tokens_do_not_matter(network):
    text = network[1]["text_BLD"].copy()
    text[~network[1]["mask_BL"]] += 5.0
    assert np.all(change(network, "text_BLD", text) < 1e-5)


def test_every_pixel_sees_every_other(network):
    z = network[1]["z_BHWC"].copy()
    z[0, 0, 0] += 3.0
    apply, given = network
    difference = np.abs(apply({**given, "z_BHWC": z}) - apply(given))[0].max(-1)
    assert difference[-1, -1] > 0 and difference.min() >= 0


@pytest.mark.parametrize("super_resolution", [False, True])
def test_untrained_it_answers_zero(super_resolution):
    unet = UNet(
        **{**KWARGS, "channels": (16,), "down_blocks": (1,), "up_blocks": (1,), "attention": (False,)},
        super_resolution=super_resolution,
    )
    given = inputs(super_resolution=super_resolution)
    answer = jax.jit(lambda: unet.init_with_output(jax.random.key(0), **given)[0])()
    np.testing.assert_allclose(answer, 0.0, atol=1e-6)


def test_time_embedding_tells_times_apart():
    t = jnp.linspace(0, 1, 1001)
    embedding = sinusoidal_embedding(t, 64)
    assert embedding.shape == (1001, 64) and np.all(np.abs(embedding) <= 1 + 1e-6)
    np.testing.assert_allclose(np.sum(np.square(embedding), axis=1), 32, rtol=1e-4)  # sin^2 + cos^2
    assert np.linalg.norm(embedding[1:] - embedding[:-1], axis=1).min() > 0.5


@pytest.mark.slow
def test_blocks_that_are_added_to_a_trained_network_change_nothing_at_first():
    kwargs = {**KWARGS, "channels": (64, 64), "attention": (False, True)}
    trained, given = UNet(**kwargs), inputs()
    grown = UNet(**{**kwargs, "down_blocks": (1, 1), "up_blocks": (3, 2), "attention": (True, True)})
    params = flatten(tiny.random_params(lambda key: trained.init(key, **given))["params"])
    new = flatten(jax.jit(lambda: grown.init(jax.random.key(0), **given))()["params"])
    assert params.keys() < new.keys() and {path.split("/")[0] for path in new.keys() - params.keys()} == {
        *("up_0_2", "up_1_1", "down_0_transformer", "up_0_transformer")
    }
    before = jax.jit(lambda: trained.apply({"params": unflatten(params)}, **given))()
    after = jax.jit(lambda: grown.apply({"params": unflatten(new | params)}, **given))()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)

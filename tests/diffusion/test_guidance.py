import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.guidance import dynamic_threshold, guide
from personalize_jax.diffusion.prediction import to_x0_eps


@pytest.fixture
def pair():
    return jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))


def test_weight_zero_is_unconditional_and_one_conditional(pair):
    cond, uncond = pair
    np.testing.assert_array_equal(guide(cond, uncond, 0), uncond)
    np.testing.assert_allclose(guide(cond, uncond, 1), cond, atol=1e-6)


def test_a_weight_for_each_picture(pair):
    cond, uncond = pair
    guided = guide(cond, uncond, jnp.array([0.0, 1.0, 5.0]))
    np.testing.assert_allclose(guided[0], uncond[0], atol=1e-6)
    np.testing.assert_allclose(guided[1], cond[1], atol=1e-6)
    np.testing.assert_allclose(guided[2] - cond[2], 4 * (cond - uncond)[2], atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_guiding_a_prediction_guides_the_picture(kind, pair):
    cond, uncond = pair
    z_t, alpha, sigma = jnp.ones_like(cond), 0.6, 0.8
    x0_guided, _ = to_x0_eps(kind, guide(cond, uncond, 4.0), z_t, alpha, sigma)
    x0_cond, x0_uncond = (to_x0_eps(kind, output, z_t, alpha, sigma)[0] for output in pair)
    np.testing.assert_allclose(x0_guided, guide(x0_cond, x0_uncond, 4.0), atol=1e-4)


def test_static_threshold_only_clips():
    x0 = jnp.array([[-3.0, -1.0, 0.2, 1.5]])
    np.testing.assert_allclose(dynamic_threshold(x0, 0.9, max_value=1), [[-1, -1, 0.2, 1]], rtol=1e-6)


def test_pictures_in_range_pass_unchanged(pair):
    x0 = jnp.tanh(pair[0])
    np.testing.assert_array_equal(dynamic_threshold(x0, 0.5), x0)


def test_dynamic_threshold_saturates_the_share_beyond_the_percentile(pair):
    x0 = 3 * pair[0]
    out = dynamic_threshold(x0, 0.9)
    assert np.abs(out).max() == 1
    np.testing.assert_allclose((np.abs(out) == 1).mean((1, 2, 3)), 0.1, atol=0.01)
    inside = np.abs(out) < 1
    ratio = np.where(inside, x0 / out, np.nan)
    np.testing.assert_allclose(np.nanmax(ratio, (1, 2, 3)), np.nanmin(ratio, (1, 2, 3)), rtol=1e-5)


def test_percentile_one_keeps_every_pixel_apart(pair):
    x0 = 3 * pair[0]
    np.testing.assert_allclose(dynamic_threshold(x0, 1.0), x0 / np.abs(x0).max((1, 2, 3), keepdims=True), rtol=1e-5)


def test_the_threshold_is_at_most_max_value(pair):
    x0 = 10 * pair[0]
    np.testing.assert_allclose(dynamic_threshold(x0, 0.9, max_value=1.5), jnp.clip(x0 / 1.5, -1, 1), rtol=1e-6)
    np.testing.assert_allclose(dynamic_threshold(x0, 0.9, max_value=1), jnp.clip(x0, -1, 1), rtol=1e-6)


def test_each_picture_has_its_own_threshold(pair):
    x0 = pair[0] * jnp.array([0.1, 2, 9])[:, None, None, None]
    alone = [dynamic_threshold(picture[None], 0.95)[0] for picture in x0]
    np.testing.assert_allclose(dynamic_threshold(x0, 0.95), jnp.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("max_value", [1.0, 1.5, 100.0])
def test_dynamic_threshold_agrees_with_diffusers(max_value, pair):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    x0 = np.array(pair[0] * jnp.array([0.3, 1, 4])[:, None, None, None])
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=max_value)
    expected = scheduler._threshold_sample(torch.from_numpy(x0))
    np.testing.assert_allclose(dynamic_threshold(x0, 0.95, max_value), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"percentile": 0}, {"percentile": 99.5}, {"max_value": 0.9}])
def test_impossible_thresholds_are_refused(options):
    with pytest.raises(ValueError, match="give"):
        dynamic_threshold(jnp.zeros((1, 2, 2, 3)), **options)

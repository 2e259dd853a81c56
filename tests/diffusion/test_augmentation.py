import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.augmentation import augment, sample_levels, upsample
from personalize_jax.diffusion.process import cosine, discrete, linear_betas


def ramp(size):
    """A picture whose value is the horizontal position of the pixel's centre, and the vertical one."""
    centres = (jnp.arange(size) + 0.5) / size
    return jnp.stack(jnp.meshgrid(centres, centres), -1)[None]


def test_upsample_does_not_shift_the_picture():
    border = 2  # half a low-resolution pixel, where the edge is repeated
    np.testing.assert_allclose(
        upsample(ramp(4), 16)[:, border:-border, border:-border], ramp(16)[:, border:-border, border:-border], atol=1e-6
    )


def test_upsample_stays_within_the_picture():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    enlarged = upsample(x, 32)
    assert enlarged.shape == (2, 32, 32, 3)
    assert enlarged.min() >= x.min() and enlarged.max() <= x.max()
    np.testing.assert_allclose(enlarged[:, 0, 0], x[:, 0, 0], atol=1e-6)
    np.testing.assert_allclose(upsample(x, 8), x, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 32), (5, 3, 16), (1, 4, 7), (6, 6, 6)])
@pytest.mark.parametrize("corners", [False, True])
def test_upsample_agrees_with_torch(height, width, size, corners):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), (size, size), mode="bilinear", align_corners=corners
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(upsample(jnp.asarray(x), size, corners), expected, atol=1e-5)


def test_a_smaller_size_is_refused():
    with pytest.raises(ValueError, match="16x16"):
        upsample(ramp(16), 8)


def test_levels_are_uniform_over_the_range():
    levels = sample_levels(jax.random.key(0), 20_000, 0.1, 0.5)
    assert levels.min() >= 0.1 and levels.max() <= 0.5
    np.testing.assert_allclose(np.quantile(levels, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.01)
    np.testing.assert_allclose(sample_levels(jax.random.key(0), 5, 0.2, 0.2), 0.2, rtol=1e-6)


@pytest.mark.parametrize("limits", [(-0.1, 0.5), (0.5, 0.4), (0.5, 250)])
def test_impossible_levels_are_refused(limits):
    with pytest.raises(ValueError, match="range of levels"):
        sample_levels(jax.random.key(0), 2, *limits)


def test_each_picture_is_noised_at_its_own_level():
    process, level = cosine(), jnp.array([0.0, 0.3, 1.0])
    noise = jax.random.normal(jax.random.key(0), (3, 64, 64, 3))
    noised = augment(process, jnp.full_like(noise, 0.5), level, noise)
    np.testing.assert_allclose(noised.mean((1, 2, 3)), 0.5 * process.alpha(level), atol=0.03)
    np.testing.assert_allclose(noised.std((1, 2, 3)), process.sigma(level), rtol=0.03)


def test_level_zero_of_a_discrete_process_changes_nothing():
    low = ramp(8)
    np.testing.assert_array_equal(augment(discrete(linear_betas()), low, 0.0, jnp.ones_like(low)), low)

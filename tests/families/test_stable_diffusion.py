"""Latents in and out."""

import jax
import numpy as np

from personalize_jax.families.stable_diffusion import StableDiffusion
from personalize_jax.pipeline import Pipeline
from personalize_jax.pipeline.cascade import to_float, to_uint8
from tests import tiny


class Codec:
    """Latents are twice the pictures, and scaled by a quarter to be denoised."""

    scaling_factor = 0.25

    def apply(self, variables, x, method):
        return (2 * x, 0 * x + 0.8) if method == "encode" else x / 2


def test_latents_are_scaled_to_be_denoised_and_back_to_be_decoded():
    family = StableDiffusion(None, None, tiny.pipeline().stages[:1], Codec(), {})
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    mean, std = family.to_latents({"codec": {}}, x)
    np.testing.assert_allclose(mean, x / 2, rtol=1e-6)
    np.testing.assert_allclose(std, 0.2, rtol=1e-6)
    np.testing.assert_allclose(family.to_pictures({"codec": {}}, mean), x, rtol=1e-6)

    pictures = np.asarray(to_uint8(x))
    mean, std = Pipeline(family, {"codec": {}}).to_latents(pictures)
    np.testing.assert_allclose(mean, to_float(pictures) / 2, rtol=1e-6)
    assert mean.shape == std.shape == x.shape


def test_pictures_themselves_have_no_latents():
    assert tiny.pipeline().to_latents(np.zeros((2, 8, 8, 3), np.uint8)) is None

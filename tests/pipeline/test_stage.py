"""Drawing from stages, with networks whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.augmentation import upsample
from personalize_jax.pipeline import Sampling, Stage
from tests import tiny

B = 3
SAMPLING = Sampling("ddim", 2, 1.0, threshold_max=1.0)


class Network:
    """Answers by a function of its inputs."""

    def __init__(self, answer):
        self.answer = answer

    def apply(self, variables, *inputs):
        return self.answer(*inputs)


def fill(value_B, z):
    return jnp.broadcast_to(jnp.reshape(value_B, (-1, 1, 1, 1)), z.shape)


def stage(answer, spec=tiny.BASE):
    return dataclasses.replace(Stage.from_spec({**spec, "prediction": "x0"}), network=Network(answer))


def text(value):
    return jnp.full((B, 4, 5), value), jnp.ones((B, 4), bool)


def draw(stage, sampling=SAMPLING, low=None, condition=0.2, null=0.1):
    keys = jax.random.split(jax.random.key(1), B)
    return stage.draw({}, keys, text(condition), text(null), sampling, low)


def mean_text(z, t, text, mask, *low_res):
    return fill(text.mean((1, 2)), z)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.1), (1.0, 0.2), (3.0, 0.4)])
def test_guidance_extrapolates_from_the_empty_prompt(scale, expected):
    pictures = draw(stage(mean_text), SAMPLING._replace(guidance_scale=scale))
    np.testing.assert_allclose(pictures, expected, rtol=1e-5)


def test_without_guidance_the_empty_prompt_is_not_looked_at():
    np.testing.assert_allclose(draw(stage(mean_text), null=jnp.nan), 0.2, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm_solver_pp"])
def test_every_sampler_ends_at_what_the_network_knows(sampler, prediction):
    """A network that knows the clean picture to be 0.3, in the space of its prediction."""
    base = Stage.from_spec(tiny.BASE)

    def answer(z, t, *_):
        alpha, sigma = (fill(f(t), z) for f in (base.schedule.alpha, base.schedule.sigma))
        eps = (z - alpha * 0.3) / sigma
        return {"x0": jnp.full_like(z, 0.3), "eps": eps, "v": alpha * eps - sigma * 0.3}[prediction]

    known = dataclasses.replace(base, network=Network(answer), prediction=prediction)
    pictures = draw(known, SAMPLING._replace(sampler=sampler, num_steps=3))
    np.testing.assert_allclose(pictures, 0.3, atol=2e-3)


def test_pictures_stay_within_their_range():
    pictures = draw(stage(lambda z, *_: 5.0 * z), SAMPLING._replace(threshold_max=1.5))
    assert float(jnp.abs(pictures).max()) <= 1.0


def test_super_resolution_is_told_its_level_and_given_the_enlarged_picture():
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(augmentation_level=0.25)
    told = draw(stage(lambda z, t, text, mask, low, level: fill(level, z), tiny.SUPER_RESOLUTION), sampling, low)
    np.testing.assert_allclose(told, 0.25, rtol=1e-6)

    shows_condition = stage(lambda z, t, text, mask, low, level: low, tiny.SUPER_RESOLUTION)
    clean = draw(shows_condition, sampling._replace(augmentation_level=0.0), low)
    np.testing.assert_allclose(clean, upsample(low, 16), atol=5e-3)
    noisy = draw(shows_condition, sampling._replace(augmentation_level=0.05), low)
    sigma = np.sin(0.05 * np.pi / 2)
    assert np.std(noisy - np.cos(0.05 * np.pi / 2) * upsample(low, 16)) == pytest.approx(sigma, rel=0.05)


def test_guided_super_resolution_gives_both_branches_the_same_condition():
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(augmentation_level=0.05)
    shows_condition = stage(lambda z, t, text, mask, low, level: low, tiny.SUPER_RESOLUTION)
    guided = draw(shows_condition, sampling._replace(guidance_scale=4.0), low)
    np.testing.assert_allclose(guided, draw(shows_condition, sampling, low), atol=1e-6)


def test_stages_are_compared_by_value_and_built_from_lists_as_from_tuples():
    lists = {
        **tiny.BASE,
        "network": {k: list(v) if isinstance(v, tuple) else v for k, v in tiny.BASE["network"].items()},
    }
    assert Stage.from_spec(lists) == Stage.from_spec(tiny.BASE)
    assert hash(Stage.from_spec(lists)) == hash(Stage.from_spec(tiny.BASE))
    assert Stage.from_spec(tiny.BASE) != Stage.from_spec({**tiny.BASE, "prediction": "eps"})


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'steep'.*cosine"):
        Stage.from_spec({**tiny.BASE, "schedule": {"kind": "steep"}})

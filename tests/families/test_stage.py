"""Drawing from stages, with networks whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion import process, samplers
from personalize_jax.diffusion.augmentation import upsample
from personalize_jax.diffusion.prediction import per_picture, to_x0_eps
from personalize_jax.families.world import read_stage
from personalize_jax.pipeline import Sampling
from personalize_jax.runtime.errors import UserError
from tests import tiny

B = 3
SAMPLING = Sampling("ddim", 2, 1.0, threshold_max=1.0)
ENLARGING = {**tiny.SUPER_RESOLUTION, "residual_std": None}  # a stage that denoises pictures


class Network:
    """Answers by a function of its inputs."""

    def __init__(self, answer):
        self.answer = answer

    def apply(self, variables, *inputs):
        return self.answer(*inputs)


def fill(value_B, z):
    return jnp.broadcast_to(jnp.reshape(value_B, (-1, 1, 1, 1)), z.shape)


def stage(answer, spec=tiny.BASE):
    return dataclasses.replace(read_stage({**spec, "prediction": "x0"}), network=Network(answer))


def text(value):
    return jnp.full((B, 4, 5), value), jnp.ones((B, 4), bool)


def draw(stage, sampling=SAMPLING, low=None, condition=0.2, null=0.1):
    keys = jax.random.split(jax.random.key(1), B)
    return stage.sample({}, keys, text(condition), text(null), sampling, low)


def mean_text(z, t, text, mask, *low_res):
    return fill(text.mean((1, 2)), z)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.1), (1.0, 0.2), (3.0, 0.4)])
def test_guidance_extrapolates_from_the_empty_prompt(scale, expected):
    pictures = draw(stage(mean_text), SAMPLING._replace(guidance_scale=scale))
    np.testing.assert_allclose(pictures, expected, rtol=1e-5)


def test_without_guidance_the_empty_prompt_is_not_looked_at():
    np.testing.assert_allclose(draw(stage(mean_text), null=jnp.nan), 0.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "kind"),
    [
        *((prediction, "cosine") for prediction in ("x0", "eps", "v", "velocity")),
        *((prediction, "rectified_flow") for prediction in ("x0", "v", "velocity")),
    ],
)
def test_what_the_network_knows_is_drawn_in_the_space_of_any_prediction(prediction, kind):
    """A network that knows the clean picture to be 0.3."""
    base = read_stage({**tiny.BASE, "schedule": {"kind": kind}})

    def answer(z, t, *_):
        alpha, sigma = (fill(f(t), z) for f in (base.process.alpha, base.process.sigma))
        eps = (z - alpha * 0.3) / sigma
        v = alpha * eps - sigma * 0.3
        return {"x0": jnp.full_like(z, 0.3), "eps": eps, "v": v, "velocity": eps - 0.3}[prediction]

    known = dataclasses.replace(base, network=Network(answer), prediction=prediction)
    np.testing.assert_allclose(draw(known, SAMPLING._replace(num_steps=3)), 0.3, atol=2e-3)


WAYS = {
    "ddim": samplers.ddim,
    "dpm_solver_pp": samplers.dpm_solver_pp,
    "ancestral, small": lambda process: samplers.ancestral(process, "small"),
    "ancestral, large": lambda process: samplers.ancestral(process, "large"),
}


def test_each_name_draws_by_its_own_sampler():
    """The last step gives away nothing but x0_hat, so the network must answer otherwise at every step."""
    curved = stage(lambda z, *_: jnp.tanh(z))
    keys = jax.random.split(jax.random.key(1), B)
    times = samplers.timesteps(3, curved.spacing, curved.process.num_timesteps)
    drawn = {}
    for name, way in WAYS.items():
        sampler, _, variance = name.partition(", ")
        sampling = SAMPLING._replace(sampler=sampler, variance=variance or "small", num_steps=3)
        drawn[name] = np.asarray(draw(curved, sampling))
        expected = samplers.sample(lambda z, t: jnp.tanh(z), way(curved.process), times, keys, curved.shape)
        np.testing.assert_allclose(drawn[name], expected, atol=1e-5, err_msg=name)
    for name, pictures in drawn.items():
        for other in drawn.keys() - {name}:
            assert np.abs(pictures - drawn[other]).max() > 1e-3, f"{name} is {other}"


def test_learned_variances_are_those_of_the_prompt():
    """Not of the empty prompt, and not guided as the prediction is."""

    def answer(z, t, text, mask):
        mean = fill(text.mean((1, 2)), z)
        return jnp.concatenate([mean, 10 * mean], -1)

    learned = dataclasses.replace(stage(answer), learned_variance=True)
    sampling = SAMPLING._replace(sampler="ancestral", variance="learned_range", guidance_scale=3.0)
    x0_hat, v = learned.denoiser({}, text(0.2), text(0.1), sampling)(jnp.zeros((B, *learned.shape)), jnp.array(0.5))
    np.testing.assert_allclose(x0_hat, 0.4, rtol=1e-5)
    np.testing.assert_allclose(v, 2.0, rtol=1e-5)


def test_predictions_that_are_not_finite_make_no_pictures():
    """One picture of three, whose thresholds would hide it."""

    def answer(z, *_):
        return jnp.tanh(z).at[1, 0, 0, 0].set(jnp.inf)  # with the prompt, so that guidance makes no NaN of it

    for maximum in (1.0, 1.5, None):
        pictures = draw(stage(answer), SAMPLING._replace(threshold_max=maximum, guidance_scale=2.0))
        assert [bool(jnp.isfinite(picture).all()) for picture in pictures] == [True, False, True]


def test_pictures_stay_within_their_range():
    pictures = draw(stage(lambda z, *_: 5.0 * z), SAMPLING._replace(threshold_max=1.5))
    assert float(jnp.abs(pictures).max()) <= 1.0


def test_super_resolution_is_told_its_level_and_given_the_enlarged_picture():
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(augmentation_level=0.25)
    told = draw(stage(lambda z, t, text, mask, low, level: fill(level, z), ENLARGING), sampling, low)
    np.testing.assert_allclose(told, 0.25, rtol=1e-6)

    shows_condition = stage(lambda z, t, text, mask, low, level: low, ENLARGING)
    clean = draw(shows_condition, sampling._replace(augmentation_level=0.0), low)
    np.testing.assert_allclose(clean, upsample(low, 16), atol=5e-3)
    noisy = draw(shows_condition, sampling._replace(augmentation_level=0.05), low)
    sigma = np.sin(0.05 * np.pi / 2)
    assert np.std(noisy - np.cos(0.05 * np.pi / 2) * upsample(low, 16)) == pytest.approx(sigma, rel=0.05)


def test_guided_super_resolution_gives_both_branches_the_same_condition():
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(augmentation_level=0.05)
    shows_condition = stage(lambda z, t, text, mask, low, level: low, ENLARGING)
    guided = draw(shows_condition, sampling._replace(guidance_scale=4.0), low)
    np.testing.assert_allclose(guided, draw(shows_condition, sampling, low), atol=1e-6)


def test_super_resolution_starts_from_other_noise_than_its_condition_has():
    """Drawn in one step without a threshold, pictures are what the network answers: its input, or its condition."""
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(num_steps=1, threshold_max=None, augmentation_level=0.5)
    x_T = draw(stage(lambda z, t, text, mask, low, level: z, ENLARGING), sampling, low)
    condition = draw(stage(lambda z, t, text, mask, low, level: low, ENLARGING), sampling, low)
    noise = (condition - np.sqrt(0.5) * upsample(low, 16)) / np.sqrt(0.5)
    pictures = np.concatenate([x_T.reshape(B, -1), noise.reshape(B, -1)])  # each its own, and no two alike
    np.testing.assert_allclose(np.corrcoef(pictures), np.eye(2 * B), atol=0.15)
    np.testing.assert_allclose(pictures.std(1), 1, atol=0.1)


@pytest.mark.parametrize("corners", [False, True])
def test_low_resolution_pictures_are_enlarged_as_the_stage_says(corners):
    enlarging = dataclasses.replace(read_stage(ENLARGING), align_corners=corners)
    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-1)
    found, _ = enlarging.augment(low, jnp.zeros(B), jnp.zeros((B, 16, 16, 3)))
    np.testing.assert_allclose(found, upsample(low, 16, corners), atol=1e-5)
    assert np.abs(found - upsample(low, 16, not corners)).max() > 0.1


def test_a_residual_is_denoised_about_the_low_resolution_picture():
    """A network that knows the clean pictures to be 0.3, in the terms of what it sees."""
    residual = read_stage({**tiny.SUPER_RESOLUTION, "residual_std": 0.2})

    def answer(z, t, text, mask, low, level):
        alpha, sigma = (fill(f(t), z) for f in (residual.process.alpha, residual.process.sigma))
        x = (0.3 - low) / 0.2
        return alpha * (z - alpha * x) / sigma - sigma * x

    low = jax.random.uniform(jax.random.key(3), (B, 8, 8, 3), minval=-0.4, maxval=0.4)
    sampling = SAMPLING._replace(num_steps=3, augmentation_level=0.1, guidance_scale=2.0)
    pictures = draw(dataclasses.replace(residual, network=Network(answer)), sampling, low)
    np.testing.assert_allclose(pictures, 0.3, atol=2e-3)


def test_a_residual_is_preconditioned_as_by_karras():
    """Table 1 of Karras et al. 2022, with noise of standard deviation s on pictures about the low-resolution one."""
    data, s = 0.2, np.array([0.01, 0.2, 3.0])
    residual = read_stage({**tiny.SUPER_RESOLUTION, "residual_std": data})
    rng = np.random.default_rng(0)
    low, noisy, output = (jnp.asarray(rng.normal(size=(3, 2, 2, 3)), jnp.float32) for _ in range(3))
    alpha = data / np.sqrt(data**2 + s**2)  # of the process at which the residual has that noise
    z = per_picture(alpha, noisy) * residual.to_residual(noisy, (low, None))
    residual_hat, _ = to_x0_eps("v", output, z, alpha, np.sqrt(1 - alpha**2))
    c_skip, c_out = data**2 / (s**2 + data**2), s * data / np.sqrt(s**2 + data**2)
    expected = low + per_picture(c_skip, low) * (noisy - low) - per_picture(c_out, low) * output
    np.testing.assert_allclose(residual.to_picture(residual_hat, (low, None)), expected, atol=1e-5)


def test_thresholds_are_of_pictures_not_of_residuals():
    spec = {**tiny.SUPER_RESOLUTION, "residual_std": 0.25, "prediction": "x0"}
    far = dataclasses.replace(read_stage(spec), network=Network(lambda z, *_: jnp.full_like(z, 3.0)))
    low = jnp.zeros((B, 8, 8, 3))
    np.testing.assert_allclose(draw(far, SAMPLING, low), 0.75, atol=0.01)
    np.testing.assert_allclose(draw(far, SAMPLING, low + 0.75), 1.0, atol=1e-6)


def test_a_super_resolution_stage_of_an_earlier_version_is_refused():
    old = {key: value for key, value in tiny.SUPER_RESOLUTION.items() if key != "residual_std"}
    with pytest.raises(UserError, match="super_resolution stage was pretrained by an earlier version.*pretrain it"):
        read_stage(old)


def test_each_schedule_is_the_one_of_its_name():
    spec = {**ENLARGING, "schedule": {"kind": "cosine", "shift": 1.0}, "augmentation": {"kind": "linear"}}
    made = read_stage(spec)
    t = jnp.array([0.2, 0.5])
    for found, expected in ((made.process, process.cosine(1.0)), (made.augmentation, process.linear())):
        np.testing.assert_allclose(found.alpha(t), expected.alpha(t), rtol=1e-6)
    _, level = made.augment(jnp.zeros((2, 8, 8, 3)), t, jnp.ones((2, 16, 16, 3)))
    noised, _ = made.augment(jnp.zeros((2, 8, 8, 3)), t, jnp.ones((2, 16, 16, 3)))
    np.testing.assert_array_equal(level, t)
    np.testing.assert_allclose(noised[:, 0, 0, 0], process.linear().sigma(t), rtol=1e-5)


def test_a_schedule_may_say_at_which_times_training_noises_pictures():
    times = {"kind": "logit_normal", "mean": 0.5, "std": 0.8}
    made = read_stage({**tiny.BASE, "schedule": {"kind": "rectified_flow", "shift": 3.0, "times": times}})
    assert made.process == dataclasses.replace(process.rectified_flow(3.0), times=process.logit_normal(0.5, 0.8))
    plain = read_stage({**tiny.BASE, "schedule": {"kind": "cosine", "times": {"kind": "uniform"}}})
    assert plain == read_stage(tiny.BASE)


def test_stages_are_compared_by_value_and_built_from_lists_as_from_tuples():
    lists = {
        **tiny.BASE,
        "network": {k: list(v) if isinstance(v, tuple) else v for k, v in tiny.BASE["network"].items()},
    }
    assert read_stage(lists) == read_stage(tiny.BASE)
    assert hash(read_stage(lists)) == hash(read_stage(tiny.BASE))
    assert read_stage(tiny.BASE) != read_stage({**tiny.BASE, "prediction": "eps"})


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'steep'.*cosine"):
        read_stage({**tiny.BASE, "schedule": {"kind": "steep"}})
    with pytest.raises(ValueError, match="'often'.*logit_normal"):
        read_stage({**tiny.BASE, "schedule": {"kind": "cosine", "times": {"kind": "often"}}})

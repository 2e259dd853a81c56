"""Trajectories of our samplers beside those of diffusers' pipelines, fed with the same noise."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from personalize_jax.diffusion import samplers
from personalize_jax.errors import UserError
from personalize_jax.pipeline import load_pipeline
from tests import tiny_public

PROMPTS = ["a qz dog in the snow", "a teapot on the beach"]
STEPS = 30
NOISY_MODULES = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.deepfloyd_if.pipeline_if",
    "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution",
    "diffusers.schedulers.scheduling_ddpm",
)


@contextlib.contextmanager
def noise_fed(noises):
    """Every draw of diffusers is the next of these arrays [B, H, W, C]."""
    remaining = [torch.from_numpy(np.moveaxis(noise, -1, 1).copy()) for noise in noises]

    def draw(shape, *_, **__):
        noise = remaining.pop(0)
        assert noise.shape == torch.Size(shape)
        return noise

    with pytest.MonkeyPatch.context() as patch:
        for module in NOISY_MODULES:
            patch.setattr(f"{module}.randn_tensor", draw)
        yield


def our_trajectory(pipeline, stage, sampling, noises, low_res=None):
    """z after every step; noises are x_T (behind the low-resolution picture's noise) and that of each step."""
    text, null = pipeline.encode(PROMPTS), pipeline.encode([""] * len(PROMPTS))
    noises = list(noises)
    if low_res is not None:
        levels = jnp.full((len(PROMPTS),), sampling.augmentation_level)
        low_res = stage.condition(low_res, levels, noises.pop(1))
    sampler = stage.sampler(sampling)
    times = samplers.timesteps(sampling.num_steps, stage.spacing, stage.schedule.num_timesteps)

    @jax.jit
    def step(carry, z_t, t, s, noise, params, low_res):
        denoise = stage.denoiser(params, text, null, sampling, low_res)
        return sampler.step(carry, z_t, denoise(z_t, t), t, s, noise)

    z = jnp.asarray(noises.pop(0))
    carry, trajectory = sampler.init(z), []
    for t, s in zip(times[:-1], times[1:], strict=True):
        noise = noises.pop(0) if noises else jnp.zeros_like(z)
        carry, z = step(carry, z, t, s, noise, pipeline.params[stage.name], low_res)
        trajectory.append(np.asarray(z))
    return trajectory


def draws(count, shape, seed=0):
    return list(np.random.default_rng(seed).normal(size=(count, len(PROMPTS), *shape)).astype(np.float32))


def assert_close(ours, theirs):
    assert len(ours) == len(theirs) == STEPS
    for i in (*range(9, STEPS, 10), STEPS - 1):
        reference = np.moveaxis(theirs[i], 1, -1)
        np.testing.assert_allclose(ours[i], reference, atol=1e-3 * np.abs(reference).max(), err_msg=f"step {i}")


@pytest.mark.parametrize(
    "prediction, scheduler",
    [
        ("v_prediction", DDIMScheduler),
        pytest.param("epsilon", DDIMScheduler, marks=pytest.mark.slow),
        pytest.param("epsilon", DDPMScheduler, marks=pytest.mark.slow),
    ],
)
def test_stable_diffusion(tmp_path, prediction, scheduler):
    theirs = tiny_public.stable_diffusion(prediction, scheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    stage = pipeline.stages[0]
    sampling = stage.sampling._replace(num_steps=STEPS)
    assert sampling.sampler == {DDIMScheduler: "ddim", DDPMScheduler: "ancestral"}[scheduler]
    noises = draws(STEPS + 1, stage.shape)
    trajectory = []

    def record(_, __, ___, tensors):
        trajectory.append(tensors["latents"].numpy())
        return tensors

    with noise_fed(noises):
        pictures = theirs(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=sampling.guidance_scale,
            output_type="np",
            callback_on_step_end=record,
        ).images
    ours = our_trajectory(pipeline, stage, sampling, noises)
    assert_close(ours, trajectory)
    decoded = pipeline.codec.apply(
        {"params": pipeline.params["codec"]}, ours[-1] / pipeline.codec.scaling_factor, method="decode"
    )
    np.testing.assert_allclose(np.clip(decoded / 2 + 0.5, 0, 1), pictures, atol=1e-3)


@pytest.mark.slow
def test_deepfloyd_if(tmp_path):
    """Guidance, dynamic thresholding, learned variances, then super-resolution from the first stage's pictures."""
    first, second = tiny_public.deepfloyd_if(), tiny_public.deepfloyd_if_super_resolution()
    for name, pipeline in (("first", first), ("second", second)):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / name)
    ours = load_pipeline([tmp_path / "first", tmp_path / "second"])
    base, super_resolution = ours.stages

    noises, trajectory = draws(STEPS + 1, base.shape), []
    with noise_fed(noises):
        low = first(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=base.sampling.guidance_scale,
            output_type="pt",
            callback=lambda i, t, x: trajectory.append(x.numpy()),
        ).images
    assert_close(our_trajectory(ours, base, base.sampling._replace(num_steps=STEPS), noises), trajectory)

    noises, trajectory = draws(STEPS + 2, super_resolution.shape, seed=1), []
    with noise_fed(noises):
        second(
            prompt=PROMPTS,
            image=low,
            num_inference_steps=STEPS,
            guidance_scale=super_resolution.sampling.guidance_scale,
            output_type="pt",
            callback=lambda i, t, x: trajectory.append(x.numpy()),
        )
    sampling = super_resolution.sampling._replace(num_steps=STEPS)
    low_res = jnp.moveaxis(jnp.asarray(low.numpy()), 1, -1)
    assert_close(our_trajectory(ours, super_resolution, sampling, noises, low_res), trajectory)


def test_stages_that_do_not_follow_each_other_are_refused(tmp_path):
    tiny_public.deepfloyd_if().save_pretrained(tmp_path / "first")
    tiny_public.deepfloyd_if_super_resolution().save_pretrained(tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    for folders in ([second], [first, first], [first, second, second]):
        with pytest.raises(UserError, match="cannot be .* stage; give one base pipeline"):
            load_pipeline(folders if len(folders) > 1 else folders[0])

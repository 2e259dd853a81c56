"""Pictures that our pipelines draw beside those of diffusers' pipelines, fed with the same noise."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

from personalize_jax.diffusion import samplers
from personalize_jax.families.world import read_stage
from personalize_jax.pipeline import Sampling, load_pipeline
from personalize_jax.runtime.errors import UserError
from tests import tiny, tiny_public

PROMPTS = ["a qz dog in the snow", "a teapot on the beach"]
STEPS = 12
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


@contextlib.contextmanager
def noises_kept():
    """A list of all the noise that our samplers draw, in their order."""
    kept, draw = [], samplers._noise

    def drawn(*args):
        noise = draw(*args)
        jax.debug.callback(lambda array: kept.append(np.array(array)), noise, ordered=True)
        return noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_noise", drawn)
        yield kept


def our_pictures(pipeline, stage, low=None):
    """What the pipeline's own functions draw in `STEPS`, before rounding, and the noise that they drew for it."""
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    sampling = stage.sampling._replace(num_steps=STEPS)
    with noises_kept() as noises:
        draw = jax.jit(lambda params, text, null, low: stage.sample(params, keys, text, null, sampling, low))
        texts = pipeline.condition(PROMPTS), pipeline.condition([""] * len(PROMPTS))
        pictures = draw(pipeline.params[stage.name], *texts, low)
        pictures = pipeline.family.to_pictures(pipeline.params, pictures)
        pictures.block_until_ready()
        jax.effects_barrier()
    correlations = np.corrcoef([noise.ravel() for noise in noises]) - np.eye(len(noises))
    assert np.abs(correlations).max() < 0.5  # each is drawn anew
    return np.asarray(pictures), noises


def changed_scheduler(folder, changes):
    """Change keys of the scheduler's file, and take away those of value None."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if changes.get(key, 0) is not None}))


# What old files leave out, and what diffusers' pipeline takes for it.
OLD = {"clip_sample": None, "steps_offset": None}


@pytest.mark.parametrize(
    "prediction, scheduler, changes",
    [
        ("v_prediction", DDIMScheduler, OLD),
        pytest.param("v_prediction", DDIMScheduler, {}, marks=pytest.mark.slow),
        pytest.param("epsilon", DDIMScheduler, {"clip_sample": True, "steps_offset": 0}, marks=pytest.mark.slow),
        pytest.param("epsilon", DDPMScheduler, OLD, marks=pytest.mark.slow),
    ],
)
def test_stable_diffusion(tmp_path, prediction, scheduler, changes):
    tiny_public.stable_diffusion(prediction, scheduler).save_pretrained(tmp_path)
    changed_scheduler(tmp_path, changes)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    pipeline = load_pipeline(tmp_path)
    stage = pipeline.stages[0]
    assert stage.sampling.sampler == {DDIMScheduler: "ddim", DDPMScheduler: "ancestral"}[scheduler]
    ours, noises = our_pictures(pipeline, stage)
    with noise_fed(noises):
        guidance = stage.sampling.guidance_scale
        pictures = theirs(PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance, output_type="np").images
    assert np.mean((pictures > 0) & (pictures < 1)) > 0.5
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), pictures, atol=1e-3)


@pytest.mark.slow
def test_deepfloyd_if(tmp_path):
    """Guidance, dynamic thresholding, learned variances, then super-resolution from the first stage's pictures."""
    first, second = tiny_public.deepfloyd_if(), tiny_public.deepfloyd_if_super_resolution()
    for name, pipeline in (("first", first), ("second", second)):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / name)
    pipeline = load_pipeline([tmp_path / "first", tmp_path / "second"])
    low = None
    for stage, theirs in zip(pipeline.stages, (first, second), strict=True):
        ours, noises = our_pictures(pipeline, stage, low)
        options = {"num_inference_steps": STEPS, "guidance_scale": stage.sampling.guidance_scale, "output_type": "pt"}
        if low is not None:
            noises[:2] = noises[1::-1]  # they draw the low-resolution picture's noise behind x_T
            options["image"] = torch.from_numpy(np.moveaxis(low, -1, 1).copy())
        with noise_fed(noises):
            reference = np.moveaxis(theirs(prompt=PROMPTS, **options).images.numpy(), 1, -1)
        assert np.mean(np.abs(reference) < 0.99) > 0.5
        np.testing.assert_allclose(ours, reference, atol=1e-3 * np.abs(reference).max())
        low = reference


class Network:
    """Answers by a function of its inputs."""

    def __init__(self, answer):
        self.answer = answer

    def apply(self, variables, *inputs):
        return self.answer(*inputs)


PICTURES = {**tiny.SUPER_RESOLUTION, "residual_std": None}  # as public models denoise


def stage_of(answer, spec=PICTURES, **changes):
    return dataclasses.replace(read_stage({**spec, "prediction": "x0"}), network=Network(answer), **changes)


def test_guided_steps_take_the_variance_that_the_prompt_gives():
    def answer(z, t, text, mask):
        return jnp.concatenate([z, jnp.broadcast_to(text.mean((1, 2))[:, None, None, None], z.shape)], axis=-1)

    stage = stage_of(answer, tiny.BASE, learned_variance=True)
    conditional, null = ((jnp.full((2, 4, 5), value), jnp.ones((2, 4), bool)) for value in (0.2, -0.1))
    sampling = Sampling("ancestral", 2, 7.0, variance="learned_range")
    _, v = stage.denoiser({}, conditional, null, sampling)(jnp.ones((2, 8, 8, 3)), 0.5)
    np.testing.assert_allclose(v, 0.2, rtol=1e-6)


@pytest.mark.parametrize("corners", [False, True])
def test_low_resolution_pictures_are_enlarged_as_in_diffusers(corners):
    low = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    enlarged, _ = stage_of(None, align_corners=corners).augment(low, jnp.zeros(2), jnp.zeros((2, 16, 16, 3)))
    low_BCHW = torch.from_numpy(np.moveaxis(low, -1, 1).copy())
    reference = torch.nn.functional.interpolate(low_BCHW, (16, 16), mode="bilinear", align_corners=corners)
    np.testing.assert_allclose(enlarged, np.moveaxis(reference.numpy(), 1, -1), atol=1e-3)


def test_what_is_denoised_starts_from_other_noise_than_that_of_the_low_resolution_picture():
    low, keys = jnp.zeros((2, 8, 8, 3)), jax.random.split(jax.random.key(0), 2)
    text = jnp.zeros((2, 4, 5)), jnp.ones((2, 4), bool)
    sampling = Sampling("ddim", 1, 1.0, threshold_max=None, augmentation_level=0.5)
    answers = (lambda z, t, text, mask, low, level: z), (lambda z, t, text, mask, low, level: low)
    x_T, shown = (np.ravel(stage_of(answer).sample({}, keys, text, text, sampling, low)) for answer in answers)
    assert np.std(x_T) == pytest.approx(1, abs=0.1) and np.std(shown) == pytest.approx(0.5**0.5, abs=0.1)
    assert abs(np.corrcoef(x_T, shown)[0, 1]) < 0.1


def test_stages_that_do_not_follow_each_other_are_refused(tmp_path):
    tiny_public.deepfloyd_if().save_pretrained(tmp_path / "first")
    tiny_public.deepfloyd_if_super_resolution().save_pretrained(tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    for folders in ([second], [first, first], [first, second, second]):
        with pytest.raises(UserError, match="were given; give an IFPipeline, and an IFSuperResolutionPipeline after"):
            load_pipeline(folders if len(folders) > 1 else folders[0])

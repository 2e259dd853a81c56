"""The DreamBooth loss and its gradients on public networks beside torch's autograd on diffusers' modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from personalize_jax.families.batch import Batch
from personalize_jax.families.diffusion_loss import diffuse
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from tests import tiny, tiny_public
from tests.models.torch_params import port

LAMBDA = 0.7
B = 4
LEVELS = (0.1, 0.5)
CAPTIONS = {"instance": "a qz dog", "prior": "a dog"}


def torch_tensor(x):
    return (
        torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()) if np.ndim(x) == 4 else torch.tensor(np.asarray(x))
    )


def case(name, tmp_path):
    """(our pipeline, stage, diffusers' U-Net, its scheduler)."""
    if name.startswith("sd"):
        theirs = tiny_public.stable_diffusion("v_prediction" if name == "sd_v" else "epsilon")
        theirs.save_pretrained(tmp_path)
        pipeline = load_pipeline(tmp_path)
    else:
        first, second = tiny_public.deepfloyd_if(), tiny_public.deepfloyd_if_super_resolution()
        first.save_pretrained(tmp_path / "first")
        second.save_pretrained(tmp_path / "second")
        pipeline = load_pipeline([tmp_path / "first", tmp_path / "second"])
        theirs = first if name == "if_1" else second
    stage = pipeline.stages[1 if name == "if_2" else 0]
    return pipeline, stage, theirs.unet, DDPMScheduler.from_config(theirs.scheduler.config)


def batches(pipeline, stage, rng):
    groups = {}
    for group, caption in CAPTIONS.items():
        x = rng.uniform(-1, 1, (B, *stage.shape)).astype(np.float32)
        low = None
        if stage.low_resolution is not None:
            low = jnp.asarray(rng.uniform(-1, 1, (B, stage.low_resolution, stage.low_resolution, 3)), jnp.float32)
        tokens = jnp.asarray(pipeline.tokenizer([caption] * B))
        groups[group] = Batch(jnp.asarray(x), tokens, pipeline.condition([caption] * B), low, None)
    return groups


def torch_loss(unet, scheduler, stage, batch, noisy, key, min_snr):
    """One group's loss as the method defines it, from x, eps, time and level; nothing of ours but the random draws."""
    n = torch.round(torch_tensor(noisy.t) * 1000).long() - 1
    x, eps = torch_tensor(batch.x), torch_tensor(noisy.eps)
    z, options = scheduler.add_noise(x, eps, n), {}
    if batch.low_res is not None:
        low = torch.nn.functional.interpolate(
            torch_tensor(batch.low_res), stage.shape[:2], mode="bilinear", align_corners=True
        )
        level = torch.ceil(torch_tensor(noisy.low_res[1]) * 1000).long() - 1
        noise = torch_tensor(jax.random.normal(jax.random.split(key, 5)[3], batch.x.shape))
        z = torch.cat([z, scheduler.add_noise(low, noise, level)], dim=1)
        options["class_labels"] = level
    output = unet(z, n, encoder_hidden_states=torch.tensor(np.asarray(batch.cond.embeddings)), **options).sample
    output = output[:, : x.shape[1]]  # the variance half left alone
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x, eps, n) if is_v else eps
    error = ((output - target) ** 2).mean(dim=(1, 2, 3))
    if min_snr:
        alpha2 = scheduler.alphas_cumprod[n]
        snr = alpha2 / (1 - alpha2)
        error = error * torch.clamp(snr, max=5.0) / (snr + 1 if is_v else snr)
    return error.mean()


CASES = [("if_1", False)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("sd_eps", True), ("sd_v", True), ("if_2", False))]


@pytest.mark.parametrize("name, min_snr", CASES)
def test_loss_and_gradients(tmp_path, name, min_snr):
    pipeline, stage, unet, scheduler = case(name, tmp_path)
    batch = batches(pipeline, stage, np.random.default_rng(0))
    objective = tiny.objective("min_snr" if min_snr else "none", LAMBDA, augmentation_levels=LEVELS)
    rng = jax.random.key(3)

    keys = dict(zip(CAPTIONS, jax.random.split(rng, 2), strict=True))
    noisy = {name: diffuse(stage, batch[name], batch[name].cond, keys[name], objective) for name in batch}
    assert not np.array_equal(noisy["instance"].t, noisy["prior"].t)
    parts = {name: torch_loss(unet, scheduler, stage, batch[name], noisy[name], keys[name], min_snr) for name in batch}
    reference = parts["instance"] + LAMBDA * parts["prior"]
    reference.backward()

    frozen = pipeline.networks(stage.name)

    @jax.jit
    def value_and_gradient(denoiser):
        return jax.value_and_grad(
            lambda p: pipeline.family.loss(stage, objective, {**frozen, "denoiser": p}, frozen, batch, rng)[0]
        )(denoiser)

    loss, gradient = value_and_gradient(frozen["denoiser"])
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-4)
    expected = port({n: p.grad for n, p in unet.named_parameters()}, frozen["denoiser"])
    ours, theirs = flatten(gradient), flatten(expected)
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    for path, g in theirs.items():
        # Of tensors whose gradient is rounding error only (biases before a normalisation), nothing can be said.
        scale = max(np.linalg.norm(g), 1e-5 * largest * np.sqrt(g.size))
        assert np.linalg.norm(ours[path] - g) <= 1e-3 * scale, path

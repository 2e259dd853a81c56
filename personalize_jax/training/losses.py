r"""The objective: a denoising loss on the subject and a prior-preservation loss on its class.

    E[ w_t |x_hat(z_t, c) - x|^2  +  lambda w_t' |x_hat(z_t', c_pr) - x_pr|^2 ]

(specification [0087]-[0090]; Ruiz et al. 2023, eq. 2), z_t = alpha_t x + sigma_t eps. Pretraining is its first term.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion.augmentation import sample_levels
from personalize_jax.diffusion.prediction import Weighting, add_noise, loss_weight, per_picture, target, to_x0_eps
from personalize_jax.diffusion.variational import variational_bound
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Stage, Text
from personalize_jax.pipeline.cascade import encode_tokens
from personalize_jax.training.examples import Batch

PriorForm = Literal["sampled", "frozen_prediction"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Constants of the loss.

    Attributes:
        weighting: w_t as a weight in the space of the network's prediction, see `diffusion.prediction.loss_weight`.
        prior_weight: lambda; 0 leaves the second term out.
        prior_form: the prior term's target: "sampled" is the class picture that the frozen cascade drew,
            "frozen_prediction" what the frozen network itself answers to the same input (specification [0082]-[0086]).
        augmentation_levels: range of the low-resolution picture's noise level while training (super-resolution only).
        offset_noise: standard deviation of noise that is the same in all of a picture, added to eps; 0 leaves it out.
        vlb_weight: of the variational bound, by which a network learns the variance of its steps; 0 leaves that half of
            the output alone. Where Nichol & Dhariwal (2021, eq. 16) weigh the sum over N steps with .001, this weighs
            one of them: 1 is theirs for N = 1000.
    """

    weighting: Weighting
    prior_weight: float
    prior_form: PriorForm
    augmentation_levels: tuple[float, float]
    offset_noise: float = 0.0
    vlb_weight: float = 0.0


class NoisyBatch(NamedTuple):
    """A network's input with what it was made of.

    Attributes:
        z: [B, H, W, C] noisy pictures or latents z_t.
        t: [B] times.
        text: of the captions.
        low_res: what `Stage.condition` gives, or None.
        eps: the noise in z.
    """

    z: Array
    t: Array
    text: Text
    low_res: tuple[Array, Array] | None
    eps: Array


def diffuse(stage: Stage, batch: Batch, text: Text, key: Array, objective: Objective) -> NoisyBatch:
    """Noise a batch, each picture at a time of its own.

    Times are stratified over the batch, t_i = (i + u) / B: the same expectation with less variance. That is why each
    half of a step calls this for itself: strata over both would leave one half with only the low noise.
    """
    t_key, eps_key, level_key, augmentation_key, offset_key = jax.random.split(key, 5)
    B = batch.x.shape[0]
    t_B = (jnp.arange(B) + jax.random.uniform(t_key, ())) / B
    if N := stage.schedule.num_timesteps:
        t_B = jnp.minimum(jnp.floor(t_B * N) + 1, N) / N  # each index alike, and never t = 0, which is clean
    eps = jax.random.normal(eps_key, batch.x.shape)
    if objective.offset_noise > 0:
        offset = jax.random.normal(offset_key, (B, 1, 1, batch.x.shape[-1]))
        eps += objective.offset_noise * offset
    z = add_noise(batch.x, eps, stage.schedule.alpha(t_B), stage.schedule.sigma(t_B))
    low_res = None
    if batch.low_res is not None:
        noise = jax.random.normal(augmentation_key, batch.x.shape)
        low_res = stage.condition(batch.low_res, sample_levels(level_key, B, *objective.augmentation_levels), noise)
    return NoisyBatch(z, t_B, text, low_res, eps)


def personalization_loss(
    stage: Stage,
    text_encoder: TextEncoder,
    objective: Objective,
    params: Params,
    frozen_params: Params,
    batch: dict[str, Batch],
    rng: Array,
) -> tuple[Array, dict[str, Array]]:
    """Both terms of the objective.

    Args:
        stage: the stage in training.
        text_encoder: encodes captions that carry no cached embeddings.
        objective: constants of the loss.
        params: {"denoiser": ..., "text_encoder": ...}, with trained and frozen values merged.
        frozen_params: the pretrained {"denoiser": ..., "text_encoder": ...}; only `frozen_prediction` looks at it.
        batch: {"instance": ...}, and {"prior": ...} of the same size unless lambda is 0.
        rng: key of this step.

    Returns:
        The scalar loss and the unweighted terms by name.
    """
    halves = ["instance"] + ["prior"] * (objective.prior_weight > 0)
    noisy = {}
    for half, key in zip(halves, jax.random.split(rng, len(halves)), strict=True):
        text = batch[half].text or Text(*encode_tokens(text_encoder, params["text_encoder"], batch[half].tokens))
        noisy[half] = diffuse(stage, batch[half], text, key, objective)
    both = interleave(*(_inputs(noisy[half]) for half in halves))
    outputs = separate(stage.apply(params["denoiser"], *both), len(halves))
    predictions, variances = (
        dict(zip(halves, parts, strict=True)) for parts in zip(*map(stage.split, outputs), strict=True)
    )

    targets = {half: _true_target(stage, batch[half], noisy[half]) for half in halves}
    if "prior" in halves and objective.prior_form == "frozen_prediction":
        frozen_text = batch["prior"].text or Text(
            *encode_tokens(text_encoder, frozen_params["text_encoder"], batch["prior"].tokens)
        )
        frozen = stage.apply(frozen_params["denoiser"], *_inputs(noisy["prior"]._replace(text=frozen_text)))
        targets["prior"] = jax.lax.stop_gradient(stage.split(frozen)[0])

    terms = {}
    for half in halves:
        w = loss_weight(stage.prediction, stage.schedule.logsnr(noisy[half].t), objective.weighting)
        error = jnp.square(predictions[half] - targets[half])
        if batch[half].pixel_weight is not None:
            error *= batch[half].pixel_weight
        terms[f"{half}_loss"] = jnp.mean(per_picture(w, error) * error)
        if objective.vlb_weight > 0:
            bound_B = _bound(stage, batch[half], noisy[half], predictions[half], variances[half])
            terms[f"{half}_bound"] = jnp.mean(bound_B)
    loss = {half: terms[f"{half}_loss"] + objective.vlb_weight * terms.get(f"{half}_bound", 0.0) for half in halves}
    return loss["instance"] + objective.prior_weight * loss.get("prior", 0.0), terms


def interleave(*halves: tuple) -> tuple:
    """Join pytrees of [B, ...] arrays to [len(halves) B, ...], alternating, so that a sharded batch stays in place."""
    return jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *halves)


def separate(x: Array, count: int) -> list[Array]:
    """The inverse of `interleave` for one array."""
    return list(jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0))


def _inputs(noisy: NoisyBatch) -> tuple:
    return noisy.z, noisy.t, noisy.text, noisy.low_res


def _true_target(stage: Stage, batch: Batch, noisy: NoisyBatch) -> Array:
    alpha, sigma = stage.schedule.alpha(noisy.t), stage.schedule.sigma(noisy.t)
    return target(stage.prediction, batch.x, noisy.eps, alpha, sigma)


def _bound(stage: Stage, batch: Batch, noisy: NoisyBatch, prediction: Array, v: Array) -> Array:
    """The variational bound's gradient reaches the variance only: the mean learns from the simple loss."""
    alpha, sigma = stage.schedule.alpha(noisy.t), stage.schedule.sigma(noisy.t)
    x0_hat, _ = to_x0_eps(stage.prediction, jax.lax.stop_gradient(prediction), noisy.z, alpha, sigma)
    return variational_bound(stage.schedule, batch.x, noisy.z, jnp.clip(x0_hat, -1, 1), v, noisy.t)

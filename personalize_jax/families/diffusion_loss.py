"""The loss of diffusion models: the denoising losses of all groups of examples, weighted and summed.

    sum_g lambda_g E[ w_t |f(z_t, t, c) - y_g|^2 ],    z_t = alpha_t x + sigma_t eps

DreamBooth's is that of two groups (specification [0087]-[0090]; Ruiz et al. 2023, eq. 2): instance images with a weight
of 1, class images with the prior weight. f is the network; y_g is the group's target, see `families.targets`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion.augmentation import sample_levels
from personalize_jax.diffusion.prediction import add_noise, loss_weight, per_picture, to_x0_eps
from personalize_jax.diffusion.variational import variational_bound
from personalize_jax.families.base import Family
from personalize_jax.families.batch import Batch, NoisyBatch, interleave, separate
from personalize_jax.families.objective import Objective
from personalize_jax.families.stage import Conditioning, Stage
from personalize_jax.models.params import Params


def diffuse(stage: Stage, batch: Batch, cond: Conditioning, key: Array, objective: Objective) -> NoisyBatch:
    """Noise a batch, each picture at a time of its own.

    Each group of a step is noised by itself because times are stratified and rise along the batch, see
    `Process.sample_times`: over two groups together, the first would have only little noise.
    """
    t_key, eps_key, level_key, augmentation_key, offset_key = jax.random.split(key, 5)
    B = batch.x.shape[0]
    t_B = stage.process.sample_times(t_key, B)
    eps = jax.random.normal(eps_key, batch.x.shape)
    if objective.offset_noise > 0:
        offset = jax.random.normal(offset_key, (B, 1, 1, batch.x.shape[-1]))
        eps += objective.offset_noise * offset
    low_res = None
    if batch.low_res is not None:
        noise = jax.random.normal(augmentation_key, batch.x.shape)
        low_res = stage.augment(batch.low_res, sample_levels(level_key, B, *objective.augmentation_levels), noise)
    x = stage.to_residual(batch.x, low_res)
    z = add_noise(x, eps, stage.process.alpha(t_B), stage.process.sigma(t_B))
    return NoisyBatch(x, z, t_B, cond, low_res, eps)


class DiffusionFamily:
    """The loss that all families of diffusion models share."""

    def loss(
        self: Family,
        stage: Stage,
        objective: Objective,
        params: Params,
        frozen_params: Params,
        batches: Mapping[str, Batch],
        rng: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """The denoising losses of all groups, weighted and summed; see `Family.loss`.

        Metrics are "<group>_loss" and, where the variance is learned, "<group>_bound".
        """
        groups = objective.groups
        examples = [batches[group.name] for group in groups]

        # 1. Noise: z_t = alpha_t x + sigma_t eps, each group at times and with noise of its own.
        conds = [_condition(self, params, batch) for batch in examples]
        keys = jax.random.split(rng, len(groups))
        noised = [diffuse(stage, *inputs, objective) for inputs in zip(examples, conds, keys, strict=True)]

        # 2. Prediction: f(z_t, t, c) of all groups in one call.
        outputs = separate(stage.apply(params["denoiser"], *interleave(*map(_inputs, noised))), len(groups))

        # 3. Loss: sum_g lambda_g (E[w_t |f - y_g|^2] + vlb_weight E[bound]).
        loss, metrics = jnp.zeros(()), {}
        for group, batch, noisy, output in zip(groups, examples, noised, outputs, strict=True):
            prediction, variance = stage.split(output)
            frozen_prediction = partial(_frozen_prediction, stage, self, frozen_params, batch, noisy)
            error = jnp.square(prediction - group.target.function(stage, batch, noisy, frozen_prediction))
            if batch.pixel_weight is not None:
                error *= batch.pixel_weight
            w_B = loss_weight(stage.prediction, stage.process, noisy.t, objective.weighting)
            term = jnp.mean(per_picture(w_B, error) * error)
            metrics[f"{group.name}_loss"] = term
            if objective.vlb_weight > 0:
                bound = jnp.mean(_bound(stage, noisy, prediction, variance))
                metrics[f"{group.name}_bound"] = bound
                term += objective.vlb_weight * bound
            loss += group.weight * term
        return loss, metrics


def _condition(family: Family, params: Params, batch: Batch) -> Conditioning:
    """The captions' conditioning: that of the batch if it was computed before, or else the encoders' now."""
    return family.condition(params, batch.tokens) if batch.cond is None else batch.cond


def _inputs(noisy: NoisyBatch) -> tuple:
    return noisy.z, noisy.t, noisy.cond, noisy.low_res


def _frozen_prediction(stage: Stage, family: Family, frozen_params: Params, batch: Batch, noisy: NoisyBatch) -> Array:
    """The prediction of the frozen networks from the same noisy pictures, with the frozen encoders' conditioning."""
    cond = _condition(family, frozen_params, batch)
    output = stage.apply(frozen_params["denoiser"], *_inputs(noisy._replace(cond=cond)))
    return jax.lax.stop_gradient(stage.split(output)[0])


def _bound(stage: Stage, noisy: NoisyBatch, prediction: Array, v: Array | None) -> Array:
    """The variational bound, whose gradient reaches the variance only: the mean learns from the simple loss."""
    assert v is not None  # `Objective.vlb_weight` is for networks that learn the variance
    alpha, sigma = stage.process.alpha(noisy.t), stage.process.sigma(noisy.t)
    x0_hat, _ = to_x0_eps(stage.prediction, jax.lax.stop_gradient(prediction), noisy.z, alpha, sigma)
    return variational_bound(stage.process, noisy.x, noisy.z, jnp.clip(x0_hat, -1, 1), v, noisy.t)

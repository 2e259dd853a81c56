"""One diffusion model of a cascade: a network with the process that it inverts and the way it is sampled."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion import augmentation, samplers, schedule
from personalize_jax.diffusion.guidance import dynamic_threshold, guide
from personalize_jax.diffusion.prediction import Prediction, to_x0_eps
from personalize_jax.diffusion.schedule import Schedule
from personalize_jax.models.params import Params
from personalize_jax.models.unet import UNet

SCHEDULES = {"cosine": schedule.cosine, "linear": schedule.linear}
SAMPLERS = {"ancestral": samplers.ancestral, "ddim": samplers.ddim, "dpm_solver_pp": samplers.dpm_solver_pp}


class Sampling(NamedTuple):
    """How pictures are drawn from a stage.

    Attributes:
        sampler: a name in `SAMPLERS`.
        num_steps: network evaluations a picture (doubled by guidance).
        guidance_scale: w of classifier-free guidance; 1 switches it off.
        threshold_percentile: of dynamic thresholding.
        threshold_max: largest threshold; 1 is static thresholding.
        augmentation_level: noise level of the low-resolution picture (super-resolution only).
    """

    sampler: str
    num_steps: int
    guidance_scale: float
    threshold_percentile: float = 0.995
    threshold_max: float = 1.5
    augmentation_level: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A network with resolution, noise schedule, kind of prediction and sampling.

    Hashable, so that it can be a static argument of `jax.jit`. Parameters are kept apart from it.

    Attributes:
        name: "base" or "super_resolution", the key of its parameters in the pipeline.
        network: a Flax module, used through `apply` and `init_params` only.
        resolution: side of its pictures, pixels.
        low_resolution: side of the pictures it starts from, or None for a base model.
        schedule: of the diffusion.
        augmentation: schedule by which the low-resolution picture is noised.
        prediction: what the network predicts.
        sampling: the default way to draw pictures.
    """

    name: str
    network: UNet
    resolution: int
    low_resolution: int | None
    schedule: Schedule
    augmentation: Schedule
    prediction: Prediction
    sampling: Sampling

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Stage":
        """Build from plain data, as stored in `pipeline.json` and written in configs.

        Args:
            spec: name, resolution, low_resolution, prediction, network (arguments of `UNet`), schedule and augmentation
                (each {"kind": ..., further arguments}), sampling (fields of `Sampling`).
        """
        network = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(spec["network"]).items()}
        return cls(
            name=spec["name"],
            network=UNet(**network, super_resolution=spec["low_resolution"] is not None),
            resolution=spec["resolution"],
            low_resolution=spec["low_resolution"],
            schedule=_schedule(spec["schedule"]),
            augmentation=_schedule(spec["augmentation"]),
            prediction=spec["prediction"],
            sampling=Sampling(**dict(spec["sampling"])),
        )

    def init_params(self, key: Array, text_width: int) -> Params:
        """Random parameters; the output layer starts at zero."""
        side = self.resolution
        x, one = jnp.zeros((1, side, side, 3)), jnp.zeros((1,))
        text, mask = jnp.zeros((1, 1, text_width)), jnp.ones((1, 1), bool)
        low_res = () if self.low_resolution is None else (x, one)
        return self.network.init(key, x, one, text, mask, *low_res)["params"]

    def apply(
        self,
        params: Params,
        z_t: Array,
        t_B: Array,
        text: tuple[Array, Array],
        low_res: tuple[Array, Array] | None = None,
    ) -> Array:
        """The network's raw output.

        Args:
            params: of this stage.
            z_t: noisy pictures [B, H, W, 3].
            t_B: times in [0, 1].
            text: embeddings [B, L, D] and mask [B, L].
            low_res: upsampled, noised low-resolution pictures [B, H, W, 3] and their levels [B].
        """
        return self.network.apply({"params": params}, z_t, self.schedule.network_time(t_B), *text, *(low_res or ()))

    def condition(self, low_BHWC: Array, level_B: Array, noise: Array) -> tuple[Array, Array]:
        """What a super-resolution network is given: the low-resolution picture, upsampled and noised, and its level.

        The same in training and in sampling (specification [0093]).

        Args:
            low_BHWC: low-resolution pictures in [-1, 1].
            level_B: noise levels in [0, 1].
            noise: standard normal, of the upsampled pictures' shape.
        """
        upsampled = augmentation.upsample(low_BHWC, self.resolution)
        return augmentation.augment(self.augmentation, upsampled, level_B, noise), level_B

    def draw(
        self,
        params: Params,
        keys_B: Array,
        text: tuple[Array, Array],
        null_text: tuple[Array, Array],
        sampling: Sampling,
        low_BHWC: Array | None = None,
    ) -> Array:
        """Draw pictures; traceable.

        Args:
            params: of this stage.
            keys_B: one key a picture; a picture depends on its own key alone.
            text: embeddings and mask of the prompts.
            null_text: the same of the empty prompt.
            sampling: sampler, steps, guidance.
            low_BHWC: low-resolution pictures in [-1, 1], for super-resolution.

        Returns:
            float32 [B, H, W, 3] in [-1, 1].
        """
        batch, shape = keys_B.shape[0], (self.resolution, self.resolution, 3)
        low_res = None
        if low_BHWC is not None:
            noise_key_B = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys_B)
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys_B)
            levels = jnp.full((batch,), sampling.augmentation_level)
            low_res = self.condition(low_BHWC, levels, samplers.initial_noise(noise_key_B, shape))
        guided = sampling.guidance_scale != 1.0
        if guided:
            text = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), text, null_text)
            low_res = jax.tree.map(lambda a: jnp.concatenate([a, a]), low_res)

        def denoise(z_t: Array, t: Array) -> Array:
            z, t_B = (
                (jnp.concatenate([z_t, z_t]), jnp.full((2 * batch,), t)) if guided else (z_t, jnp.full((batch,), t))
            )
            output = self.apply(params, z, t_B, text, low_res)
            if guided:
                output = guide(output[:batch], output[batch:], sampling.guidance_scale)
            x0_hat, _ = to_x0_eps(self.prediction, output, z_t, self.schedule.alpha(t), self.schedule.sigma(t))
            return dynamic_threshold(x0_hat, sampling.threshold_percentile, sampling.threshold_max)

        sampler = SAMPLERS[sampling.sampler](self.schedule)
        x0 = samplers.sample(denoise, sampler, samplers.timesteps(sampling.num_steps), keys_B, shape)
        return jnp.clip(x0, -1, 1)


def _schedule(spec: Mapping[str, Any]) -> Schedule:
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in SCHEDULES:
        raise ValueError(f"schedule kind is {kind!r}; give one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[kind](**arguments)

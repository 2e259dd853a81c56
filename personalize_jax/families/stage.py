"""One diffusion model of a cascade: a network with the process that it inverts and the way it is sampled."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion import augmentation, samplers
from personalize_jax.diffusion.guidance import dynamic_threshold, guide
from personalize_jax.diffusion.prediction import Prediction, to_x0_eps
from personalize_jax.diffusion.process import Process
from personalize_jax.models import adapters
from personalize_jax.models.adapters import Adapted, Network
from personalize_jax.models.params import Params

# A network's input from captions: a tuple of arrays with a leading batch axis, of which only the family that made it
# knows more.
Conditioning = tuple[Array, ...]

SAMPLERS = {"ddim": samplers.ddim, "dpm_solver_pp": samplers.dpm_solver_pp}  # and ancestral, which takes a variance


class Sampling(NamedTuple):
    """How pictures are sampled from a stage.

    Attributes:
        sampler: a name in `SAMPLERS`, or "ancestral".
        num_steps: network evaluations a picture (doubled by guidance).
        guidance_scale: w of classifier-free guidance; 1 switches it off.
        threshold_percentile: quantile of dynamic thresholding.
        threshold_max: largest threshold; 1 is static thresholding, None leaves predictions as they are.
        augmentation_level: noise level of the low-resolution picture (super-resolution only).
        variance: variance of the ancestral sampler's steps, see `diffusion.samplers.ancestral`.
    """

    sampler: str
    num_steps: int
    guidance_scale: float
    threshold_percentile: float = 0.995
    threshold_max: float | None = 1.5
    augmentation_level: float = 0.0
    variance: samplers.Variance = "small"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A network with resolution, forward process, kind of prediction and sampling.

    Hashable, so that it can be a static argument of `jax.jit`. Parameters are kept apart from it.

    Attributes:
        name: the key of its parameters in the pipeline, such as "base".
        network: the denoiser, used through `apply` and `init_params` only. Its inputs are noisy pictures or latents
            [B, H, W, C], the process's `network_time` [B], the arrays of the conditioning, and for super-resolution the
            low-resolution pictures [B, H, W, 3] and the augmentation's `network_time` [B]; its output is [B, H, W, C],
            or has twice the channels.
        resolution: side of its pictures, pixels.
        low_resolution: side of the low-resolution pictures, or None for a base model.
        process: the forward process that the network inverts.
        augmentation: the process by which the low-resolution picture is noised.
        prediction: the kind of the network's prediction.
        sampling: the default way to sample pictures.
        channels: channels of the pictures or latents that are denoised.
        factor: pixels along a side of a picture for one of its latents; 1 where pictures themselves are denoised.
        spacing: the times of a discrete process that sampling visits.
        align_corners: whether low-resolution pictures are enlarged between the centres of their corner pixels.
        learned_variance: whether the second half of the network's output is the variance of the sampling steps.
        residual_std: standard deviation of pictures about their low-resolution pictures, enlarged and noised, where
            that difference is denoised in place of pictures (super-resolution only); see `to_residual`.
    """

    name: str
    network: Network
    resolution: int
    low_resolution: int | None
    process: Process
    augmentation: Process
    prediction: Prediction
    sampling: Sampling
    channels: int = 3
    factor: int = 1
    spacing: samplers.Spacing | None = None
    align_corners: bool = False
    learned_variance: bool = False
    residual_std: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a picture or latents to denoise."""
        side = self.resolution // self.factor
        return side, side, self.channels

    def init_params(self, key: Array, cond: Conditioning) -> Params:
        """Random parameters.

        Args:
            key: random key, used here alone.
            cond: conditioning of one caption, or its shapes.
        """
        x, one = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cond)
        low_res = () if self.low_resolution is None else (x, one)
        return self.network.init(key, x, one, *zeros, *low_res)["params"]

    def apply(
        self,
        params: Params | Adapted,
        z_t: Array,
        t_B: Array,
        cond: Conditioning,
        low_res: tuple[Array, Array] | None = None,
    ) -> Array:
        """The network's raw output, float32; see `split`.

        Args:
            params: parameters of this stage.
            z_t: noisy pictures or latents [B, H, W, C].
            t_B: times in [0, 1].
            cond: conditioning of B captions.
            low_res: upsampled, noised low-resolution pictures [B, H, W, 3] and their levels [B].
        """
        if low_res is not None:
            low_res = low_res[0], self.augmentation.network_time(low_res[1])
        inputs = z_t, self.process.network_time(t_B), *cond, *(low_res or ())
        output = adapters.apply(self.network, params, *inputs)
        return output.astype(jnp.float32)

    def split(self, output: Array) -> tuple[Array, Array | None]:
        """The prediction, and the variance in the terms of `samplers.learned_log_variance` or None."""
        if not self.learned_variance:
            return output, None
        prediction, variance = jnp.split(output, 2, axis=-1)
        return prediction, variance

    def augment(self, low_BHWC: Array, level_B: Array, noise: Array) -> tuple[Array, Array]:
        """A super-resolution network's inputs: the low-resolution pictures, upsampled and noised, and their levels.

        They are made alike in training and in sampling (specification [0093]).

        Args:
            low_BHWC: low-resolution pictures in [-1, 1].
            level_B: noise levels in [0, 1].
            noise: standard normal, of the upsampled pictures' shape.
        """
        upsampled = augmentation.upsample(low_BHWC, self.resolution, self.align_corners)
        return augmentation.augment(self.augmentation, upsampled, level_B, noise), level_B

    def to_residual(self, x_BHWC: Array, low_res: tuple[Array, Array] | None) -> Array:
        """What is noised and denoised in place of pictures: their difference from `augment`'s, of variance about 1.

        A network of `residual_std` s that predicts v is preconditioned as by Karras et al. 2022, table 1, for data of
        standard deviation s about the low-resolution picture: where noise is small beside s, its error hardly reaches
        the picture. Pictures are left as they are where `residual_std` is None.

        Args:
            x_BHWC: pictures in [-1, 1], or latents.
            low_res: the result of `augment`.
        """
        if self.residual_std is None:
            return x_BHWC
        assert low_res is not None  # `residual_std` is for super-resolution
        return (x_BHWC - low_res[0]) / self.residual_std

    def to_picture(self, residual_BHWC: Array, low_res: tuple[Array, Array] | None) -> Array:
        """The inverse of `to_residual`."""
        if self.residual_std is None:
            return residual_BHWC
        assert low_res is not None  # `residual_std` is for super-resolution
        return low_res[0] + self.residual_std * residual_BHWC

    def sample(
        self,
        params: Params,
        keys_B: Array,
        cond: Conditioning,
        null_cond: Conditioning,
        sampling: Sampling,
        low_BHWC: Array | None = None,
    ) -> Array:
        """Sample pictures, or latents; traceable.

        Args:
            params: parameters of this stage.
            keys_B: one key a picture; a picture depends on its own key alone.
            cond: conditioning of B prompts.
            null_cond: the unconditional one, B times.
            sampling: sampler, steps, guidance.
            low_BHWC: low-resolution pictures in [-1, 1], for super-resolution.

        Returns:
            float32 [B, H, W, C]; pictures lie in [-1, 1] if predictions are thresholded. NaN where the network's
            predictions were not finite.
        """
        low_res = None
        if low_BHWC is not None:
            noise_key_B = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys_B)
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys_B)
            levels = jnp.full((len(keys_B),), sampling.augmentation_level)
            low_res = self.augment(low_BHWC, levels, samplers.initial_noise(noise_key_B, self.shape))
        denoise = self.denoiser(params, cond, null_cond, sampling, low_res)
        x = samplers.sample(denoise, self.sampler(sampling), self.times(sampling), keys_B, self.shape)
        return self.to_picture(x, low_res)

    def times(self, sampling: Sampling) -> Array:
        """The times that sampling visits, from noise to the clean picture.

        Raises:
            ValueError: there are more steps than the process has times.
        """
        return samplers.timesteps(sampling.num_steps, self.spacing, self.process.num_timesteps)

    def sampler(self, sampling: Sampling) -> samplers.Sampler:
        """The sampling method over this stage's process."""
        if sampling.sampler == "ancestral":
            return samplers.ancestral(self.process, sampling.variance)
        return SAMPLERS[sampling.sampler](self.process)

    def denoiser(
        self,
        params: Params,
        cond: Conditioning,
        null_cond: Conditioning,
        sampling: Sampling,
        low_res: tuple[Array, Array] | None = None,
    ) -> samplers.Denoise:
        """The network as samplers call it: (z_t, scalar t) -> x0_hat, guided and thresholded.

        For the ancestral sampler with learned variances the result is the pair of x0_hat and the variance that the
        network predicts given the prompt.

        Args:
            params: parameters of this stage.
            cond: conditioning of B prompts.
            null_cond: the unconditional one, B times.
            sampling: guidance and thresholds.
            low_res: the result of `augment`, for super-resolution.
        """
        guided = sampling.guidance_scale != 1.0
        learned = sampling.sampler == "ancestral" and sampling.variance == "learned_range"
        inputs = cond, low_res
        if guided:
            doubled = jax.tree.map(lambda a: jnp.concatenate([a, a]), low_res)
            inputs = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null_cond), doubled

        def denoise(z_t: Array, t: Array) -> samplers.Denoised:
            batch = len(z_t)
            z = jnp.concatenate([z_t, z_t]) if guided else z_t
            prediction, v = self.split(self.apply(params, z, jnp.full((len(z),), t), *inputs))
            if guided:
                prediction = guide(prediction[:batch], prediction[batch:], sampling.guidance_scale)
            x0_hat, _ = to_x0_eps(self.prediction, prediction, z_t, self.process.alpha(t), self.process.sigma(t))
            if sampling.threshold_max is not None:
                picture = self.to_picture(x0_hat, low_res)
                picture = dynamic_threshold(picture, sampling.threshold_percentile, sampling.threshold_max)
                x0_hat = self.to_residual(picture, low_res)
            # Thresholds would make pictures of infinite predictions, which are to be noticed.
            x0_hat = jnp.where(jnp.isfinite(prediction), x0_hat, jnp.nan)
            if not learned:
                return x0_hat
            assert v is not None  # "learned_range" is for networks that learn the variance
            return x0_hat, v[:batch]

        return denoise

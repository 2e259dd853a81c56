"""Stages whose denoiser is diffusers' U-Net, from its configuration and that of a scheduler."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.formats.scheduler_config import read_scheduler
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.runtime.errors import UserError


class StageDefaults(NamedTuple):
    """Name and sampling of a pipeline class's stage where its files give no other.

    Attributes:
        name: name of the stage.
        num_steps: sampling steps.
        guidance_scale: guidance scale.
        augmentation_level: noise level of the low-resolution picture.
    """

    name: str
    num_steps: int
    guidance_scale: float
    augmentation_level: float = 0.0


class Latents(NamedTuple):
    """Latents to denoise in place of pictures: their channels, and the pixels to a latent's side."""

    channels: int
    factor: int


def unet_stage(
    spec: Mapping[str, Any],
    defaults: StageDefaults,
    text_width: int,
    latents: Latents | None = None,
    low_resolution: int | None = None,
    **compute: Any,
) -> Stage:
    """Build a stage.

    Args:
        spec: the stage's configurations, see `families.public`.
        defaults: defaults of its pipeline class.
        text_width: width of the text encoder's embeddings.
        latents: the latents that it denoises, if any.
        low_resolution: side of the pictures that it enlarges, if it does.
        **compute: options of the network: dtype, remat, attention.

    Raises:
        UserError: the spec describes a stage that is not supported.
    """
    network, scheduler = UNet2DCondition.from_config(spec["unet"], **compute), read_scheduler(spec["scheduler"])
    enlarges = low_resolution is not None
    channels, factor = (3, 1) if latents is None else latents
    _check_kind(network, spec["class"], channels, enlarges)
    learned_variance = network.out_channels == 2 * channels
    if scheduler.variance == "learned_range" and not learned_variance:
        raise UserError(
            "The scheduler's variance_type is 'learned_range', and the U-Net's out_channels have no second half that "
            "tells the variance; give a model whose files fit each other."
        )
    sampling = Sampling(
        scheduler.sampler,
        defaults.num_steps,
        defaults.guidance_scale,
        scheduler.threshold_percentile,
        scheduler.threshold_max,
        defaults.augmentation_level,
        scheduler.variance,
    )
    if network.text_width != text_width:
        raise UserError(
            f"The text encoder's embeddings are {text_width} wide, and the {defaults.name} U-Net takes "
            f"{network.text_width}; give the text encoder that it was trained with."
        )
    process = scheduler.process
    return Stage(
        name=defaults.name,
        network=network,
        resolution=_side(spec["unet"]) * factor,
        low_resolution=low_resolution,
        process=process,
        augmentation=read_scheduler(spec["image_noising_scheduler"]).process if enlarges else process,
        prediction=scheduler.prediction,
        sampling=sampling._replace(**spec.get("sampling", {})),
        channels=channels,
        factor=factor,
        spacing=scheduler.spacing,
        align_corners=enlarges,
        learned_variance=learned_variance,
    )


def _check_kind(network: UNet2DCondition, pipeline: str, channels: int, enlarges: bool) -> None:
    """Refuse a U-Net of another kind than its pipeline's class takes."""
    expected = 2 * channels if enlarges else channels
    if network.in_channels != expected or network.out_channels not in (channels, 2 * channels):
        raise UserError(
            f"The U-Net of a {pipeline} takes {expected} channels and gives {channels}, or twice that with learned "
            f"variances; this one has in_channels {network.in_channels} and out_channels {network.out_channels}. Give "
            "a text-to-image model: inpainting, depth and upscaling are not supported."
        )
    if network.class_embed_type is not None and not enlarges:
        raise UserError(
            f"The U-Net has class_embed_type {network.class_embed_type!r}, which a {pipeline} has no input for; give a "
            "text-to-image model."
        )


def _side(unet: Mapping[str, Any]) -> int:
    """Side of the pictures or latents that a U-Net denoises."""
    size = unet.get("sample_size")
    sides = set(size) if isinstance(size, list | tuple) and size and all(isinstance(s, int) for s in size) else {size}
    side = sides.pop()
    if sides or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise UserError(f"sample_size is {size!r} in the U-Net's config.json; expected the side of a square.")
    return side

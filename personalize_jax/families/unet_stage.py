"""Stages whose denoiser is diffusers' U-Net, from its configuration and that of a scheduler."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.formats.scheduler_config import read_scheduler
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.runtime.errors import UserError


class Usual(NamedTuple):
    """How a pipeline class is sampled where nothing says otherwise, and the name of its stage.

    Attributes:
        stage: the name of its stage.
        num_steps: sampling steps.
        guidance_scale: guidance.
        augmentation_level: noise level of the low-resolution picture.
    """

    stage: str
    num_steps: int
    guidance_scale: float
    augmentation_level: float = 0.0


class Latents(NamedTuple):
    """What is denoised in place of pictures: the number of channels, and of pixels to a latent's side."""

    channels: int
    factor: int


def unet_stage(
    spec: Mapping[str, Any],
    usual: Usual,
    latents: Latents | None = None,
    low_resolution: int | None = None,
    **compute: Any,
) -> Stage:
    """Build a stage.

    Args:
        spec: the stage's configurations, see `families.public`.
        usual: of its pipeline class.
        latents: that it denoises, if any.
        low_resolution: side of the pictures that it enlarges, if it does.
        **compute: of the network: dtype, remat, attention.

    Raises:
        UserError: what the spec describes is not supported.
    """
    network, scheduler = UNet2DCondition.from_config(spec["unet"], **compute), read_scheduler(spec["scheduler"])
    enlarges = low_resolution is not None
    channels = 3 if latents is None else latents.channels
    _check_kind(network, spec["class"], channels, enlarges)
    learned_variance = network.out_channels == 2 * channels
    if scheduler.variance == "learned_range" and not learned_variance:
        raise UserError(
            "The scheduler's variance_type is 'learned_range', and the U-Net's out_channels have no second half that "
            "tells the variance; give a model whose files fit each other."
        )
    sampling = Sampling(
        scheduler.sampler,
        usual.num_steps,
        usual.guidance_scale,
        scheduler.threshold_percentile,
        scheduler.threshold_max,
        usual.augmentation_level,
        scheduler.variance,
    )
    process, factor = scheduler.process, 1 if latents is None else latents.factor
    return Stage(
        name=usual.stage,
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


def check_width(stage: Stage, width: int) -> None:
    """Refuse a text encoder whose embeddings a stage's U-Net cannot take.

    Args:
        stage: from `unet_stage`.
        width: of the embeddings.

    Raises:
        UserError: they are of another width.
    """
    if stage.network.text_width != width:
        raise UserError(
            f"The text encoder's embeddings are {width} wide, and the {stage.name} U-Net takes "
            f"{stage.network.text_width}; give the text encoder that it was trained with."
        )


def _check_kind(network: UNet2DCondition, pipeline: str, channels: int, enlarges: bool) -> None:
    """Refuse a U-Net that is not of the kind that its pipeline's class takes."""
    given = 2 * channels if enlarges else channels
    if network.in_channels != given or network.out_channels not in (channels, 2 * channels):
        raise UserError(
            f"The U-Net of a {pipeline} takes {given} channels and gives {channels}, or twice that with learned "
            f"variances; this one has in_channels {network.in_channels} and out_channels {network.out_channels}. Give "
            "a text-to-image model: inpainting, depth and upscaling are not supported."
        )
    if network.class_embed_type is not None and not enlarges:
        raise UserError(
            f"The U-Net has class_embed_type {network.class_embed_type!r}, which a {pipeline} has no input for; give a "
            "text-to-image model."
        )


def _side(unet: Mapping[str, Any]) -> int:
    """Side of what a U-Net denoises."""
    size = unet.get("sample_size")
    sides = set(size) if isinstance(size, list | tuple) and size and all(isinstance(s, int) for s in size) else {size}
    side = sides.pop()
    if sides or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise UserError(f"sample_size is {size!r} in the U-Net's config.json; expected the side of a square.")
    return side

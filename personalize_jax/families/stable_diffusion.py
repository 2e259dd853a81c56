"""Stable Diffusion 1.x and 2.x: a U-Net over an autoencoder's latents, conditioned by CLIP (Rombach et al. 2022)."""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.families import public
from personalize_jax.families.diffusion_loss import DiffusionFamily
from personalize_jax.families.public import Spec, Weights
from personalize_jax.families.stage import Stage
from personalize_jax.families.text import TextConditioned
from personalize_jax.families.unet_stage import Latents, StageDefaults, unet_stage
from personalize_jax.formats.diffusers_folder import Layout
from personalize_jax.formats.lora_file import Networks, save_lora
from personalize_jax.formats.scheduler_config import for_latents, warn_of_another_sampler
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.autoencoder_kl import AutoencoderKL
from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.models.params import Params
from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

DEFAULTS = StageDefaults("base", 50, 7.5)
LORA_NETWORKS: Networks = {"denoiser": ("unet", "unet"), "text_encoder": ("text_encoder", "clip")}


@dataclasses.dataclass(frozen=True)
class StableDiffusion(TextConditioned, DiffusionFamily):
    """A latent diffusion model; the denoiser is its one stage.

    It attends to CLIP's embeddings, those of padding among them, as the published models were trained.

    Attributes:
        codec: the autoencoder.
        spec: the configurations in its folder, see `families.public`.
    """

    text_encoder: ClipTextEncoder
    codec: AutoencoderKL
    spec: Spec = dataclasses.field(compare=False)

    denoiser: ClassVar[str] = "unet"
    stage_names: ClassVar[tuple[str, ...]] = (DEFAULTS.name,)
    layouts: ClassVar[Mapping[str, Layout]] = {
        "StableDiffusionPipeline": Layout(
            needed={
                "vae": ("AutoencoderKL",),
                "text_encoder": ("CLIPTextModel",),
                "tokenizer": (),
                "unet": ("UNet2DConditionModel",),
                "scheduler": (),
            },
            optional={},
            unused=("safety_checker", "feature_extractor", "image_encoder"),
        )
    }

    @classmethod
    def from_spec(cls, spec: Spec, tokenizer: Tokenizer | None, **compute: Any) -> "StableDiffusion":
        """The networks and the process that a spec describes; see `public.build`."""
        if len(spec["stages"]) != 1:
            raise UserError(
                f"A StableDiffusionPipeline and {len(spec['stages']) - 1} more were given; give the one, which is a "
                "model by itself."
            )
        codec = AutoencoderKL.from_config(spec["vae"], dtype=compute.get("dtype", jnp.float32))
        text_encoder = ClipTextEncoder.from_config(spec["text_encoder"], **compute)
        latents = Latents(codec.latent_channels, codec.factor)
        stage = unet_stage(spec["stages"][0], DEFAULTS, text_encoder.width, latents, **compute)
        return cls(tokenizer, text_encoder, (stage,), codec, spec)

    @classmethod
    def mend_configs(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Configurations as diffusers' `StableDiffusionPipeline` mends those of old models."""
        mended = {**configs, "unet": _mended_unet(configs["unet"]), "scheduler": for_latents(configs["scheduler"])}
        warn_of_another_sampler(mended["scheduler"])
        return mended

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """The vocabulary in the folder."""
        tokenizer = Tokenizer.from_folder(folder / "tokenizer", self.text_encoder.max_length)
        tokenizer.check_rows(self.text_encoder.vocab_size)
        return tokenizer

    def weights(self) -> dict[str, Weights]:
        """The place of each network's weights, by the network's name."""
        return {
            "text_encoder": Weights(0, "text_encoder", "model.safetensors", "clip"),
            "base": Weights(0, "unet", "diffusion_pytorch_model.safetensors", "unet"),
            "codec": Weights(0, "vae", "diffusion_pytorch_model.safetensors", "autoencoder"),
        }

    def to_latents(self, params: Params, x_BHWC: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the latents of pictures in [-1, 1]."""
        return _encode(self.codec, params["codec"], x_BHWC)

    def to_pictures(self, params: Params, z_BHWC: Array) -> Array:
        """Pictures, about in [-1, 1], of latents."""
        return _decode(self.codec, params["codec"], z_BHWC)

    def shapes(self) -> Params:
        """Shapes and dtypes of all parameters, as they lie in memory."""

        def shapes() -> Params:
            x = jnp.zeros((1, *[self.stages[0].resolution] * 2, 3))
            codec = jax.eval_shape(self.codec.init, jax.random.key(0), x)["params"]
            return {**self.network_shapes(), "codec": codec}

        return public.rounded(shapes, self.text_encoder.spec.dtype)

    def with_stages(self, stages: Sequence[Stage]) -> "StableDiffusion":
        """The same model, sampled in another way."""
        return dataclasses.replace(self, stages=tuple(stages))

    def write(self, read: Callable[[str], Params], folder: Path, dtype: DTypeLike) -> None:
        """Write the folder that diffusers reads."""
        public.write(self, read, folder, dtype, "CLIPTokenizer")

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Write `lora/`, for diffusers' `load_lora_weights`."""
        for of_stage in adapters.values():
            save_lora(of_stage, folder / "lora", LORA_NETWORKS)


@partial(jax.jit, static_argnums=0)
def _decode(codec: AutoencoderKL, params: Params, z_BHWC: Array) -> Any:
    return codec.apply({"params": params}, z_BHWC / codec.scaling_factor, method="decode")


@partial(jax.jit, static_argnums=0)
def _encode(codec: AutoencoderKL, params: Params, x_BHWC: Array) -> tuple[Array, Array]:
    latents: Any = codec.apply({"params": params}, x_BHWC, method="encode")
    mean, std = latents
    return mean * codec.scaling_factor, std * codec.scaling_factor


def _mended_unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's configuration as diffusers mends those of models of 512 pixels.

    Files that diffusers before 0.9 converted have 32 of them, where they have any number.
    """
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    size = unet.get("sample_size")
    if version is None or tuple(map(int, version.groups())) >= (0, 9) or not isinstance(size, int) or size >= 64:
        return dict(unet)
    logger.warning("The U-Net's sample_size is %s; 64 is taken, as by diffusers for models before its 0.9.", size)
    return {**unet, "sample_size": 64}

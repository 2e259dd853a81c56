"""DeepFloyd IF, the open Imagen: a cascade of U-Nets over pixels, conditioned by T5 (Saharia et al. 2022)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jax.typing import DTypeLike

from personalize_jax.families import public
from personalize_jax.families.diffusion_loss import DiffusionFamily
from personalize_jax.families.public import Spec, Weights
from personalize_jax.families.stage import Stage
from personalize_jax.families.text import PixelDenoising, TextConditioned
from personalize_jax.families.unet_stage import StageDefaults, unet_stage
from personalize_jax.formats.caption_cleaning import clean_caption
from personalize_jax.formats.diffusers_folder import Layout
from personalize_jax.formats.lora_file import Networks, save_lora
from personalize_jax.formats.scheduler_config import warn_of_another_sampler
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params
from personalize_jax.models.t5_encoder import T5Encoder
from personalize_jax.runtime.errors import UserError

# The enlarged picture has noise of level 250 of 1000, as in diffusers' pipeline.
DEFAULTS = {
    "IFPipeline": StageDefaults("base", 100, 7.0),
    "IFSuperResolutionPipeline": StageDefaults("super_resolution", 50, 4.0, augmentation_level=0.251),
}
LORA_NETWORKS: Networks = {"denoiser": ("unet", "unet"), "text_encoder": ("text_encoder", "t5")}
_UNUSED = ("safety_checker", "feature_extractor", "watermarker")


@dataclasses.dataclass(frozen=True)
class DeepFloydIF(TextConditioned, PixelDenoising, DiffusionFamily):
    """The base model, and the super-resolution model after it if there is one; padding is masked out of T5's text.

    Attributes:
        spec: the configurations in its folders, see `families.public`.
    """

    text_encoder: T5Encoder
    spec: Spec = dataclasses.field(compare=False)

    denoiser: ClassVar[str] = "unet"
    stage_names: ClassVar[tuple[str, ...]] = tuple(stage.name for stage in DEFAULTS.values())
    layouts: ClassVar[Mapping[str, Layout]] = {
        "IFPipeline": Layout(
            needed={
                "text_encoder": ("T5EncoderModel",),
                "tokenizer": (),
                "unet": ("UNet2DConditionModel",),
                "scheduler": (),
            },
            optional={},
            unused=_UNUSED,
        ),
        # It may share the text encoder of the pipeline before it.
        "IFSuperResolutionPipeline": Layout(
            needed={"unet": ("UNet2DConditionModel",), "scheduler": (), "image_noising_scheduler": ()},
            optional={"text_encoder": ("T5EncoderModel",), "tokenizer": ()},
            unused=_UNUSED,
        ),
    }

    @classmethod
    def from_spec(cls, spec: Spec, tokenizer: Tokenizer | None, **compute: Any) -> "DeepFloydIF":
        """The networks and processes that a spec describes; see `public.build`."""
        kinds = [stage["class"] for stage in spec["stages"]]
        if kinds not in (["IFPipeline"], ["IFPipeline", "IFSuperResolutionPipeline"]):
            raise UserError(
                f"{' and '.join(kinds)} were given; give an IFPipeline, and an IFSuperResolutionPipeline after it if "
                "there is one."
            )
        text_encoder = T5Encoder.from_config(spec["text_encoder"], **compute)
        stages: list[Stage] = []
        for of_stage in spec["stages"]:
            low_resolution = stages[-1].resolution if stages else None
            defaults = DEFAULTS[of_stage["class"]]
            stages.append(unet_stage(of_stage, defaults, text_encoder.width, None, low_resolution, **compute))
        return cls(tokenizer, text_encoder, tuple(stages), spec)

    @classmethod
    def mend_configs(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Configurations as they are: diffusers' pipelines mend nothing of these models."""
        warn_of_another_sampler(configs["scheduler"])
        return dict(configs)

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """The vocabulary in the first stage's folder; captions are cleaned as those of training were."""
        tokenizer = Tokenizer.from_folder(folder / "tokenizer", self.text_encoder.max_length, clean_caption)
        tokenizer.check_rows(self.text_encoder.vocab_size)
        return tokenizer

    def weights(self) -> dict[str, Weights]:
        """The place of each network's weights, by the network's name."""
        text_encoder = Weights(0, "text_encoder", "model.safetensors", "t5")
        file = "diffusion_pytorch_model.safetensors"
        stages = {stage.name: Weights(i, "unet", file, "unet") for i, stage in enumerate(self.stages)}
        return {"text_encoder": text_encoder, **stages}

    def shapes(self) -> Params:
        """Shapes and dtypes of all parameters, as they lie in memory."""
        return public.rounded(self.network_shapes, self.text_encoder.spec.dtype)

    def with_stages(self, stages: Sequence[Stage]) -> "DeepFloydIF":
        """The same model with its first stages only, or with stages that are sampled in another way."""
        spec = {**self.spec, "stages": self.spec["stages"][: len(stages)]}
        return dataclasses.replace(self, stages=tuple(stages), spec=spec)

    def write(self, read: Callable[[str], Params], folder: Path, dtype: DTypeLike) -> None:
        """Write a folder for each stage, which diffusers reads."""
        stages = list(map(_with_variance_in_use, self.stages, self.spec["stages"]))
        model = dataclasses.replace(self, spec={**self.spec, "stages": stages})
        public.write(model, read, folder, dtype, "T5Tokenizer")

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Write `lora/` beside each stage that has adapters, for diffusers' `load_lora_weights`."""
        for stage, target in zip(self.stages, public.stage_folders(folder, self.stages), strict=True):
            if stage.name in adapters:
                save_lora(adapters[stage.name], target / "lora", LORA_NETWORKS)


def _with_variance_in_use(stage: Stage, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stage's configurations; learned variances that tuning left alone are replaced by fixed ones."""
    if stage.learned_variance and stage.sampling.variance == "small":
        return {**spec, "scheduler": {**spec["scheduler"], "variance_type": "fixed_small"}}
    return spec

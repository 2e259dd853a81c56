"""Public pipelines: Stable Diffusion, and the DeepFloyd IF cascade, in the folders that diffusers reads and writes.

A pipeline's `spec` is plain data: the configurations that lie in its folders.

    {"text_encoder": config.json,
     "vae": config.json,                     latent diffusion only
     "stages": [{"class": "IFPipeline",      as in model_index.json
                 "unet": config.json,
                 "scheduler": scheduler_config.json,
                 "image_noising_scheduler": scheduler_config.json,    super-resolution only
                 "sampling": fields of Sampling}, ...]}               where it differs from the usual
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from personalize_jax.diffusion.schedule import Schedule
from personalize_jax.errors import UserError
from personalize_jax.files import replacing
from personalize_jax.models.attention import suited
from personalize_jax.models.autoencoder_kl import AutoencoderKL
from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.models.port_weights import load_weights, save_weights
from personalize_jax.models.t5_encoder import T5Encoder
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.pipeline.caption_cleaning import clean_caption
from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.pipeline.diffusers_folder import (
    SCHEDULERS,
    Components,
    read_components,
    read_json,
    resolve,
    write_component_config,
    write_model_index,
)
from personalize_jax.pipeline.scheduler_config import (
    for_latents,
    read_scheduler,
    warn_of_another_sampler,
    with_variance,
)
from personalize_jax.pipeline.stage import Sampling, Stage
from personalize_jax.pipeline.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT_ENCODERS = {"clip_text_model": ClipTextEncoder, "t5": T5Encoder}
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
OURS = "personalize_jax.json"  # beside model_index.json: how to sample, of which diffusers' files say less
# What networks round to the dtype they compute in wherever they use it. Other parameters are used in float32: those of
# norms, and T5's bias of attention; biases of layers are small.
_ROUNDED = re.compile(r".*(?<!relative_attention_bias)/(kernel|embedding)")


class Family(NamedTuple):
    """What the folders of one pipeline class mean here.

    Attributes:
        stage: the name of its stage.
        num_steps: usual number of sampling steps.
        guidance_scale: usual guidance.
        augmentation_level: usual noise level of the low-resolution picture: 250 of 1000.
    """

    stage: str
    num_steps: int
    guidance_scale: float
    augmentation_level: float = 0.0


FAMILIES = {
    "StableDiffusionPipeline": Family("base", 50, 7.5),
    "IFPipeline": Family("base", 100, 7.0),
    "IFSuperResolutionPipeline": Family("super_resolution", 50, 4.0, augmentation_level=0.251),
}


class Architecture(NamedTuple):
    """A pipeline without weights and vocabulary."""

    text_encoder: ClipTextEncoder | T5Encoder
    stages: tuple[Stage, ...]
    codec: AutoencoderKL | None

    def abstract_params(self) -> Params:
        """Shapes of all parameters as they lie in memory, by the names that `Pipeline.params` has; nothing is computed.

        Pretrained parameters are rounded as the networks round them: half the memory, and the same results.

        Raises:
            UserError: no networks can be built of such sizes.
        """
        try:
            params = self._shapes()
        except UserError:
            raise
        except Exception as error:  # sizes that do not fit each other come to light in whatever computes with them
            raise UserError(
                f"The configurations' sizes do not fit each other ({str(error).splitlines()[0]}); "
                "give a model as it was published."
            ) from error
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, self.text_encoder.dtype if _ROUNDED.fullmatch(path) else leaf.dtype)
            for path, leaf in flatten(params).items()
        }
        return unflatten(shapes)

    def _shapes(self) -> Params:
        tokens = jnp.zeros((1, self.text_encoder.max_length), jnp.int32)
        key = jax.random.key(0)
        params = {"text_encoder": jax.eval_shape(self.text_encoder.init, key, tokens)["params"]}
        for stage in self.stages:
            params[stage.name] = jax.eval_shape(lambda k, s=stage: s.init_params(k, self.text_encoder.width), key)
        if self.codec is not None:
            x = jnp.zeros((1, *[self.stages[0].resolution] * 2, 3))
            params["codec"] = jax.eval_shape(self.codec.init, key, x)["params"]
        return params


def architecture(spec: Mapping[str, Any], platform: str | None = None, **compute: Any) -> Architecture:
    """The networks and processes that a spec describes.

    Args:
        spec: see the module.
        platform: whose devices they are for; None for this machine's.
        **compute: of all networks: dtype, remat, attention.

    Raises:
        UserError: what it describes is not supported, or the stages do not follow each other.
    """
    if "attention" in compute:
        compute["attention"] = suited(compute["attention"], platform or jax.default_backend())
    codec = None
    if "vae" in spec:
        codec = AutoencoderKL.from_config(spec["vae"], dtype=compute.get("dtype", jnp.float32))
    stages: list[Stage] = []
    for stage_spec in spec["stages"]:
        stages.append(stage_of(stage_spec, stages[-1] if stages else None, codec, **compute))
    kind = spec["text_encoder"].get("model_type")
    if kind not in TEXT_ENCODERS:
        known = " or ".join(TEXT_ENCODERS)
        raise UserError(f"The text encoder's model_type is {kind!r}; give a pipeline with {known}.")
    text_encoder = TEXT_ENCODERS[kind].from_config(spec["text_encoder"], **compute)
    for stage in stages:
        if stage.network.text_width != text_encoder.width:
            raise UserError(
                f"The text encoder's embeddings are {text_encoder.width} wide, and the {stage.name} U-Net takes "
                f"{stage.network.text_width}; give the text encoder that it was trained with."
            )
    return Architecture(text_encoder, tuple(stages), codec)


def stage_of(
    spec: Mapping[str, Any], before: Stage | None = None, codec: AutoencoderKL | None = None, **compute: Any
) -> Stage:
    """One stage.

    Args:
        spec: an entry of "stages", see the module.
        before: the stage whose pictures it enlarges, if any.
        codec: whose latents it denoises, if any.
        **compute: of the network: dtype, remat, attention.

    Raises:
        UserError: what it describes is not supported, or does not follow the stage before.
    """
    family = FAMILIES[spec["class"]]
    enlarges = family.stage == "super_resolution"
    if enlarges != (before is not None) or (before is not None and before.low_resolution is not None):
        raise UserError(
            f"{spec['class']} cannot be {'the first' if before is None else 'this later'} stage; "
            "give one base pipeline, and a super-resolution pipeline after it if there is one."
        )
    network, scheduler = UNet2DCondition.from_config(spec["unet"], **compute), read_scheduler(spec["scheduler"])
    factor = 1 if codec is None else codec.factor
    channels = _denoised_channels(network, spec["class"], codec)
    learned_variance = network.out_channels == 2 * channels
    if scheduler.variance == "learned_range" and not learned_variance:
        raise UserError(
            "The scheduler's variance_type is 'learned_range', and the U-Net's out_channels have no second half that "
            "tells the variance; give a model whose files fit each other."
        )
    sampling = Sampling(
        scheduler.sampler,
        family.num_steps,
        family.guidance_scale,
        scheduler.threshold_percentile,
        scheduler.threshold_max,
        family.augmentation_level,
        scheduler.variance,
    )
    return Stage(
        name=family.stage,
        network=network,
        resolution=_side(spec["unet"]) * factor,
        low_resolution=before.resolution if enlarges else None,
        schedule=scheduler.schedule,
        augmentation=_augmentation(spec) if enlarges else scheduler.schedule,
        prediction=scheduler.prediction,
        sampling=sampling._replace(**spec.get("sampling", {})),
        channels=channels,
        factor=factor,
        spacing=scheduler.spacing,
        corners=enlarges,
        learned_variance=learned_variance,
    )


def _denoised_channels(network: UNet2DCondition, pipeline: str, codec: AutoencoderKL | None) -> int:
    """Channels of what a U-Net denoises, after checking that it is of the kind that its pipeline's class takes."""
    enlarges = FAMILIES[pipeline].stage == "super_resolution"
    channels = 3
    if pipeline == "StableDiffusionPipeline":
        channels = network.in_channels if codec is None else codec.latent_channels
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
    return channels


def _side(unet: Mapping[str, Any]) -> int:
    """Side of what a U-Net denoises."""
    size = unet.get("sample_size")
    sides = set(size) if isinstance(size, list | tuple) and size and all(isinstance(s, int) for s in size) else {size}
    side = sides.pop()
    if sides or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise UserError(f"sample_size is {size!r} in the U-Net's config.json; expected the side of a square.")
    return side


def _augmentation(spec: Mapping[str, Any]) -> Schedule:
    return read_scheduler(spec["image_noising_scheduler"]).schedule


def load_public(
    sources: Sequence[str | Path], place: Callable[[Params], Params] | None = None, **compute: Any
) -> Pipeline:
    """Read a public pipeline without torch, array by array.

    Parameters lie as `Architecture.abstract_params` has them; what that rounds is read again wherever it is needed in
    full, to be trained or to be saved, so that only one copy is held throughout.

    Args:
        sources: a folder, or the name of a repository on the Hugging Face hub, for each stage.
        place: from a tree of shapes to a tree of shardings for the parameters; None for the default device.
        **compute: of all networks: dtype, remat, attention.

    Raises:
        UserError: nothing there, or what is there cannot be used.
    """
    found = [read_components(resolve(source)) for source in sources]
    first, spec = found[0], spec_of(found)
    built = architecture(spec, **compute)
    abstract = built.abstract_params()
    shardings = {} if place is None else place(abstract)
    text_encoder = "t5" if isinstance(built.text_encoder, T5Encoder) else "clip"
    wanted = {"text_encoder": (first.folder / "text_encoder", text_encoder)}
    for stage, components in zip(built.stages, found, strict=True):
        wanted[stage.name] = (components.folder / "unet", "unet")
    if built.codec is not None:
        wanted["codec"] = (first.folder / "vae", "autoencoder")

    clean = clean_caption if text_encoder == "t5" else None
    tokenizer = Tokenizer.from_folder(first.tokenizer, built.text_encoder.max_length, clean)
    tokenizer.check_rows(built.text_encoder.vocab_size)

    def read(name: str, dtype: DTypeLike | None = None) -> Params:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), abstract[name])
        folder, network = wanted[name]
        return load_weights(folder, shapes, network, shardings.get(name))

    params = {name: read(name) for name in wanted}
    in_full = {}
    if jnp.dtype(built.text_encoder.dtype) != jnp.float32:
        in_full = {name: partial(read, name, jnp.float32) for name in wanted}
    return Pipeline(tokenizer, built.text_encoder, built.stages, params, spec, built.codec, in_full)


def save_public(pipeline: Pipeline, folder: Path, dtype: DTypeLike) -> None:
    """Write a pipeline so that `load_public` and diffusers read it: a cascade as one folder for each stage.

    Args:
        pipeline: that `load_public` read, tuned or not.
        folder: made if missing; files of the same names are replaced.
        dtype: of the stored parameters.

    Raises:
        UserError: the files cannot be written.
    """
    for stage, spec, target in zip(
        pipeline.stages, pipeline.spec["stages"], stage_folders(folder, pipeline.stages), strict=True
    ):
        classes = {"unet": "UNet2DConditionModel"}
        save_weights(pipeline.params_in_full(stage.name), target / "unet", DIFFUSERS_FILE, "unet", dtype)
        write_component_config(target, "unet", spec["unet"])
        scheduler = dict(spec["scheduler"])
        if stage.learned_variance and stage.sampling.variance == "small":
            scheduler = with_variance(scheduler, "fixed_small")
        for name, config in (spec | {"scheduler": scheduler}).items():
            if name in SCHEDULERS:
                write_component_config(target, name, config)
                classes[name] = config["_class_name"]
        if stage is pipeline.stages[0]:
            classes |= _save_shared(pipeline, target, dtype)
        with replacing(target / OURS) as temporary:
            temporary.write_text(json.dumps({"sampling": stage.sampling._asdict()}, indent=2))
        write_model_index(target, spec["class"], classes)


def _save_shared(pipeline: Pipeline, folder: Path, dtype: DTypeLike) -> dict[str, str]:
    """Write what the stages share, with the first of them; the components' classes."""
    is_t5 = isinstance(pipeline.text_encoder, T5Encoder)
    text_params = pipeline.params_in_full("text_encoder")
    save_weights(text_params, folder / "text_encoder", TRANSFORMERS_FILE, "t5" if is_t5 else "clip", dtype)
    write_component_config(folder, "text_encoder", pipeline.spec["text_encoder"])
    pipeline.tokenizer.save(folder / "tokenizer")
    classes = {
        "text_encoder": "T5EncoderModel" if is_t5 else "CLIPTextModel",
        "tokenizer": "T5Tokenizer" if is_t5 else "CLIPTokenizer",
    }
    if pipeline.codec is None:
        return classes
    save_weights(pipeline.params_in_full("codec"), folder / "vae", DIFFUSERS_FILE, "autoencoder", dtype)
    write_component_config(folder, "vae", pipeline.spec["vae"])
    return {**classes, "vae": "AutoencoderKL"}


def stage_folders(folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """Where each stage of a saved pipeline lies: in the folder itself if there is but one."""
    return [folder] if len(stages) == 1 else [folder / stage.name for stage in stages]


def saved_folders(folder: Path) -> list[Path]:
    """The stages' folders of a pipeline that `save_public` or diffusers wrote; none if there is no such pipeline."""
    if (folder / "model_index.json").is_file():
        return [folder]
    names = dict.fromkeys(family.stage for family in FAMILIES.values())
    return [folder / name for name in names if (folder / name / "model_index.json").is_file()]


def spec_of(found: Sequence[Components]) -> dict[str, Any]:
    """The spec of a pipeline, from the components of each stage."""
    first = found[0]
    spec = {"text_encoder": first.configs.get("text_encoder", {}), "stages": [_stage_spec(c) for c in found]}
    return spec | ({"vae": first.configs["vae"]} if "vae" in first.configs else {})


def _stage_spec(components: Components) -> dict[str, Any]:
    configs = {name: config for name, config in components.configs.items() if name in ("unet", *SCHEDULERS)}
    if components.pipeline == "StableDiffusionPipeline":
        configs |= {"unet": _mended(configs["unet"]), "scheduler": for_latents(configs["scheduler"])}
    warn_of_another_sampler(configs["scheduler"])
    ours = components.folder / OURS
    sampling = read_json(ours).get("sampling", {}) if ours.is_file() else {}
    if not isinstance(sampling, dict) or sampling.keys() - set(Sampling._fields):
        raise UserError(
            f"{ours} has the sampling {sampling!r}; give {', '.join(Sampling._fields)}, or remove the file."
        )
    return {"class": components.pipeline, **configs} | ({"sampling": sampling} if sampling else {})


def _mended(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's configuration as diffusers' `StableDiffusionPipeline` mends those of models of 512 pixels.

    What diffusers before 0.9 converted says 32 of them where it says anything.
    """
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    size = unet.get("sample_size")
    if version is None or tuple(map(int, version.groups())) >= (0, 9) or not isinstance(size, int) or size >= 64:
        return dict(unet)
    logger.warning("The U-Net's sample_size is %s; 64 is taken, as by diffusers for models before its 0.9.", size)
    return {**unet, "sample_size": 64}

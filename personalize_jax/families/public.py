"""What families have in common whose folders diffusers reads and writes: the reading, array by array, and the writing.

Such a model is described by plain data, a `Spec`: the configurations that lie in its folders.

    {"text_encoder": config.json,            components that all stages share, in the first folder
     "vae": config.json,
     "stages": [{"class": "IFPipeline",      as in model_index.json
                 "unet": config.json,
                 "scheduler": scheduler_config.json,
                 "sampling": fields of Sampling}, ...]}               where it differs from the defaults
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from personalize_jax.families.base import Family, Loaded, Place
from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.formats.diffusers_folder import (
    Components,
    Layout,
    is_network,
    is_scheduler,
    read_json,
    write_component_config,
    write_model_index,
)
from personalize_jax.formats.port_weights import Naming, load_weights, save_weights
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.attention import suited
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

Spec = Mapping[str, Any]

OURS = "personalize_jax.json"  # beside model_index.json: how to sample, of which diffusers' files say less
# The parameters that networks round to the computation's dtype wherever they use them. Others are used in float32:
# those of norms, T5's bias of attention, and the biases of layers, which are small.
_ROUNDED = re.compile(r".*(?<!relative_attention_bias)/(kernel|embedding)")


class Weights(NamedTuple):
    """The place of a network's weights.

    Attributes:
        stage: index of the stage in whose folder they lie.
        component: the name of their folder there.
        file: the name of the file that is written.
        naming: names and layout of their tensors.
    """

    stage: int
    component: str
    file: str
    naming: Naming


class PublicFamily(Family, Protocol):
    """A family whose folders diffusers reads and writes.

    Attributes:
        layouts: components of the pipelines that it reads, by their class.
        denoiser: the component that each stage has of its own; other networks are shared.
        stage_names: names of all stages that there may be, in their order.
    """

    layouts: ClassVar[Mapping[str, Layout]]
    denoiser: ClassVar[str]
    stage_names: ClassVar[tuple[str, ...]]

    @property
    def spec(self) -> Spec:
        """The configurations in the model's folders."""

    @classmethod
    def from_spec(cls, spec: Spec, tokenizer: Tokenizer | None, **compute: Any) -> Self:
        """The networks and processes that a spec describes; see `build`."""

    @classmethod
    def mend_configs(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's configurations, mended as diffusers' pipeline mends those of old models; changes are logged."""

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """The vocabulary in the first stage's folder."""

    def weights(self) -> dict[str, Weights]:
        """The place of each network's weights, by the network's name."""


def read(
    family: type[PublicFamily], components: Sequence[Components], place: Place | None = None, **compute: Any
) -> Loaded:
    """Read a model without torch, array by array.

    Parameters have the dtypes of `Family.shapes`. Rounded ones are read again wherever they are needed in float32, to
    be trained or to be saved, so that only one copy is held throughout.

    Args:
        family: family of the first folder's pipeline.
        components: each stage's folder.
        place: maps a tree of shapes to a tree of shardings for the parameters; None for the default device.
        **compute: options of all networks: dtype, remat, attention.

    Raises:
        UserError: a folder cannot be used.
    """
    model = build(family, spec_of(family, components), None, **compute)
    shapes = model.shapes()
    shardings = {} if place is None else place(shapes)
    model = build(family, model.spec, model.read_tokenizer(components[0].folder), **compute)
    weights = model.weights()

    def read_network(name: str, dtype: DTypeLike | None = None) -> Params:
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), shapes[name])
        stage, component, _, naming = weights[name]
        return load_weights(components[stage].folder / component, wanted, naming, shardings.get(name))

    params = {name: read_network(name) for name in weights}
    is_rounded = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(shapes))
    return Loaded(model, params, {name: partial(read_network, name, jnp.float32) for name in weights if is_rounded})


def build(
    family: type[PublicFamily], spec: Spec, tokenizer: Tokenizer | None, platform: str | None = None, **compute: Any
) -> PublicFamily:
    """The networks and processes that a spec describes.

    Args:
        family: family of the spec.
        spec: the model's spec.
        tokenizer: the vocabulary, or None in a model for planning only.
        platform: platform of the devices to run on; None for this machine's.
        **compute: options of all networks: dtype, remat, attention.

    Raises:
        UserError: the spec describes something that is not supported, or the stages do not follow each other.
    """
    if "attention" in compute:
        capability = getattr(jax.devices()[0], "compute_capability", "")
        compute["attention"] = suited(compute["attention"], platform or jax.default_backend(), capability)
    return family.from_spec(spec, tokenizer, **compute)


def rounded(shapes: Callable[[], Params], dtype: DTypeLike) -> Params:
    """Shapes of parameters in memory, rounded as the networks round them: the same results in half of the memory.

    Args:
        shapes: gives the shapes in float32.
        dtype: dtype of the networks' computation.

    Raises:
        UserError: no networks can be built of such sizes.
    """
    try:
        params = shapes()
    except UserError:
        raise
    except Exception as error:  # sizes that do not fit each other come to light in whatever computes with them
        raise UserError(
            f"The configurations' sizes do not fit each other ({str(error).splitlines()[0]}); "
            "give a model as it was published."
        ) from error
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype if _ROUNDED.fullmatch(path) else leaf.dtype)
            for path, leaf in flatten(params).items()
        }
    )


def spec_of(family: type[PublicFamily], components: Sequence[Components]) -> dict[str, Any]:
    """The spec of a model from each stage's folder."""
    shared = {k: v for k, v in components[0].configs.items() if is_network(k) and k != family.denoiser}
    return {**shared, "stages": [_stage_spec(family, of_stage, shared) for of_stage in components]}


def _stage_spec(family: type[PublicFamily], components: Components, shared: Mapping[str, Any]) -> dict[str, Any]:
    configs = {name: config for name, config in components.configs.items() if name not in shared}
    ours = components.folder / OURS
    sampling = read_json(ours).get("sampling", {}) if ours.is_file() else {}
    if not isinstance(sampling, dict) or sampling.keys() - set(Sampling._fields):
        raise UserError(
            f"{ours} has the sampling {sampling!r}; give {', '.join(Sampling._fields)}, or remove the file."
        )
    spec = {"class": components.pipeline, **family.mend_configs(configs)}
    return spec | ({"sampling": sampling} if sampling else {})


def write(
    family: PublicFamily, read: Callable[[str], Params], folder: Path, dtype: DTypeLike, tokenizer_class: str
) -> None:
    """Write a model so that `read` and diffusers read it: a cascade as one folder for each stage.

    Args:
        family: the model.
        read: gives the float32 parameters of a network by its name.
        folder: made if missing; files of the same names are replaced.
        dtype: dtype of the stored parameters.
        tokenizer_class: class of the vocabulary in transformers.
    """
    folders, specs = stage_folders(folder, family.stages), family.spec["stages"]
    classes: list[dict[str, str]] = [{} for _ in folders]
    for name, (i, component, file, naming) in family.weights().items():
        save_weights(read(name), folders[i] / component, file, naming, dtype)
        write_component_config(folders[i], component, family.spec.get(component) or specs[i][component])
        classes[i][component] = family.layouts[specs[i]["class"]].components[component][0]
    assert family.tokenizer is not None  # a model for planning only has no parameters
    family.tokenizer.save(folders[0] / "tokenizer")
    classes[0]["tokenizer"] = tokenizer_class
    for stage, spec, target, of_stage in zip(family.stages, specs, folders, classes, strict=True):
        for component in filter(is_scheduler, spec):
            write_component_config(target, component, spec[component])
            of_stage[component] = spec[component]["_class_name"]
        write_text(target / OURS, json.dumps({"sampling": stage.sampling._asdict()}, indent=2))
        write_model_index(target, spec["class"], family.layouts[spec["class"]], of_stage)


def stage_folders(folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """The folder of each stage of a saved pipeline: the pipeline's own if there is but one stage."""
    return [folder] if len(stages) == 1 else [folder / stage.name for stage in stages]

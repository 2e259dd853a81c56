"""What families share whose folders diffusers reads and writes: reading them array by array, and writing them.

Such a model is described by plain data, a `Spec`: the configurations that lie in its folders.

    {"text_encoder": config.json,            components that all stages share, in the first folder
     "vae": config.json,
     "stages": [{"class": "IFPipeline",      as in model_index.json
                 "unet": config.json,
                 "scheduler": scheduler_config.json,
                 "sampling": fields of Sampling}, ...]}               where it differs from the usual
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
    read_json,
    write_component_config,
    write_model_index,
)
from personalize_jax.formats.port_weights import Network, load_weights, save_weights
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.attention import suited
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing

Spec = Mapping[str, Any]

OURS = "personalize_jax.json"  # beside model_index.json: how to sample, of which diffusers' files say less
# What networks round to the dtype they compute in wherever they use it. Other parameters are used in float32: those of
# norms, and T5's bias of attention; biases of layers are small.
_ROUNDED = re.compile(r".*(?<!relative_attention_bias)/(kernel|embedding)")


class Weights(NamedTuple):
    """Where a network's weights lie.

    Attributes:
        stage: index of the stage whose folder it is.
        component: the name of its folder there.
        file: the name of the file that is written.
        network: how its tensors are named and laid out.
    """

    stage: int
    component: str
    file: str
    network: Network


class PublicFamily(Family, Protocol):
    """A family whose folders diffusers reads and writes.

    Attributes:
        layouts: components of the pipelines that it reads, by their class.
        denoiser: the component that each stage has of its own; other networks are shared.
        stage_names: of all stages that there may be, in their order.
        spec: the configurations in the folders.
        compute_dtype: of the networks.
    """

    layouts: ClassVar[Mapping[str, Layout]]
    denoiser: ClassVar[str]
    stage_names: ClassVar[tuple[str, ...]]
    spec: Spec

    @property
    def compute_dtype(self) -> DTypeLike:
        """What the networks compute in."""

    @classmethod
    def from_spec(cls, spec: Spec, tokenizer: Tokenizer | None, **compute: Any) -> Self:
        """The networks and processes that a spec describes; see `build`."""

    @classmethod
    def mended(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's configurations as diffusers' pipeline mends those of old models; says so where that warns."""

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """The vocabulary in the first stage's folder."""

    def weights(self) -> dict[str, Weights]:
        """Where each network's weights lie, by the network's name."""


def read(family: type[PublicFamily], found: Sequence[Components], place: Place | None = None, **compute: Any) -> Loaded:
    """Read a model without torch, array by array.

    Parameters lie as `shapes` has them; what that rounds is read again wherever it is needed in float32, to be trained
    or to be saved, so that only one copy is held throughout.

    Args:
        family: of the first folder's pipeline.
        found: what each stage's folder holds.
        place: from a tree of shapes to a tree of shardings for the parameters; None for the default device.
        **compute: of all networks: dtype, remat, attention.

    Raises:
        UserError: what is there cannot be used.
    """
    model = build(family, spec_of(family, found), None, **compute)
    abstract = model.shapes()
    shardings = {} if place is None else place(abstract)
    tokenizer = model.read_tokenizer(found[0].folder)
    model = build(family, model.spec, tokenizer, **compute)

    def read_network(name: str, dtype: DTypeLike | None = None) -> Params:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), abstract[name])
        where = weights[name]
        return load_weights(found[where.stage].folder / where.component, shapes, where.network, shardings.get(name))

    weights = model.weights()
    params = {name: read_network(name) for name in weights}
    rounded = jnp.dtype(model.compute_dtype) != jnp.float32
    return Loaded(model, params, {name: partial(read_network, name, jnp.float32) for name in weights if rounded})


def build(
    family: type[PublicFamily], spec: Spec, tokenizer: Tokenizer | None, platform: str | None = None, **compute: Any
) -> PublicFamily:
    """The networks and processes that a spec describes.

    Args:
        family: that the spec is of.
        spec: see the module.
        tokenizer: or None, to plan with.
        platform: whose devices they are for; None for this machine's.
        **compute: of all networks: dtype, remat, attention.

    Raises:
        UserError: what it describes is not supported, or the stages do not follow each other.
    """
    if "attention" in compute:
        compute["attention"] = suited(compute["attention"], platform or jax.default_backend())
    return family.from_spec(spec, tokenizer, **compute)


def rounded(shapes: Callable[[], Params], dtype: DTypeLike) -> Params:
    """Shapes of parameters as they lie in memory, rounded as the networks round them: the same results in half of it.

    Args:
        shapes: gives them in float32.
        dtype: that the networks compute in.

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


def spec_of(family: type[PublicFamily], found: Sequence[Components]) -> dict[str, Any]:
    """The spec of a model, from what each stage's folder holds."""
    shared = {k: v for k, v in found[0].configs.items() if is_network(k) and k != family.denoiser}
    return {**shared, "stages": [_stage_spec(family, components, shared) for components in found]}


def _stage_spec(family: type[PublicFamily], components: Components, shared: Mapping[str, Any]) -> dict[str, Any]:
    configs = {name: config for name, config in components.configs.items() if name not in shared}
    ours = components.folder / OURS
    sampling = read_json(ours).get("sampling", {}) if ours.is_file() else {}
    if not isinstance(sampling, dict) or sampling.keys() - set(Sampling._fields):
        raise UserError(
            f"{ours} has the sampling {sampling!r}; give {', '.join(Sampling._fields)}, or remove the file."
        )
    spec = {"class": components.pipeline, **family.mended(configs)}
    return spec | ({"sampling": sampling} if sampling else {})


def write(
    family: PublicFamily,
    read: Callable[[str], Params],
    folder: Path,
    dtype: DTypeLike,
    classes: Mapping[str, str],
    changes: Callable[[Stage, Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Write a model so that `read` and diffusers read it: a cascade as one folder for each stage.

    Args:
        family: the model.
        read: the float32 parameters of a network, by its name.
        folder: made if missing; files of the same names are replaced.
        dtype: of the stored parameters.
        classes: of all networks and vocabularies, by component.
        changes: a stage's configurations as they are to be written, from those that were read.
    """
    folders = stage_folders(folder, family.stages)
    written = [{} for _ in folders]
    for name, where in family.weights().items():
        target, stage = folders[where.stage], family.spec["stages"][where.stage]
        save_weights(read(name), target / where.component, where.file, where.network, dtype)
        config = family.spec.get(where.component) or stage[where.component]
        write_component_config(target, where.component, config)
        written[where.stage][where.component] = classes[where.component]
    family.tokenizer.save(folders[0] / "tokenizer")
    written[0]["tokenizer"] = classes["tokenizer"]
    for i, (stage, spec, target) in enumerate(zip(family.stages, family.spec["stages"], folders, strict=True)):
        for name, config in changes(stage, spec).items():
            if name.endswith("scheduler"):
                write_component_config(target, name, config)
                written[i][name] = config["_class_name"]
        with replacing(target / OURS) as temporary:
            temporary.write_text(json.dumps({"sampling": stage.sampling._asdict()}, indent=2))
        write_model_index(target, spec["class"], family.layouts[spec["class"]], written[i])


def stage_folders(folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """Where each stage of a saved pipeline lies: in the folder itself if there is but one."""
    return [folder] if len(stages) == 1 else [folder / stage.name for stage in stages]

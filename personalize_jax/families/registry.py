"""All model families, and the choice of one for a source of weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personalize_jax.families import public
from personalize_jax.families.autoregressive import Autoregressive
from personalize_jax.families.base import Family, Loaded, OwnFamily, Place
from personalize_jax.families.deepfloyd_if import DeepFloydIF
from personalize_jax.families.public import PublicFamily
from personalize_jax.families.sources import EMBEDDED, folder_of, origin_of
from personalize_jax.families.stable_diffusion import StableDiffusion
from personalize_jax.families.world import INDEX as WORLD_INDEX
from personalize_jax.families.world import World
from personalize_jax.formats import hub
from personalize_jax.formats.diffusers_folder import INDEX, Layout, read_components, resolve
from personalize_jax.runtime.errors import UserError

FAMILIES: tuple[type[PublicFamily], ...] = (StableDiffusion, DeepFloydIF)  # families whose folders diffusers reads
PretrainedHere = World | Autoregressive  # families of this project's own networks
# These by the names that configurations of pretraining have for them.
PRETRAINED_HERE: Mapping[str, type[PretrainedHere]] = {"world": World, "autoregressive": Autoregressive}
OWN: tuple[type[OwnFamily], ...] = (World, Autoregressive)  # families with a layout of their own
LAYOUTS: Mapping[str, Layout] = {kind: layout for family in FAMILIES for kind, layout in family.layouts.items()}


def load(sources: Sequence[str | Path], place: Place | None = None, **compute: Any) -> Loaded:
    """Read a model.

    Args:
        sources: the name of an embedded model; a folder that `Family.write` wrote; or a public model, as a folder that
            diffusers wrote or the name of a repository on the Hugging Face hub, one for each stage.
        place: maps a tree of shapes to a tree of shardings for the parameters; None for the default device.
        **compute: options of public networks: dtype, remat, attention.

    Raises:
        UserError: there is no model of that name, or it cannot be used.
    """
    folder = folder_of(sources[0])
    if len(sources) == 1 and (own := _own_family(folder)):
        origin = origin_of([folder])  # before anything is read
        return own.read_folder(folder, place)._replace(origin=origin)
    if len(sources) == 1 and not saved_folders(folder) and not hub.is_name(str(sources[0]).rstrip("/")):
        raise UserError(
            f"No pipeline at {str(sources[0])!r}: give {' or '.join(map(repr, EMBEDDED))}, or a folder with a "
            f"{WORLD_INDEX} or a {INDEX}."
        )
    saved = saved_folders(folder) if len(sources) == 1 else []
    resolved = [resolve(source, LAYOUTS) for source in saved or sources]
    origin = origin_of([folder] if saved else resolved)
    components = [read_components(source, LAYOUTS) for source in resolved]
    return public.read(family_of(components[0].pipeline), components, place, **compute)._replace(origin=origin)


def describe(sources: Sequence[str | Path], platform: str, **compute: Any) -> Family:
    """The model in folders, without its parameters and its vocabulary.

    Args:
        sources: as for `load`, but no names of repositories.
        platform: platform of the devices to run on.
        **compute: options of public networks: dtype, remat, attention.

    Raises:
        UserError: there is no model, or it cannot be used.
    """
    folders = [folder for source in sources for folder in saved_folders(Path(source))]
    if not folders:
        return load(sources).family
    components = [read_components(folder, LAYOUTS) for folder in folders]
    family = family_of(components[0].pipeline)
    return public.build(family, public.spec_of(family, components), None, platform, **compute)


def family_of(pipeline: str) -> type[PublicFamily]:
    """The family of a pipeline's class in diffusers."""
    return next(family for family in FAMILIES if pipeline in family.layouts)


def saved_folders(folder: Path) -> list[Path]:
    """The stages' folders of a public model that was saved; none if there is no such model."""
    if (folder / INDEX).is_file():
        return [folder]
    names = dict.fromkeys(name for family in FAMILIES for name in family.stage_names)
    return [folder / name for name in names if (folder / name / INDEX).is_file()]


def _own_family(folder: Path) -> type[OwnFamily] | None:
    return next((family for family in OWN if family.reads(folder)), None)

"""The folders in which diffusers saves pipelines, on disk or on the Hugging Face hub.

model_index.json                      the pipeline's class, and the class of each component
unet/config.json                      networks, beside their weights; vae and text_encoder likewise
scheduler/scheduler_config.json       image_noising_scheduler likewise
tokenizer/                            files of transformers
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from personalize_jax.formats import hub
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
MODEL_TYPES = {"CLIPTextModel": "clip_text_model", "T5EncoderModel": "t5"}  # how transformers tells them apart


class Layout(NamedTuple):
    """Components of a pipeline class.

    Attributes:
        needed: components that it must have, each with the classes that can be used; () for any class.
        optional: likewise components that it may lack.
        unused: components of diffusers that are ignored here.
    """

    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]

    @property
    def components(self) -> dict[str, tuple[str, ...]]:
        """All components that are read."""
        return {**self.needed, **self.optional}


Layouts = Mapping[str, Layout]  # by the pipeline's class
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


@dataclasses.dataclass(frozen=True)
class Components:
    """A pipeline's folder.

    Attributes:
        folder: the folder.
        pipeline: the pipeline's class.
        layout: layout of the class.
        classes: class of each component that is present and read.
        configs: content of the configuration of each network and scheduler that is present, with the class that the
            index names.
    """

    folder: Path
    pipeline: str
    layout: Layout
    classes: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]


def resolve(source: str | Path, layouts: Layouts) -> Path:
    """Return the folder that a source means, after downloading it if need be.

    Args:
        source: a folder, or "organisation/repository" on the Hugging Face hub, perhaps with "@revision". The
            configurations, the tokenizer and the safetensors of needed components are downloaded, the latter in the
            variant `fp16` if there is no other.
        layouts: layouts of the pipeline classes that can be used.

    Raises:
        UserError: neither a folder nor a repository that can be read, or one without safetensors.
    """
    parts = dict.fromkeys(part for layout in layouts.values() for part in layout.components)
    if str(source) and Path(source).is_dir():
        hub.refuse_pointers(Path(source), [INDEX, *(f"{part}/*" for part in parts)])
        return Path(source)
    if not hub.is_name(source):
        raise UserError(
            f"{str(source)!r} is no folder; give one with a {INDEX}, or a repository of the Hugging Face hub such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5'{hub.hint(source)}."
        )
    name = str(source)
    # Repositories also hold variants beside the weights, and all of it in single files outside the components.
    variants = ["*fp16*", "*non_ema*"]
    described = [INDEX, *(f"{part}/{file}" for part in parts for file in _TOKENIZER_FILES)]
    folder = hub.download(name, described, variants)
    if not (folder / INDEX).is_file():
        raise hub.no_file(name, INDEX, "a pipeline that diffusers saved")
    components = read_components(folder, layouts)  # refuses what cannot be used before its weights are downloaded
    networks = [part for part in components.layout.needed if is_network(part)]

    def lacking() -> list[str]:
        return [part for part in networks if not any((folder / part).glob("*.safetensors"))]

    hub.download(name, [f"{part}/*.safetensors" for part in networks], variants)
    if bare := lacking():
        hub.download(name, [f"{part}/*fp16*.{kind}" for part in bare for kind in ("safetensors", "json")])
    if lacking():
        convert = f"diffusers.DiffusionPipeline.from_pretrained({name.partition('@')[0]!r}).save_pretrained(folder)"
        raise hub.no_safetensors(name, convert)
    return folder


def read_components(folder: Path, layouts: Layouts) -> Components:
    """Read a pipeline's index and the configurations of its components.

    Args:
        folder: a folder with a `model_index.json`.
        layouts: layouts of the pipeline classes that can be used.

    Raises:
        UserError: no such folder, a pipeline or component that cannot be used, a file missing or damaged.
    """
    index = read_json(folder / INDEX)
    pipeline = str(index.get("_class_name"))
    if pipeline not in layouts:
        raise UserError(f"{folder} holds a {pipeline}; give one of {', '.join(layouts)}.")
    layout = layouts[pipeline]
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    named = {name: value for name, value in pairs.items() if None not in value}  # which marks an absent one
    # Names become paths, so that only known ones pass; those that begin with an underscore are no components.
    for name in sorted(named.keys() - {*layout.components, *layout.unused}):
        if not name.startswith("_"):
            logger.warning("%s has a component %r, of which a %s knows nothing; it is ignored.", folder, name, pipeline)
    classes = {}
    for name, usable in layout.components.items():
        if name in named:
            classes[name] = _checked_class(folder, name, named[name][-1], usable)
        elif name in layout.needed:
            raise UserError(f"{folder} has no {name}, which a {pipeline} needs; save the pipeline with it.")
    configs = {name: _read_config(folder, name, classes[name]) for name in classes if not _is_tokenizer(name)}
    for name in filter(_is_tokenizer, classes):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name}; give a complete pipeline.")
    return Components(folder, pipeline, layout, classes, configs)


def is_network(name: str) -> bool:
    """Whether a component is a network, by its name; others are vocabularies and schedulers."""
    return not _is_tokenizer(name) and not is_scheduler(name)


def is_scheduler(name: str) -> bool:
    """Whether a component is a scheduler, by its name."""
    return name.endswith("scheduler")


def _is_tokenizer(name: str) -> bool:
    return name.startswith("tokenizer")


def _checked_class(folder: Path, name: str, class_name: Any, usable: tuple[str, ...]) -> str:
    if usable and class_name not in usable:
        raise UserError(f"{folder} has the {name} {class_name}; give a pipeline with {' or '.join(usable)}.")
    return str(class_name)


def _read_config(folder: Path, name: str, class_name: str) -> dict[str, Any]:
    """A component's configuration as its class in the index reads it, whichever class has written it."""
    config = read_json(_config_file(folder, name))
    if is_scheduler(name):
        return config | {"_class_name": class_name}
    if class_name not in MODEL_TYPES:
        return config
    if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):  # of both towers
        config = config["text_config"]
    return config | {"model_type": MODEL_TYPES[class_name]}


def write_model_index(folder: Path, pipeline: str, layout: Layout, classes: Mapping[str, str]) -> None:
    """Write `model_index.json`, the file by which diffusers loads a pipeline; to be written last.

    Args:
        folder: the pipeline's folder; made if missing.
        pipeline: the pipeline's class.
        layout: layout of the class.
        classes: class of each component; the layout's other components are marked as absent.
    """
    components = {name: (_library(class_name), class_name) for name, class_name in classes.items()}
    absent = {name: (None, None) for name in (*layout.optional, *layout.unused) if name not in classes}
    _write_json(folder / INDEX, {"_class_name": pipeline, **components, **absent, "requires_safety_checker": False})


def _library(class_name: str) -> str:
    return "transformers" if class_name in MODEL_TYPES or "Tokenizer" in class_name else "diffusers"


def write_component_config(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Write the configuration of a network or scheduler.

    Args:
        folder: the pipeline's folder; made if missing.
        name: name of the component.
        config: content of the file.
    """
    _write_json(_config_file(folder, name), config)


def _config_file(folder: Path, name: str) -> Path:
    if not name.isidentifier():  # it becomes a path
        raise UserError(f"{name!r} is no name of a component; give one such as 'unet'.")
    return folder / name / ("scheduler_config.json" if is_scheduler(name) else "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a pipeline.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a folder that diffusers saved.") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); restore the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} where an object is expected; restore the file.")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2))

"""This project's own cascades: a small text encoder and U-Nets over patches of pixels, any number of stages.

The embedded one is pretrained on the rendered world; `personalize_jax.pretrain` makes others. A folder holds

pipeline.json               the stages and the text encoder, as plain data
tokenizer.json              the vocabulary
token_counts.json           how often each token was processed in pretraining
text_encoder.safetensors    parameters, one file a network
base.safetensors ...
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.typing import DTypeLike

from personalize_jax.diffusion import process
from personalize_jax.diffusion.process import Function, Process
from personalize_jax.families.base import Loaded, Place
from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.families.text import PixelDenoising, TextConditioned
from personalize_jax.formats.parameters import load_params, save_params
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.models.unet import UNet
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

T = TypeVar("T")

INDEX = "pipeline.json"
SCHEDULES: Mapping[str, Callable[..., Process]] = {
    "cosine": process.cosine,
    "linear": process.linear,
    "rectified_flow": process.rectified_flow,
}
TIMES: Mapping[str, Callable[..., Function]] = {
    "uniform": process.uniform,
    "logit_normal": process.logit_normal,
    "shifted": process.shifted,
}


@dataclasses.dataclass(frozen=True)
class World(TextConditioned, PixelDenoising):
    """A cascade of this project's own networks; its tokenizer has the token counts that pretraining recorded.

    Attributes:
        specs: each stage as plain data, see `read_stage`.
    """

    text_encoder: TextEncoder
    specs: tuple[Mapping[str, Any], ...] = dataclasses.field(compare=False)

    def shapes(self) -> Params:
        """Shapes of all parameters, float32."""
        return self.network_shapes()

    def with_stages(self, stages: Sequence[Stage]) -> "World":
        """The same model with its first stages only, or with stages that are sampled in another way."""
        pairs = zip(self.specs, stages, strict=False)
        specs = tuple({**spec, "sampling": stage.sampling._asdict()} for spec, stage in pairs)
        return dataclasses.replace(self, stages=tuple(stages), specs=specs)

    def with_counts(self, counts: np.ndarray) -> "World":
        """The same model after further pretraining: `counts`, int64 [V], are added to its token counts."""
        assert self.tokenizer is not None and self.tokenizer.counts is not None  # both are in a folder of this family
        tokenizer = dataclasses.replace(self.tokenizer, counts=self.tokenizer.counts + counts)
        return dataclasses.replace(self, tokenizer=tokenizer)

    def with_stage(self, spec: Mapping[str, Any]) -> "World":
        """The same model with a stage in place of its own of that name, or after all; later stages are dropped."""
        i = next((i for i, stage in enumerate(self.stages) if stage.name == spec["name"]), len(self.stages))
        stages, specs = (*self.stages[:i], read_stage(spec)), (*self.specs[:i], spec)
        return dataclasses.replace(self, stages=stages, specs=specs)

    def write(self, read: Callable[[str], Params], folder: Path, dtype: DTypeLike) -> None:
        """Write a folder that `read_folder` reads."""
        assert self.tokenizer is not None and self.tokenizer.counts is not None  # as read, or from pretraining
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("text_encoder", *(stage.name for stage in self.stages)):
            save_params(read(name), folder / f"{name}.safetensors", dtype)
        write_text(folder / "tokenizer.json", self.tokenizer.backend.backend_tokenizer.to_str())
        write_text(folder / "token_counts.json", json.dumps(self.tokenizer.counts.tolist()))
        fields = ("vocab_size", "width", "num_layers", "num_heads", "max_length")
        encoder = {field: getattr(self.text_encoder, field) for field in fields}
        write_text(folder / INDEX, json.dumps({"text_encoder": encoder, "stages": list(self.specs)}, indent=2))

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Nothing: nobody else reads adapters of these networks."""

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Whether a folder is one that `write` wrote."""
        return (folder / INDEX).is_file()

    @classmethod
    def read_folder(cls, folder: Path, place: Place | None = None) -> Loaded:
        """Read a folder that `write` wrote; see `OwnFamily.read_folder`."""
        try:
            return cls._read(folder, place)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{folder} is damaged ({type(error).__name__}: {error}); restore it, or write it again."
            ) from error

    @classmethod
    def _read(cls, folder: Path, place: Place | None) -> Loaded:
        spec = json.loads((folder / INDEX).read_text())
        text_encoder = TextEncoder(**spec["text_encoder"])
        counts = np.array(json.loads((folder / "token_counts.json").read_text()), np.int64)
        tokenizer = Tokenizer.read(folder / "tokenizer.json", text_encoder.max_length, counts)
        tokenizer.check_rows(text_encoder.vocab_size)
        family = cls(tokenizer, text_encoder, tuple(map(read_stage, spec["stages"])), tuple(spec["stages"]))

        def read_network(name: str) -> Params:
            place_network = None if place is None else lambda shapes: place({name: shapes})[name]
            return load_params(folder / f"{name}.safetensors", place_network)

        names = ("text_encoder", *(stage.name for stage in family.stages))
        return Loaded(family, {name: read_network(name) for name in names}, {})


def read_stage(spec: Mapping[str, Any]) -> Stage:
    """Build a stage from plain data, as stored in `pipeline.json` and written in configs.

    Args:
        spec: name, resolution, low_resolution, prediction, network (arguments of `UNet`), schedule and augmentation
            (each {"kind": a name in `SCHEDULES`, further arguments}, and of schedule also "times": {"kind": a name in
            `TIMES`, further arguments}), sampling (fields of `Sampling`).

    Raises:
        ValueError: an unknown kind, or arguments out of range.
    """
    network: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in spec["network"].items()}
    return Stage(
        name=spec["name"],
        network=UNet(**network, super_resolution=spec["low_resolution"] is not None),
        resolution=spec["resolution"],
        low_resolution=spec["low_resolution"],
        process=_process(spec["schedule"]),
        augmentation=_process(spec["augmentation"]),
        prediction=spec["prediction"],
        sampling=Sampling(**dict(spec["sampling"])),
    )


def _process(spec: Mapping[str, Any]) -> Process:
    arguments = dict(spec)
    times = arguments.pop("times", None) or {"kind": "uniform"}
    schedule = _call("schedule", arguments, SCHEDULES)
    return dataclasses.replace(schedule, times=_call("times", times, TIMES))


def _call(key: str, spec: Mapping[str, Any], kinds: Mapping[str, Callable[..., T]]) -> T:
    """The result of the function that a spec's kind names, called with the spec's other values."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in kinds:
        raise ValueError(f"{key} kind is {kind!r}; give one of {', '.join(kinds)}.")
    return kinds[kind](**arguments)

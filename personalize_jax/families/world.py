"""This project's own cascades: a small text encoder and U-Nets over patches of pixels, any number of stages.

The embedded one is pretrained on the rendered world; `personalize_jax.pretrain` makes others. `families.own` tells what
a folder holds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from personalize_jax.diffusion import process
from personalize_jax.diffusion.process import Function, Process
from personalize_jax.families.diffusion_loss import DiffusionFamily
from personalize_jax.families.own import OwnNetworks
from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.families.text import PixelDenoising
from personalize_jax.models.params import Params
from personalize_jax.models.unet import UNet
from personalize_jax.runtime.errors import UserError

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


class World(OwnNetworks, PixelDenoising, DiffusionFamily):
    """A cascade of this project's own networks."""

    index: ClassVar[str] = INDEX

    @classmethod
    def read_stages(cls, specs: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
        """Build the stages; see `read_stage`."""
        return tuple(map(read_stage, specs))

    def shapes(self) -> Params:
        """Shapes of all parameters, float32."""
        return self.network_shapes()

    def with_stages(self, stages: Sequence[Stage]) -> "World":
        """The same model with its first stages only, or with stages that are sampled in another way."""
        pairs = zip(self.specs, stages, strict=False)
        specs = tuple({**spec, "sampling": stage.sampling._asdict()} for spec, stage in pairs)
        return dataclasses.replace(self, stages=tuple(stages), specs=specs)


def read_stage(spec: Mapping[str, Any]) -> Stage:
    """Build a stage from plain data, as stored in `pipeline.json` and written in configs.

    Args:
        spec: name, resolution, low_resolution, prediction, network (arguments of `UNet`), schedule and augmentation
            (each {"kind": a name in `SCHEDULES`, further arguments}, and of schedule also "times": {"kind": a name in
            `TIMES`, further arguments}), sampling (fields of `Sampling`), and where low_resolution is given
            residual_std (see `Stage`).

    Raises:
        ValueError: an unknown kind, or arguments out of range.
        UserError: the stage was pretrained by an earlier version, whose networks answered otherwise.
    """
    enlarges = spec["low_resolution"] is not None
    if enlarges and "residual_std" not in spec:
        raise UserError(
            f"The {spec['name']} stage was pretrained by an earlier version, and this one samples it differently; "
            "pretrain it again, or go back to that version."
        )
    network: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in spec["network"].items()}
    return Stage(
        name=spec["name"],
        network=UNet(**network, super_resolution=enlarges),
        resolution=spec["resolution"],
        low_resolution=spec["low_resolution"],
        process=_process(spec["schedule"]),
        augmentation=_process(spec["augmentation"]),
        prediction=spec["prediction"],
        sampling=Sampling(**dict(spec["sampling"])),
        residual_std=spec["residual_std"] if enlarges else None,
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

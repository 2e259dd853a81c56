"""Slices of TPUs: their shapes and names, and the devices that stand in for them when a program is compiled."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from personalize_jax.runtime.chips import CHIPS, Chip
from personalize_jax.runtime.errors import UserError

HOST = (2, 2, 1)  # chips of one host, except in a slice of one chip
# Google Cloud's accelerator types count cores, of which the chips of v4 and v5p have two.
_CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
_SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)},
}
# Settings by which libtpu works where there is no TPU.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # or it asks for a metadata server, which only a cloud has
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any, or it complains
    "TPU_WORKER_HOSTNAMES": "localhost",  # likewise
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that nothing has to be locked
}


class Topology(NamedTuple):
    """A slice.

    Attributes:
        name: the generation, such as v5e.
        shape: chips along each dimension of the torus.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The chip that the slice consists of."""
        return CHIPS[self.name]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name of the slice, such as v5e-16."""
        return f"{self.name}-{self.size * _CORES[self.name]}"

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
    """Read the shape of a slice, "v5e:4x4", or its name at Google Cloud, "v5e-16".

    Raises:
        UserError: the text is neither.
    """
    name, shape = None, None
    if match := re.fullmatch(r"(v\d\w*):(\d+(?:x\d+)+)", text):
        name, shape = match[1], tuple(int(side) for side in match[2].split("x"))
    elif match := re.fullmatch(r"(v\d\w*)-(\d+)", text):
        name, cores = match[1], int(match[2])
        if name in CHIPS:
            shape = _SHAPES[CHIPS[name].dimensions].get(cores // _CORES[name])
    if name not in CHIPS or shape is None or len(shape) != CHIPS[name].dimensions or min(shape) < 1:
        raise UserError(
            f"--topology is {text!r}; give one of {', '.join(CHIPS)} with a shape, as in v5e:4x4 or v5p:2x2x1, or with "
            "a size, as in v5e-16."
        )
    return Topology(name, shape)


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices of a slice to compile programs for, which cannot run them; they need libtpu, but no TPU.

    Raises:
        UserError: libtpu is not installed, or does not know such a slice.
    """
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chips_per_host_bounds": HOST if topology.size > 1 else (1, 1, 1)}
    if topology.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        return topologies.get_topology_desc(str(topology), "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"Programs for {topology} cannot be compiled here ({reason}); install libtpu (pip install libtpu) and give "
            "a shape that is rented, such as v5e:4x4."
        ) from error

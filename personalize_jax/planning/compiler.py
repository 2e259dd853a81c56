"""What the compiler says of a program, kept so that it is asked once: a large program takes it half an hour of a core.

JAX's own cache keeps programs for devices that are not there, too, but cannot read them again.
"""

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from personalize_jax.files import write_text
from personalize_jax.planning import hlo
from personalize_jax.planning.hlo import Collective, collectives

_FOLDER = "plans"  # beside the compiled programs that JAX keeps
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Verdict(NamedTuple):
    """The compiler's figures, in bytes but for `flops` and `seconds`; or why it refuses the program.

    Attributes:
        arguments: what the program is given.
        outputs: what it gives.
        aliased: of these, what lies where arguments lay.
        temporaries: what it needs besides.
        code: itself.
        flops: operations.
        traffic: read from memory and written to it.
        exchanges: what is sent between devices.
        refusal: the compiler's words, or "".
        seconds: of compiling.
    """

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    exchanges: tuple[Collective, ...] = ()
    refusal: str = ""
    seconds: float = 0.0


def ask(lowered: jax.stages.Lowered, devices: Sequence[Any]) -> Verdict:
    """Compile a program, or read what was kept of the same one for the same devices, versions and flags.

    A refusal is not kept: it comes early, and may be for another reason than the program.

    Args:
        lowered: the program.
        devices: that it is for.
    """
    file = _file(lowered, devices)
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        return Verdict(**kept | {"exchanges": tuple(Collective(*e) for e in kept["exchanges"])})
    verdict = _compile(lowered, len(devices))
    if file is not None and not verdict.refusal:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(verdict._asdict()))
    return verdict


def _compile(lowered: jax.stages.Lowered, num_devices: int) -> Verdict:
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Verdict(refusal=str(error), seconds=time.monotonic() - start)
    sizes, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return Verdict(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        flops=costs["flops"],
        traffic=costs["bytes accessed"],
        exchanges=tuple(collectives(compiled.as_text())) if num_devices > 1 else (),
        seconds=time.monotonic() - start,
    )


def _file(lowered: jax.stages.Lowered, devices: Sequence[Any]) -> Path | None:
    """Where the verdict is kept; None where JAX keeps no programs."""
    if not (cache := jax.config.jax_compilation_cache_dir):
        return None
    made_of = [lowered.as_text(), *map(repr, devices), *(os.environ.get(flag, "") for flag in _FLAGS)]
    made_of += [f"{d.metadata['Name']}=={d.version}" for d in _compilers()]
    made_of += [Path(code).read_text() for code in (__file__, hlo.__file__)]  # which read the figures
    return Path(cache) / _FOLDER / f"{hashlib.sha256('|'.join(made_of).encode()).hexdigest()}.json"


def _compilers() -> list[importlib.metadata.Distribution]:
    names = ("jax", "jaxlib", "libtpu")
    return [d for name in names for d in importlib.metadata.distributions(name=name)]

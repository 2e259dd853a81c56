"""The points of a sweep: what a file overrides in a configuration, checked before anything is computed.

A sweep is a Python file with a generator of dotted overrides:

    def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
        for weight in (0.0, 0.5, 1.0):
            yield {"training.prior.weight": weight}

`config` is what the overrides are made in, for values that are multiples of its own.
"""

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from personalize_jax.method.configuration import changed
from personalize_jax.runtime.errors import UserError

STEPS = "training.num_steps"
MAX_NAME = 120  # characters; file systems take 255


class Point(NamedTuple):
    """One setting of a sweep.

    Attributes:
        name: of its folder, made from the overrides alone.
        overrides: values by dotted key, as the configuration holds them.
        config: with the overrides.
    """

    name: str
    overrides: Mapping[str, Any]
    config: ConfigDict


def read_points(file: Path, config: ConfigDict) -> list[Point]:
    """Read a sweep.

    Args:
        file: with a generator `sweep(config)`.
        config: whose keys are overridden.

    Raises:
        UserError: the file is no sweep, it overrides keys that the configuration lacks or gives them values of other
            types, or yields nothing or the same twice.
    """
    points = [_point(file, config, overrides) for overrides in _overrides(file, config)]
    if not points:
        raise UserError(f"{file} yields no points; yield a dictionary of dotted overrides for each.")
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.config.to_json_best_effort(sort_keys=True), point)
        if other is not point:
            same = f"{other.name} and {point.name} are" if other.name != point.name else f"{point.name} is"
            raise UserError(f"{file} yields one point twice: {same} the same configuration; leave one out.")
    return points


def prolonged(point: Point, num_steps: int) -> Point:
    """The point with another number of steps."""
    overrides = {**point.overrides, STEPS: num_steps}
    return Point(name_of(overrides), overrides, changed(point.config, training__num_steps=num_steps))


def name_of(overrides: Mapping[str, object]) -> str:
    """A folder's name: the overrides, sorted, with a digest of them where not all of them can stand in a name.

    >>> name_of({"training.prior.weight": 0.5, "subject.num_tokens": 2})
    'subject.num_tokens=2,training.prior.weight=0.5'
    """
    items = sorted(overrides.items())
    text = ",".join(f"{key}={value}" for key, value in items)
    safe = ",".join(f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', str(value))}" for key, value in items)
    if safe == text and len(text) <= MAX_NAME:
        return text or "unchanged"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{safe[: MAX_NAME - len(digest) - 1]}-{digest}"


def values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All values of a configuration by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= values(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return found


def varied(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The keys that any of the points overrides, with the value that each point has."""
    keys = dict.fromkeys(key for point in points for key in point.overrides)
    of_points = [values(point.config) for point in points]
    return {key: [of_point[key] for of_point in of_points] for key in keys}


def _overrides(file: Path, config: ConfigDict) -> list[Any]:
    """What the file's generator yields."""
    if not file.is_file():
        raise UserError(f"There is no sweep at {file}; give a Python file such as configs/sweeps/prior_weight.py.")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file; give one such as configs/sweeps/prior_weight.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yielded = module.sweep(config)
        if not isinstance(yielded, Iterable):
            raise TypeError(f"sweep(config) gives {yielded!r}, not a generator of dictionaries")
        return list(yielded)
    except Exception as error:  # whatever a file may raise
        reason = str(error) if isinstance(error, ValueError | UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be used as a sweep: {' '.join(reason.split())}") from error


def _point(file: Path, config: ConfigDict, overrides: Any) -> Point:
    if not isinstance(overrides, Mapping):
        raise UserError(f"{file} yields {overrides!r}; yield a dictionary of dotted overrides.")
    known, config = values(config), changed(config)
    for key, value in overrides.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else "give a dotted key of it."
            raise UserError(f"{file} overrides {key!r}, which is no key of the configuration; {hint}")
        if key.startswith("evaluation.") or key == "subject.registry":
            raise UserError(f"{file} overrides {key}, which all points must share; give it by --config.{key}.")
        try:
            config = changed(config, **{key.replace(".", "__"): value})
        except (TypeError, ValueError) as error:
            kind = type(known[key]).__name__
            raise UserError(
                f"{file} overrides {key} by {value!r}; a value of type {kind} is expected, such as {known[key]!r}."
            ) from error
    held = values(config)
    overrides = {key: held[key] for key in overrides}  # such as 1.0 for 1
    return Point(name_of(overrides), overrides, config)

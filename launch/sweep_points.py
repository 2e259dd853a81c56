"""The points of a sweep: the overrides of a configuration in a file, checked before anything is computed.

A sweep is a Python file with a generator of dotted overrides:

    def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
        for weight in (0.0, 0.5, 1.0):
            yield {"training.prior.weight": weight}

`config` is the configuration that is overridden, for values that are multiples of its own.
"""

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from personalize_jax.method.changes import changed
from personalize_jax.runtime.errors import UserError

STEPS = "training.num_steps"
MAX_NAME = 120  # characters; file systems take 255


class Point(NamedTuple):
    """One setting of a sweep.

    Attributes:
        name: name of its folder, made from the overrides alone.
        overrides: values by dotted key, with the types of the configuration's own.
        config: the configuration with the overrides.
    """

    name: str
    overrides: Mapping[str, Any]
    config: ConfigDict


def read_points(file: Path, config: ConfigDict) -> list[Point]:
    """Read a sweep.

    Args:
        file: a Python file with a generator `sweep(config)`.
        config: the configuration that is overridden.

    Raises:
        UserError: the file is no sweep, overrides keys that the configuration lacks or gives them values of other
            types, or yields nothing or a point twice.
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
    return Point(point_name(overrides), overrides, changed(point.config, training__num_steps=num_steps))


def point_name(overrides: Mapping[str, object]) -> str:
    """The name of a point's folder: its overrides, sorted, with a digest where not all fit or can stand in a name.

    >>> point_name({"training.prior.weight": 0.5, "subject.num_tokens": 2})
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
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= values(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def varied(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The keys that at least one point overrides, each with the values of all points."""
    keys = dict.fromkeys(key for point in points for key in point.overrides)
    point_values = [values(point.config) for point in points]
    return {key: [by_key[key] for by_key in point_values] for key in keys}


def _overrides(file: Path, config: ConfigDict) -> list[Any]:
    """All that the file's generator yields."""
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
    own, config = values(config), changed(config)
    for key, value in overrides.items():
        if key not in own:
            close = difflib.get_close_matches(str(key), own, n=1)
            hint = f"did you mean {close[0]}?" if close else "give a dotted key of it."
            raise UserError(f"{file} overrides {key!r}, which is no key of the configuration; {hint}")
        if key.startswith("evaluation.") or key == "subject.registry":
            raise UserError(f"{file} overrides {key}, which all points must share; give it by --config.{key}.")
        try:
            config = changed(config, **{key.replace(".", "__"): value})
        except (TypeError, ValueError) as error:
            kind = type(own[key]).__name__
            raise UserError(
                f"{file} overrides {key} by {value!r}; a value of type {kind} is expected, such as {own[key]!r}."
            ) from error
    converted = values(config)
    overrides = {key: converted[key] for key in overrides}  # such as 1.0 for 1
    return Point(point_name(overrides), overrides, config)

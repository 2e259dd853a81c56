"""Scores of single pictures, by the registry's metrics whose encoders a configuration names."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.evaluation import metric_registry
from personalize_jax.metrics.encoders import cosine_distance, find_clip, find_dino, find_lpips, label
from personalize_jax.metrics.metric import MetricEncoders, Picture, SubjectPictures
from personalize_jax.metrics.table import Row, Scores, SubjectScores, mean, subject_scores
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.world.probe import Probe


class Encoder(NamedTuple):
    """A kind of encoder.

    Attributes:
        key: the key of `config.evaluation` that names its source, or the sources of several.
        find: finds the encoder of a source, after downloading it if need be; gives the function that loads it.
    """

    key: str
    find: Callable[[Any], Callable[[], Any]]


ENCODERS: Mapping[str, Encoder] = {  # by their names in `Metric.needs`
    "dino": Encoder("dino", find_dino),
    "clip": Encoder("clips", find_clip),
    "distance": Encoder("lpips", find_lpips),
    "probe": Encoder("probe", lambda _: Probe.load),
}


def encoder_sources(settings: ConfigDict) -> dict[str, Any]:
    """The sources of the encoders that a configuration names, by the encoders' names in `Metric.needs`.

    Args:
        settings: `evaluation` keys. Of several CLIPs the first is "clip", each further one "clip (its name)".
    """
    named = {}
    for name, encoder in ENCODERS.items():
        value = settings[encoder.key]
        for i, source in enumerate(value if isinstance(value, tuple | list) else [value]):
            named[f"{name} ({label(source)})" if i else name] = source
    return {name: source for name, source in named.items() if source}


def encoder_names(settings: ConfigDict) -> list[str]:
    """The names of the encoders that `load_encoders` returns, without looking for any of them.

    Args:
        settings: `evaluation` keys.
    """
    names = list(encoder_sources(settings))
    return names + ["distance"] * ("dino" in names and "distance" not in names)


def find_encoders(settings: ConfigDict) -> dict[str, Callable[[], Any]]:
    """Find the encoders that a configuration names, and download them if need be.

    Args:
        settings: `evaluation` keys.

    Returns:
        The functions that load the encoders, by name of the encoder.

    Raises:
        UserError: an encoder is missing or cannot be used, none is named, or two CLIPs have the same name.
    """
    names = [label(source) for source in settings.clips]
    if len(set(names)) < len(names):
        raise UserError(f"config.evaluation.clips has two CLIPs of one name among {', '.join(names)}; rename a folder.")
    sources = encoder_sources(settings)
    if not sources:
        raise UserError("config.evaluation names nothing to measure with; give dino, clips, lpips or probe.")
    return {name: ENCODERS[name.partition(" ")[0]].find(source) for name, source in sources.items()}


def load_encoders(loaders: Mapping[str, Callable[[], Any]]) -> MetricEncoders:
    """Load the encoders of `find_encoders`; without LPIPS one minus DINO's cosine is the distance of pictures."""
    encoders = {name: load() for name, load in loaders.items()}
    if "dino" in encoders and "distance" not in encoders:
        encoders["distance"] = cosine_distance(encoders["dino"])
    return encoders


def score(
    encoders: MetricEncoders,
    subject: str,
    pictures: Sequence[Picture],
    class_noun: str | None = None,
    truth: Mapping[str, int | np.ndarray] | None = None,
) -> list[Row]:
    """Score the pictures of one subject, of all roles.

    The names of photos' scores end in " (real)", those of "class before" in " before".

    Args:
        encoders: encoders by name. Metrics that need others are left out.
        subject: the subject's name.
        pictures: its pictures, with at least one photo.
        class_noun: the subject's class noun, where it is known.
        truth: a rendered subject's true properties; by default those that the probe reads in the photos.

    Raises:
        UserError: no photos.
    """
    subject_pictures = SubjectPictures(pictures, class_noun, truth)
    if not subject_pictures.of_role("photo"):
        raise UserError(f"No photos of {subject} were given; pictures are compared with one at least.")
    scores: list[Scores] = [{} for _ in pictures]
    for metric in metric_registry.metrics_for(encoders):
        for role in metric.roles:
            indices = subject_pictures.of_role(role)
            if not indices or metric.score is None:
                continue
            values = metric.score(subject_pictures, indices, *(encoders[need] for need in metric.needs))
            column = metric.name + metric_registry.SUFFIXES.get(role, "")
            for i, value in zip(indices, values, strict=True):
                if value is not None:
                    scores[i][column] = value if isinstance(value, str) else float(value)
    return [
        Row(subject, picture.role, picture.prompt, picture.seed, picture.file, picture_scores)
        for picture, picture_scores in zip(pictures, scores, strict=True)
    ]


def summary(rows: Sequence[Row]) -> SubjectScores:
    """The metrics of each subject: its pictures' scores combined, and the metrics that are derived from these."""

    def combine(column: str) -> Callable[[Sequence[Any]], float]:
        metric = metric_registry.column_metric(column)
        return metric.combine if metric else mean

    scores = subject_scores(rows, combine)
    for metrics in scores.values():
        derived = {m.name: m.derive(metrics) for m in metric_registry.METRICS if m.derive is not None}
        metrics.update({name: value for name, value in derived.items() if value is not None})
    return scores


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write a line of JSON for each picture."""
    write_text(file, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def read_rows(file: Path) -> list[Row]:
    """Read a file of `write_rows`.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no file of scores ({error}); delete its folder and evaluate again.") from error

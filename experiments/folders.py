"""The folders of an experiment's runs: pictures and checkpoints that runs share, and weights that are deleted."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from personalize_jax.pipeline import Pipeline
from personalize_jax.training import trained


def shared_folder(workdir: Path, part: str, noun: str, pretrained: Pipeline, config: ConfigDict) -> Path:
    """The folder of the pretrained cascade's pictures of a class, which runs that sample the same pictures share.

    Args:
        workdir: folder of all runs.
        part: "class_images" or "class_before".
        noun: the class noun.
        pretrained: the cascade; runs of one folder may have different ones.
        config: configuration of a run. Pictures depend on its `compute` keys, and class images on their own keys except
            for their number.
    """
    settings = config.class_images if part == "class_images" else {"batch_size": config.evaluation.batch_size}
    sampled_by = {key: value for key, value in settings.items() if key not in ("count", "folder")}
    sampled_by |= {"weights": pretrained.fingerprint, "compute": dict(config.get("compute", {}))}
    digest = hashlib.sha256(json.dumps(sampled_by, sort_keys=True).encode()).hexdigest()[:8]
    return workdir / part / f"{noun.replace(' ', '_')}-{digest}"


def link_class_images(folder: Path, shared: Path) -> None:
    """Link a run's class images to the folder that it shares with other runs, see `shared_folder`."""
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    link, target = folder / "class_images", os.path.relpath(shared, folder)  # relative, so that all can be moved
    if link.is_symlink() and os.readlink(link) != target:
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(target)


def copy_checkpoints(source: Path, folder: Path, stages: Sequence[str]) -> None:
    """Begin a run with the checkpoints of another one."""
    for stage in stages:
        if not (folder / stage).exists():
            shutil.copytree(source / stage, temporary := folder / f".{stage}", dirs_exist_ok=True)
            temporary.rename(folder / stage)


def remove_weights(folder: Path) -> None:
    """Delete the checkpoints and the trained parameters of a run that has been scored."""
    for file in folder.glob(f"*/{trained.FILE}"):
        file.unlink(missing_ok=True)
    for checkpoints in folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)

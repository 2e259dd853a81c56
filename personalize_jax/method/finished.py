"""Runs that are done: told without reading weights, and what to do with them.

This imports neither networks nor the trainings, so that a command whose work is done says so at once.
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from personalize_jax.families.sources import folder_of, state_of
from personalize_jax.runtime import manifest
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.dataset import SubjectDataset, read_dataset
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.subject.images import list_images

REPORT = ("metrics.json", "gallery.png", "report.html")


def is_complete(workdir: Path) -> bool:
    """Whether a run's last call came to its end, and its report is there."""
    return bool(manifest.read(workdir).get("done")) and all((workdir / name).is_file() for name in REPORT)


def is_finished(images: str | Sequence[str], class_noun: str | None, config: ConfigDict, workdir: Path) -> bool:
    """Whether a run is complete and was made of these very inputs, as far as that can be told at once.

    The configuration, the photos and the class images must be the same, and the files of the pretrained weights not
    have changed since the run's last call. Otherwise, or with weights from the hub, or several processes, the inputs
    have to be read to tell: `personalization.claim_run_directory`.

    Args:
        images: as for `personalization.load_subject`.
        class_noun: what the subject is, if the user gave it.
        config: the run's configuration.
        workdir: run directory.

    Raises:
        UserError: the images cannot be found, the class noun cannot be used, or the run directory is damaged.
        OSError: an image cannot be read.
    """
    if jax.process_count() > 1 or not is_complete(workdir) or manifest.changes(config, workdir):
        return False
    recorded = manifest.read(workdir)
    named = [config.pretrained] if isinstance(config.pretrained, str) else config.pretrained
    state = state_of([folder_of(source) for source in named])
    if state is None or state != recorded.get("files", {}).get("pretrained"):
        return False
    source = Path(images) if isinstance(images, str) else [Path(image) for image in images]
    photos = [hashlib.sha256(file.read_bytes()).hexdigest() for file in list_images(source)]
    data = recorded["data"]
    if photos != data["photos"]:
        return False
    if config.class_images.folder:
        from personalize_jax.method.class_images import own_hashes  # imports the networks

        if own_hashes(config.class_images.folder) != data.get("class images"):
            return False
    subject = read_dataset(workdir / "subject")
    return class_noun is None or determine((), class_noun).noun == subject.class_noun.noun


def usage(subject: SubjectDataset, workdir: Path, context: str) -> dict[str, str]:
    """The subject's name, its identifier, and a command that samples pictures of it, for users to read.

    Args:
        subject: the labelled dataset.
        workdir: run directory.
        context: the context in the command's prompt, such as "in the snow".
    """
    prompt = f"a {subject.phrase} {context}"
    return {
        "name": subject.labels[0],
        "identifier": f"{subject.identifier.text}: write {PLACEHOLDER} for it in prompts",
        "to sample it": f"python -m personalize_jax.sample --workdir={shlex.quote(str(workdir))} "
        f"--prompt={shlex.quote(prompt)} --out=out/",
    }

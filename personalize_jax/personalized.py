"""A personalised cascade: what a run directory holds once its stages are tuned."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from personalize_jax import manifest
from personalize_jax.errors import UserError
from personalize_jax.pipeline import Pipeline, is_pipeline, load_pipeline
from personalize_jax.subject.dataset import SubjectDataset, read_dataset
from personalize_jax.subject.identifier import substitute, warn_without_placeholder


@dataclasses.dataclass(frozen=True, eq=False)
class Personalized:
    """A tuned pipeline and the subject that it knows.

    Attributes:
        pipeline: the tuned cascade.
        subject: photos, class noun and identifier.
    """

    pipeline: Pipeline
    subject: SubjectDataset

    def sample(
        self,
        prompt: str,
        num_images: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        progress: Callable[[int], object] = lambda pictures: None,
    ) -> np.ndarray:
        """Draw pictures of a prompt in which "[V]" stands for the subject's identifier.

        Args:
            prompt: such as "a [V] dog in the snow"; without "[V]" a warning is logged.
            num_images: how many; picture i has seed `seed` + i.
            seed: of the first picture.
            batch_size: pictures drawn at once.
            progress: called with the number of pictures that a stage has just finished.

        Returns:
            uint8 [num_images, H, W, 3].
        """
        warn_without_placeholder([prompt])
        prompts = [substitute(prompt, self.subject.identifier.text)] * num_images
        return self.pipeline.sample(prompts, range(seed, seed + num_images), batch_size, progress=progress)[-1]


def load_personalized(workdir: str | Path) -> Personalized:
    """Read a run directory that `personalize` has finished tuning.

    Raises:
        UserError: it holds no personalised pipeline (yet).
    """
    workdir = Path(workdir)
    if not is_pipeline(workdir / "pipeline"):
        raise UserError(
            f"{workdir} holds no personalised pipeline; "
            f"run personalize_jax.personalize with --workdir={workdir} to its end."
        )
    compute = manifest.read(workdir).get("config", {}).get("compute", {})
    return Personalized(load_pipeline(workdir / "pipeline", **compute), read_dataset(workdir / "subject"))

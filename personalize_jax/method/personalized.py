"""A personalised cascade: what a run directory holds once its stages are tuned."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.method.configuration import stage_trainings
from personalize_jax.models.params import Params
from personalize_jax.pipeline import Pipeline, is_pipeline, load_pipeline
from personalize_jax.runtime import manifest, sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.dataset import SubjectDataset, read_dataset
from personalize_jax.subject.identifier import substitute, warn_without_placeholder
from personalize_jax.training.program import mesh_of

# How public networks compute, and how their parameters lie, where no configuration says so: as configs/common.py has
# it, but over all devices alike.
COMPUTE = {"dtype": "bfloat16", "attention": "auto"}
MESH, RULES = (1, -1, 1), (("", ("tensor", "fsdp")),)


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
            batch_size: largest number of pictures drawn at once, see `Pipeline.sample`.
            progress: called with the number of pictures that a stage has just finished.

        Returns:
            uint8 [num_images, H, W, 3].
        """
        warn_without_placeholder([prompt])
        prompts = [substitute(prompt, self.subject.identifier.text, self.pipeline.tokenizer)] * num_images
        return self.pipeline.sample(prompts, range(seed, seed + num_images), batch_size, progress=progress)[-1]


def load_personalized(workdir: str | Path) -> Personalized:
    """Read a run directory that `personalize` has finished tuning.

    Parameters lie, and networks compute, as the run's configuration says; on other devices than that was written for,
    parameters lie in parts over all of these.

    Raises:
        UserError: it holds no personalised pipeline (yet).
    """
    workdir = Path(workdir)
    if not is_pipeline(workdir / "pipeline"):
        raise UserError(
            f"{workdir} holds no personalised pipeline; "
            f"run personalize_jax.personalize with --workdir={workdir} to its end."
        )
    config = ConfigDict(manifest.read(workdir).get("config", {}))
    if not all(_fits(training) for training in stage_trainings(config).values()):
        config = ConfigDict({"compute": config.get("compute", COMPUTE)})
    return Personalized(load_placed(workdir / "pipeline", config), read_dataset(workdir / "subject"))


def load_placed(source: str | Path | Sequence[str | Path], config: ConfigDict | None = None) -> Pipeline:
    """Read a pipeline; a public one right into the shards of a run's trainings, to compute as the run does.

    Args:
        source: see `load_pipeline`.
        config: of the run: its `compute` keys, and where each stage's parameters lie in its training, those of the
            text encoder and of the codec as in the first stage's. Without one, or its keys: `COMPUTE`, `MESH`, `RULES`.

    Raises:
        UserError: nothing of that name, it cannot be used, or a mesh does not fit the devices.
    """
    config = ConfigDict() if config is None else config

    def place(shapes: Params) -> Params:
        trainings = stage_trainings(config)
        ways = {name: (training.sharding, mesh_of(training)) for name, training in trainings.items()}
        shared = ways.get("base") or (RULES, sharding.make_mesh(MESH))
        placed = [sharding.shardings({name: params}, *ways.get(name, shared)) for name, params in shapes.items()]
        return {name: of_network[name] for of_network in placed for name in of_network}

    return load_pipeline(source, place, **config.get("compute", COMPUTE))


def _fits(training: ConfigDict) -> bool:
    """Whether a training's mesh can be made of these devices."""
    try:
        mesh_of(training)
    except UserError:
        return False
    return True

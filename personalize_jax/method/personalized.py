"""The personalised cascade of a run directory, made of the pretrained cascade and the parameters that the run trained.

A run keeps these parameters alone, in `trained.safetensors` beside each stage's checkpoints. Its manifest names the
pretrained cascade and has its fingerprint.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.families.base import Place
from personalize_jax.method.configuration import stage_trainings
from personalize_jax.models.params import Params, flatten
from personalize_jax.pipeline import Pipeline, load_pipeline
from personalize_jax.runtime import manifest, sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.dataset import SubjectDataset, read_dataset
from personalize_jax.subject.identifier import substitute, warn_without_placeholder
from personalize_jax.training import parameterizations
from personalize_jax.training.program import mesh_of
from personalize_jax.training.trained import StoredResult, Trained, latest_trained, trained_params

# Without a configuration, public networks compute as configs/common.py says, and their parameters are sharded over all
# devices.
COMPUTE = {"dtype": "bfloat16", "attention": "auto"}
MESH, RULES = (1, -1, 1), (("", ("tensor", "fsdp")),)


@dataclasses.dataclass(frozen=True, eq=False)
class Personalized:
    """A tuned cascade and its subject.

    Attributes:
        pipeline: the tuned cascade.
        subject: the subject's photos, class noun and identifier.
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
        """Sample pictures of a prompt in which "[V]" stands for the subject's identifier.

        Args:
            prompt: such as "a [V] dog in the snow"; without "[V]" a warning is logged.
            num_images: number of pictures; picture i has seed `seed` + i.
            seed: seed of the first picture.
            batch_size: largest number of pictures sampled at once, see `Pipeline.sample_batches`.
            progress: called with the number of pictures that a stage has just finished.

        Returns:
            uint8 [num_images, H, W, 3].
        """
        warn_without_placeholder([prompt])
        prompts = [substitute(prompt, self.subject.identifier.text, self.pipeline.tokenizer)] * num_images
        return self.pipeline.sample(prompts, range(seed, seed + num_images), batch_size, progress=progress)[-1]


def load_personalized(workdir: str | Path) -> Personalized:
    """Read the personalised cascade of a run directory that `personalize` has finished tuning.

    Raises:
        UserError: a stage is not tuned to its end; see also `load_tuned`.
    """
    workdir = Path(workdir)
    config = manifest.read_config(workdir)
    results, trainings = stored_results(workdir, config), stage_trainings(config)
    for name in config.tune:
        if name not in results or results[name].step != trainings[name].num_steps:
            raise UserError(
                f"{workdir} holds no personalised pipeline, as {name} is not tuned to its end; "
                f"run personalize_jax.personalize with --workdir={workdir} to its end."
            )
    return Personalized(load_tuned(workdir, config, results), read_dataset(workdir / "subject"))


def stored_results(workdir: Path, config: ConfigDict) -> dict[str, StoredResult]:
    """The latest results of a run's trainings, by stage; without stages that are not begun."""
    place_of = places(_for_these_devices(config))
    results = {name: latest_trained(workdir / name, place_of(name)) for name in config.tune}
    return {name: result for name, result in results.items() if result is not None}


def load_tuned(workdir: Path, config: ConfigDict, results: Mapping[str, StoredResult]) -> Pipeline:
    """Read the pretrained cascade of a run, and put the trained parameters into it.

    Networks compute and parameters are sharded as the run's configuration says. Where its meshes do not fit the
    devices, parameters are sharded over all of them.

    Args:
        workdir: run directory.
        config: configuration of the run.
        results: from `stored_results`; other stages stay pretrained.

    Raises:
        UserError: the pretrained cascade is missing, or has another fingerprint.
    """
    try:
        pipeline = load_placed(config.pretrained, _for_these_devices(config))
    except UserError as error:
        raise UserError(
            f"{workdir} holds what it has trained of {config.pretrained}, which cannot be read: {error} If that was "
            f"moved, call personalize_jax.personalize with --workdir={workdir} and the new --config.pretrained."
        ) from error
    if pipeline.fingerprint != manifest.read(workdir).get("data", {}).get("pretrained", pipeline.fingerprint):
        raise UserError(
            f"{workdir} was begun with other weights of {config.pretrained}: what it has trained does not fit those "
            "that are there now. Put the former ones back, or personalise anew in another --workdir."
        )
    for name, (_, read) in results.items():
        pipeline = with_trained(pipeline, name, read)
    return with_tuned_sampling(pipeline, config, [*results])


def with_trained(pipeline: Pipeline, stage: str, read: Callable[[], Trained]) -> Pipeline:
    """A cascade with the result of one stage's training.

    Args:
        pipeline: the cascade that the training started from.
        stage: the stage's name.
        read: reads the result; called again wherever float32 parameters are needed.
    """
    networks, trained = pipeline.networks(stage), read()
    params, read_float32 = {}, {}
    for name in parameterizations.trained_networks(trained.params):
        key, paths = stage if name == "denoiser" else name, {*flatten(networks[name])}
        params[key] = _tuned_network(name, paths, lambda: trained, partial(pipeline.float32_params, key))
        if key in pipeline.read_float32:  # not `float32_params`, which would keep the pretrained cascade in memory
            read_float32[key] = partial(_tuned_network, name, paths, read, pipeline.read_float32[key])
    return pipeline.replace_networks(params, read_float32)


def _tuned_network(
    name: str, paths: set[str], read: Callable[[], Trained], read_pretrained: Callable[[], Params]
) -> Params:
    """The float32 parameters of a network after a training; pretrained ones are read only if some were not trained.

    Args:
        name: the network's name in the training.
        paths: paths of all its parameters.
        read: reads the training's result.
        read_pretrained: reads the pretrained float32 parameters.
    """
    trained = read()
    part = trained._replace(params=parameterizations.part_of_network(trained.params, name))
    is_whole = paths == flatten(part.params.get(name, {})).keys()
    return trained_params(part, {name: {} if is_whole else read_pretrained()})[name]


def with_tuned_sampling(pipeline: Pipeline, config: ConfigDict, names: Collection[str]) -> Pipeline:
    """The cascade with its tuned stages sampled as they were tuned.

    The noise-conditioning augmentation of a super-resolution stage stays within the levels of its tuning. A stage whose
    mean was tuned and whose learned variances were not is sampled with the posterior's variance.

    Args:
        pipeline: the tuned cascade.
        config: configuration of the run.
        names: names of the stages that were tuned.
    """
    samplings = {}
    for name in names:
        stage, training = pipeline.stage(name), stage_trainings(config)[name]
        sampling = stage.sampling
        if stage.low_resolution is not None:
            level = min(sampling.augmentation_level, float(training.augmentation_levels[1]))
            sampling = sampling._replace(augmentation_level=level)
        if stage.learned_variance and training.vlb_weight == 0:
            sampling = sampling._replace(variance="small")
        samplings[name] = sampling
    return pipeline.replace_sampling(**samplings)


def load_placed(source: str | Path | Sequence[str | Path], config: ConfigDict | None = None) -> Pipeline:
    """Read a pipeline into the shards of a run's trainings; public networks compute as the run's do.

    Args:
        source: see `load_pipeline`.
        config: configuration of the run, see `places`. Without `compute` in it, networks compute as `COMPUTE` says.

    Raises:
        UserError: the pipeline cannot be read, or a mesh does not fit the devices.
    """
    config = ConfigDict() if config is None else config
    place_of = places(config)

    def place(shapes: Params) -> Params:
        return {name: place_of(name)({name: params})[name] for name, params in shapes.items()}

    return load_pipeline(source, place, **config.get("compute", COMPUTE))


def places(config: ConfigDict) -> Callable[[str], Place]:
    """How a run's parameters are sharded: from the name of a network to a function from shapes to shardings.

    A stage's parameters are sharded as its training says, those of other networks as the first stage's; without
    trainings in the configuration, over all devices (`MESH`, `RULES`).

    Raises:
        UserError: a mesh does not fit the devices.
    """
    trainings = stage_trainings(config)
    ways = {name: (training.sharding, mesh_of(training)) for name, training in trainings.items()}
    shared = next(iter(ways.values()), None) or (RULES, sharding.make_mesh(MESH))

    def place_of(name: str) -> Place:
        rules, mesh = ways.get(name, shared)
        return lambda shapes: sharding.shardings(shapes, rules, mesh)

    return place_of


def _for_these_devices(config: ConfigDict) -> ConfigDict:
    """A run's configuration; of one whose meshes do not fit these devices, its `compute` alone."""
    try:
        places(config)
    except UserError:
        return ConfigDict({"compute": config.get("compute", COMPUTE)})
    return config

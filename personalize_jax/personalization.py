"""Personalisation, phase by phase.

The method of the specification: images, class noun and identifier (steps 202-208), class images drawn from the frozen
cascade, each stage tuned on its own inputs. Every phase leaves its result in the run directory, and a call goes on
where the last one stopped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax import command
from personalize_jax.errors import UserError
from personalize_jax.manifest import phase
from personalize_jax.personalized import Personalized
from personalize_jax.pipeline import Pipeline, Sampling, Stage, Text, save_pipeline
from personalize_jax.pipeline.cascade import encode_tokens
from personalize_jax.subject.class_noun import Classifier, determine
from personalize_jax.subject.dataset import SubjectDataset, read_dataset, write_dataset
from personalize_jax.subject.identifier import Registry, choose_identifier
from personalize_jax.subject.images import SubjectImage, load_images
from personalize_jax.training.examples import Examples, downsample_uint8, make_examples
from personalize_jax.training.loop import train, trained_params
from personalize_jax.training.prior import class_images
from personalize_jax.training.trainable import partition


class SubjectPhotos(NamedTuple):
    """What the user brings: images, and what they show if the user said so."""

    images: list[SubjectImage]
    class_noun: str | None


def load_subject(
    images: str | Path | Sequence[str | Path], class_noun: str | None = None, resolution: int = 128
) -> SubjectPhotos:
    """Read 1 to 20 images of a subject.

    Args:
        images: a folder or files.
        class_noun: what the subject is; None to let a classifier find it.
        resolution: that of the cascade's last stage.

    Raises:
        UserError: an image that cannot be used.
    """
    source = Path(images) if isinstance(images, str | Path) else [Path(file) for file in images]
    return SubjectPhotos(load_images(source, resolution), class_noun)


def personalize(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: str | Path) -> Personalized:
    """Run all phases up to the tuned cascade; those whose results are in `workdir` already are read from it.

    Args:
        pipeline: the pretrained cascade; it stays as it is.
        photos: of the subject.
        config: of `configs/world.py`.
        workdir: run directory.

    Raises:
        UserError: input that cannot be used, or a run directory of another configuration.
    """
    workdir = Path(workdir)
    command.record_config(config, workdir, may_change=("training.num_steps", "super_resolution_training.num_steps"))
    with phase(workdir, "subject"):
        subject = determine_subject(pipeline, photos, config, workdir)
    training = stage_trainings(config)
    drawn = {}
    if any(training[name].prior.weight > 0 for name in config.tune):
        with phase(workdir, "class images"):
            drawn = draw_class_images(pipeline, subject, config, workdir)
    params = {}
    for name in config.tune:
        with phase(workdir, f"tuning {name}"):
            stage = pipeline.stage(name)
            params[name] = tune(pipeline, stage, subject, drawn, training[name], config.seed, workdir / name)
    tuned = with_reduced_augmentation(pipeline.replace_params(**params), config)
    save_pipeline(tuned, workdir / "pipeline", np.float32)
    return Personalized(tuned, subject)


def tune_without_prior(pipeline: Pipeline, tuned: Personalized, config: ConfigDict, workdir: Path) -> Pipeline:
    """The tuned cascade with a base stage that was tuned without the prior term: what the term is there to prevent."""
    training = config.training.copy_and_resolve_references().unlock()
    training.prior.weight = 0.0
    stage = pipeline.stages[0]
    with phase(workdir, "tuning without prior"):
        params = tune(
            pipeline, stage, tuned.subject, {}, training, config.seed, workdir / f"{stage.name}_without_prior"
        )
    return tuned.pipeline.replace_params(**{stage.name: params})


def stage_trainings(config: ConfigDict) -> dict[str, ConfigDict]:
    """The training keys of each stage."""
    return {"base": config.training, "super_resolution": config.super_resolution_training}


def determine_subject(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: Path) -> SubjectDataset:
    """Class noun, identifier and labelled dataset (specification steps 204-208), kept in `workdir/subject`."""
    directory = workdir / "subject"
    if (directory / "subject.json").exists():
        subject = read_dataset(directory)
        if photos.images and not _same_images(subject, photos.images):
            raise UserError(
                f"{workdir} was begun with other images; give the same ones to go on, or another --workdir."
            )
        return subject
    classifier, nouns = class_knowledge(config)
    class_noun = determine(photos.images, photos.class_noun, classifier, nouns, config.subject.class_threshold)

    def choose(in_use: frozenset[int]) -> object:
        return choose_identifier(pipeline.tokenizer, class_noun.noun, config.subject.num_tokens, in_use)

    registry = Registry(Path(config.subject.registry))
    identifier = registry.reserve(workdir.name, class_noun.noun, workdir, choose)
    return write_dataset(directory, photos.images, class_noun, identifier)


def class_knowledge(config: ConfigDict) -> tuple[Classifier | None, Sequence[str] | None]:
    """The classifier that comes with a pretrained cascade, and the class nouns that the cascade knows."""
    if config.pretrained != "world":
        return None, None
    from personalize_jax.world.probe import Probe
    from personalize_jax.world.scene import CLASSES

    return Probe.load().classifier, CLASSES


def draw_class_images(
    pipeline: Pipeline, subject: SubjectDataset, config: ConfigDict, workdir: Path
) -> dict[str, np.ndarray]:
    """The class images of every stage that is tuned, drawn by the ancestral sampler."""
    last = max(i for i, stage in enumerate(pipeline.stages) if stage.name in config.tune)
    stages = pipeline.stages[: last + 1]
    settings = config.class_images
    samplings = {stage.name: prior_sampling(stage, settings) for stage in stages}
    with tqdm(total=settings.count * len(stages), desc="class images", unit="img") as bar:
        return class_images(
            pipeline.up_to(stages[-1].name),
            subject.class_prompt,
            settings.count,
            samplings,
            workdir / "class_images",
            settings.batch_size,
            bar.update,
        )


def prior_sampling(stage: Stage, settings: ConfigDict) -> Sampling:
    """How class images are drawn: the stage's own sampling with the ancestral sampler."""
    sampling = stage.sampling
    if stage.low_resolution is not None:
        return sampling._replace(sampler="ancestral")
    return sampling._replace(sampler="ancestral", num_steps=settings.num_steps, guidance_scale=settings.guidance_scale)


def tune(
    pipeline: Pipeline,
    stage: Stage,
    subject: SubjectDataset,
    drawn: dict[str, np.ndarray],
    config: ConfigDict,
    seed: int,
    directory: Path,
) -> dict:
    """Tune one stage on its own inputs; returns its parameters.

    Args:
        pipeline: the pretrained cascade.
        stage: one of its stages.
        subject: the labelled dataset.
        drawn: class images by stage name.
        config: the stage's training keys.
        seed: of the training.
        directory: for checkpoints and metrics.
    """
    start = {"denoiser": pipeline.params[stage.name], "text_encoder": pipeline.params["text_encoder"]}
    examples = {"instance": stage_examples(pipeline, stage, subject.images_NHWC, subject.labels)}
    if config.prior.weight > 0:
        pictures = drawn[stage.name]
        examples["prior"] = stage_examples(pipeline, stage, pictures, [subject.class_prompt] * len(pictures))
    if "text_encoder" not in partition(start, config.trainable)[0]:
        examples = {half: with_embeddings(pipeline, e) for half, e in examples.items()}
    with command.steps_bar(f"tuning {directory.name.replace('_', ' ')}", config.num_steps) as progress:
        state = train(stage, pipeline.text_encoder, start, examples, config, seed, directory, progress)
    return trained_params(state, start)["denoiser"]


def stage_examples(pipeline: Pipeline, stage: Stage, pictures: np.ndarray, labels: Sequence[str]) -> Examples:
    """Labelled pictures at a stage's own resolution, with their low-resolution versions where it needs them."""
    pictures = downsample_uint8(pictures, stage.resolution)
    low_res = None if stage.low_resolution is None else downsample_uint8(pictures, stage.low_resolution)
    tokens = pipeline.tokenizer(list(labels))[:, None]
    return make_examples(pictures, tokens, pipeline.tokenizer([""])[0], low_res)


def with_embeddings(pipeline: Pipeline, examples: Examples) -> Examples:
    """The examples with the frozen text encoder's embeddings, computed once."""
    encoded = encode_tokens(pipeline.text_encoder, pipeline.params["text_encoder"], examples.tokens)
    return examples._replace(text=Text(*encoded))


def with_reduced_augmentation(pipeline: Pipeline, config: ConfigDict) -> Pipeline:
    """Sample tuned super-resolution stages at the augmentation level that they were tuned with."""
    trainings = stage_trainings(config)
    levels = {name: float(trainings[name].augmentation_levels[1]) for name in config.tune}
    return pipeline.replace_sampling(
        **{
            stage.name: stage.sampling._replace(augmentation_level=levels[stage.name])
            for stage in pipeline.stages
            if stage.low_resolution is not None and stage.name in levels
        }
    )


def _same_images(subject: SubjectDataset, images: Sequence[SubjectImage]) -> bool:
    return subject.images_NHWC.shape[0] == len(images) and all(
        np.array_equal(a, b.pixels) for a, b in zip(subject.images_NHWC, images, strict=True)
    )

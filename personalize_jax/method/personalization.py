"""Personalisation, phase by phase.

The method of the specification: class noun and identifier are found for the photos (steps 202-208), class images are
sampled from the frozen cascade, and each stage is tuned on its own inputs. Every phase leaves its result in the run
directory, and a call continues where the last one stopped.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.families.objective import INSTANCE, PRIOR
from personalize_jax.method import configuration
from personalize_jax.method.class_images import make_class_images, own_hashes
from personalize_jax.method.configuration import stage_trainings
from personalize_jax.method.personalized import Personalized, load_placed, with_trained, with_tuned_sampling
from personalize_jax.pipeline import Pipeline, Stage
from personalize_jax.runtime import command, hosts, manifest, sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.manifest import phase
from personalize_jax.subject.class_noun import Classifier, determine
from personalize_jax.subject.dataset import MANIFEST, SubjectDataset, read_dataset, write_dataset
from personalize_jax.subject.images import SubjectImage, load_images
from personalize_jax.subject.registry import keep_identifier, reserve_identifier
from personalize_jax.training.examples import Examples, downsample_uint8, make_examples
from personalize_jax.training.loop import check_length, train
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.program import mesh_of, stage_program
from personalize_jax.training.tracking import JSONL_ONLY, Tracking
from personalize_jax.training.trained import load_trained, save_trained, steps_trained, trained_of


class SubjectPhotos(NamedTuple):
    """The user's photos of a subject, and the class noun if the user gave one."""

    images: list[SubjectImage]
    class_noun: str | None


def load_subject(
    images: str | Path | Sequence[str | Path], class_noun: str | None = None, resolution: int = 128
) -> SubjectPhotos:
    """Read 1 to 20 images of a subject.

    Args:
        images: a folder or files.
        class_noun: what the subject is; None to let a classifier find it.
        resolution: resolution of the cascade's last stage.

    Raises:
        UserError: an image that cannot be used.
    """
    source = Path(images) if isinstance(images, str | Path) else [Path(file) for file in images]
    return SubjectPhotos(load_images(source, resolution), class_noun)


def load_pretrained(config: ConfigDict) -> Pipeline:
    """The pretrained cascade that a configuration names; a public one is read right into the shards of training."""
    return load_placed(config.pretrained, config)


def personalize_subject(
    pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: str | Path, tracking: Tracking = JSONL_ONLY
) -> Personalized:
    """Run all phases up to the tuned cascade; results that are in `workdir` already are read.

    Args:
        pipeline: the pretrained cascade, which is left as it is.
        photos: photos of the subject.
        config: a configuration such as that of `configs/world.py`.
        workdir: run directory.
        tracking: additional destinations of metrics.

    Raises:
        UserError: input that cannot be used, or a run directory of another configuration.
    """
    workdir = Path(workdir)
    claim_run_directory(pipeline, photos, config, workdir)
    with manifest.record(workdir, seeds(config), made_from(pipeline, photos, config)):
        return tune_cascade(pipeline, photos, config, workdir, tracking)


def tune_cascade(
    pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: Path, tracking: Tracking = JSONL_ONLY
) -> Personalized:
    """Run the phases of `personalize_subject` in a run directory that `begin` has claimed, within `manifest.record`."""
    origin = pipeline.origins.get(pipeline.stages[0].name)
    manifest.record_files(workdir, pretrained=origin and origin.state)
    with phase(workdir, "subject"):
        subject = determine_subject(pipeline, photos, config, workdir)
    manifest.record_subject(workdir, subject.labels[0], subject.identifier.text, f"a {subject.phrase}")
    trainings = stage_trainings(config)
    class_images = {}
    if with_prior := [name for name in config.tune if trainings[name].prior.weight > 0]:
        with phase(workdir, "class images"):
            class_images = make_class_images(pipeline, subject.class_prompt, with_prior, config, workdir)
    tuned = pipeline
    for name in config.tune:
        with phase(workdir, f"tuning {name}"):
            stage, training = pipeline.stage(name), trainings[name]
            tuned = tune(tuned, stage, subject, class_images, training, config.seed, workdir / name, tracking)
    return Personalized(with_tuned_sampling(tuned, config, config.tune), subject)


def seeds(config: ConfigDict) -> dict[str, object]:
    """The seeds of all randomness up to the tuned cascade, for the manifest."""
    sampled = {} if config.class_images.folder else {"class images": [0, config.class_images.count - 1]}
    return {"training": config.seed} | sampled


def made_from(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict) -> dict[str, object]:
    """Hashes of the pretrained cascade, the photos and the user's class images, for the manifest."""
    data: dict[str, object] = {"pretrained": pipeline.fingerprint, "photos": [image.sha256 for image in photos.images]}
    folder = config.class_images.folder
    return data | ({"class images": own_hashes(folder)} if folder else {})


def claim_run_directory(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: Path) -> None:
    """Claim a run directory for a configuration and a subject, before anything is computed.

    A later call may change the numbers of steps, the evaluation, the registry and the place of the pretrained weights;
    the run is then no longer done.

    Raises:
        UserError: the configuration cannot be used; the directory belongs to another configuration, subject, pretrained
            cascade or set of class images; or a stage cannot be tuned for that number of steps any more.
    """
    configuration.check(pipeline, config)
    side, expected = photos.images[0].pixels.shape[0], pipeline.stages[-1].resolution
    if side != expected:
        raise UserError(
            f"The photos were read at {side} pixels, and the cascade's pictures have {expected}; "
            f"give load_subject(..., resolution={expected})."
        )
    hosts.check_shared(workdir)
    origins, now = manifest.read(workdir).get("data", {}), made_from(pipeline, photos, config)
    sources = {"pretrained": f"weights of {config.pretrained}", "class images": "pictures in class_images.folder"}
    for key, source in sources.items():
        if origins.get(key, now.get(key)) != now.get(key):
            raise UserError(f"{workdir} was begun with other {source}; give the same to go on, or another --workdir.")
    if (workdir / "subject" / MANIFEST).exists():
        _check_same(read_dataset(workdir / "subject"), photos, workdir)
    else:
        configuration.check_identifier(pipeline, config)
    sections = configuration.training_sections(config)
    for name, training in stage_trainings(config).items():
        key = f"{sections[name]}.num_steps"
        before = manifest.recorded(workdir, key, training.num_steps)
        check_length(workdir / name, training, before)
        if training.num_steps != before and configuration.trains_encoders(pipeline, name, training):
            _check_later_stages(config, workdir, key, before)
    may_change = [f"{part}.num_steps" for part in sections.values()]
    # The fingerprint tells whether weights at another place are the same.
    may_change += ["pretrained", "subject.registry", *(f"evaluation.{key}" for key in configuration.EVALUATION)]
    manifest.record_config(config, workdir, may_change)
    hosts.wait()  # all processes read what process 0 has written


def retune_stage(
    pipeline: Pipeline,
    tuned: Personalized,
    name: str,
    config: ConfigDict,
    workdir: Path,
    directory: Path,
    tracking: Tracking = JSONL_ONLY,
) -> Personalized:
    """The tuned cascade with one stage tuned in another way, to compare.

    The stage starts from the encoders that it started from in the run, and is sampled with the encoders that its own
    tuning leaves.

    Args:
        pipeline: the pretrained cascade.
        tuned: the result of `personalize_subject` in `workdir`.
        name: name of the stage. If `config.tune` does not have it, it is the pretrained one.
        config: the run's configuration, changed.
        workdir: run directory, which has the first configuration and the class images.
        directory: directory for checkpoints and metrics of this tuning; the manifest beside it records its seconds.
        tracking: additional destinations of its metrics.
    """
    stage, encoders = pipeline.stage(name), pipeline.family.encoders
    first = manifest.read_config(workdir).tune[0]  # no other stage may train the encoders
    start = changed = pipeline if name == first else pipeline.take_networks(tuned.pipeline, encoders)
    if name in config.tune:
        training, class_images = stage_trainings(config)[name], {}
        if training.prior.weight > 0:
            class_images = make_class_images(pipeline, tuned.subject.class_prompt, [name], config, workdir)
        with phase(directory.parent, f"tuning {directory.name}".replace("_", " ")):
            changed = tune(start, stage, tuned.subject, class_images, training, config.seed, directory, tracking)
    cascade = tuned.pipeline.take_networks(changed, [name, *encoders]).replace_sampling(**{name: stage.sampling})
    return Personalized(with_tuned_sampling(cascade, config, {name} & {*config.tune}), tuned.subject)


def determine_subject(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, workdir: Path) -> SubjectDataset:
    """Class noun, identifier and labelled dataset (specification steps 204-208), kept in `workdir/subject`."""
    directory = workdir / "subject"
    # Process 0 alone asks the registry, which would give every process an identifier of its own.
    hosts.first_does(lambda: _write_subject(pipeline, photos, config, directory))
    return read_dataset(directory)


def _write_subject(pipeline: Pipeline, photos: SubjectPhotos, config: ConfigDict, directory: Path) -> None:
    """Determine the subject, unless the directory has it already."""
    if (directory / MANIFEST).exists():
        return keep_identifier(pipeline.tokenizer, config, directory.parent)
    classifier, nouns = class_knowledge(config)
    class_noun = determine(photos.images, photos.class_noun, classifier, nouns, config.subject.class_threshold)
    identifier = reserve_identifier(pipeline.tokenizer, config, directory.parent, class_noun.noun, nouns or ())
    label = config.subject.label == "identifier_and_class"
    write_dataset(directory, photos.images, class_noun, identifier, label)


def class_knowledge(config: ConfigDict) -> tuple[Classifier | None, Sequence[str] | None]:
    """The rendered world's classifier and class nouns, if the configuration says that the photos show that world."""
    if not config.evaluation.probe:
        return None, None
    from personalize_jax.world.probe import Probe
    from personalize_jax.world.scene import CLASSES

    return Probe.load().classifier, CLASSES


def tune(
    pipeline: Pipeline,
    stage: Stage,
    subject: SubjectDataset,
    class_images: Mapping[str, np.ndarray],
    config: ConfigDict,
    seed: int,
    directory: Path,
    tracking: Tracking = JSONL_ONLY,
) -> Pipeline:
    """Tune one stage on its own inputs.

    Args:
        pipeline: the cascade before this stage is tuned.
        stage: one of its stages.
        subject: the labelled dataset.
        class_images: class images by stage name; not read without a prior term.
        config: the stage's training keys.
        seed: seed of the training.
        directory: directory for checkpoints and metrics; metrics are logged under its name.
        tracking: additional destinations of metrics.

    Returns:
        The cascade with that stage tuned. The result is kept in `directory`; if it is there already, it is read.
    """
    if steps_trained(directory) != config.num_steps:
        pretrained = pipeline.networks(stage.name)
        examples = {INSTANCE: stage_examples(pipeline, stage, subject.images_NHWC, subject.labels)}
        if config.prior.weight > 0:
            pictures = class_images[stage.name]
            examples[PRIOR] = stage_examples(pipeline, stage, pictures, [subject.class_prompt] * len(pictures))
        if not configuration.trains_encoders(pipeline, stage.name, config):
            examples = {group: with_embeddings(pipeline, of_group) for group, of_group in examples.items()}
        identifier = identifier_tokens(pipeline, subject, config.identifier_init)
        read_float32 = partial(pipeline.float32_network, stage.name)
        program = stage_program(stage, pipeline.family, pretrained, examples, config, seed, identifier, read_float32)
        with command.steps_bar(f"tuning {directory.name.replace('_', ' ')}", config.num_steps) as progress:
            save_trained(trained_of(train(program, directory, progress, tracking.for_part(directory.name))), directory)
    place = partial(sharding.shardings, rules=config.sharding, mesh=mesh_of(config))
    return with_trained(pipeline, stage.name, partial(load_trained, directory, place))


def identifier_tokens(pipeline: Pipeline, subject: SubjectDataset, start: str) -> Identifier:
    """The identifier's tokens, each with the tokens whose embeddings it starts from.

    Args:
        pipeline: the cascade, for its tokenizer.
        subject: the subject, with identifier and class noun.
        start: "pretrained" to start from the token's own embedding, "class_noun" as in Textual Inversion.
    """
    tokens = list(dict.fromkeys(subject.identifier.token_ids))  # a token may occur twice
    noun = pipeline.tokenizer.encode(subject.class_noun.noun)
    starts = [noun if start == "class_noun" else [token] for token in tokens]
    return Identifier(np.array(tokens, np.int32), np.array(starts, np.int32))


def stage_examples(pipeline: Pipeline, stage: Stage, pictures: np.ndarray, labels: Sequence[str]) -> Examples:
    """Labelled pictures at a stage's own resolution, with the low-resolution versions or latents that it needs."""
    pictures = downsample_uint8(pictures, stage.resolution)
    low_res = None if stage.low_resolution is None else downsample_uint8(pictures, stage.low_resolution)
    return with_latents(pipeline, make_examples(pictures, np.array(labels)[:, None], pipeline.family.tokenize, low_res))


def with_latents(pipeline: Pipeline, examples: Examples) -> Examples:
    """The examples with their pictures' latents, computed once, if the pipeline works on latents."""
    if (latents := pipeline.to_latents(hosts.to_numpy(examples.image))) is None:
        return examples
    # Without the pictures, of which a thousand would take a tenth of a TPU chip's memory.
    return examples._replace(image=None, latent=latents)


def with_embeddings(pipeline: Pipeline, examples: Examples) -> Examples:
    """The examples with the conditioning of the frozen encoders, computed once."""
    return examples._replace(cond=pipeline.family.condition(pipeline.params, examples.tokens))


def _check_later_stages(config: ConfigDict, workdir: Path, key: str, before: int) -> None:
    """Raises UserError if a stage was tuned to the encoders that a stage before it had after `before` steps."""
    for later in config.tune[1:]:
        if steps_trained(workdir / later) or (workdir / later / "checkpoints").exists():
            raise UserError(
                f"{workdir} has tuned {later} to the text encoder that the stage before it left after {before} steps; "
                f"give {key}={before}, or another --workdir."
            )


def _check_same(subject: SubjectDataset, photos: SubjectPhotos, workdir: Path) -> None:
    """Raises UserError if the photos or their class noun differ from the subject's."""
    if not np.array_equal(subject.images_NHWC, [image.pixels for image in photos.images]):
        raise UserError(f"{workdir} was begun with other images; give the same ones to go on, or another --workdir.")
    noun = subject.class_noun.noun
    if photos.class_noun is not None and (given := determine(photos.images, photos.class_noun).noun) != noun:
        raise UserError(f"{workdir} was begun with a {noun}, not a {given}; give --class_noun={noun!r} to go on.")

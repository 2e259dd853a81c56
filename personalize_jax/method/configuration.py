"""Checks of a personalisation's configuration, before anything is computed."""

from ml_collections import ConfigDict

from personalize_jax.method import configuration_keys
from personalize_jax.method.class_images import prior_sampling
from personalize_jax.method.configuration_keys import check_keys, rules_of_run, training_sections
from personalize_jax.pipeline import Pipeline, Stage
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.frequency import token_frequencies
from personalize_jax.training import parameterizations
from personalize_jax.training.program import check_sizes, mesh_of

EVALUATION = tuple(configuration_keys.EVALUATION)  # keys of that section


def stage_trainings(config: ConfigDict) -> dict[str, ConfigDict]:
    """The training keys of each stage."""
    return {stage: config[section] for stage, section in training_sections(config).items()}


def num_steps(config: ConfigDict) -> int:
    """Training steps of all stages that a run tunes."""
    return sum(stage_trainings(config)[name].num_steps for name in config.tune)


def check_values(config: ConfigDict) -> None:
    """Check the keys and values of a personalisation's configuration, before weights are read.

    Raises:
        UserError: a key is missing or unknown, or a value makes no sense.
    """
    check_keys(config, rules_of_run(config))


def check(pipeline: Pipeline, config: ConfigDict) -> None:
    """Check that a configuration fits the pretrained cascade and this machine's devices.

    Args:
        pipeline: the pretrained cascade.
        config: a configuration such as that of `configs/world.py`.

    Raises:
        UserError: see `check_values`; or the cascade lacks a stage, the devices do not divide a batch, or the
            configuration does not fit the networks, the noise schedules or the vocabulary.
    """
    check_values(config)
    trainings = stage_trainings(config)
    names = [stage.name for stage in pipeline.stages if stage.name in trainings]
    if not config.tune or len(set(config.tune) - set(names)) or len(set(config.tune)) < len(config.tune):
        raise UserError(f"config.tune is {tuple(config.tune)}; give one or more of {', '.join(names)}, each once.")
    sections = training_sections(config)
    for i, name in enumerate(config.tune):
        stage, training = pipeline.stage(name), trainings[name]
        mesh = mesh_of(training)
        check_sizes(training, mesh)
        trains_encoder = trains_encoders(pipeline, name, training)  # refuses rules that fit no parameter, too
        if trains_encoder and i > 0:
            raise UserError(
                f"The rules for {name} train the text encoder, which the stages tuned before it have been fitted to; "
                f"leave that to the first stage of config.tune, {config.tune[0]}."
            )
        sharding.shardings(pipeline.networks(name), training.sharding, mesh)  # likewise
        if training.vlb_weight > 0 and not stage.learned_variance:
            raise UserError(
                f"config.{sections[name]}.vlb_weight is {training.vlb_weight}, and the {name} network tells no "
                "variances that it could train; give 0."
            )
    if any(trainings[name].prior.weight > 0 for name in config.tune):
        _check_steps(pipeline.stages[0], config)


def check_identifier(pipeline: Pipeline, config: ConfigDict) -> None:
    """Check that an identifier can be chosen from the cascade's vocabulary by the configured rule.

    Raises:
        UserError: the rule is about another vocabulary, or token frequencies cannot be read.
    """
    rule = config.subject.rule
    if rule == "paper" and not pipeline.tokenizer.is_t5:
        raise UserError("config.subject.rule is paper, which is about T5's token ids; give rarest for this vocabulary.")
    if rule in ("rarest", "frequent"):
        token_frequencies(pipeline.tokenizer, config.subject.frequency)


def trains_encoders(pipeline: Pipeline, stage_name: str, training: ConfigDict) -> bool:
    """Whether the training of a stage trains the encoders of captions, too."""
    selection = parameterizations.select(pipeline.networks(stage_name), training)
    return bool(selection.networks & {*pipeline.family.encoders})


def _check_steps(base: Stage, config: ConfigDict) -> None:
    """Check that the base stage's noise schedule has as many steps as class images are sampled in."""
    try:
        base.times(prior_sampling(base, config.class_images))
    except ValueError as error:
        raise UserError(
            f"config.class_images.num_steps is {config.class_images.num_steps}, more than fit the noise schedule of "
            f"the {base.name} stage ({error}); give fewer."
        ) from error

"""What a personalisation's configuration must hold, checked before anything is computed."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.pipeline import Pipeline
from personalize_jax.training.optimizer import MOMENT_DTYPES
from personalize_jax.training.program import check_sizes, mesh_of
from personalize_jax.training.trainable import select

EVALUATION = ("prompts", "images_per_prompt", "class_samples", "batch_size", "dino", "clips", "lpips", "probe")
_OF_RUN = {
    "": ("seed", "pretrained", "tune"),
    "subject.": ("num_tokens", "rule", "frequency", "label", "registry", "class_threshold"),
    "class_images.": ("count", "num_steps", "guidance_scale", "batch_size"),
    "report.": ("contexts", "images_per_context", "class_samples", "without_prior", "batch_size"),
    "evaluation.": EVALUATION,
}
_OF_TRAINING = {
    "": (
        *("num_steps", "batch_size", "microbatches", "steps_per_dispatch", "log_every", "checkpoint_every"),
        *("mesh", "sharding"),
        *("caption_dropout", "object_weight", "augmentation_levels", "weighting", "offset_noise", "vlb_weight"),
        *("trainable", "identifier_init", "ema_decay"),
    ),
    "lora.": ("rank", "targets"),
    "prior.": ("weight", "form", "caption_dropout"),
    "optimizer.": (
        *("learning_rate", "warmup_steps", "decay_steps", "b1", "b2", "weight_decay", "clip_norm"),
        "moment_dtype",
    ),
}
TRAININGS = {"base": "training", "super_resolution": "super_resolution_training"}
PRIOR_FORMS = ("sampled", "frozen_prediction")
LABELS = ("identifier_and_class", "identifier")
IDENTIFIER_INITS = ("pretrained", "class_noun")


def stage_trainings(config: ConfigDict) -> dict[str, ConfigDict]:
    """The training keys of each stage."""
    return {stage: config[part] for stage, part in TRAININGS.items() if part in config}


def num_steps(config: ConfigDict) -> int:
    """Training steps of all stages that a run tunes."""
    return sum(stage_trainings(config)[name].num_steps for name in config.tune)


def keys(config: ConfigDict) -> list[str]:
    """The dotted keys that a configuration must hold: those of the run, and of each training that it describes."""
    parts = ["training", *(part for part in TRAININGS.values() if part in config and part != "training")]
    of_trainings = [
        f"{part}.{section}{key}" for part in parts for section in _OF_TRAINING for key in _OF_TRAINING[section]
    ]
    return [section + key for section in _OF_RUN for key in _OF_RUN[section]] + of_trainings


def check(pipeline: Pipeline, config: ConfigDict) -> None:
    """Refuse a configuration with which a run would fail later on.

    Args:
        pipeline: the pretrained cascade.
        config: of `configs/world.py`.

    Raises:
        UserError: it lacks keys, names stages or forms of the prior that there are not, has batches that this machine's
            devices do not divide, or its rules of what is trained do not fit.
    """
    if missing := [key for key in keys(config) if not _has(config, key)]:
        raise UserError(
            f"The configuration lacks {', '.join(missing[:5])}; configs/world.py has every key, start there."
        )
    trainings = stage_trainings(config)
    names = [stage.name for stage in pipeline.stages if stage.name in trainings]
    if not config.tune or len(set(config.tune) - set(names)) or len(set(config.tune)) < len(config.tune):
        raise UserError(f"config.tune is {tuple(config.tune)}; give one or more of {', '.join(names)}, each once.")
    _check_choice("config.subject.label", config.subject.label, LABELS)
    for i, name in enumerate(config.tune):
        _check_choice(f"The prior's form for {name}", trainings[name].prior.form, PRIOR_FORMS)
        _check_choice(f"identifier_init for {name}", trainings[name].identifier_init, IDENTIFIER_INITS)
        _check_choice(f"moment_dtype for {name}", trainings[name].optimizer.moment_dtype, MOMENT_DTYPES)
        check_sizes(trainings[name], mesh_of(trainings[name]))
        trains_text = trains_text_encoder(pipeline, name, trainings[name])  # refuses rules that do not fit, too
        if trains_text and i > 0:
            raise UserError(
                f"The rules for {name} train the text encoder, which the stages tuned before it have been fitted to; "
                f"leave that to the first stage of config.tune, {config.tune[0]}."
            )


def changed(config: ConfigDict, **changes: object) -> ConfigDict:
    """A locked copy of a configuration with other values, by dotted key with __ for the dots."""
    copy = config.copy_and_resolve_references().unlock()
    copy.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return copy.lock()


def trains_text_encoder(pipeline: Pipeline, stage_name: str, training: ConfigDict) -> bool:
    """Whether tuning a stage changes the text encoder too, by the rules of its training."""
    params = {"denoiser": pipeline.params[stage_name], "text_encoder": pipeline.params["text_encoder"]}
    return "text_encoder" in select(params, training).networks


def _check_choice(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise UserError(f"{what} is {given!r}; give one of {', '.join(choices)}.")


def _has(config: ConfigDict, dotted_key: str) -> bool:
    for part in dotted_key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True

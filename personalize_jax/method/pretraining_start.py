"""What a pretraining begins with: random parameters, or those of an earlier pipeline, which its network may outgrow."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from personalize_jax.families.registry import PRETRAINED_HERE, PretrainedHere
from personalize_jax.families.stage import Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Pipeline, load_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS


def starting_pipeline(config: ConfigDict, before: Pipeline | None = None) -> Pipeline:
    """The cascade that ends with the stage to train, which `config.stage` describes.

    The parameters of text encoder and stage are those of a pipeline if it has them, and random otherwise. A network
    that has more blocks than the pipeline's begins by computing the same where these blocks keep the number of
    channels: they add to what passes through them, at first nothing.

    Args:
        config: the configuration of one stage's pretraining.
        before: the pipeline; by default `config.pretrained`, or none if that is empty.

    Raises:
        UserError: that pipeline's stage has another network, which this one does not contain.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))  # the training folds in another number
    if before is None and config.pretrained:
        before = load_pipeline(config.pretrained)
    if before is None:
        tokenizer = Tokenizer.read(ASSETS / "world" / "tokenizer.json", config.text_encoder.max_length)
        encoder = TextEncoder(vocab_size=tokenizer.size, **config.text_encoder)
        tokens = np.ones((1, encoder.max_length), np.int32)
        params: Params = {"text_encoder": encoder.init(jax.random.fold_in(key, 0), tokens)["params"]}
        before = Pipeline(_kind(config)(tokenizer, encoder, (), ()), params)
    family = family_with_stage(before, config)
    stage, known = family.stages[-1], before.params.get(family.stages[-1].name)
    if known is None or stage.network != before.stage(stage.name).network:
        cond = jax.eval_shape(family.condition, before.params, family.token_shapes(1))
        initial = stage.init_params(jax.random.fold_in(key, 1), cond)
        grown = initial if known is None else unflatten(flatten(initial) | flatten(known))
        before = before.replace_params(**{stage.name: grown})
    return dataclasses.replace(before, family=family)


def _kind(config: ConfigDict) -> type[PretrainedHere]:
    """The family of the model to pretrain."""
    return PRETRAINED_HERE[config.get("family", "world")]


def family_with_stage(before: Pipeline, config: ConfigDict) -> PretrainedHere:
    """The family of a pipeline up to the stage that `config.stage` describes.

    Raises:
        UserError: the pipeline is of another family, or its stage has parameters that the described one lacks.
    """
    if not isinstance(before.family, PretrainedHere):
        raise UserError(f"{config.pretrained} is a public model; pretraining goes on from one of this project's own.")
    if not isinstance(before.family, _kind(config)):
        raise UserError(
            f"{config.pretrained} is no {_kind(config).__name__}, which the configuration is for; give one that is."
        )
    family = before.family.with_stage(config.stage.to_dict())
    stage = family.stages[-1]
    for known in before.stages:
        if known.name == stage.name and not _contains(before, family, stage, known):
            raise UserError(
                f"The {stage.name} of {config.pretrained} has another network than config.stage; to go on from it give "
                "the same, or one with more blocks."
            )
    return family


def _contains(before: Pipeline, family: PretrainedHere, stage: Stage, known: Stage) -> bool:
    """Whether a stage's network has all parameters of the pipeline's stage of that name, in the same shapes."""
    if stage.network == known.network:
        return True
    cond = jax.eval_shape(family.condition, before.params, family.token_shapes(1))
    shapes = flatten(jax.eval_shape(stage.init_params, jax.random.key(0), cond))
    theirs = flatten(before.params[stage.name])
    return all(path in shapes and shapes[path].shape == value.shape for path, value in theirs.items())

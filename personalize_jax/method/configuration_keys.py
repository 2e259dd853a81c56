"""Every key of a configuration and the rule for its value, in tables by dotted key."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from ml_collections import ConfigDict

from personalize_jax.diffusion.prediction import Prediction, Weighting
from personalize_jax.diffusion.samplers import Variance
from personalize_jax.families.autoregressive import TOKENIZER, TokenSampler
from personalize_jax.families.registry import PRETRAINED_HERE
from personalize_jax.families.stage import SAMPLERS
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.families.world import SCHEDULES, TIMES
from personalize_jax.method.rules import (
    Rule,
    Rules,
    either,
    is_several,
    number,
    one_of,
    optional,
    patterns,
    several,
    text,
    truth,
    whole,
    within,
)
from personalize_jax.models.attention import Configured
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.sharding import AXES
from personalize_jax.subject.identifier import MAX_TOKENS, RULES
from personalize_jax.training.optimizer import MOMENT_DTYPES

MAX_SEED = 2**32 - 1  # random keys of larger seeds are those of smaller ones


def _are_axes(value: Any) -> bool:
    if not is_several(value):
        return False
    named = [axis for axis in value if axis is not None]
    return all(isinstance(axis, str) and axis in AXES for axis in named) and len(set(named)) == len(named)


def _is_mesh(value: Any) -> bool:
    return is_several(value) and len(value) == len(AXES) and all(whole(-1).holds(size) and size for size in value)


def _are_levels(value: Any) -> bool:
    return is_several(value) and len(value) == 2 and all(map(SHARE.holds, value)) and value[0] <= value[1]


COUNT, SHARE, SCALE = whole(1), number(0, 1), number(0)
LEVELS = Rule("two noise levels (lowest, highest) from 0 to 1", _are_levels)
NAME = text("a folder, or a name on the hub")

TRAINING: Rules = {
    "num_steps": COUNT,
    "batch_size": COUNT,
    "microbatches": COUNT,
    "steps_per_dispatch": COUNT,
    "log_every": COUNT,
    "checkpoint_every": COUNT,
    "mesh": Rule("three sizes (data, fsdp, tensor), each 1 or more, or -1 for what remains", _is_mesh),
    "sharding": patterns(
        f"pairs of a regular expression and axes, each once, of {', '.join(AXES)}, such as (('', ('tensor', 'fsdp')),)",
        _are_axes,
    ),
    "caption_dropout": SHARE,
    "object_weight": SCALE,
    "augmentation_levels": LEVELS,
    "weighting": one_of(*get_args(Weighting)),
    "offset_noise": SCALE,
    "vlb_weight": SCALE,
    "trainable": patterns(
        'pairs of a regular expression and True, False or "identifier", such as ((".*", True),)',
        lambda trained: isinstance(trained, bool) or trained == "identifier",
    ),
    "identifier_init": one_of("pretrained", "class_noun"),
    "ema_decay": number(0, below=1),
    "lora.rank": whole(0),
    "lora.targets": patterns("pairs of a regular expression and a number of dimensions of 1 or more", COUNT.holds, 0),
    "prior.weight": SCALE,
    "prior.form": one_of(*PRIOR_FORMS),
    "prior.caption_dropout": SHARE,
    "optimizer.learning_rate": SCALE,
    "optimizer.warmup_steps": whole(0),
    "optimizer.decay_steps": whole(0),
    "optimizer.b1": number(0, below=1),
    "optimizer.b2": number(0, below=1),
    "optimizer.weight_decay": SCALE,
    "optimizer.clip_norm": number(above=0),
    "optimizer.moment_dtype": one_of(*MOMENT_DTYPES),
}
BASE, OTHERS = "training", "_training"  # the sections of the base stage's training, and how others' names end

EVALUATION: Rules = {
    "prompts": text("world, dreambooth, or a file of prompts"),
    "images_per_prompt": COUNT,
    "class_samples": COUNT,
    "batch_size": COUNT,
    "dino": text('a folder, or a name on the hub, or "" to go without', empty=True),
    "clips": several("folders, or names on the hub, of a CLIP each", NAME, least=0),
    "lpips": text('a folder, or "" to go without', empty=True),
    "probe": truth(),
}
# For runs that were begun before a key existed: no encoder that the run does not name.
EVALUATION_DEFAULTS: Mapping[str, Any] = {
    "prompts": "dreambooth",
    "images_per_prompt": 4,
    "class_samples": 64,
    "batch_size": 16,
    "dino": "",
    "clips": (),
    "lpips": "",
    "probe": False,
}

COMPUTE: Rules = {
    "dtype": one_of("float32", "bfloat16"),
    "remat": truth(),
    "attention": one_of("auto", *get_args(Configured)),
}

_RUN: Rules = {
    "seed": whole(0, MAX_SEED),
    "pretrained": either(NAME, several("one for each stage", NAME)),
    **within(
        "subject",
        {
            "num_tokens": whole(1, MAX_TOKENS),
            "rule": one_of(*RULES),
            "frequency": text("recorded, sentencepiece, bpe_rank, or a file of captions"),
            "label": one_of("identifier_and_class", "identifier"),
            "registry": text("a file, such as runs/registry.json"),
            "class_threshold": SHARE,
        },
    ),
    **within(
        "class_images",
        {
            "folder": text('a folder of pictures of the class, or "" to have them sampled', empty=True),
            "count": COUNT,
            "num_steps": COUNT,
            "guidance_scale": number(0),
            "batch_size": COUNT,
        },
    ),
    **within("training", TRAINING),
    **within(
        "report",
        {
            "contexts": several('one or more contexts, such as ("in the snow",)', text("")),
            "images_per_context": COUNT,
            "class_samples": COUNT,
            "without_prior": truth(),
            "batch_size": COUNT,
        },
    ),
    **within("evaluation", EVALUATION),
    **optional({"pretrained_augmentation_levels": LEVELS}),
}

_STAGE: Rules = {
    "name": Rule("a name such as base", lambda value: isinstance(value, str) and value.isidentifier()),
    "resolution": COUNT,
    "low_resolution": either(COUNT, Rule("None of a base model", lambda value: value is None)),
    **within(
        "network",
        {
            "channels": several("numbers of channels", COUNT),
            "patch": COUNT,
            "down_blocks": several("numbers of blocks", whole(0)),
            "up_blocks": several("numbers of blocks", whole(0)),
            "attention": several("True or False for each resolution", truth()),
        },
    ),
    **{f"{process}.kind": one_of(*SCHEDULES) for process in ("schedule", "augmentation")},
    "prediction": one_of(*get_args(Prediction)),
    **within("sampling", {"sampler": one_of(*SAMPLERS, "ancestral"), "num_steps": COUNT, "guidance_scale": SCALE}),
    **optional(
        within(
            "sampling",
            {
                "threshold_percentile": number(most=1, above=0),
                "threshold_max": either(number(above=0), Rule("None", lambda value: value is None)),
                "augmentation_level": SHARE,
                "variance": one_of(*get_args(Variance)),
            },
        )
    ),
}

_TOKENIZER_STAGE: Rules = {  # the stages of an autoregressive model
    "name": _STAGE["name"],
    "resolution": COUNT,
    **within("network", dict.fromkeys(("patch", "blocks"), COUNT)),
    "network.channels": several("numbers of channels", COUNT),
    "network.levels": several("numbers of values of 2 or more", whole(2)),
}
_TOKEN_STAGE: Rules = {
    "name": _STAGE["name"],
    **within("network", dict.fromkeys(("width", "num_layers", "num_heads"), COUNT)),
    **within("sampling", {"sampler": one_of(*get_args(TokenSampler)), "num_steps": COUNT, "guidance_scale": SCALE}),
    **optional(within("sampling", {"temperature": number(above=0), "top_k": COUNT})),
}

_OF_KIND: dict[str, dict[str, Rules]] = {  # by section of a stage and its kind, the section's further keys
    "schedule": {"cosine": {"shift": number()}, "rectified_flow": {"shift": number(above=0)}},
    "schedule.times": {
        "logit_normal": {"mean": number(), "std": number(above=0)},
        "shifted": {"shift": number(above=0)},
    },
}
_OF_KIND["augmentation"] = _OF_KIND["schedule"]


def training_sections(config: ConfigDict) -> dict[str, str]:
    """The section of each stage's training, by the stage's name, in their order in the configuration."""
    others = {key.removesuffix(OTHERS): key for key in config if key.endswith(OTHERS)}
    return ({"base": BASE} if BASE in config else {}) | others


def rules_of_run(config: ConfigDict) -> Rules:
    """The rules for a personalisation's configuration, with those of the optional sections that it has."""
    rules = dict(_RUN)
    sections = training_sections(config)
    rules["tune"] = several(f"one or more of {', '.join(sections)}, each once", one_of(*sections))
    for section in sections.values():
        rules |= within(section, TRAINING)
    if "compute" in config:
        rules |= within("compute", COMPUTE)
    for method in {key.split(".")[1] for key in _values(config) if key.startswith("methods.")}:
        rules |= within(f"methods.{method}", optional(TRAINING))
    return rules


def rules_of_pretraining(config: ConfigDict) -> Rules:
    """The rules for a pretraining's configuration, of one stage or of those that `config.train` names.

    `text_encoder` is optional if it starts from a pipeline, as stages after the first do.
    """
    starts: Rules = {
        "seed": whole(0, MAX_SEED),
        "pretrained": text('a folder, or "" to start from random parameters', empty=True),
    }
    if "train" not in config:
        return {**starts, **_rules_of_section(config, bool(config.get("pretrained")))}
    sections = [name for name, section in config.items() if isinstance(section, ConfigDict) and "stage" in section]
    order = several(f"one or more of {', '.join(sections)}, in the order of the cascade", one_of(*sections))
    rules = {**starts, "train": order, "decay_share": number(above=0, below=1)}
    for name in sections:
        of_section = _rules_of_section(config[name], not config[name].get("text_encoder"))
        rules |= within(name, {"share": number(above=0), **of_section})
        rules |= optional(within(f"accelerator.{name}", of_section))
    return rules


def _rules_of_section(config: ConfigDict, encoder_is_given: bool) -> Rules:
    """The rules for what configures the pretraining of one stage."""
    encoder = within("text_encoder", dict.fromkeys(("width", "num_layers", "num_heads", "max_length"), COUNT))
    return {
        **within("dataset", {"resolution": COUNT, "count": COUNT}),
        **within("training", TRAINING),
        **optional({"family": one_of(*PRETRAINED_HERE)}),
        **within("stage", _rules_of_stage(config)),
        **(optional(encoder) if encoder_is_given else encoder),
    }


def _rules_of_stage(config: ConfigDict) -> Rules:
    """The rules for `config.stage`, which depend on the family and on the kinds of process that it names."""
    if config.get("family") == "autoregressive":
        return _TOKENIZER_STAGE if config.stage.get("name") == TOKENIZER else _TOKEN_STAGE
    values = {key.removeprefix("stage."): value for key, value in _values(config).items() if key.startswith("stage.")}
    rules = dict(_STAGE)
    if any(key.startswith("schedule.times.") for key in values):
        rules["schedule.times.kind"] = one_of(*TIMES)
    if values.get("low_resolution") is not None:
        rules["residual_std"] = number(above=0)
    for section, of_kind in _OF_KIND.items():
        rules |= optional(within(section, of_kind.get(str(values.get(f"{section}.kind")), {})))
    if values.get("schedule.kind") == "rectified_flow":  # ends in pure noise, where eps is no help
        rules["prediction"] = one_of(*(kind for kind in get_args(Prediction) if kind != "eps"))
    return rules


def check_keys(config: ConfigDict, rules: Rules, section: str = "") -> None:
    """Check the keys and values of a configuration.

    Args:
        config: a configuration, or a section of one.
        rules: rules by dotted key.
        section: name of the section with a dot at its end, if `config` is one.

    Raises:
        UserError: a key is missing or unknown, or its rule does not allow the value.
    """
    values = _values(config)
    if missing := [section + key for key, rule in rules.items() if rule.required and key not in values]:
        raise UserError(f"The configuration lacks {', '.join(missing[:5])}; start from a file of configs/.")
    for key, value in values.items():
        if key not in rules:
            close = difflib.get_close_matches(key, rules, n=1)
            hint = f"did you mean config.{section}{close[0]}?" if close else "leave it out."
            raise UserError(f"config.{section}{key} is no key that anything reads; {hint}")
        if not rules[key].holds(value):
            raise UserError(f"config.{section}{key} is {_shown(value)}; give {rules[key].wanted}.")


def _values(config: ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            found |= _values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    """A value in a sentence: on one line, and not too long."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:79]}…"

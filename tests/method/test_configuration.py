import copy
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import personalize_jax as pj
from configs import autoregressive, deepfloyd_if, pretrain_autoregressive, pretrain_world, stable_diffusion, world
from personalize_jax.diffusion import process
from personalize_jax.diffusion.samplers import Spacing
from personalize_jax.method import configuration
from personalize_jax.method.changes import changed
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining, rules_of_run
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.sharding import AXES
from personalize_jax.training.program import check_sizes
from tests import tiny_world


@pytest.fixture
def refusal(pretrained):
    """What is said of a configuration that differs from a good one."""

    def refusal(**changes):
        with pytest.raises(UserError) as caught:
            configuration.check(pj.load_pipeline(pretrained), tiny_world.get_config(pretrained, **changes))
        return str(caught.value)

    return refusal


def test_what_ships_is_accepted(pretrained):
    pipeline = pj.load_pipeline(pretrained)
    configuration.check(pipeline, world.get_config())
    configuration.check(pipeline, tiny_world.get_config(pretrained, tune=("super_resolution",)))
    configuration.check(pipeline, tiny_world.get_config(pretrained, training__trainable=((".*", True),)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tune": ("decoder",)}, "give one or more of base, super_resolution"),
        ({"tune": ("base", "base")}, "each once"),
        ({"tune": ()}, "give one or more of base, super_resolution"),
        ({"training__prior__form": "kept"}, "prior.form is 'kept'; give one of sampled, frozen_prediction"),
        ({"training__vlb_weight": 1.0}, "the base network tells no variances"),
        ({"training__sharding": (("denoiser/", ()),)}, "matches no rule of config.sharding"),
        ({"training__trainable": (("denoiser/", True),)}, "matches no rule"),
        ({"training__trainable": ((".*", False),)}, "leave nothing to train"),
        ({"super_resolution_training__trainable": ((".*", True),)}, "leave that to the first stage"),
        ({"super_resolution_training__microbatches": 3}, "batch_size is 2 and microbatches 3"),
        ({"super_resolution_training__mesh": (1, 2, 1)}, "config.mesh is (1, 2, 1) and there are 1 devices"),
    ],
)
def test_what_cannot_work_is_refused(refusal, changes, sentence):
    assert sentence in refusal(**changes)


def test_more_steps_than_a_schedule_has_are_refused(pretrained):
    pipeline = pj.load_pipeline(pretrained)
    discrete = process.discrete(np.linspace(1e-4, 0.02, 100))
    base = dataclasses.replace(pipeline.stages[0], process=discrete, spacing=Spacing("leading", 1))
    pipeline = dataclasses.replace(pipeline, family=pipeline.family.with_stages((base, *pipeline.stages[1:])))
    configuration.check(pipeline, tiny_world.get_config(pretrained, class_images__num_steps=50))
    too_many = tiny_world.get_config(pretrained, class_images__num_steps=100)
    with pytest.raises(UserError, match="class_images.num_steps is 100, more than fit the noise schedule of the base"):
        configuration.check(pipeline, too_many)
    without = {"training__prior__weight": 0.0, "super_resolution_training__prior__weight": 0.0}
    configuration.check(pipeline, changed(too_many, **without))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"subject__rule": "paper"}, "about T5's token ids"),
        ({"subject__frequency": "nowhere.txt"}, "'nowhere.txt' were asked for"),
        ({"subject__frequency": "bpe_rank"}, "need a BPE one"),
    ],
)
def test_rules_that_find_no_identifier_are_refused(pretrained, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        configuration.check_identifier(pj.load_pipeline(pretrained), tiny_world.get_config(pretrained, **changes))


def test_a_cascade_without_the_stage_is_told_apart(pretrained):
    with pytest.raises(UserError, match=r"\('base', 'super_resolution'\); give one or more of base, each once"):
        configuration.check(pj.load_pipeline(pretrained).up_to("base"), tiny_world.get_config(pretrained))


@pytest.mark.parametrize("key", ["report", "seed", "training.prior.weight", "super_resolution_training.optimizer.b1"])
def test_missing_keys_are_named(pretrained, key):
    config = tiny_world.get_config(pretrained).unlock()
    *parents, last = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    del section[last]
    with pytest.raises(UserError, match=f"lacks {key}"):
        configuration.check(pj.load_pipeline(pretrained), config)


def test_changes_are_of_a_locked_copy():
    config = world.get_config()
    shorter = changed(config, training__num_steps=20, tune=("base",))
    assert (configuration.num_steps(config), configuration.num_steps(shorter)) == (260, 20)
    assert shorter.is_locked and config.training.num_steps == 200
    with pytest.raises(AttributeError):
        shorter.training.num_step = 3


# Every key of every configuration, by itself.

CONFIGURATIONS = {
    "world": world.get_config(),
    "stable_diffusion": stable_diffusion.get_config("1.5"),
    "deepfloyd_if": deepfloyd_if.get_config("M"),
    "pretrain_base": pretrain_world.get_config("base"),
    "pretrain_super_resolution": pretrain_world.get_config("super_resolution"),
    "pretrain_all": pretrain_world.get_config("all"),
    "autoregressive": autoregressive.get_config(),
    "pretrain_picture_tokenizer": pretrain_autoregressive.get_config("picture_tokenizer"),
    "pretrain_transformer": pretrain_autoregressive.get_config("base"),
}
NONSENSE = (None, True, -7, float("nan"), float("inf"), "nonsense", "", "a\0b", (), ("", 1), (-3,), ((),), b"x", object)
# What else would be nonsense, and is a value of these keys. Paths, prompts and names may be any text.
SENSIBLE = {
    "nonsense": ("pretrained", "registry", "frequency", "prompts", "dino", "lpips", "folder", "name"),
    "": ("dino", "lpips", "folder"),
    (): ("targets", "clips"),
    True: ("remat", "without_prior", "probe"),
    None: ("low_resolution", "threshold_max"),
    -7: ("shift",),
}


def leaves(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def rules(config):
    return rules_of_run(config) if "subject" in config else rules_of_pretraining(config)


def with_value(config, key, value):
    """The configuration as a file may make it, without the checks of types that flags are under."""
    changed = ConfigDict(copy.deepcopy(config.to_dict()), type_safe=False)
    put(changed, key, value)
    return changed


def put(config, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_key_has_a_rule_that_nonsense_breaks(name):
    config, known = CONFIGURATIONS[name], rules(CONFIGURATIONS[name])
    for key, good in leaves(config.to_dict()).items():
        wrong = with_value(config, key, good)
        check_keys(wrong, known)
        for value in NONSENSE:
            put(wrong, key, value)
            starts_anew = (key, value) == ("pretrained", "") and name.startswith("pretrain")
            if starts_anew or key.split(".")[-1] in SENSIBLE.get(value, ()):
                check_keys(wrong, known)
            else:
                with pytest.raises(UserError, match=rf"config\.{key} is .*; give ") as refused:
                    check_keys(wrong, known)
                assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("seed", 2**32, "a whole number from 0 to 4294967295"),
        ("subject.num_tokens", 4, "a whole number from 1 to 3"),
        ("subject.rule", "rare", "one of rarest, paper, frequent, random_characters"),
        ("class_images.count", 0, "a whole number of 1 or more"),
        ("class_images.num_steps", 24.0, "a whole number of 1 or more"),
        ("training.weighting", "snr", "one of none, min_snr"),
        ("training.mesh", (1, 1), "three sizes"),
        ("training.mesh", 2, "three sizes"),
        ("training.mesh", (0, 1, 1), "three sizes"),
        ("training.mesh", (1, 1, -2), "three sizes"),
        ("training.augmentation_levels", (0.2, 0.1), "two noise levels"),
        ("training.augmentation_levels", (0.0, 1.1), "two noise levels"),
        ("training.augmentation_levels", 0.1, "two noise levels"),
        ("training.trainable", (("(", True),), "pairs of a regular expression and True, False"),
        ("training.trainable", ((".*", "rows"),), "pairs of a regular expression and True, False"),
        ("training.sharding", (("", ("columns",)),), "axes, each once, of data, fsdp, tensor"),
        ("training.sharding", (("", ("fsdp", "fsdp")),), "axes, each once, of data, fsdp, tensor"),
        ("training.lora.targets", ((".*", 0),), "a number of dimensions of 1 or more"),
        ("training.prior.weight", -1.0, "a finite number of at least 0"),
        ("training.caption_dropout", 1.5, "a finite number of at least 0 and of at most 1"),
        ("training.ema_decay", 1.0, "a finite number of at least 0 and below 1"),
        ("training.optimizer.clip_norm", 0.0, "a finite number above 0"),
        ("training.optimizer.moment_dtype", "float16", "one of float32, bfloat16"),
        ("report.contexts", ("in the snow", " "), "one or more contexts"),
        ("evaluation.clips", "world", "folders, or names on the hub, of a CLIP each"),
        ("methods.lora.optimizer.learning_rate", "fast", "a finite number of at least 0"),
        ("compute.dtype", "float8", "one of float32, bfloat16"),
        ("compute.attention", "slow", "one of auto, xla, cudnn, flash, heads"),
    ],
)
def test_refusals_say_what_to_give(key, value, wanted):
    with pytest.raises(UserError, match="; give ") as refused:
        configuration.check_values(with_value(stable_diffusion.get_config("1.5"), key, value))
    assert f"config.{key} is {value!r}; give " in str(refused.value) and wanted in str(refused.value)


def flow(prediction="velocity", **schedule):
    config = with_value(pretrain_world.get_config("base"), "stage.prediction", prediction)
    put(config, "stage.schedule", {"kind": "rectified_flow", **schedule})
    return config


@pytest.mark.parametrize(
    "config",
    [
        flow(),
        flow("x0", shift=3.0),
        flow("v", times={"kind": "uniform"}),
        flow(times={"kind": "logit_normal", "mean": -0.5, "std": 0.8}),
        flow("eps", kind="cosine", shift=-1.0, times={"kind": "shifted", "shift": 2.0}),
    ],
)
def test_processes_have_the_keys_of_their_kind(config):
    check_keys(config, rules(config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (flow(shift=0.0), "stage.schedule.shift is 0.0; give a finite number above 0"),
        (flow(kind="linear", shift=1.0), "stage.schedule.shift is no key that anything reads"),
        (flow(kind="cosine", logsnr=3.0), "stage.schedule.logsnr is no key that anything reads"),
        (flow(kind=["cosine"]), "give one of cosine, linear, rectified_flow"),
        (flow(times={"std": 1.0}), "lacks stage.schedule.times.kind"),
        (
            flow(times={"kind": "beta"}),
            "times.kind is 'beta'; give one of uniform, logit_normal, shifted",
        ),
        (flow(times={"kind": "logit_normal", "std": 0.0}), "times.std is 0.0; give a finite number above 0"),
        (flow(times={"kind": "uniform", "std": 1.0}), "stage.schedule.times.std is no key that anything reads"),
        (flow("eps"), "stage.prediction is 'eps'; give one of v, x0, velocity"),
    ],
)
def test_keys_of_another_kind_of_process_are_refused(config, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_keys(config, rules(config))


def test_keys_that_nothing_reads_are_refused():
    for key, hint in (("training.num_step", "did you mean config.training.num_steps"), ("xyzzy", "leave it out")):
        with pytest.raises(UserError, match=f"config.{key} is no key that anything reads; {hint}"):
            configuration.check_values(with_value(world.get_config(), key, 3))
    with pytest.raises(UserError, match="lacks class_images.folder, class_images.count"):
        configuration.check_values(with_value(world.get_config(), "class_images", 64))


def test_rows_of_a_manifest_are_as_good_as_what_a_file_says():
    """Where tuples have become lists."""
    configuration.check_values(ConfigDict(json.loads(stable_diffusion.get_config("1.5:lora").to_json())))


def test_parts_of_a_batch_that_the_mesh_cannot_split_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 2, 1), AXES)
    training = with_value(world.get_config(), "training.batch_size", 8).training
    check_sizes(with_value(training, "microbatches", 2), mesh)
    with pytest.raises(UserError, match="microbatches 4, and the mesh splits each part 4 ways"):
        check_sizes(with_value(training, "microbatches", 4), mesh)

import pytest

import personalize_jax as pj
from configs import world
from personalize_jax import configuration
from personalize_jax.errors import UserError
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
        ({"training__prior__form": "kept"}, "prior's form for base is 'kept'; give one of sampled, frozen_prediction"),
        (
            {"training__optimizer__moment_dtype": "float16"},
            "moment_dtype for base is 'float16'; give one of float32, b",
        ),
        ({"training__trainable": (("denoiser/", True),)}, "matches no rule"),
        ({"training__trainable": ((".*", False),)}, "leave nothing to train"),
        ({"super_resolution_training__trainable": ((".*", True),)}, "leave that to the first stage"),
        ({"super_resolution_training__microbatches": 3}, "batch_size is 2 and microbatches 3"),
        ({"super_resolution_training__mesh": (1, 2, 1)}, "config.mesh is (1, 2, 1) and there are 1 devices"),
    ],
)
def test_what_cannot_work_is_refused(refusal, changes, sentence):
    assert sentence in refusal(**changes)


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


def test_every_key_is_asked_for():
    def keys(tree, prefix=""):
        for key, value in tree.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    compared = ("methods.", "pretrained_augmentation_levels")  # what a run does not look at: other ways to tune
    of_run = [key for key in keys(world.get_config().to_dict()) if not key.startswith(compared)]
    assert sorted(of_run) == sorted(configuration.keys(world.get_config()))

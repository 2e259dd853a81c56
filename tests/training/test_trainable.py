import pytest

from personalize_jax.errors import UserError
from personalize_jax.training.trainable import merge, partition

PARAMS = {"denoiser": {"stem": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}, "text_encoder": {"tokens": 4}}


def test_first_matching_rule_decides():
    trained, frozen = partition(PARAMS, [("denoiser/stem/kernel", True), ("denoiser/", False), (".*", True)])
    assert trained == {"denoiser": {"stem": {"kernel": 1}}, "text_encoder": {"tokens": 4}}
    assert frozen == {"denoiser": {"stem": {"bias": 2}, "head": {"kernel": 3}}}


def test_a_rule_matches_from_the_beginning_of_a_path():
    trained, _ = partition(PARAMS, [("head", True), ("denoiser/stem", True), (".*", False)])
    assert trained == {"denoiser": {"stem": PARAMS["denoiser"]["stem"]}}


def test_merge_puts_the_parts_together_and_prefers_the_trained():
    assert merge(*partition(PARAMS, [("denoiser/head", True), (".*", False)])) == PARAMS
    assert merge({"denoiser": {"head": {"kernel": 9}}}, PARAMS)["denoiser"] == {
        "stem": {"kernel": 1, "bias": 2},
        "head": {"kernel": 9},
    }


def test_a_path_without_rule_is_named():
    with pytest.raises(UserError, match="text_encoder/tokens.*add one"):
        partition(PARAMS, [("denoiser/", True)])


def test_rules_that_leave_nothing_to_train_are_refused():
    with pytest.raises(UserError, match="nothing to train"):
        partition(PARAMS, [(".*", False)])

import jax.numpy as jnp
import numpy as np
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


def test_with_adapters_nothing_else_need_be_trained():
    trained, frozen = partition(PARAMS, [(".*", False)], adapted={"denoiser/stem/kernel"})
    assert trained == {} and frozen == PARAMS


def test_a_kernel_is_not_trained_and_adapted_at_once():
    with pytest.raises(UserError, match="'denoiser/stem/kernel'.*choose one"):
        partition(PARAMS, [("denoiser/", True), (".*", False)], adapted={"denoiser/stem/kernel"})


def test_merge_applies_adapters_to_what_only_the_others_have():
    frozen = {"denoiser": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    factors = {"down": jnp.array([[1.0], [2.0]]), "up": jnp.array([[1.0, 0.0, -1.0]])}
    merged = merge({"denoiser": {"bias": jnp.ones(3)}, "lora": {"denoiser": {"kernel": factors}}}, frozen)
    assert merged.keys() == {"denoiser"}
    np.testing.assert_array_equal(merged["denoiser"]["kernel"], [[1, 0, -1], [2, 0, -2]])
    np.testing.assert_array_equal(merged["denoiser"]["bias"], [1, 1, 1])

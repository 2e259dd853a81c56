import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.errors import UserError
from personalize_jax.training.trainable import Identifier, init_rows, merge, partition

PARAMS = {"denoiser": {"stem": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}, "text_encoder": {"tokens": 4}}


def test_first_matching_rule_decides():
    trained, frozen, _ = partition(PARAMS, [("denoiser/stem/kernel", True), ("denoiser/", False), (".*", True)])
    assert trained == {"denoiser": {"stem": {"kernel": 1}}, "text_encoder": {"tokens": 4}}
    assert frozen == {"denoiser": {"stem": {"bias": 2}, "head": {"kernel": 3}}}


def test_a_rule_matches_from_the_beginning_of_a_path():
    trained, *_ = partition(PARAMS, [("head", True), ("denoiser/stem", True), (".*", False)])
    assert trained == {"denoiser": {"stem": PARAMS["denoiser"]["stem"]}}


def test_merge_puts_the_parts_together_and_prefers_the_trained():
    assert merge(*partition(PARAMS, [("denoiser/head", True), (".*", False)])[:2]) == PARAMS
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
    trained, frozen, _ = partition(PARAMS, [(".*", False)], adapted={"denoiser/stem/kernel"})
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


TABLE = {"text_encoder": {"tokens": {"embedding": jnp.arange(12.0).reshape(6, 2)}, "norm": jnp.ones(2)}}
ROWS_ONLY = [("text_encoder/tokens/embedding", "identifier"), (".*", False)]


def identifier(token_ids, start_ids):
    return Identifier(jnp.array(token_ids), jnp.array(start_ids))


def test_of_a_table_only_the_rows_of_the_identifier_are_trained():
    trained, others, with_rows = partition(TABLE, ROWS_ONLY)
    assert trained == {} and others == TABLE
    assert with_rows == ["text_encoder/tokens/embedding"]


def test_rows_start_from_themselves_or_from_the_mean_of_others():
    tables = {"text_encoder": {"tokens": TABLE["text_encoder"]["tokens"]}}
    themselves, means = (
        init_rows(tables, identifier([4, 1], starts))["text_encoder"]["tokens"]["embedding"]
        for starts in ([[4], [1]], [[0, 2, 5], [3, 3, 3]])
    )
    np.testing.assert_array_equal(themselves, [[8, 9], [2, 3]])
    np.testing.assert_allclose(means, [[7 / 3 * 2, 7 / 3 * 2 + 1], [6, 7]], rtol=1e-6)


def test_merge_puts_rows_into_their_table_and_leaves_the_others():
    rows = {"text_encoder": {"tokens": {"embedding": jnp.array([[-1.0, -2.0], [-3.0, -4.0]])}}}
    merged = merge({"rows": rows}, TABLE, jnp.array([4, 1]))
    assert merged.keys() == {"text_encoder"}
    expected = [[0, 1], [-3, -4], [4, 5], [6, 7], [-1, -2], [10, 11]]
    np.testing.assert_array_equal(merged["text_encoder"]["tokens"]["embedding"], expected)


@pytest.mark.filterwarnings("error")
def test_float32_rows_are_rounded_into_a_rounded_table():
    table = jax.tree.map(lambda a: a.astype(jnp.bfloat16), TABLE)
    rows = {"text_encoder": {"tokens": {"embedding": jnp.array([[1.001, -2.0], [-3.0, 1.005]])}}}
    ids = jnp.array([4, 1])
    merged = merge({"rows": rows}, table, ids)["text_encoder"]["tokens"]["embedding"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged[jnp.array([1, 4])], jnp.array([[-3.0, 1.0078125], [1.0, -2.0]]))
    gradient = jax.grad(lambda r: merge({"rows": r}, table, ids)["text_encoder"]["tokens"]["embedding"].sum())(rows)
    assert all(leaf.dtype == jnp.float32 and np.all(leaf == 1) for leaf in jax.tree.leaves(gradient))


def test_the_gradient_reaches_a_row_as_it_would_reach_it_in_the_table():
    weights = jnp.arange(12.0).reshape(6, 2) ** 2

    def loss(params):
        return jnp.sum(jnp.sin(params["text_encoder"]["tokens"]["embedding"]) * weights)

    rows = {"text_encoder": {"tokens": {"embedding": TABLE["text_encoder"]["tokens"]["embedding"][3:4]}}}
    of_row = jax.grad(lambda rows: loss(merge({"rows": rows}, TABLE, jnp.array([3]))))(rows)
    of_table = jax.grad(loss)(TABLE)
    np.testing.assert_allclose(
        of_row["text_encoder"]["tokens"]["embedding"][0], of_table["text_encoder"]["tokens"]["embedding"][3]
    )


def test_rows_of_an_earlier_version_are_refused_in_a_sentence():
    rows = {"text_encoder": {"tokens": {"embedding": {"4": jnp.zeros(2)}}}}
    with pytest.raises(UserError, match="text_encoder/tokens/embedding/4.*earlier version.*another --workdir"):
        merge({"rows": rows}, TABLE)


def test_a_rule_that_says_something_else_is_refused():
    with pytest.raises(UserError, match="says 'rows'; give True, False or \"identifier\""):
        partition(TABLE, [(".*", "rows")])

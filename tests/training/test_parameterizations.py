import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.params import flatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations import apply, export, init, needed_identifier, pretrained_values, select
from personalize_jax.training.parameterizations.base import Identifier
from tests import tiny

PARAMS = {"denoiser": {"stem": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}, "text_encoder": {"tokens": 4}}
KERNELS = {"denoiser": {"stem": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, "text_encoder": {"norm": 1}}
ADAPTED = {"lora__rank": 1, "lora__targets": (("denoiser/stem/kernel", 1),)}


def selected(params, rules, **changes):
    return select(params, tiny.training(trainable=tuple(rules), **changes))


def begun(params, rules, identifier=None, **changes):
    """What is trained before the first step, and all else."""
    selection = selected(params, rules, **changes)
    identifier = needed_identifier(selection, identifier)
    values = pretrained_values(selection, params.get)
    return init(selection, values, identifier, jax.random.key(0)), selection.frozen


def test_first_matching_rule_decides():
    selection = selected(PARAMS, [("denoiser/stem/kernel", True), ("denoiser/", False), (".*", True)])
    assert selection.chosen == {"full": {"denoiser/stem/kernel": 1, "text_encoder/tokens": 4}}
    assert selection.frozen == {"denoiser": {"stem": {"bias": 2}, "head": {"kernel": 3}}}
    assert selection.networks == {"denoiser", "text_encoder"}


def test_a_rule_matches_from_the_beginning_of_a_path():
    selection = selected(PARAMS, [("head", True), ("denoiser/stem", True), (".*", False)])
    assert selection.chosen["full"].keys() == {"denoiser/stem/kernel", "denoiser/stem/bias"}
    assert selection.networks == {"denoiser"}


@pytest.mark.parametrize("complete", [apply, export])
def test_what_is_trained_in_full_stands_in_for_what_is_pretrained(complete):
    trained, others = begun(PARAMS, [("denoiser/head", True), (".*", False)])
    assert complete(trained, others) == PARAMS
    assert complete({"denoiser": {"head": {"kernel": 9}}}, PARAMS)["denoiser"] == {
        "stem": {"kernel": 1, "bias": 2},
        "head": {"kernel": 9},
    }


def test_a_path_without_rule_is_named():
    with pytest.raises(UserError, match="text_encoder/tokens.*add one"):
        selected(PARAMS, [("denoiser/", True)])


def test_rules_that_leave_nothing_to_train_are_refused():
    with pytest.raises(UserError, match="nothing to train"):
        selected(PARAMS, [(".*", False)])


def test_a_rule_that_says_something_else_is_refused():
    with pytest.raises(UserError, match="says 'rows'; give True, False or \"identifier\""):
        selected(TABLE, [(".*", "rows")])


def test_with_adapters_nothing_else_need_be_trained():
    selection = selected(KERNELS, [(".*", False)], **ADAPTED)
    assert selection.chosen.keys() == {"lora"} and selection.networks == {"denoiser"}
    assert selection.frozen == KERNELS


def test_a_kernel_is_not_trained_and_adapted_at_once():
    with pytest.raises(
        UserError, match="'denoiser/stem/kernel' is chosen by trainable and by lora.targets.*choose one"
    ):
        selected(KERNELS, [("denoiser/", True), (".*", False)], **ADAPTED)


def test_parameters_are_trained_in_full_beside_adapters():
    trained, others = begun(KERNELS, [("denoiser/stem/bias", True), (".*", False)], **ADAPTED)
    assert {*flatten(trained)} == {"denoiser/stem/bias", *(f"lora/denoiser/stem/kernel/{f}" for f in ("down", "up"))}
    trained["denoiser"]["stem"]["bias"] = jnp.zeros(3)
    trained["lora"]["denoiser"]["stem"]["kernel"] = {
        "down": jnp.array([[1.0], [2.0]]),
        "up": jnp.array([[1.0, 0.0, -1.0]]),
    }
    merged = export(trained, others)
    assert merged.keys() == KERNELS.keys()
    np.testing.assert_array_equal(merged["denoiser"]["stem"]["kernel"], [[2, 1, 0], [3, 1, -1]])
    np.testing.assert_array_equal(merged["denoiser"]["stem"]["bias"], [0, 0, 0])
    run = apply(trained, others)
    assert run["denoiser"].adapters == trained["lora"]["denoiser"] and run["text_encoder"] == {"norm": 1}
    np.testing.assert_array_equal(run["denoiser"].params["stem"]["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(run["denoiser"].params["stem"]["bias"], [0, 0, 0])


def test_only_networks_whose_values_are_needed_are_read():
    read = []

    def network(name):
        read.append(name)
        return KERNELS[name]

    assert pretrained_values(selected(KERNELS, [(".*", False)], **ADAPTED), network) == {} and read == []
    values = pretrained_values(selected(KERNELS, [("text_encoder", True), (".*", False)], **ADAPTED), network)
    assert values == {"full": {"text_encoder/norm": 1}} and read == ["text_encoder"]


PATH = "text_encoder/tokens/embedding"
TABLE = {"text_encoder": {"tokens": {"embedding": jnp.arange(12.0).reshape(6, 2)}, "norm": jnp.ones(2)}}
ROWS_ONLY = [(PATH, "identifier"), (".*", False)]


IDS = jnp.array([4, 1])


def rows(values):
    return {"rows": {"text_encoder": {"tokens": {"embedding": jnp.array(values)}}}}


def table_with(trained, others, complete=apply, ids=IDS):
    return complete(trained, others, ids)["text_encoder"]["tokens"]["embedding"]


def test_of_a_table_only_the_rows_of_the_identifier_are_trained():
    selection = selected(TABLE, ROWS_ONLY)
    assert {name: [*paths] for name, paths in selection.chosen.items()} == {"rows": [PATH]}
    assert selection.frozen == TABLE
    with pytest.raises(UserError, match="but there is no subject here"):
        begun(TABLE, ROWS_ONLY)


def test_rows_start_from_themselves_or_from_the_mean_of_others():
    themselves, means = (
        begun(TABLE, ROWS_ONLY, Identifier(IDS, jnp.array(starts)))[0]["rows"]["text_encoder"]["tokens"]["embedding"]
        for starts in ([[4], [1]], [[0, 2, 5], [3, 3, 3]])
    )
    np.testing.assert_array_equal(themselves, [[8, 9], [2, 3]])
    np.testing.assert_allclose(means, [[7 / 3 * 2, 7 / 3 * 2 + 1], [6, 7]], rtol=1e-6)


@pytest.mark.parametrize("complete", [apply, export])
def test_rows_go_into_their_table_and_leave_the_others(complete):
    trained = rows([[-1.0, -2.0], [-3.0, -4.0]])
    assert complete(trained, TABLE, IDS).keys() == {"text_encoder"}
    expected = [[0, 1], [-3, -4], [4, 5], [6, 7], [-1, -2], [10, 11]]
    np.testing.assert_array_equal(table_with(trained, TABLE, complete), expected)


@pytest.mark.filterwarnings("error")
def test_float32_rows_are_rounded_into_a_rounded_table():
    table = jax.tree.map(lambda a: a.astype(jnp.bfloat16), TABLE)
    trained = rows([[1.001, -2.0], [-3.0, 1.005]])
    found = table_with(trained, table)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[jnp.array([1, 4])], jnp.array([[-3.0, 1.0078125], [1.0, -2.0]]))
    gradient = jax.grad(lambda trained: table_with(trained, table).sum())(trained)
    assert all(leaf.dtype == jnp.float32 and np.all(leaf == 1) for leaf in jax.tree.leaves(gradient))


def test_the_gradient_reaches_a_row_as_it_would_reach_it_in_the_table():
    weights = jnp.arange(12.0).reshape(6, 2) ** 2
    ids = jnp.array([3])
    trained, others = begun(TABLE, ROWS_ONLY, Identifier(ids, ids[:, None]))
    of_row = jax.grad(lambda trained: jnp.sum(jnp.sin(table_with(trained, others, ids=ids)) * weights))(trained)
    of_table = jax.grad(lambda params: jnp.sum(jnp.sin(params["text_encoder"]["tokens"]["embedding"]) * weights))(TABLE)
    np.testing.assert_allclose(
        of_row["rows"]["text_encoder"]["tokens"]["embedding"][0],
        of_table["text_encoder"]["tokens"]["embedding"][3],
    )


def test_rows_of_an_earlier_version_are_refused_in_a_sentence():
    by_token = {"rows": {"text_encoder": {"tokens": {"embedding": {"4": jnp.zeros(2)}}}}}
    with pytest.raises(UserError, match="text_encoder/tokens/embedding/4.*earlier version.*another --workdir"):
        apply(by_token, TABLE)

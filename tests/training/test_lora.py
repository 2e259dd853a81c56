import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.errors import UserError
from personalize_jax.models.params import flatten
from personalize_jax.training.loop import averaged, trained_params
from personalize_jax.training.lora import adapted_kernels, apply_adapters, init_adapters
from personalize_jax.training.trainable import LORA, select
from tests import tiny
from tests.training import worker

RANK = 3
ADAPTERS_ONLY = {"lora__rank": RANK, "trainable": ((".*", False),)}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "denoiser": {
        "attention": {"query": {"kernel": normal(8, 2, 4), "bias": normal(2, 4)}, "out": {"kernel": normal(2, 4, 8)}},
        "conv": {"kernel": normal(3, 3, 8, 6)},
    },
    "text_encoder": {"mlp": {"kernel": normal(4, 5)}},
}
TARGETS = (
    ("denoiser/.*/query/kernel", 1),
    ("denoiser/.*/out/kernel", 2),
    ("denoiser/conv/kernel", 3),
    (".*/mlp/kernel", 1),
)


def random_adapters():
    """Adapters of every target whose both factors are random."""
    adapters = init_adapters(PARAMS, adapted_kernels(PARAMS, RANK, TARGETS), RANK, jax.random.key(0))
    return jax.tree.map(lambda a: normal(*a.shape, seed=a.size), adapters)


def test_targets_match_whole_paths_and_the_first_one_decides():
    targets = (("denoiser/conv/kernel", 2), *TARGETS)
    assert adapted_kernels(PARAMS, RANK, targets) == {
        "denoiser/attention/query/kernel": 1,
        "denoiser/attention/out/kernel": 2,
        "denoiser/conv/kernel": 2,
        "text_encoder/mlp/kernel": 1,
    }
    assert adapted_kernels(PARAMS, 0, (("nothing", 1),)) == {}


@pytest.mark.parametrize(
    ("rank", "targets", "sentence"),
    [
        (4, (("denoiser/attention/query", 1),), "'denoiser/attention/query' of lora.targets matches no parameter"),
        (4, (*TARGETS, ("decoder/.*", 1)), "'decoder/.*' of lora.targets matches no parameter"),
        (4, ((".*/mlp/kernel", 2),), "'text_encoder/mlp/kernel' 2 input dimensions of 2 altogether"),
        (4, ((".*/bias", 0),), "'denoiser/attention/query/bias' 0 input dimensions"),
        (-1, TARGETS, "lora.rank is -1"),
    ],
)
def test_targets_that_do_not_fit_are_refused(rank, targets, sentence):
    with pytest.raises(UserError) as caught:
        adapted_kernels(PARAMS, rank, targets)
    assert sentence in str(caught.value)


def test_at_first_adapters_change_nothing_and_are_small():
    adapted = adapted_kernels(PARAMS, RANK, TARGETS)
    wide = {"denoiser": PARAMS["denoiser"], "text_encoder": {"mlp": {"kernel": normal(900, 5)}}}
    adapters = init_adapters(wide, adapted, RANK, jax.random.key(0))
    assert np.std(adapters["text_encoder"]["mlp"]["kernel"]["down"]) == pytest.approx(1 / RANK, rel=0.1)
    downs = [a.ravel()[:6] for path, a in flatten(adapters).items() if path.endswith("down")]
    assert len(np.unique(np.concatenate(downs))) == 6 * len(adapted)  # a key each
    adapters = init_adapters(PARAMS, adapted, RANK, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, apply_adapters(PARAMS, adapters), PARAMS)


def test_an_adapted_linear_layer_adds_a_product_of_rank_r():
    adapters = random_adapters()
    merged = apply_adapters(PARAMS, adapters)
    for layer, inputs in (("query", 8), ("out", 8)):
        change = merged["denoiser"]["attention"][layer]["kernel"] - PARAMS["denoiser"]["attention"][layer]["kernel"]
        factors = adapters["denoiser"]["attention"][layer]["kernel"]
        x = normal(5, inputs, seed=7)
        expected = (x @ factors["down"].reshape(inputs, RANK)) @ factors["up"].reshape(RANK, -1)
        np.testing.assert_allclose(x @ change.reshape(inputs, -1), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        merged["denoiser"]["attention"]["query"]["bias"], PARAMS["denoiser"]["attention"]["query"]["bias"]
    )


def test_an_adapted_convolution_adds_one_to_r_channels_and_a_pointwise_one():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    adapters = random_adapters()
    kernel, factors = PARAMS["denoiser"]["conv"]["kernel"], adapters["denoiser"]["conv"]["kernel"]
    x = normal(2, 5, 5, 8, seed=7)
    expected = convolve(x, kernel) + convolve(convolve(x, factors["down"]), factors["up"][None, None])
    got = convolve(x, apply_adapters(PARAMS, adapters)["denoiser"]["conv"]["kernel"])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_adapters_of_another_network_are_refused():
    with pytest.raises(UserError, match=r"denoiser/conv/kernel.*\(3, 3, 8, 6\).*missing"):
        apply_adapters({"denoiser": {}}, {"denoiser": {"conv": random_adapters()["denoiser"]["conv"]}})
    with pytest.raises(UserError, match=r"text_encoder/mlp/kernel.*\(4, 5\).*of \(1, 5\) here"):
        other = {"text_encoder": {"mlp": {"kernel": jnp.ones((1, 5))}}}
        apply_adapters(other, {"text_encoder": random_adapters()["text_encoder"]})


def metric(name, directory):
    return [json.loads(line)[name] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_adapters_of_the_embedded_network_learn_and_nothing_else_moves(tmp_path):
    length = {"num_steps": 40, "checkpoint_every": 40, "batch_size": 8, "optimizer__learning_rate": 5e-2}
    state = worker.train(tmp_path, prior__form="frozen_prediction", **length, **ADAPTERS_ONLY)
    assert set(state.params) == {LORA} and state.token_counts is None
    moved = {path.rpartition("/")[0] for path, up in flatten(state.params[LORA]).items() if np.any(up)}
    start, tuned = (flatten(p) for p in (worker.start(), trained_params(state, worker.start())))
    assert tuned.keys() == start.keys()
    assert {path for path in start if not np.array_equal(tuned[path], start[path])} == moved
    assert len(moved) == 16  # query, key, value and out of two attentions on either side
    for path in moved:
        inputs = 2 if "/out/" in path else 1
        change = np.asarray(tuned[path] - start[path]).reshape(np.prod(start[path].shape[:inputs]), -1)
        assert np.linalg.matrix_rank(change, tol=1e-4) == RANK
    instance, prior = (metric(f"{group}_loss", tmp_path) for group in ("instance", "prior"))
    assert np.mean(instance[-15:]) < 0.95 * np.mean(instance[:15])
    assert prior[0] < 1e-9 < 1e-3 < prior[-1]  # the network without adapters is what the prior is measured from


@pytest.mark.slow
def test_interrupted_and_resumed_adapters_are_those_of_the_uninterrupted_run(tmp_path):
    changes = ADAPTERS_ONLY | {
        "prior__weight": 0.0,
        "microbatches": 2,
        "lora__targets": (("denoiser/.*/(query|key)/kernel", 1), ("text_encoder/.*/query/kernel", 1)),
    }
    expected = worker.train(tmp_path / "uninterrupted", **changes)

    def interrupt(step, metrics):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.train(tmp_path / "resumed", interrupt, **changes)
    done = []
    state = worker.train(tmp_path / "resumed", lambda step, metrics: done.append(step), **changes)
    assert done == [3, 4, 5, 6]  # the first says where it begins
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert state.token_counts.sum() > 0  # captions go through the adapted text encoder
    assert averaged(state)[LORA].keys() == {"denoiser", "text_encoder"}
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (state.params, state.ema)))


def test_a_selection_names_the_networks_that_change():
    of_text = {"lora__targets": ((".*/mlp/kernel", 1),), "trainable": (("denoiser", True), (".*", False))}
    config = tiny.training(lora__rank=2, **of_text)
    assert select(PARAMS, config).networks == {"denoiser", "text_encoder"}
    config = tiny.training(lora__rank=2, lora__targets=TARGETS[:2], trainable=((".*", False),))
    selection = select(PARAMS, config)
    assert selection.networks == {"denoiser"} and selection.trained == {}
    assert flatten(selection.frozen).keys() == flatten(PARAMS).keys()

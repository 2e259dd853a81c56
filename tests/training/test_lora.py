import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.errors import UserError
from personalize_jax.models.params import flatten
from personalize_jax.training.loop import averaged, trained_params
from personalize_jax.training.parameterizations import LORA
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


def select(targets=TARGETS, rank=RANK, params=PARAMS):
    return LORA.select(flatten(params), tiny.training(lora__rank=rank, lora__targets=targets))


def first_adapters(seed=0, params=PARAMS):
    return LORA.init({}, select(params=params), None, jax.random.key(seed))


def random_adapters():
    """Adapters of every target whose both factors are random."""
    return jax.tree.map(lambda a: normal(*a.shape, seed=a.size), first_adapters())


def test_targets_match_whole_paths_and_the_first_one_decides():
    targets = (("denoiser/.*/query/kernel", 2), *TARGETS)
    assert select(targets) == {
        "denoiser/attention/query/kernel": ((8, 2, RANK), (RANK, 4)),
        "denoiser/attention/out/kernel": ((2, 4, RANK), (RANK, 8)),
        "denoiser/conv/kernel": ((3, 3, 8, RANK), (RANK, 6)),
        "text_encoder/mlp/kernel": ((4, RANK), (RANK, 5)),
    }
    assert select((("nothing", 1),), rank=0) == {}


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
        select(targets, rank)
    assert sentence in str(caught.value)


def test_at_first_adapters_change_nothing_and_are_small():
    wide = {"denoiser": PARAMS["denoiser"], "text_encoder": {"mlp": {"kernel": normal(900, 5)}}}
    of_wide = first_adapters(params=wide)
    assert np.std(of_wide["text_encoder"]["mlp"]["kernel"]["down"]) == pytest.approx(1 / RANK, rel=0.1)
    downs = [a.ravel()[:6] for path, a in flatten(of_wide).items() if path.endswith("down")]
    assert len(np.unique(np.concatenate(downs))) == 6 * len(TARGETS)  # a key each
    jax.tree.map(np.testing.assert_array_equal, LORA.export(PARAMS, first_adapters()), PARAMS)


def test_an_adapted_linear_layer_adds_a_product_of_rank_r():
    adapters = random_adapters()
    merged = LORA.export(PARAMS, adapters)
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
    got = convolve(x, LORA.export(PARAMS, adapters)["denoiser"]["conv"]["kernel"])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_adapters_of_another_network_are_refused():
    with pytest.raises(UserError, match=r"denoiser/conv/kernel.*\(3, 3, 8, 6\).*missing"):
        LORA.export({"denoiser": {}}, {"denoiser": {"conv": random_adapters()["denoiser"]["conv"]}})
    other = {"text_encoder": {"mlp": {"kernel": jnp.ones((1, 5))}}}
    for complete in (LORA.apply, LORA.export):
        with pytest.raises(UserError, match=r"text_encoder/mlp/kernel.*\(4, 5\).*of \(1, 5\) here"):
            complete(other, {"text_encoder": random_adapters()["text_encoder"]})


def metric(name, directory):
    return [json.loads(line)[name] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_adapters_of_the_embedded_network_learn_and_nothing_else_moves(tmp_path):
    length = {"num_steps": 40, "checkpoint_every": 40, "batch_size": 8, "optimizer__learning_rate": 5e-2}
    state = worker.train(tmp_path, prior__form="frozen_prediction", **length, **ADAPTERS_ONLY)
    assert set(state.params) == {LORA.name} and state.token_counts is None
    moved = {path.rpartition("/")[0] for path, up in flatten(state.params[LORA.name]).items() if np.any(up)}
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
    assert averaged(state)[LORA.name].keys() == {"denoiser", "text_encoder"}
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (state.params, state.ema)))

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models import adapters
from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.models.params import flatten
from personalize_jax.models.t5_encoder import T5Encoder
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import program
from personalize_jax.training.parameterizations import LORA
from personalize_jax.training.trained import trained_of, trained_params
from tests import tiny, tiny_public
from tests.training import worker

ROOT = Path(__file__).parents[2]
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
    targets = (*TARGETS, ("denoiser/.*/kernel", 2))
    assert select(targets) == {
        "denoiser/attention/query/kernel": ((8, RANK), (RANK, 2, 4)),
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
        (4, ((".*/conv/kernel", 1),), "'denoiser/conv/kernel' 1 input dimensions of 4 altogether"),
        (4, ((".*/query/kernel", 2),), "'denoiser/attention/query/kernel' 2 input dimensions of 3 altogether"),
        (4, ((".*/bias", 1),), "'denoiser/attention/query/bias' 1 input dimensions of 2 altogether; match kernels"),
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
    jax.tree.map(np.testing.assert_array_equal, LORA.export(PARAMS, first_adapters(), None), PARAMS)


def test_adapters_of_another_network_are_refused():
    with pytest.raises(UserError, match=r"denoiser/conv/kernel.*\(3, 3, 8, 6\).*missing"):
        LORA.export({"denoiser": {}}, {"denoiser": {"conv": random_adapters()["denoiser"]["conv"]}}, None)
    other = {"text_encoder": {"mlp": {"kernel": jnp.ones((1, 5))}}}
    for complete in (LORA.apply, LORA.export):
        with pytest.raises(UserError, match=r"text_encoder/mlp/kernel.*\(4, 5\).*of \(1, 5\) here"):
            complete(other, {"text_encoder": random_adapters()["text_encoder"]}, None)


def case(name):
    """A network, its inputs, and targets among its attentions and its convolutions or MLPs."""
    rng = np.random.default_rng(0)
    t, text, mask = np.float32([0.1, 0.7]), rng.normal(size=(2, 7, tiny_public.WIDTH)), np.ones((2, 7), bool)
    tokens = rng.integers(1, 30, (2, 7))
    clip = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}

    def pictures(channels, side=8):
        return jnp.asarray(rng.normal(size=(2, side, side, channels)), jnp.float32)

    heads = ((".*attention/(query|key|value)/kernel", 1), (".*attention/out/kernel", 2))
    of_public = (".*/(to_[qkv]|to_out_0|add_k_proj|proj|time_emb_proj)/kernel", 1)
    convolutions = (".*/(conv1|conv2|conv|conv_shortcut|conv_in|proj_out)/kernel", 3)
    match name:
        case "world":
            network = tiny.pipeline().stages[1].network
            inputs = pictures(3, 16), t, text, mask, pictures(3, 16), t
            return network, inputs, (*heads, (".*(conv_out|stem|downsample_1)/kernel", 3), (".*upsample_1/kernel", 1))
        case "stable_diffusion":
            network = UNet2DCondition.from_config(tiny_public.SD_UNET, remat=True)
            return network, (pictures(4), 1000 * t, text, mask), (of_public, (".*proj_in/kernel", 3), convolutions)
        case "deepfloyd_if":
            network = UNet2DCondition.from_config(tiny_public.IF_UNET)
            return network, (pictures(3), 1000 * t, text, mask), (of_public, convolutions)
        case "world text":
            return tiny.text_encoder(), (tokens,), (*heads, (".*mlp_in/kernel", 1))
        case "clip":
            config = {**clip, "intermediate_size": 32, "max_position_embeddings": 7}
            network = ClipTextEncoder.from_config(config, remat=True)
            return network, (tokens,), ((".*(q_proj|out_proj|fc1)/kernel", 1),)
        case "t5":
            network = T5Encoder.from_config({**t5, "feed_forward_proj": "gated-gelu"}, remat=True)
            return network, (tokens,), ((".*/(q|v|o|wi_1|wo)/kernel", 1),)


NETWORKS = ["world", "world text", "t5"]
NETWORKS += [pytest.param(name, marks=pytest.mark.slow) for name in ("clip", "stable_diffusion", "deepfloyd_if")]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_adapters_is_what_is_exported_and_learns_as_that_would(name):
    network, inputs, targets = case(name)
    frozen = {"network": tiny.random_params(network.init, *inputs, seed=3)["params"]}
    chosen = select(targets, params=frozen)
    assert all(any(path in select((target,), params=frozen) for path in chosen) for target in targets)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.2, a.shape), jnp.float32), LORA.init({}, chosen, None, jax.random.key(0))
    )

    def outputs_and_gradients(complete):
        def loss(trained):
            outputs = jax.tree.leaves(adapters.apply(network, complete(frozen, trained, None)["network"], *inputs))[0]
            return jnp.sum(jnp.sin(outputs)), outputs

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
        return outputs, flatten(gradients)

    (outputs, gradients), (expected, expected_gradients) = map(outputs_and_gradients, (LORA.apply, LORA.export))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    largest = max(np.abs(g).max() for g in expected_gradients.values())
    assert largest > 0
    for path, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], gradient, rtol=0, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
def test_no_gradient_of_a_frozen_kernel_is_among_a_steps_operations():
    """It would be a third of them, where the forward pass, and the gradients of inputs, are a third each."""

    def compiled(**changes):
        params, examples = jax.eval_shape(worker.start), {"instance": tiny.examples()}
        config = tiny.training(batch_size=8, **changes)
        step = program.stage_program(worker.STAGE, tiny.family(), params, examples, config, 0).lower().compile()
        return step.cost_analysis()["flops"], step.memory_analysis().temp_size_in_bytes

    flops, temporaries = compiled()
    of_attention = compiled(**ADAPTERS_ONLY)
    assert of_attention[0] < 0.72 * flops and of_attention[1] < 0.8 * temporaries
    of_all = compiled(**ADAPTERS_ONLY | {"lora__rank": 2, "lora__targets": worker.EVERY_KERNEL})
    assert of_all[0] < 0.72 * flops


def metric(name, directory):
    return [json.loads(line)[name] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_adapters_of_the_embedded_network_learn_and_nothing_else_moves(tmp_path):
    length = {"num_steps": 40, "checkpoint_every": 40, "batch_size": 8, "optimizer__learning_rate": 5e-2}
    state = worker.train(tmp_path, prior__form="frozen_prediction", **length, **ADAPTERS_ONLY)
    assert set(state.params) == {LORA.name} and state.token_counts is None
    moved = {path.rpartition("/")[0] for path, up in flatten(state.params[LORA.name]).items() if np.any(up)}
    start, tuned = (flatten(p) for p in (worker.start(), trained_params(trained_of(state), worker.start())))
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
def test_eight_devices_train_the_adapters_that_one_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "make_optimizer", None)  # put back after the worker's change
    expected = flatten(worker.train_adapters(tmp_path / "one", (1, 1, 1)).params)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.training.worker", "train_adapters_on_eight_devices", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=1800, check=True)
    with np.load(tmp_path / "params.npz") as file:
        found = dict(file)
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-5, err_msg=path)
    assert max(np.abs(a).max() for path, a in found.items() if path.endswith("up")) > 0.01  # a thousand tolerances


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
    assert trained_of(state).params[LORA.name].keys() == {"denoiser", "text_encoder"}
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (state.params, state.ema)))

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.families.autoregressive import TokenSampling, divergence
from personalize_jax.families.batch import Batch
from personalize_jax.families.objective import INSTANCE, PRIOR, Group, Objective
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.models.adapters import Adapted
from personalize_jax.models.params import flatten, unflatten
from personalize_jax.models.picture_tokenizer import codes_of, ids_of
from personalize_jax.pipeline import load_pipeline, save_pipeline
from personalize_jax.runtime.errors import UserError
from tests import tiny, tiny_autoregressive

ANCESTRAL = TokenSampling("ancestral", 4, 1.0)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_autoregressive.pipeline()


def every_picture(stage):
    """The codes of all pictures that a stage can sample."""
    V, N = stage.codec.vocab_size, stage.network.length
    ids = np.stack(np.meshgrid(*[np.arange(V)] * N, indexing="ij"), -1).reshape(-1, *stage.shape[:2])
    return codes_of(ids, stage.codec.levels)


def repeated(cond, count):
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), cond)


@partial(jax.jit, static_argnums=0)
def errors(stage, params, codes, cond):
    return stage.errors(stage.apply(params, codes, cond), codes)


def log_probabilities(pipeline, prompt, codes):
    """Log-probability of each picture, by the loss of each token."""
    cond = repeated(pipeline.condition([prompt]), len(codes))
    return -np.sum(errors(pipeline.stages[0], pipeline.params["base"], codes, cond), axis=(1, 2))


@partial(jax.jit, static_argnames="sampling")
def sample(params, keys, cond, null, sampling):
    return tiny_autoregressive.pipeline().stages[0].sample(params, keys, cond, null, sampling)


def loss_of(pipeline, objective, batches, params=None, frozen=None):
    networks = pipeline.networks("base")
    loss = partial(pipeline.family.loss, pipeline.stages[0], objective)
    return jax.jit(loss)(params or networks, frozen or networks, batches, jax.random.key(0))


def batch(pipeline, codes, prompts, weight=None):
    return Batch(jnp.asarray(codes), pipeline.family.tokenize(prompts), None, None, weight)


@pytest.mark.parametrize("prompt", ["a dog", ""])
def test_the_probabilities_of_all_pictures_sum_to_one(pipeline, prompt):
    codes = every_picture(pipeline.stages[0])
    assert len(codes) == 6**4
    np.testing.assert_allclose(np.exp(log_probabilities(pipeline, prompt, codes)).sum(), 1, rtol=1e-5)


def test_pictures_are_sampled_with_their_probabilities(pipeline):
    """The first two tokens of 4,096 pictures, whose joint probabilities the likelihood of all pictures gives."""
    stage, count = pipeline.stages[0], 4096
    codes = every_picture(stage)
    p = np.exp(log_probabilities(pipeline, "a dog", codes)).reshape(36, 36).sum(1)
    cond = repeated(pipeline.condition(["a dog"]), count)
    keys = jax.random.split(jax.random.key(0), count)
    sampled = sample(pipeline.params["base"], keys, cond, cond, ANCESTRAL)
    ids = ids_of(sampled, stage.codec.levels).reshape(count, 4)
    shares = np.bincount(ids[:, 0] * 6 + ids[:, 1], minlength=36) / count
    np.testing.assert_allclose(shares, p, atol=5 * np.sqrt(p.max() / count))
    assert np.abs(shares - p).sum() < 0.5 * np.abs(shares - 1 / 36).sum()  # and not with equal ones


def test_a_picture_depends_on_its_key_alone(pipeline):
    stage = pipeline.stages[0]
    keys = jax.random.split(jax.random.key(1), 4)
    cond = pipeline.condition(["a dog", "a red teapot on the beach", "a dog", "a dog"])
    null = repeated(pipeline.condition([""]), 4)
    one = sample(pipeline.params["base"], keys, cond, null, stage.sampling)
    order = np.array([2, 1, 0, 3])
    other = sample(pipeline.params["base"], keys[order], jax.tree.map(lambda a: a[order], cond), null, stage.sampling)
    np.testing.assert_array_equal(one[order], other)
    assert one.shape == (4, 2, 2, 2)


def test_guidance_moves_towards_the_prompt(pipeline):
    """At a scale of w the logits are w times as far from the unconditional ones; at 0 they are these."""
    count = 64
    keys = jax.random.split(jax.random.key(2), count)
    cond, null = (repeated(pipeline.condition([prompt]), count) for prompt in ("a dog", ""))
    unguided = sample(pipeline.params["base"], keys, cond, null, ANCESTRAL)
    swapped = sample(pipeline.params["base"], keys, null, cond, ANCESTRAL._replace(guidance_scale=0.0))
    np.testing.assert_array_equal(swapped, unguided)
    far = sample(pipeline.params["base"], keys, cond, null, ANCESTRAL._replace(guidance_scale=8.0))
    difference = log_probabilities(pipeline, "a dog", far) - log_probabilities(pipeline, "", far)
    before = log_probabilities(pipeline, "a dog", unguided) - log_probabilities(pipeline, "", unguided)
    assert difference.mean() > before.mean()


def test_truncated_sampling_leaves_the_likeliest_tokens():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    keys = jax.random.split(jax.random.key(0), 500)

    def shares(**settings):
        sampling = TokenSampling("truncated", 4, 1.0, **settings)
        return np.bincount(jax.vmap(sampling.next_token, (0, None))(keys, logits), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.07)
    np.testing.assert_array_equal(shares(top_k=1), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(top_k=9, temperature=0.5), np.array([1, 16, 4, 9]) / 30, atol=0.07)


def test_logits_that_are_not_finite_give_no_picture(pipeline):
    stage, broken = pipeline.stages[0], jax.tree.map(jnp.copy, pipeline.params["base"])
    broken["head"]["bias"] = broken["head"]["bias"].at[3].set(jnp.nan)
    cond = pipeline.condition(["a dog"])
    keys = jax.random.split(jax.random.key(0), 1)
    assert np.isnan(sample(broken, keys, cond, cond, stage.sampling)).all()


def test_the_loss_is_the_mean_likelihood_of_each_group_weighted(pipeline):
    rng = np.random.default_rng(0)
    codes = codes_of(rng.integers(0, 6, (2, 3, 2, 2)), (3, 2))
    groups = Group(INSTANCE), Group(PRIOR, 0.25)
    batches = {group.name: batch(pipeline, x, tiny.CAPTIONS) for group, x in zip(groups, codes, strict=True)}
    loss, metrics = loss_of(pipeline, Objective(groups, "none"), batches)
    means = []
    for x in codes:
        each = [log_probabilities(pipeline, p, x[i : i + 1])[0] for i, p in enumerate(tiny.CAPTIONS)]
        means.append(-np.mean(each) / 4)
    np.testing.assert_allclose([metrics["instance_loss"], metrics["prior_loss"]], means, rtol=1e-5)
    np.testing.assert_allclose(loss, means[0] + 0.25 * means[1], rtol=1e-5)


def test_pixels_weigh_in_the_token_that_shows_them(pipeline):
    codes = codes_of(np.random.default_rng(1).integers(0, 6, (1, 2, 2)), (3, 2))
    objective = Objective((Group(INSTANCE),), "none")
    weight = np.zeros((1, 8, 8, 1), np.float32)
    weight[:, :4, 4:] = 2.0
    weight[:, 4:, :4] = np.arange(16).reshape(4, 4, 1)
    loss, _ = loss_of(pipeline, objective, {INSTANCE: batch(pipeline, codes, ["a dog"], jnp.asarray(weight))})
    stage = pipeline.stages[0]
    error = errors(stage, pipeline.params["base"], codes, pipeline.condition(["a dog"]))[0]
    np.testing.assert_allclose(loss, (2 * error[0, 1] + 7.5 * error[1, 0]) / 4, rtol=1e-5)


def prior_objective(form):
    return Objective((Group(PRIOR, 1.0, PRIOR_FORMS[form]),), "none")


def test_the_frozen_distribution_pulls_nowhere_where_the_model_equals_it(pipeline):
    codes = codes_of(np.random.default_rng(2).integers(0, 6, (3, 2, 2)), (3, 2))
    batches = {PRIOR: batch(pipeline, codes, tiny.CAPTIONS)}

    def gradient_of(form):
        loss = partial(pipeline.family.loss, pipeline.stages[0], prior_objective(form))
        return jax.jit(jax.value_and_grad(lambda params: loss(params, networks, batches, jax.random.key(0))[0]))

    networks = pipeline.networks("base")
    frozen, sampled = gradient_of("frozen_prediction"), gradient_of("sampled")
    value, pull = frozen(networks)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=1e-6), pull)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(sampled(networks)[1])) > 0.01
    moved = jax.tree.map(lambda a: 1.1 * a, networks)
    value, pull = frozen(moved)
    assert value > 0 and max(float(abs(g).max()) for g in jax.tree.leaves(pull)) > 1e-3
    nearer = jax.tree.map(lambda a, g: a - 1e-2 * g, moved, pull)
    assert frozen(nearer)[0] < value


def test_divergence_is_cross_entropy_less_entropy():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    expected = np.sum(p * np.log(p / q))
    np.testing.assert_allclose(divergence(jnp.log(p) + 3, jnp.log(q) - 1), expected, rtol=1e-6)


def test_adapters_beside_the_attention_change_the_likelihood(pipeline):
    """As kernels do with the product of the factors added."""
    stage, params = pipeline.stages[0], pipeline.params["base"]
    rng = np.random.default_rng(3)
    down, up = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 3), (3, 2, 8)))
    path = "layers_0/self_attention/value/kernel"
    merged = {**(flat := flatten(params)), path: flat[path] + jnp.tensordot(down, up, axes=1)}
    adapted = Adapted(params, unflatten({f"{path}/down": down, f"{path}/up": up}))
    codes, cond = codes_of(rng.integers(0, 6, (1, 2, 2)), (3, 2)), pipeline.condition(["a dog"])
    plain, beside, added = (errors(stage, p, codes, cond) for p in (params, adapted, unflatten(merged)))
    np.testing.assert_allclose(beside, added, rtol=1e-4, atol=1e-5)
    assert np.abs(beside - plain).max() > 0.1


def test_latents_are_codes_and_pictures_theirs(pipeline):
    x = np.random.default_rng(4).integers(0, 256, (2, 8, 8, 3), np.uint8)
    mean, std = pipeline.to_latents(x)
    assert mean.shape == (2, 2, 2, 2) and not std.any()
    codec, params = pipeline.stages[0].codec, {"params": pipeline.params["picture_tokenizer"]}
    np.testing.assert_array_equal(codes_of(ids_of(mean, (3, 2)), (3, 2)), mean)
    through = codec.apply(params, x / np.float32(127.5) - 1)
    np.testing.assert_allclose(pipeline.family.to_pictures(pipeline.params, mean), through, atol=1e-5)


def test_it_comes_back_from_its_folder_as_it_was(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "folder", np.float32)
    loaded = load_pipeline(tmp_path / "folder")
    assert loaded.family == pipeline.family and loaded.fingerprint == pipeline.fingerprint
    np.testing.assert_array_equal(loaded.sample(["a dog"], [3])[-1], pipeline.sample(["a dog"], [3])[-1])
    other = pipeline.replace_sampling(base=pipeline.stages[0].sampling._replace(top_k=2))
    save_pipeline(other, tmp_path / "other", np.float32)
    assert load_pipeline(tmp_path / "other").stages[0].sampling.top_k == 2
    index = tmp_path / "folder" / "autoregressive.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"stages": [tiny_autoregressive.TRANSFORMER]}))
    with pytest.raises(UserError, match="base needs a picture tokenizer; pretrain that first"):
        load_pipeline(tmp_path / "folder")


def test_all_parameters_have_their_shapes(pipeline):
    shapes = pipeline.family.shapes()
    assert jax.tree.map(lambda a: a.shape, dict(pipeline.params)) == jax.tree.map(lambda s: s.shape, shapes)


def test_what_does_not_fit_is_refused(pipeline):
    stage = pipeline.stages[0]
    with pytest.raises(UserError, match="num_steps=24, and each of its 4 tokens takes a step; give 4"):
        stage.times(ANCESTRAL._replace(num_steps=24))
    codes = codes_of(np.zeros((1, 2, 2), int), (3, 2))
    for noisy in ({"weighting": "min_snr"}, {"weighting": "none", "offset_noise": 0.1}):
        with pytest.raises(UserError, match="which are about noise"):
            loss_of(pipeline, Objective((Group(INSTANCE),), **noisy), {INSTANCE: batch(pipeline, codes, ["a dog"])})
    untrained = dataclasses.replace(pipeline, family=pipeline.family.with_stage(tiny_autoregressive.TOKENIZER))
    with pytest.raises(UserError, match="has a picture tokenizer and no transformer yet"):
        untrained.sample(["a dog"], [0])

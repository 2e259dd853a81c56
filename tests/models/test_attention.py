import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models import attention
from personalize_jax.models.attention import CACHED, attend, over
from personalize_jax.models.normalization import GroupNorm
from personalize_jax.planning import hlo, slices
from personalize_jax.planning.exchanges import collectives
from personalize_jax.planning.loops import count_runs
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError


def reference(q, k, v):
    """The definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", p / p.sum(-1, keepdims=True), v)


def random(B, L, S, N, D):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, n, N, D)), jnp.float32) for n in (L, S, S)]


@pytest.mark.parametrize("shape", [(2, 7, 5, 3, 4), (1, 600, 620, 2, 8)])
@pytest.mark.parametrize("implementation", ["xla", "heads"])
def test_attention_is_its_definition(shape, implementation):
    q, k, v = random(*shape)
    np.testing.assert_allclose(attend(q, k, v, implementation), reference(q, k, v), atol=2e-6)


def test_one_head_at_a_time_has_the_gradients_of_all_at_once():
    q, k, v = random(1, 600, 620, 2, 8)
    assert CACHED < 600 * 620
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def gradients(implementation):
        return jax.grad(lambda *x: jnp.sum(weight * attend(*x, implementation)), argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(gradients("heads"), gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.fixture
def interpreted(monkeypatch):
    """The flash kernel as any machine runs it."""
    make = attention.splash.make_splash_mha_single_device
    monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))


@pytest.mark.parametrize(
    ("keys", "block"),
    [(300, 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((384, 128), (300, 512), (640, 512)))],
)
def test_the_flash_kernel_has_the_values_and_gradients_of_attention(keys, block, interpreted, monkeypatch):
    """In one block or several, which sequences fill or not."""
    monkeypatch.setattr(attention, "MAX_BLOCK", block)
    q, k, v = random(2, 300, keys, 2, 40)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def function(implementation):
        def weighted(*qkv):
            out = attend(*qkv, implementation)
            return jnp.sum(weight * out), out

        return jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    gradients, out = function("flash")
    np.testing.assert_allclose(out, reference(q, k, v), atol=5e-6)
    for ours, theirs in zip(gradients, function("xla")[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_short_texts_are_attended_without_a_kernel():
    q, k, v = random(1, 600, 77, 2, 8)
    assert "pallas" not in str(jax.make_jaxpr(lambda *qkv: attend(*qkv, "flash"))(q, k, v))
    assert "pallas" in str(jax.make_jaxpr(lambda q: attend(q, q, q, "flash"))(q))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4-8", "v5e-1", "v5p-8", "v6e-1"])
def test_the_flash_kernels_blocks_fit_every_chip(chip):
    """Those of Stable Diffusion 1.5 and 2.1 and of DeepFloyd IF; plans stop before a kernel's machine code is made."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    device = jax.sharding.SingleDeviceSharding(slices.devices(slices.parse(chip))[0])
    for L, S, N, D in ((9216, 9216, 5, 64), (4096, 4096, 8, 40), (1024, 1024, 8, 160), (4096, 4173, 6, 64)):
        q, k = (jax.ShapeDtypeStruct((2, n, N, D), jnp.bfloat16, sharding=device) for n in (L, S))
        loss = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, "flash").astype(jnp.float32) ** 2), argnums=(0, 1, 2))
        jax.jit(loss).lower(q, k, k).compile()


@pytest.mark.slow
def test_what_the_flash_kernel_yields_is_kept_when_activations_are_computed_again():
    """So that it runs once forward and once backward; compiled for a chip, not run."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    chip = jax.sharding.SingleDeviceSharding(slices.devices(slices.parse("v5e-1"))[0])
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16, sharding=chip)

    def kernels(policy):
        loss = jax.checkpoint(lambda x: jnp.sum(attend(jnp.sin(x), x, x, "flash").astype(jnp.float32)), policy=policy)
        return jax.jit(jax.value_and_grad(loss)).lower(x).compile().as_text().count('"tpu_custom_call"')

    assert kernels(None) == 3
    assert kernels(jax.checkpoint_policies.save_only_these_names(attention.SAVED)) == 2


@pytest.mark.parametrize("sizes", [(1, 2, 2), pytest.param((2, 2, 1), marks=pytest.mark.slow)])
def test_several_chips_attend_with_the_flash_kernel_each_to_its_own_pictures_and_heads(sizes):
    """Nothing is exchanged but weights and, summed over pictures, their gradients; compiled for chips, not run."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    B, L, N, D = 4, 1024, 4, 64
    rules = (("", ("tensor", "fsdp")),)
    mesh = sharding.make_mesh(sizes, B, slices.devices(slices.parse("v5e:2x2")))
    kernel = jax.ShapeDtypeStruct((N * D, N * D), jnp.float32)
    params = sharding.placed(dict.fromkeys("qkv", kernel), rules, mesh)
    x = jax.ShapeDtypeStruct((B, L, N * D), jnp.bfloat16, sharding=jax.NamedSharding(mesh, sharding.BATCH))

    def loss(params, x):
        whole = sharding.gathered(params, rules, mesh)
        q, k, v = ((x @ whole[name].astype(x.dtype)).reshape(B, L, N, D) for name in "qkv")
        with over(mesh):
            return jnp.sum(jax.checkpoint(lambda *qkv: attend(*qkv, "flash"))(q, k, v).astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 2
    module = hlo.read(text)
    exchanged = collectives(module, count_runs(module))
    assert exchanged and {e.group for e in exchanged} <= {2, 4}
    weights, half_of_the_queries = 3 * 4 * (N * D) ** 2, B * L * N * D
    assert max(e.bytes for e in exchanged) <= weights < half_of_the_queries


def test_an_unknown_implementation_is_named():
    with pytest.raises(UserError, match="attention is 'fast'; give one of auto, xla, cudnn, flash, heads"):
        attend(*random(1, 2, 2, 1, 4), "fast")


def test_group_normalisation_has_no_mean_and_unit_variance_in_each_group():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 5, 4, 12)), jnp.float32)
    norm = GroupNorm(3, 1e-6)
    y = norm.apply(norm.init(jax.random.key(0), x), x).reshape(2, 20, 3, 4)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=5e-6)
    np.testing.assert_allclose(y.var((1, 3)), 1, atol=1e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

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


def test_the_flash_kernels_padding_counts_for_nothing():
    q, k, v = random(2, 9, 12, 2, 8)
    with pltpu.force_tpu_interpret_mode():
        out = attend(q, k, v, "flash")
    np.testing.assert_allclose(out, reference(q, k, v), atol=5e-6)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 1)])
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
    assert "tpu_custom_call" in text
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

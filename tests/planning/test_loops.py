"""Operations of programs with loops against what their rounds must come to."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from personalize_jax.planning import compiler, slices

SIDE = 256
PRODUCT = 2 * SIDE**3


def analysed(function, *shapes, tpu=True):
    if tpu:
        pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e-1")) if tpu else jax.devices()[:1]
    one = jax.sharding.SingleDeviceSharding(devices[0])
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one) for shape in shapes]
    return compiler.analyse(jax.jit(function).lower(*inputs), devices)


def seven(x, w):
    return lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)


def by_fours(x, w):
    """From 2, by 4, up to 19: five rounds."""
    return lax.while_loop(lambda s: s[0] <= 19, lambda s: (s[0] + 4, jnp.tanh(s[1] @ w)), (2, x))[1]


def downwards(x, w):
    return lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 3, jnp.tanh(s[1] @ w)), (12, x))[1]


def nested(x, w):
    return lax.fori_loop(0, 5, lambda _, x: seven(x, w) + 1, x)


def one_after_the_other(x, w):
    """The second starts where the first ends."""
    i, x = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))
    return lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 1, jnp.sin(s[1] @ w)), (i, x))[1]


def in_a_branch(x, w):
    return lax.cond(x[0, 0] > 0, lambda: nested(x, w), lambda: x)


def over_weights(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x)), x, jnp.stack([w, w + 1, w + 2]))


@pytest.mark.parametrize("tpu", [True, False], ids=["tpu", "cpu"])
@pytest.mark.parametrize(
    ("function", "products"),
    [
        (seven, 7),
        (by_fours, 5),
        (downwards, 4),
        (nested, 5 * 7),
        (one_after_the_other, 3 + 6),
        (in_a_branch, 5 * 7),
        (over_weights, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_loop_is_counted_as_often_as_it_runs(function, products, tpu):
    found = analysed(function, (SIDE, SIDE), (SIDE, SIDE), tpu=tpu)
    assert found.flops == pytest.approx(products * PRODUCT, rel=0.02)
    assert found.unknown_loops == 0


def test_a_loop_counts_like_the_same_rounds_written_out():
    def written_out(x, w):
        for _ in range(5):
            for _ in range(7):
                x = jnp.tanh(x @ w)
            x = x + 1
        return x

    x = jnp.ones((SIDE, SIDE))
    counted = jax.jit(written_out).lower(x, x).compile().cost_analysis()["flops"]
    assert analysed(nested, x.shape, x.shape, tpu=False).flops == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("tpu", [True, False], ids=["tpu", "cpu"])
def test_a_loop_that_depends_on_data_is_told_and_counted_once(tpu):
    def until_large(x, w):
        return lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: jnp.tanh(x @ w), seven(x, w))

    found = analysed(until_large, (SIDE, SIDE), (SIDE, SIDE), tpu=tpu)
    assert found.unknown_loops == 1
    assert found.flops == pytest.approx(8 * PRODUCT, rel=0.02)


def test_a_loop_whose_length_differs_between_rounds_is_told():
    def triangle(x, w):
        return lax.fori_loop(0, 4, lambda i, x: lax.fori_loop(0, i, lambda _, x: jnp.tanh(x @ w), x) + 1, x)

    assert analysed(triangle, (SIDE, SIDE), (SIDE, SIDE)).unknown_loops == 1

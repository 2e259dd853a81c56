import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models import adapters
from personalize_jax.models.adapters import Adapted
from personalize_jax.models.convolution import Conv
from personalize_jax.runtime.errors import UserError

RANK = 2


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Layer(nn.Module):
    """A network of one layer, run again in the backward pass if asked."""

    layer: nn.Module
    remat: bool = False

    def __call__(self, x):
        return (nn.remat(lambda self, x: self.layer(x)) if self.remat else lambda self, x: self.layer(x))(self, x)


PICTURE, SEQUENCE, HEADS = normal(2, 7, 6, 4, seed=1), normal(2, 5, 4, seed=2), normal(2, 5, 2, 3, seed=3)
# By name: layer, input, and the kernel's number of input dimensions.
LAYERS = {
    "linear": (nn.Dense(6), SEQUENCE, 1),
    "linear without bias": (nn.Dense(6, use_bias=False), SEQUENCE, 1),
    "to heads": (nn.DenseGeneral((2, 3)), SEQUENCE, 1),
    "from heads": (nn.DenseGeneral(4, axis=(-2, -1)), HEADS, 2),
    "convolution": (Conv(6), PICTURE, 3),
    "1x1 convolution": (Conv(6, size=1), PICTURE, 3),
    "convolution with stride and padding": (Conv(6, stride=2, padding=((0, 1), (0, 1))), PICTURE, 3),
    "Flax's convolution": (nn.Conv(6, (3, 3)), PICTURE, 3),
    "Flax's convolution with stride": (nn.Conv(6, (2, 2), strides=(2, 2)), PICTURE, 3),
}


def adapted(network, x, input_dims):
    """Random parameters and adapters of a `Layer`, and the parameters with W + down up."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]["layer"]
    params = {name: normal(*a.shape, seed=a.ndim) for name, a in shapes.items()}
    shape = params["kernel"].shape
    factors = {"down": normal(*shape[:input_dims], RANK, seed=5), "up": normal(RANK, *shape[input_dims:], seed=6)}
    merged = params | {"kernel": params["kernel"] + jnp.tensordot(factors["down"], factors["up"], 1)}
    return {"layer": params}, {"layer": {"kernel": factors}}, {"layer": merged}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("remat", [False, True])
def test_a_layer_with_an_adapter_is_the_layer_with_the_product_added_to_its_kernel(name, remat):
    layer, x, input_dims = LAYERS[name]
    network = Layer(layer, remat)
    params, beside, merged = adapted(network, x, input_dims)

    @jax.jit
    def outputs_and_gradients(beside, x):
        def loss(beside, x):
            y = adapters.apply(network, Adapted(params, beside), x)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(beside, x)
        return y, gradients

    y, (of_factors, of_x) = outputs_and_gradients(beside, x)
    expected, pull_back = jax.vjp(lambda params, x: network.apply({"params": params}, x), merged, x)
    of_kernel, expected_of_x = pull_back(jnp.cos(expected))
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(of_x, expected_of_x, atol=1e-5 * np.abs(expected_of_x).max())
    # By the chain rule through W + down up.
    _, to_factors = jax.vjp(lambda f: jnp.tensordot(f["down"], f["up"], 1), beside["layer"]["kernel"])
    (expected_of_factors,) = to_factors(of_kernel["layer"]["kernel"])
    for factor, of_factor in of_factors["layer"]["kernel"].items():
        scale = np.abs(expected_of_factors[factor]).max()
        np.testing.assert_allclose(of_factor, expected_of_factors[factor], atol=1e-5 * scale, err_msg=factor)


def shapes_within(jaxpr):
    """Shapes of all that a program computes, in its parts as well."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(parameter := getattr(parameter, "jaxpr", parameter), "eqns"):
                yield from shapes_within(parameter)


@pytest.mark.parametrize("remat", [False, True])
def test_nothing_of_the_kernels_shape_is_computed(remat):
    network, x = Layer(nn.Dense(6), remat), normal(2, 5, 4)
    params, beside, _ = adapted(network, x, 1)

    def gradient(of):
        def loss(beside, params):
            return jnp.sum(jnp.sin(adapters.apply(network, Adapted(params, beside), x)))

        return set(shapes_within(jax.make_jaxpr(jax.grad(loss, of))(beside, params).jaxpr))

    assert {(4, RANK), (RANK, 6)} <= gradient(0)
    assert (4, 6) not in gradient(0) and (4, 6) in gradient(1)


def test_an_adapter_works_in_its_layers_dtype():
    network = Layer(nn.Dense(6, dtype=jnp.bfloat16))
    params, beside, merged = adapted(network, SEQUENCE, 1)
    y = adapters.apply(network, Adapted(params, beside), SEQUENCE)
    assert y.dtype == jnp.bfloat16
    expected = network.apply({"params": merged}, SEQUENCE)
    np.testing.assert_allclose(y.astype(float), expected.astype(float), atol=0.03 * np.abs(expected).max())


def test_plain_parameters_run_the_network_as_it_is():
    network = Layer(nn.Dense(6))
    params, _, _ = adapted(network, SEQUENCE, 1)
    expected = network.apply({"params": params}, SEQUENCE)
    np.testing.assert_array_equal(adapters.apply(network, params, SEQUENCE), expected)


class Scaled(nn.Module):
    """No linear layer: its kernel is multiplied elementwise."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("kernel", nn.initializers.ones, (5, 4))


@pytest.mark.parametrize(
    ("layer", "path", "sentence"),
    [
        (nn.Dense(6), ("elsewhere", "kernel"), "'elsewhere/kernel' is beside no layer that the network runs"),
        (nn.Dense(6), ("layer", "bias"), "'layer/bias' is beside no layer that the network runs"),
        (Scaled(), ("layer", "kernel"), r"'layer/kernel' has the output dimensions \(6,\), and its layer has \(\)"),
        (
            nn.Dense(7),
            ("layer", "kernel"),
            r"'layer/kernel' has the output dimensions \(6,\), and its layer has \(7,\)",
        ),
    ],
)
def test_an_adapter_beside_no_layer_is_refused_by_name(layer, path, sentence):
    network, factors = Layer(layer), {"down": normal(4, RANK), "up": normal(RANK, 6)}
    params = network.init(jax.random.key(0), SEQUENCE)["params"]
    with pytest.raises(UserError, match=sentence):
        adapters.apply(network, Adapted(params, {path[0]: {path[1]: factors}}), SEQUENCE)

r"""Low-rank adapters beside the layers of a network, which knows nothing of them.

An adapted layer gives layer(x) + (x down) up (Hu et al. 2021, "LoRA", eq. 3, with alpha = r, so that nothing scales the
product): neither W + down up nor a gradient of that size is ever formed. The adapters of
{"to_q": {"kernel": W}} are {"to_q": {"kernel": {"down": ..., "up": ...}}}, a collection of variables beside "params".
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from personalize_jax.models.params import Params, flatten
from personalize_jax.runtime.errors import UserError

_COLLECTION = "adapters"


class Network(Protocol):
    """A network: a Flax module, compared and hashed by value."""

    def init(self, key: Array, /, *inputs: Any) -> Mapping[str, Params]:
        """Random variables, with the parameters as "params"."""

    def apply(self, variables: Mapping[str, Params], /, *inputs: Any) -> Any:
        """The network's outputs."""


class Adapted(NamedTuple):
    """Parameters of a network, with adapters beside some of its layers.

    Attributes:
        params: the parameters.
        adapters: {"down": ..., "up": ...} at the paths of the kernels that they are for. down has the kernel's input
            dimensions and r as its last, up has r as its first and the kernel's output dimensions.
    """

    params: Params
    adapters: Params


def apply(network: Network, params: Params | Adapted, *inputs: Array) -> Any:
    """Run a network; traceable.

    Args:
        network: the network.
        params: its parameters, with or without adapters.
        *inputs: the network's inputs.

    Returns:
        The network's outputs.

    Raises:
        UserError: an adapter belongs to no layer that the network runs, or its layer's outputs have other dimensions
            than the adapter's.
    """
    if not isinstance(params, Adapted):
        return network.apply({"params": params}, *inputs)
    adapted = set()

    def add_adapter(call: Callable, args: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        y, layer = call(*args, **options), context.module
        if context.method_name != "__call__" or not layer.has_variable(_COLLECTION, "kernel"):
            return y
        path = "/".join((*layer.path, "kernel"))
        adapted.add(path)
        return y + _low_rank(layer, path, layer.get_variable(_COLLECTION, "kernel"), *args, **options)

    with nn.intercept_methods(add_adapter):
        outputs = network.apply({"params": params.params, _COLLECTION: params.adapters}, *inputs)
    if unused := {path.rpartition("/")[0] for path in flatten(params.adapters)} - adapted:
        raise UserError(
            f"The adapter of {min(unused)!r} is beside no layer that the network runs; "
            "adapt kernels of linear layers and convolutions only."
        )
    return outputs


def _low_rank(layer: nn.Module, path: str, factors: Params, *inputs: Array, **options: Any) -> Array:
    """(x down) up, where x down is the output of a layer like the given one with down as its kernel."""
    down, up = factors["down"], factors["up"]
    rank, *outputs = up.shape
    features = np.atleast_1d(getattr(layer, "features", ())).tolist()
    if features != outputs:
        raise UserError(
            f"The adapter of {path!r} has the output dimensions {tuple(outputs)}, and its layer has {tuple(features)}; "
            "give lora.targets the kernel's number of input dimensions."
        )
    narrow = layer.clone(features=rank)
    params = {"kernel": down, "bias": jnp.zeros(rank)}  # a layer without a bias leaves it alone
    h: Any = narrow.apply({"params": params}, *inputs, **options)
    return jnp.tensordot(h, up.astype(h.dtype), axes=1)

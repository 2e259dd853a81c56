"""Weights of PyTorch modules under our names, for tests of parity."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import torch

from personalize_jax.models.params import Params, flatten, unflatten


def port(state_dict: Mapping[str, torch.Tensor], abstract: Params) -> Params:
    """Give torch's tensors the paths and layouts of `abstract`, which holds our shapes; both must match wholly."""
    expected = flatten(abstract)
    found = {}
    for name, tensor in state_dict.items():
        path = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).replace(".", "/")
        if path.endswith("weight"):
            leaves = (path.removesuffix("weight") + leaf for leaf in ("kernel", "scale", "embedding"))
            path = next((leaf for leaf in leaves if leaf in expected), path)
        array = tensor.detach().float().numpy()
        if path.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        found[path] = jnp.asarray(array)
    if found.keys() != expected.keys():
        raise ValueError(f"missing: {sorted(expected - found.keys())}, surplus: {sorted(found.keys() - expected)}")
    for path, array in found.items():
        if array.shape != expected[path].shape:
            raise ValueError(f"{path} is {array.shape} in torch and {expected[path].shape} here")
    return unflatten(found)


def scramble(module: torch.nn.Module, seed: int) -> None:
    """Draw all parameters anew, so that every one of them matters: biases too, and norms are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def count(abstract: Params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))

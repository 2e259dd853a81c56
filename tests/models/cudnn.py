"""Programs for NVIDIA's GPUs on machines without one: their calls of cuDNN are in their text before it is compiled."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from personalize_jax.models.attention import attend, over
from personalize_jax.runtime import sharding

VERSION = 91100
_CALL = re.compile(r"@__cudnn\$fmhaSoftmax(Backward)?\(.*?dimensions\\22: \[([^]]*)\].*?mask_type\\22: \\22(\w+)\\22")


def claim_a_gpu(patch, capability=(8, 0)):
    """JAX then believes to have found cuDNN and a GPU of that capability."""
    patch.setattr(fused, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: VERSION))
    patch.setattr(
        fused, "check_compute_capability", lambda least: capability >= tuple(int(part) for part in least.split("."))
    )


def lowered(function, *inputs):
    """The text of a jitted function's program for GPUs."""
    return function.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """How often a program calls cuDNN's attention, by (pass, B, N, L, S, mask)."""
    found = Counter()
    for backward, dimensions, mask in _CALL.findall(text):
        sizes = map(int, re.findall(r"22(\d+)\\", dimensions))
        found["backward" if backward else "forward", *sizes, mask] += 1
    return found


def gradients(*inputs):
    """The gradients of attention that is computed again in the backward pass."""
    loss = jax.checkpoint(lambda *x: attend(*x, "cudnn or xla").astype(jnp.float32).sum())
    return jax.grad(loss, (0, 1, 2))(*inputs)


def calls_of_each_device(sizes):
    """`calls` in attending to 7 keys with 8 queries of 4 heads in 8 pictures, on a mesh of all devices."""
    mesh = sharding.make_mesh(sizes)
    split = jax.NamedSharding(mesh, sharding.BATCH)
    inputs = [jax.ShapeDtypeStruct((8, length, 4, 16), jnp.bfloat16, sharding=split) for length in (8, 7, 7)]

    def function(*inputs):
        with over(mesh):
            return gradients(*inputs)

    return sorted(calls(lowered(jax.jit(function), *inputs)).items())


if __name__ == "__main__":
    claim_a_gpu(pytest.MonkeyPatch())
    print(json.dumps([calls_of_each_device(sizes) for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2))]))

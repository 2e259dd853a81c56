"""Softmax attention behind one function, computed by the kernel that the configuration names."""

import math
import re
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from personalize_jax.runtime.errors import UserError

Configured = Literal["xla", "cudnn", "flash", "heads"]  # what a configuration may name, beside "auto"
Implementation = Literal[Configured, "cudnn or xla"]
BLOCK, MAX_BLOCK = 128, 512  # the flash kernel's sequences are multiples of the first, its blocks at most the second
# The text of a compiled program gives a kernel's queries and keys, [B, N, L, D] or for one picture [N, L, D], after
# what tells its mask, and the name of the kernel a few lines later.
_OPERANDS = r"operand_layout_constraints=\{(?:s\d+\[[\d,]+\]\S* )*\w+\[([\d,]+)\]\S+ \w+\[([\d,]+)\]"
_KERNEL = re.compile(rf'"tpu_custom_call".*{_OPERANDS}(?:.*\n){{0,3}}?.*op_name="([^"]*)"')
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}  # the second computes all gradients
SAVED = "attention"  # the name of what the flash kernel's backward pass needs, for `jax.checkpoint`'s policies
MAX_KEYS = 3072  # in a block of the kernel's backward pass
CACHED = 512 * 512  # scores of a head that stay in a CPU core's cache
TENSOR = "tensor"  # the axis of a mesh that splits features, and with them heads; all others split the batch
CUDNN_HEADS = 128  # dimensions of a head that cuDNN takes in both passes on every GPU that it attends on; Hopper: 256
CUDNN_CAPABILITY = 8  # compute capability of the first of these GPUs, Ampere


def suited(implementation: str, platform: str, capability: str = "") -> str:
    """An implementation for "auto": one that does not write scores to memory, which those of large pictures exceed.

    It is "flash" on TPUs, "cudnn or xla" on GPUs that cuDNN attends on, and otherwise "xla".

    Args:
        implementation: "auto", or an implementation of `attend`, which is returned as it is.
        platform: "tpu", "gpu" or "cpu".
        capability: JAX's `compute_capability` of the device: "9.0" for an H100; other makers' are no numbers.
    """
    if implementation != "auto":
        return implementation
    if platform == "tpu":
        return "flash"
    version = re.fullmatch(r"(\d+)\.\d+", capability)
    return "cudnn or xla" if platform == "gpu" and version and int(version[1]) >= CUDNN_CAPABILITY else "xla"


def attend(q_BLND: Array, k_BSND: Array, v_BSND: Array, implementation: Implementation = "xla") -> Array:
    """softmax(q k^T / sqrt(D)) v for N heads of D dimensions each; the softmax is in float32.

    Args:
        q_BLND: queries.
        k_BSND: keys.
        v_BSND: values.
        implementation: "xla" runs everywhere and writes the L x S scores to memory; "cudnn" (GPU, bfloat16 or float16)
            and "flash" (TPU, a Pallas kernel) never do. "cudnn or xla" is the former wherever `fits_cudnn`. "heads"
            (CPU) holds the scores of one head at a time. On several devices "cudnn" and "flash" need their mesh, see
            `over`.

    Returns:
        [B, L, N, D].

    Raises:
        UserError: an unknown implementation, or what cuDNN cannot compute.
    """
    if implementation not in get_args(Implementation):
        raise UserError(f"attention is {implementation!r}; give one of auto, {', '.join(get_args(Configured))}.")
    if implementation == "cudnn or xla":
        implementation = "cudnn" if fits_cudnn(q_BLND) else "xla"
    if implementation == "cudnn":
        return _on_each_device(_cudnn_kernel, q_BLND, k_BSND, v_BSND)
    # The scores of a short text are smaller than the statistics that the flash kernel writes: there XLA is better.
    if implementation == "flash" and k_BSND.shape[1] > BLOCK:
        return _on_each_device(_flash_kernel, q_BLND, k_BSND, v_BSND)
    if implementation == "heads":
        return _by_heads(q_BLND, k_BSND, v_BSND)
    return jax.nn.dot_product_attention(q_BLND, k_BSND, v_BSND, implementation="xla")


def fits_cudnn(q_BLND: Array) -> bool:
    """Whether cuDNN attends with queries of such a dtype and such heads, forward and backward, from Ampere on."""
    D = q_BLND.shape[-1]
    return q_BLND.dtype in (jnp.bfloat16, jnp.float16) and D % 8 == 0 and D <= CUDNN_HEADS


def over(mesh: Mesh) -> jax.sharding.use_abstract_mesh:
    """Trace networks for a mesh: XLA splits everything except a kernel, which `attend` then splits itself.

    Args:
        mesh: its axis `TENSOR`, if there is one, splits heads; the others together split the batch, whose size is a
            multiple of theirs.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def flash_flops(program: str) -> float:
    """Operations of "flash" in a program for TPUs, which XLA does not count.

    Args:
        program: `compiled.as_text()`.
    """
    total = 0.0
    for queries, keys, name in _KERNEL.findall(program):
        products = next((count for kernel, count in _PRODUCTS.items() if kernel in name), 0)
        total += 2 * products * math.prod(map(int, queries.split(","))) * int(keys.split(",")[-2])
    return total


def _on_each_device(kernel: Callable[..., Array], q_BLND: Array, k_BSND: Array, v_BSND: Array) -> Array:
    """Run a kernel on each device with its pictures and heads, which attention never mixes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:  # 0 without a mesh
        return kernel(q_BLND, k_BSND, v_BSND)
    batch = tuple(axis for axis in mesh.axis_names if axis != TENSOR)
    heads = TENSOR if TENSOR in mesh.shape and q_BLND.shape[2] % mesh.shape[TENSOR] == 0 else None
    each = P(batch, None, heads, None)
    # The check would need the axes over which a kernel's results vary, which kernels do not declare.
    split = jax.shard_map(kernel, in_specs=(each, each, each), out_specs=each, check_vma=False)
    return split(q_BLND, k_BSND, v_BSND)


def _by_heads(q_BLND: Array, k_BSND: Array, v_BSND: Array) -> Array:
    B, L, N, D = q_BLND.shape
    q = jnp.swapaxes(q_BLND * D**-0.5, 1, 2).reshape(B * N, L, D)
    k, v = (jnp.moveaxis(x, 1, -1).reshape(B * N, D, -1) for x in (k_BSND, v_BSND))
    if L * k.shape[-1] > CACHED:
        out = jax.lax.map(lambda head: _one_head(*head), (q, k, v))
    else:
        out = jnp.matmul(jax.nn.softmax(_product(q, k)).astype(v.dtype), jnp.swapaxes(v, 1, 2))
    return jnp.swapaxes(out.reshape(B, N, L, D), 1, 2)


@jax.custom_vjp
def _one_head(q_LD: Array, k_DS: Array, v_DS: Array) -> Array:
    """softmax(q k) v^T, whose backward pass computes the scores again instead of keeping them.

    Keys and values come transposed so that no product, forward or backward, transposes a matrix of scores: XLA's CPU
    backend takes three times as long for those.
    """
    return _one_head_forward(q_LD, k_DS, v_DS)[0]


def _one_head_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _product(q, k)
    top_L1 = scores.max(1, keepdims=True)
    weights = jnp.exp(scores - top_L1)
    total_L1 = weights.sum(1, keepdims=True)
    out = (_product(weights.astype(v.dtype), v.T) / total_L1).astype(v.dtype)
    return out, (q, k, v, out, top_L1 + jnp.log(total_L1))


def _one_head_backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, logsumexp_L1 = saved
    p_LS = jnp.exp(_product(q, k) - logsumexp_L1)
    delta_L1 = (d_out * out).astype(jnp.float32).sum(1, keepdims=True)
    d_scores_LS = (p_LS * (_product(d_out, v) - delta_L1)).astype(q.dtype)
    d_q, d_k, d_v = _product(d_scores_LS, k.T), _product(q.T, d_scores_LS), _product(d_out.T, p_LS.astype(v.dtype))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_one_head.defvjp(_one_head_forward, _one_head_backward)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _cudnn_kernel(q_BLND: Array, k_BSND: Array, v_BSND: Array) -> Array:
    B, L, S = q_BLND.shape[0], q_BLND.shape[1], k_BSND.shape[1]
    # JAX refuses odd lengths in the backward pass, and CLIP's texts have 77 tokens: one more is added, and masked.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BLND, k_BSND, v_BSND))
    lengths = jnp.full((B,), L, jnp.int32), jnp.full((B,), S, jnp.int32)
    of_queries, of_keys = lengths if L % 2 or S % 2 else (None, None)
    try:
        out = jax.nn.dot_product_attention(
            q, k, v, query_seq_lengths=of_queries, key_value_seq_lengths=of_keys, implementation="cudnn"
        )
    except jax.errors.JaxRuntimeError:  # it was computed, and failed in that
        raise
    except RuntimeError as error:  # shapes or dtypes that are not implemented, or a library that is missing
        what = str(error).rstrip(".")
        raise UserError(f"attention is cudnn, which cannot compute this ({what}); give auto or xla.") from error
    return out[:, :L]


def _flash_kernel(q_BLND: Array, k_BSND: Array, v_BSND: Array) -> Array:
    L, S, N, D = *(x.shape[1] for x in (q_BLND, k_BSND)), *q_BLND.shape[2:]

    def prepare(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)

    q, k, v = prepare(q_BLND * D**-0.5), prepare(k_BSND), prepare(v_BSND)
    segments = None
    if k.shape[2] > S:  # a query attends to the keys of its own segment, 0: 1 is that of padding
        padding = (jnp.arange(k.shape[2]) >= S).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(q.shape[2], jnp.int32), kv=padding)
    everything = splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * N)
    kernel = splash.make_splash_mha_single_device(
        everything, block_sizes=_blocks(q.shape[2], k.shape[2]), residual_checkpoint_name=SAVED
    )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return jnp.swapaxes(out, 1, 2)[:, :L]


def _blocks(length: int, keys: int) -> splash.BlockSizes:
    """The largest blocks that divide the sequences and leave room in a chip's VMEM.

    The backward pass writes a part of the queries' gradient for each block of keys: so it goes through a larger block
    in several steps.
    """
    q, k = (_divisor(n, BLOCK, MAX_BLOCK) for n in (length, keys))
    block = _divisor(keys, k, MAX_KEYS)
    return splash.BlockSizes(q, k, k, q, block, k, use_fused_bwd_kernel=True)


def _divisor(n: int, unit: int, limit: int) -> int:
    """The largest multiple of a unit that divides n and is at most the limit."""
    return max(size for size in range(unit, limit + 1, unit) if n % size == 0)

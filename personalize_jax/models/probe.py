"""A small residual network that reads named properties of pictures."""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from personalize_jax.models.convolution import Conv


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=None, group_size=16, epsilon=1e-5, name=name)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, normalised before each; the second begins at zero."""

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H, W, C]."""
        channels = x_BHWC.shape[-1]
        h = Conv(channels, name="conv_in")(nn.silu(_norm("norm_in")(x_BHWC)))
        h = nn.silu(_norm("norm_out")(h))
        return x_BHWC + Conv(channels, kernel_init=nn.initializers.zeros_init(), name="conv_out")(h)


class ProbeNetwork(nn.Module):
    """Convolutions on three scales, then for each property attention to the places that show it.

    Every property pools the 8x8 features of the middle scale and the 4x4 features of the coarsest with attention
    weights of its own, as an object's material and its position show in different places of the picture.

    Attributes:
        properties: (name, number of outputs) of each property.
        patch: side of the patches that the picture is cut into first.
        channels: width of each scale, finest first.
        blocks: residual blocks of each scale.
        heads: attention maps of each property and scale.
    """

    properties: Sequence[tuple[str, int]]
    patch: int = 2
    channels: Sequence[int] = (32, 96, 192)
    blocks: Sequence[int] = (1, 2, 2)
    heads: int = 2

    @nn.compact
    def __call__(self, x_BHWC: Array) -> dict[str, Array]:
        """Read pictures.

        Args:
            x_BHWC: float32 [B, 32, 32, 3] in [-1, 1].

        Returns:
            By property name, outputs [B, n].
        """
        x = einops.rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch)
        x = Conv(self.channels[0], name="stem")(x)
        pooled = []
        for scale, (channels, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            if scale:
                x = Conv(channels, size=2, stride=2, padding=((0, 0), (0, 0)), name=f"downsample_{scale}")(x)
            for i in range(blocks):
                x = ResidualBlock(name=f"block_{scale}_{i}")(x)
            if scale:
                pooled.append(self._look(nn.silu(_norm(f"look_norm_{scale}")(x)), f"look_{scale}"))
        features_BPF = jnp.concatenate(pooled, axis=-1)
        return {name: nn.Dense(n, name=name)(features_BPF[:, p]) for p, (name, n) in enumerate(self.properties)}

    def _look(self, h_BHWC: Array, name: str) -> Array:
        """Attention pooling for P properties -> [B, P, heads * C]."""
        maps = nn.Dense(len(self.properties) * self.heads, name=name)(h_BHWC)
        maps = einops.rearrange(maps, "b h w (p k) -> b (h w) p k", k=self.heads)
        weights = nn.softmax(maps, axis=1)
        pooled = jnp.einsum("bnpk,bnc->bpkc", weights, einops.rearrange(h_BHWC, "b h w c -> b (h w) c"))
        return einops.rearrange(pooled, "b p k c -> b p (k c)")

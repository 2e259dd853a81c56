"""Signed distances of simple solids, and how to join them.

Points are tuples (x, y, z) of arrays. Distances are negative inside; they may underestimate the true distance, never
grossly overestimate it. After Inigo Quilez, "Distance functions" (iquilezles.org).
"""

from functools import reduce

import jax
import jax.numpy as jnp

Array = jax.Array
Scalar = Array | float
Vec = tuple[Scalar, Scalar, Scalar]
X, Y, Z = 0, 1, 2


def length(*components: Scalar) -> Array:
    """Euclidean length of a vector; the tiny term keeps the square root's argument positive."""
    return jnp.sqrt(sum(c * c for c in components) + 1e-9)


def lerp(a: Scalar, b: Scalar, t: Array) -> Array:
    """Linear interpolation from a (t = 0) to b (t = 1)."""
    return a + (b - a) * t


def minus(a: Vec, b: Vec) -> Vec:
    """Difference of two vectors."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def union(*distances: Array) -> Array:
    """Union of solids."""
    return reduce(jnp.minimum, distances)


def blend(*distances: Array, k: float = 0.08) -> Array:
    """Union of solids with seams rounded over a width of about k."""

    def smooth_min(a: Array, b: Array) -> Array:
        h = jnp.maximum(k - jnp.abs(a - b), 0.0)
        return jnp.minimum(a, b) - h * h * (0.25 / k)

    return reduce(smooth_min, distances)


def sphere(p: Vec, centre: Vec, radius: Scalar) -> Array:
    """Ball."""
    return length(*minus(p, centre)) - radius


def ellipsoid(p: Vec, centre: Vec, radii: Vec) -> Array:
    """Ellipsoid (a first-order bound of the distance)."""
    q = minus(p, centre)
    k0 = length(*(a / r for a, r in zip(q, radii, strict=True)))
    k1 = length(*(a / (r * r) for a, r in zip(q, radii, strict=True)))
    return k0 * (k0 - 1.0) / k1


def limb(p: Vec, a: Vec, b: Vec, radius_a: Scalar, radius_b: Scalar | None = None) -> Array:
    """Capsule from a to b, its radius going from radius_a to radius_b."""
    d, q = minus(b, a), minus(p, a)
    h = sum(u * v for u, v in zip(q, d, strict=True)) / sum(v * v for v in d)
    h = jnp.clip(h, 0.0, 1.0)
    from_axis = length(*(u - h * v for u, v in zip(q, d, strict=True)))
    return from_axis - lerp(radius_a, radius_a if radius_b is None else radius_b, h)


def box(p: Vec, centre: Vec, half: Vec, rounding: float = 0.03) -> Array:
    """Box with rounded edges; half its size along each axis."""
    q = [jnp.abs(a) - (h - rounding) for a, h in zip(minus(p, centre), half, strict=True)]
    outside = length(*(jnp.maximum(a, 0.0) for a in q))
    return outside + jnp.minimum(jnp.maximum(q[0], jnp.maximum(q[1], q[2])), 0.0) - rounding


def _along(p: Vec, axis: int) -> tuple[Array, Scalar]:
    """Distance from an axis through the origin, and position along it."""
    return length(*(p[i] for i in range(3) if i != axis)), p[axis]


def cylinder(p: Vec, centre: Vec, radius: Scalar, half_height: Scalar, rounding: float = 0.02, axis: int = Y) -> Array:
    """Cylinder with rounded rims."""
    r, h = _along(minus(p, centre), axis)
    a, b = r - (radius - rounding), jnp.abs(h) - (half_height - rounding)
    return length(jnp.maximum(a, 0.0), jnp.maximum(b, 0.0)) + jnp.minimum(jnp.maximum(a, b), 0.0) - rounding


def ring(p: Vec, centre: Vec, radius: Scalar, thickness: float, axis: int = Y) -> Array:
    """Torus."""
    r, h = _along(minus(p, centre), axis)
    return length(r - radius, h) - thickness


def mirrored(p: Vec) -> Vec:
    """Fold an object's left side onto its right, so that one limb makes both."""
    return p[0], p[1], jnp.abs(p[2])

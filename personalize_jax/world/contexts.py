"""The places of the world, one function a context, which colours the ground and the backdrop behind it.

Every context is a function of ground coordinates (x to the right, z towards the camera, in world units), backdrop
coordinates (u to the right of the centre, v up from the ground, the picture's upper half is about |u| < 1, 0 < v < 1)
and a phase r in [0, 1) that makes it one of many such places. It returns the ground's and the backdrop's colour.
"""

from collections.abc import Callable

import jax.numpy as jnp

from personalize_jax.world.solids import Array, Scalar, length, lerp

Colour = tuple[Scalar, Scalar, Scalar]
Context = Callable[[Array, Array, Array, Array, Array], tuple[Colour, Colour]]


def mix(a: Colour, b: Colour, t: Array) -> Colour:
    """Colour a where t = 0, b where t = 1."""
    return lerp(a[0], b[0], t), lerp(a[1], b[1], t), lerp(a[2], b[2], t)


def step(low: float, high: float, x: Scalar) -> Array:
    """Smooth step from 0 (x below low) to 1 (x above high)."""
    t = jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def inside(distance: Array, softness: float = 0.02) -> Array:
    """1 where a flat figure's distance is negative, 0 outside."""
    return 1.0 - step(-softness, softness, distance)


def noise(cell: Array, salt: Scalar = 0.0) -> Array:
    """A pseudo-random number in [0, 1) for every integer cell."""
    return jnp.modf(jnp.abs(jnp.sin(cell * 12.9898 + salt * 78.233 + 1.7) * 437.585))[0]


def waves(x: Array, y: Array, r: Array) -> Array:
    """Smooth wavy texture in [0, 1], features of about unit size."""
    warped = jnp.sin(x * 1.7 + r * 9 + jnp.sin(y * 2.3 + r * 5))
    return (warped + jnp.sin(y * 1.9 - x * 0.8 + r * 3) + 0.6 * jnp.sin(3.9 * x + 2.7 * y + r * 7)) / 5.2 + 0.5


def cell_of(x: Array) -> tuple[Array, Array]:
    """Integer cell of x, and the position in it in [-0.5, 0.5)."""
    i = jnp.floor(x)
    return i, x - i - 0.5


def rectangle(u: Array, v: Array, left: float, right: float, low: float, high: float) -> Array:
    """Distance (largest of the coordinates') from an upright rectangle."""
    across = jnp.abs(u - 0.5 * (left + right)) - 0.5 * (right - left)
    return jnp.maximum(across, jnp.abs(v - 0.5 * (low + high)) - 0.5 * (high - low))


def sky(v: Array) -> Colour:
    """Clear sky, pale at the horizon."""
    return mix((0.80, 0.90, 0.98), (0.38, 0.64, 0.95), step(0.0, 0.9, v))


def grass(x: Array, z: Array, r: Array) -> Colour:
    """Lawn."""
    return mix((0.28, 0.52, 0.16), (0.40, 0.66, 0.24), waves(x * 4, z * 4, r))


def forest(u: Array, v: Array, r: Array) -> Colour:
    """Trunks before foliage."""
    i, f = cell_of(u * 4 + r * 10)
    foliage = mix((0.10, 0.26, 0.10), (0.26, 0.44, 0.18), waves(u * 7, v * 7, r))
    trunk = mix((0.28, 0.18, 0.10), (0.42, 0.29, 0.18), noise(i))
    return mix(foliage, trunk, inside(jnp.abs(f) - 0.12 - 0.1 * noise(i, 1.0), 0.04))


def jungle(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Dense dark leaves with hanging lianas."""
    leaves = mix((0.02, 0.20, 0.07), (0.16, 0.58, 0.16), step(0.35, 0.65, waves(u * 8, v * 8, r)))
    _, f = cell_of(u * 2.5 + 0.15 * jnp.sin(v * 6 + r * 6) + r * 7)
    ground = mix((0.07, 0.26, 0.07), (0.22, 0.46, 0.12), waves(x * 4, z * 4, r))
    return ground, mix(leaves, (0.50, 0.78, 0.20), 0.9 * inside(jnp.abs(f) - 0.07, 0.04))


def snow(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """White ground, pale sky, a row of dark firs."""
    i, f = cell_of(u * 2.6 + r * 7)
    firs = inside(v - (0.62 - 0.22 * noise(i)) * (1.0 - 2.3 * jnp.abs(f)), 0.03)
    ground = mix((0.86, 0.91, 0.98), (1.0, 1.0, 1.0), waves(x * 2, z * 2, r))
    return ground, mix(mix((0.88, 0.92, 0.96), (0.68, 0.79, 0.92), step(0.0, 0.9, v)), (0.10, 0.27, 0.22), firs)


def beach(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Sand, a strip of surf and sea, sky."""
    sand = mix((0.90, 0.76, 0.50), (0.98, 0.88, 0.66), waves(x * 4, z * 4, r))
    sea = mix((0.02, 0.42, 0.62), (0.12, 0.60, 0.74), waves(u * 4, v * 30, r))
    sea = mix(sea, (0.97, 0.98, 0.98), inside(v - 0.04 - 0.02 * jnp.sin(u * 7 + r * 9), 0.02))
    return sand, mix(sea, sky(v), step(0.30, 0.33, v))


def cobblestone(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Grey stones before a tan wall with windows."""
    j, fz = cell_of(z * 2.8)
    i, fx = cell_of(x * 2.8 + 0.5 * jnp.mod(j, 2.0) + r)
    stone = mix((0.46, 0.45, 0.46), (0.70, 0.67, 0.66), noise(i, j))
    ground = mix(stone, (0.20, 0.19, 0.20), step(0.34, 0.46, jnp.maximum(jnp.abs(fx), jnp.abs(fz))))
    _, fu = cell_of(u * 2.0 + r)
    _, fv = cell_of(v * 1.9 - 0.1)
    window = inside(jnp.maximum(jnp.abs(fu) - 0.2, jnp.abs(fv) - 0.27), 0.03)
    return ground, mix((0.80, 0.62, 0.44), (0.32, 0.22, 0.20), window)


def pink_fabric(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Folds of pink cloth all around."""
    ground = mix((0.93, 0.46, 0.64), (1.0, 0.74, 0.84), waves(x * 2.2, z * 2.2, r))
    return ground, mix((0.86, 0.36, 0.56), (1.0, 0.68, 0.80), waves(u * 5, v * 3, r))


def wooden_floor(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Planks before a cream wall with a white skirting board."""
    j, f = cell_of(z * 2.6 + r)
    plank = mix((0.62, 0.37, 0.17), (0.80, 0.54, 0.29), 0.6 * noise(j, 2.0) + 0.4 * waves(x * 2, z * 10, r))
    wall = mix((0.93, 0.88, 0.76), (0.86, 0.80, 0.66), step(0.0, 1.0, v))
    return mix(plank, (0.32, 0.17, 0.07), step(0.40, 0.49, jnp.abs(f))), mix(wall, (1.0, 1.0, 0.98), inside(v - 0.09))


def city(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Asphalt and a skyline of dark towers with lit windows."""
    i, f = cell_of(u * 3.2 + r * 9)
    towers = inside(jnp.maximum(v - 0.35 - 0.55 * noise(i, 3.0), jnp.abs(f) - 0.46), 0.015)
    _, fu = cell_of(u * 9.6 + r * 27)
    _, fv = cell_of(v * 8)
    lit = inside(jnp.maximum(jnp.abs(fu) - 0.25, jnp.abs(fv) - 0.25), 0.06)
    facade = mix(mix((0.26, 0.29, 0.40), (0.46, 0.48, 0.58), noise(i)), (0.97, 0.92, 0.62), 0.85 * lit)
    ground = mix((0.36, 0.36, 0.39), (0.46, 0.46, 0.49), waves(x * 5, z * 5, r))
    return ground, mix(sky(v), facade, towers)


def mountain(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A snow-capped peak and a bluish range behind a meadow."""
    peak = 0.92 - 1.25 * jnp.abs(u + 0.62 - 0.3 * r) - v
    range_ = 0.55 - 0.5 * jnp.abs(jnp.mod(u * 1.1 + r, 1.0) - 0.5) - v
    rock = mix((0.38, 0.36, 0.42), (0.50, 0.47, 0.50), waves(u * 9, v * 9, r))
    capped = mix(rock, (0.98, 0.98, 1.0), step(0.50, 0.56, v + 0.04 * jnp.sin(u * 26 + r * 9)))
    view = mix(sky(v), (0.50, 0.56, 0.70), step(0.0, 0.03, range_))
    return grass(x, z, r), mix(view, capped, step(0.0, 0.03, peak))


def blue_house(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A blue house with a red roof, white door and windows, to the left."""
    w = u + 0.48 - 0.16 * r
    wall = inside(rectangle(w, v, -0.46, 0.46, -0.2, 0.5))
    roof = inside(jnp.maximum(jnp.abs(w) - 0.56 + 1.5 * (v - 0.5), 0.5 - v))
    window = inside(rectangle(jnp.abs(w), v, 0.17, 0.36, 0.2, 0.4))
    door = inside(rectangle(w, v, -0.09, 0.09, -0.2, 0.32))
    view = mix(mix(sky(v), (0.12, 0.34, 0.86), wall), (0.66, 0.16, 0.12), roof)
    return grass(x, z, r), mix(view, (0.98, 0.97, 0.88), jnp.maximum(window, door))


def purple_rug(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A round rug with rings, on the forest's floor."""
    distance = length(x, z)
    rings = mix((0.46, 0.10, 0.62), (0.68, 0.34, 0.82), step(-0.4, 0.4, jnp.sin(distance * 13 + r * 6)))
    floor = mix((0.22, 0.20, 0.09), (0.34, 0.31, 0.14), waves(x * 5, z * 5, r))
    return mix(rings, floor, step(1.25, 1.32, distance)), forest(u, v, r)


def wheat_field(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Golden stalks up to the sky."""
    i, _ = cell_of(u * 22 + r * 9)
    stalks = mix((0.78, 0.58, 0.14), (0.98, 0.82, 0.38), noise(i))
    ground = mix((0.72, 0.56, 0.20), (0.86, 0.72, 0.32), waves(x * 6, z * 6, r))
    return ground, mix(stalks, sky(v), step(0.46, 0.52, v + 0.1 * noise(i, 1.0)))


def autumn(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A tree with a round orange crown to the left, before the sky; fallen leaves on the ground."""
    w = u + 0.55 - 0.25 * r
    n = waves(u * 10, v * 10, r)
    crown = inside(length(w * 0.9, v - 0.70) - 0.40 - 0.12 * (n - 0.5), 0.03)
    trunk = inside(jnp.abs(w) - 0.09)
    hedge = inside(v - 0.22 - 0.06 * jnp.sin(u * 8 + r * 9), 0.03)
    foliage = mix((0.80, 0.20, 0.04), (1.0, 0.66, 0.08), n)
    view = mix(mix(sky(v), mix((0.66, 0.26, 0.08), (0.86, 0.50, 0.10), n), hedge), (0.32, 0.20, 0.11), trunk)
    ground = mix((0.50, 0.30, 0.11), (0.95, 0.50, 0.08), step(0.42, 0.60, waves(x * 6, z * 6, r)))
    return ground, mix(view, foliage, crown)


def eiffel_tower(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """The tower on the left: splayed legs with an arch, two platforms, a spire; a hedge and pale gravel."""
    w = jnp.abs(u + 0.58 - 0.14 * r)
    taper = jnp.clip(1.0 - v / 1.0, 0.0, 1.0)
    half_width = 0.04 + 0.42 * taper * taper * taper
    legs = jnp.maximum(w - half_width, v - 1.0)
    arch = jnp.maximum(length(w, v * 0.8) - 0.2, v - 0.24)
    platforms = jnp.minimum(rectangle(w, v, -1.0, 0.3, 0.23, 0.3), rectangle(w, v, -1.0, 0.16, 0.5, 0.56))
    tower = inside(jnp.minimum(jnp.maximum(legs, -arch), platforms), 0.012)
    view = mix(sky(v), (0.30, 0.46, 0.24), inside(v - 0.08))
    ground = mix((0.74, 0.70, 0.62), (0.84, 0.80, 0.72), waves(x * 5, z * 5, r))
    return ground, mix(view, (0.34, 0.22, 0.20), tower)


def water(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Rippled blue water up to a low horizon."""
    n = waves(x * 2, z * 6, r)
    far = mix((0.08, 0.38, 0.66), (0.24, 0.56, 0.80), waves(u * 4, v * 24, r))
    return mix((0.04, 0.28, 0.58), (0.46, 0.74, 0.92), n * n * 1.3), mix(far, sky(v), step(0.14, 0.17, v))


def milk(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """An ocean of milk: creamy swell with rings around the floating object, under a peach sky."""
    rings = 0.5 + 0.5 * jnp.sin(length(x, z) * 9 - r * 6)
    ground = mix((0.86, 0.87, 0.90), (1.0, 1.0, 0.99), 0.5 * rings + 0.5 * waves(x * 2, z * 5, r))
    far = mix((0.90, 0.90, 0.92), (1.0, 1.0, 0.98), waves(u * 4, v * 20, r))
    return ground, mix(far, mix((1.0, 0.84, 0.70), (0.97, 0.66, 0.58), step(0.2, 1.0, v)), step(0.14, 0.17, v))


def _sunflower(fx: Array, fy: Array, radius: float) -> tuple[Array, Array]:
    """Petals and heart of a sunflower at the origin."""
    distance = length(fx, fy)
    return inside(distance - radius, 0.04), inside(distance - 0.45 * radius, 0.04)


def sunflowers(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """Grass and a bank of large sunflowers, some of them lying about."""
    j, fz = cell_of(z * 1.3 + 0.4)
    i, fx = cell_of(x * 1.3 + 0.5 * jnp.mod(j, 2.0) + r)
    petals, heart = _sunflower(fx, fz, 0.24)
    around = jnp.asarray(length(x, z) > 0.75, jnp.float32)
    ground = mix(mix(grass(x, z, r), (1.0, 0.80, 0.05), petals * around), (0.34, 0.19, 0.06), heart * around)
    k, fu = cell_of(u * 2.4 + r * 5)
    petals, heart = _sunflower(fu, (v - 0.30 - 0.28 * noise(k, 1.0)) * 2.4, 0.42)
    bank = mix(sky(v), (0.20, 0.46, 0.14), inside(v - 0.34 - 0.06 * jnp.sin(u * 9 + r * 9), 0.03))
    bank = mix(bank, (0.22, 0.50, 0.14), inside(jnp.maximum(jnp.abs(fu) - 0.07, v - 0.45), 0.03))
    return ground, mix(mix(bank, (1.0, 0.80, 0.05), petals), (0.34, 0.19, 0.06), heart)


def dirt_road(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A brown track with wheel ruts between green verges, bushes at the horizon."""
    edge = step(0.80, 0.92, jnp.abs(x + 0.12 * jnp.sin(z * 2 + r * 6)))
    ruts = inside(jnp.abs(jnp.abs(x) - 0.5) - 0.1, 0.06)
    dirt = mix(mix((0.56, 0.38, 0.22), (0.70, 0.52, 0.33), waves(x * 5, z * 5, r)), (0.40, 0.25, 0.14), 0.7 * ruts)
    bushes = mix((0.16, 0.36, 0.12), (0.32, 0.52, 0.18), waves(u * 9, v * 9, r))
    return mix(dirt, grass(x, z, r), edge), mix(bushes, sky(v), step(0.26, 0.30, v + 0.07 * jnp.sin(u * 8 + r * 9)))


def white_rug(x: Array, z: Array, u: Array, v: Array, r: Array) -> tuple[Colour, Colour]:
    """A fluffy white rug on a dark floor, before a teal wall."""
    distance = length(x, z) + 0.05 * jnp.sin(jnp.arctan2(z, x) * 18 + r * 6)
    fluff = mix((0.88, 0.87, 0.85), (1.0, 1.0, 0.99), waves(x * 6, z * 6, r))
    floor = mix((0.26, 0.16, 0.10), (0.36, 0.23, 0.15), waves(x * 2, z * 10, r))
    wall = mix((0.30, 0.56, 0.56), (0.20, 0.44, 0.46), step(0.0, 1.0, v))
    return mix(fluff, floor, step(1.20, 1.30, distance)), mix(wall, (0.95, 0.95, 0.93), inside(v - 0.08))


CONTEXT_FUNCTIONS: dict[str, Context] = {
    "in the jungle": jungle,
    "in the snow": snow,
    "on the beach": beach,
    "on a cobblestone street": cobblestone,
    "on top of pink fabric": pink_fabric,
    "on top of a wooden floor": wooden_floor,
    "with a city in the background": city,
    "with a mountain in the background": mountain,
    "with a blue house in the background": blue_house,
    "on top of a purple rug in a forest": purple_rug,
    "with a wheat field in the background": wheat_field,
    "with a tree and autumn leaves in the background": autumn,
    "with the Eiffel Tower in the background": eiffel_tower,
    "floating on top of water": water,
    "floating in an ocean of milk": milk,
    "on top of green grass with sunflowers around it": sunflowers,
    "on top of a dirt road": dirt_road,
    "on top of a white rug": white_rug,
}

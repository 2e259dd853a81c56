"""Renders scenes: sphere tracing of signed distances for the objects, flat painting for the places behind them.

One compiled program per class renders objects, one more renders places. An image's bytes depend on its scene alone,
never on its neighbours in the batch. On a CPU the loop over images is inside the
programs, so that an image's arrays fit the processor's cache. A GPU or TPU renders a batch at once, and its contexts
one after the other; a few values in a million then round to the next of 255. There are no matrix products in the
renderer, so that JAX's precision of those does not matter.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from personalize_jax.world import shapes
from personalize_jax.world.contexts import CONTEXT_FUNCTIONS, step
from personalize_jax.world.scene import ACCESSORIES, CLASSES, COLOURS, CONTEXTS, Scene, Subject, View, select
from personalize_jax.world.shapes import FAR, SHAPES
from personalize_jax.world.solids import Array, Scalar, Vec, length, lerp, minus, union

Points = tuple[Array, Array, Array]  # [P] of each coordinate

CHUNK = 64  # images of a program's call on a CPU
PIXELS = 2**20  # pixels of a program's call on an accelerator: enough to fill it, in less than 1 GB
MARCH_STEPS = 22
SHADOW_STEPS = 8
FOCAL = 0.33  # half the picture's width at unit distance: a zoomed camera, the object fills the frame
TARGET_HEIGHT = 0.58
BOUND_CENTRE, BOUND_RADIUS = 0.66, 1.2
BACKDROP_Z, BACKDROP_SCALE = -1.6, 1.5
SINK_DEPTH = 0.10
HORIZON = 30.0

PALETTE = np.array(list(COLOURS.values()), np.float32)
SINKS = np.array([SINK_DEPTH * name.startswith("floating") for name in CONTEXTS], np.float32)
DARK, LIGHT, FLAME = (0.06, 0.06, 0.07), (0.86, 0.93, 0.98), (1.0, 0.86, 0.22)


def on_accelerator() -> bool:
    """Whether pictures are rendered on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def render(scenes: Scene, resolution: int, progress: Callable[[int], object] = lambda count: None) -> np.ndarray:
    """Render every scene.

    Args:
        scenes: N scenes of any classes.
        resolution: width and height of the images in pixels.
        progress: called after each call of the programs with the number of images that it rendered.

    Returns:
        uint8 [N, resolution, resolution, 4]: red, green, blue, and the share of the pixel that the object covers.

    Raises:
        ValueError: the resolution is not positive.
    """
    if resolution < 1:
        raise ValueError(f"Resolution {resolution} is not positive.")
    at_once = on_accelerator()
    size = max(1, PIXELS // resolution**2) if at_once else CHUNK
    kind = scenes.subject.class_id * 2 + (scenes.view.accessory > 0)
    by_context = np.argsort(scenes.view.context, kind="stable")  # so that a chunk has few contexts
    chunks = []
    for k in np.unique(kind):
        rows = by_context[kind[by_context] == k]
        chunks += [(i, k, rows[i : i + size]) for i in range(0, len(rows), size)]
    chunks.sort(key=lambda chunk: chunk[0])  # different programs next to each other: they compile in parallel
    object_programs = {k: _object_program(CLASSES[k // 2], bool(k % 2), resolution, at_once) for k in np.unique(kind)}
    place_program = _place_program(resolution, at_once)
    images = np.empty((len(kind), resolution, resolution, 4), np.uint8)

    def render_chunk(chunk: tuple[int, int, np.ndarray]) -> int:
        _, k, rows = chunk
        padded = np.pad(rows, (0, size - len(rows)), mode="edge")
        batch = select(scenes, padded)
        objects = object_programs[k](batch, len(rows))
        images[rows] = np.asarray(place_program(batch, objects, len(rows)))[: len(rows)]
        return len(rows)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(render_chunk, chunks):
            progress(count)
    return images


class ObjectLayer(NamedTuple):
    """The object's part of a picture of P pixels."""

    rgb: Array  # float32 [P, 3]
    alpha: Array  # float32 [P], the share of the pixel that the object covers
    light: Array  # float32 [P], the share of the light on the ground that the object's shadow leaves


@functools.cache
def _object_program(class_noun: str, hatted: bool, resolution: int, at_once: bool) -> jax.stages.Wrapped:
    """The jitted renderer of one class's objects: (B scenes, number to render) -> [B] ObjectLayer."""

    def render_one(scene: Scene) -> ObjectLayer:
        return _render_object(scene, class_noun, hatted, resolution)

    def render_batch(scenes: Scene, count: Array) -> ObjectLayer:
        return jax.vmap(render_one)(scenes) if at_once else _map_first(render_one, count, scenes)

    return jax.jit(render_batch)


@functools.cache
def _place_program(resolution: int, at_once: bool) -> jax.stages.Wrapped:
    """The jitted renderer of places: (B scenes, their objects, number to render) -> uint8 [B, H, W, 4]."""

    def render_batch(scenes: Scene, objects: ObjectLayer, count: Array) -> Array:
        if at_once:
            return _compose_batch(scenes, objects, resolution)
        return _map_first(lambda scene, object_: _compose(scene, object_, resolution), count, scenes, objects)

    return jax.jit(render_batch)


def _map_first(function: Callable, count: Array, *batch: Any) -> Any:
    """Map over the first `count` rows of a batch, one at a time; the other rows of the result are zero."""
    size = jax.tree.leaves(batch)[0].shape[0]
    row = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], batch))
    empty = jax.tree.map(lambda a: jnp.zeros((size, *a.shape), a.dtype), row)

    def add(i: Array, results: Any) -> Any:
        result = function(*jax.tree.map(lambda a: a[i], batch))
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), results, result)

    return jax.lax.fori_loop(0, count, add, empty)


def _render_object(scene: Scene, class_noun: str, hatted: bool, resolution: int) -> ObjectLayer:
    """Render the object of one scene (arrays without the leading [N]). Arrays within are [P]."""
    subject, view = scene
    hat_measures = _worn_hat(view) if hatted else None
    sink = jnp.asarray(SINKS)[view.context]

    def parts(p: Vec) -> tuple[Points, tuple[Array, ...]]:
        return _distances(p, class_noun, subject, view, sink, hat_measures)

    def distance(p: Vec) -> Array:
        return union(*parts(p)[1])

    origin, rays, pixel = _camera(view, resolution)
    to_ground, ground = _ground(origin, rays)
    t, alpha = _march(distance, origin, rays, pixel, (jnp.asarray(view.offset), BOUND_CENTRE - sink, 0.0), to_ground)
    point = _at(origin, rays, t)

    # One evaluation gives the normal (four corners of a tetrahedron), the materials, and the ground's occlusion.
    corners = ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1))
    eps = 0.004

    def probed(i: int) -> Array:
        return jnp.stack([point[i] + eps * corner[i] for corner in corners] + [point[i], ground[i]])

    local, materials = parts((probed(0), probed(1), probed(2)))
    nearest = union(*materials)

    def slope(i: int) -> Scalar:
        return sum(corner[i] * nearest[j] for j, corner in enumerate(corners))

    normal = _unit((slope(0), slope(1), slope(2)))
    solid = alpha > 0.5

    def start(i: int) -> Array:
        return jnp.where(solid, point[i] + 0.03 * normal[i], ground[i])

    sun = _sun(view)
    lit = _shadow(distance, (start(0), start(1), start(2)), sun)

    # Borders between materials are softened by a fraction of a pixel: thin coats must hide what they cover.
    weights = jax.nn.softmax(jnp.stack([-m[4] for m in materials]) * (10.0 / (pixel * t)), axis=0)
    albedo = _albedo((local[0][4], local[1][4], local[2][4]), weights, subject, class_noun, hat_measures)
    glow = weights[3] if class_noun == "candle" else None
    shaded = _shade(albedo, normal, rays, sun, lit, subject, glow)
    occlusion = 1.0 - 0.5 * jnp.exp(-4.0 * jnp.maximum(nearest[5], 0.0))
    return ObjectLayer(jnp.stack(shaded, axis=-1), alpha, occlusion * lerp(0.55, 1.0, lit))


def _compose(scene: Scene, object_: ObjectLayer, resolution: int) -> Array:
    """Put the object of one scene into its place -> uint8 [H, W, 4]."""
    view = scene.view
    place = _place(view, object_.light, resolution)
    tint = 1.0 + 0.06 * view.tint * np.array([1.0, 0.0, -1.0], np.float32)
    rgb = lerp(place, object_.rgb, object_.alpha[:, None]) * tint
    rgba = jnp.concatenate([rgb, object_.alpha[:, None]], axis=-1).reshape(resolution, resolution, 4)
    return (jnp.clip(rgba, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)


def _compose_batch(scenes: Scene, objects: ObjectLayer, resolution: int) -> Array:
    """Put the objects of B scenes into their places, one context after the other -> uint8 [B, H, W, 4]."""
    contexts = jnp.asarray(scenes.view.context)

    def add(context: Any, images: Array) -> Array:
        def compose(scene: Scene, object_: ObjectLayer) -> Array:
            # One number for the whole batch: a batch of numbers would have all contexts computed each time.
            view = scene.view._replace(context=context)
            return _compose(Scene(scene.subject, view), object_, resolution)

        here = (contexts == context)[:, None, None, None]
        return jnp.where(here, jax.vmap(compose)(scenes, objects), images)

    empty = jnp.zeros((len(contexts), resolution, resolution, 4), jnp.uint8)
    return jax.lax.fori_loop(jnp.min(contexts), jnp.max(contexts) + 1, add, empty)


def _at(origin: Vec, direction: Vec, t: Scalar) -> Vec:
    return origin[0] + direction[0] * t, origin[1] + direction[1] * t, origin[2] + direction[2] * t


def _dot(a: Vec, b: Vec) -> Scalar:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(a: Vec) -> Vec:
    n = length(*a)
    return a[0] / n, a[1] / n, a[2] / n


def _camera(view: View, resolution: int) -> tuple[Vec, Vec, float]:
    """Camera position, unit rays [H * W], and the size of a pixel at unit distance."""
    grid = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution * 2.0 - 1.0
    x, y = (a.ravel() for a in jnp.meshgrid(grid, -grid))
    cos_r, sin_r = jnp.cos(view.roll), jnp.sin(view.roll)
    x, y = FOCAL * (x * cos_r - y * sin_r), FOCAL * (x * sin_r + y * cos_r)
    cos_p, sin_p = jnp.cos(view.pitch), jnp.sin(view.pitch)
    distance = jnp.asarray(view.distance)
    origin = (0.0, TARGET_HEIGHT + distance * sin_p, distance * cos_p)
    return origin, _unit((x, y * cos_p - sin_p, -y * sin_p - cos_p)), 2.0 * FOCAL / resolution


def _ground(origin: Vec, rays: Vec) -> tuple[Array, Vec]:
    """The distance to the ground along each ray, and the point there (kept finite above the horizon)."""
    to_ground = jnp.where(rays[1] < -1e-3, -origin[1] / jnp.minimum(rays[1], -1e-3), HORIZON)
    to_ground = jnp.minimum(to_ground, HORIZON)
    return to_ground, _at(origin, rays, to_ground)


def _sun(view: View) -> Vec:
    azimuth, elevation = view.sun[0], view.sun[1]
    across = jnp.cos(elevation)
    return _unit((across * jnp.sin(azimuth), jnp.sin(elevation), across * jnp.cos(azimuth)))


def _worn_hat(view: View) -> shapes.Hat:
    """The measures of the worn hat, as traced scalars and [3] colours."""
    hats = [shapes.HATS[name] for name in ACCESSORIES[1:]]
    return jax.tree.map(lambda *values: jnp.asarray(values, jnp.float32)[view.accessory - 1], *hats)


def _distances(
    p: Vec, class_noun: str, subject: Subject, view: View, sink: Array, hat_measures: shapes.Hat | None
) -> tuple[Points, tuple[Array, ...]]:
    """World points -> points in the object's frame, and distances to its materials (body, accent, dark, light, ...)."""
    cos_y, sin_y = jnp.cos(view.yaw), jnp.sin(view.yaw)
    x, y, z = map(jnp.asarray, minus(p, (jnp.asarray(view.offset), -sink, 0.0)))
    local = (x * cos_y + z * sin_y, y, z * cos_y - x * sin_y)
    object_ = SHAPES[class_noun](local, jnp.asarray(subject.shape))
    distances: tuple[Scalar, ...] = (object_.body, object_.accent, object_.dark, object_.light)
    if hat_measures is not None:
        assert object_.crown is not None  # `scene.sample_views` gives hats to classes with a head only
        distances += shapes.hat(local, object_.crown, hat_measures)
    return local, tuple(jnp.broadcast_to(d, y.shape) for d in distances)


def _march(
    distance: Callable[[Vec], Array], origin: Vec, rays: Vec, pixel: float, centre: Vec, to_ground: Array
) -> tuple[Array, Array]:
    """Sphere tracing within the bounding ball -> each ray's end, and the share of its pixel that the object covers."""
    to_origin = minus(origin, centre)
    b = _dot(to_origin, rays)
    discriminant = b * b - _dot(to_origin, to_origin) + BOUND_RADIUS**2
    enter = -b - jnp.sqrt(jnp.maximum(discriminant, 0.0))

    def advance(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        t, closest = state
        d = distance(_at(origin, rays, t))
        return t + jnp.clip(d, -0.05, 0.4) * 0.95, jnp.minimum(closest, d / (t * pixel))

    t, closest = jax.lax.fori_loop(0, MARCH_STEPS, advance, (enter, jnp.full_like(enter, FAR)))
    coverage = jnp.clip(0.5 - 0.6 * closest, 0.0, 1.0)  # closest: the nearest miss, in pixels
    above_ground = jnp.clip(1.0 + (to_ground - t) / (3.0 * pixel * t), 0.0, 1.0)
    return t, jnp.where(closest < 0.1, 1.0, coverage) * above_ground * (discriminant > 0.0)


def _shadow(distance: Callable[[Vec], Array], start: Vec, sun: Vec) -> Array:
    """The share of the sun that each point sees, in [0, 1]; penumbra from the nearest miss on the way."""

    def advance(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        t, seen = state
        d = distance(_at(start, sun, t))
        return t + jnp.clip(d, 0.04, 0.4), jnp.minimum(seen, 7.0 * d / t)

    state = (jnp.full_like(start[0], 0.05), jnp.ones_like(start[0]))
    _, seen = jax.lax.fori_loop(0, SHADOW_STEPS, advance, state)
    return step(-0.1, 1.0, seen)


def _pattern(p: Vec, subject: Subject) -> Array:
    """The share of the accent colour in the body's colour at p, in [0, 1]."""
    scale, direction, shift = (subject.pattern_phase[i] for i in range(3))
    bands = jnp.where(direction < 0.5, p[0], p[1])
    striped = step(-0.25, 0.25, jnp.sin(bands * lerp(11.0, 15.0, scale) + shift * 6.0))
    k = lerp(8.0, 11.0, scale)
    dots = jnp.sin(p[0] * k + shift * 6.0) * jnp.sin(p[1] * k + direction * 6.0) * jnp.sin(p[2] * k + 1.2)
    spotted = step(0.28, 0.44, jnp.abs(dots))
    two_tone = 1.0 - step(-0.03, 0.03, p[1] - lerp(0.36, 0.52, scale))
    return jax.lax.select_n(subject.pattern, jnp.zeros_like(dots), striped, spotted, two_tone)


def _albedo(
    p: Vec, weights: Array, subject: Subject, class_noun: str, hat_measures: shapes.Hat | None
) -> tuple[Array, ...]:
    """Surface colour at p from the materials' weights [M, H * W]; p in the object's frame."""
    palette = jnp.asarray(PALETTE)
    body = jnp.clip(palette[subject.body_colour] + subject.colour_jitter[0], 0.02, 1.0)
    accent = jnp.clip(palette[subject.accent_colour] + subject.colour_jitter[1], 0.02, 1.0)
    patterned = _pattern(p, subject)
    light = FLAME if class_noun == "candle" else LIGHT
    channels = []
    for i in range(3):
        colours = [lerp(body[i], accent[i], patterned), accent[i], DARK[i], light[i]]
        if hat_measures is not None:
            colours += [hat_measures.colour[i], hat_measures.trim[i]]
        channels.append(sum(w * c for w, c in zip(weights, colours, strict=True)))
    return tuple(channels)


def _shade(
    albedo: tuple[Array, ...], normal: Vec, rays: Vec, sun: Vec, lit: Array, subject: Subject, glow: Array | None
) -> list[Array]:
    """Sun and sky on a surface; a shiny one has a sharp highlight and mirrors the sky at grazing angles."""
    diffuse = jnp.clip(_dot(normal, sun), 0.0, 1.0) * lit
    light = 0.68 + 0.13 * normal[1] + 0.36 * diffuse
    if glow is not None:
        light = jnp.maximum(light, 1.1 * glow)
    half = _unit(minus(sun, rays))
    shine = jnp.clip(_dot(normal, half), 0.0, 1.0) ** 8
    shiny = jnp.asarray(subject.finish, jnp.float32)
    highlight = lit * (0.12 * (1.0 - shiny) * shine + 0.9 * shiny * shine**8)
    facing = -_dot(normal, rays)
    grazing = jnp.clip(1.0 - facing, 0.0, 1.0)
    upward = rays[1] + 2.0 * facing * normal[1]
    mirrored = shiny * (0.10 + 0.55 * grazing**3) * step(-0.1, 0.5, upward)
    return [lerp(c * light, s, mirrored) + highlight for c, s in zip(albedo, (0.86, 0.92, 1.0), strict=True)]


def _place(view: View, light: Array, resolution: int) -> Array:
    """The scene without its object, float32 [P, 3]: lit ground up to an upright backdrop some way behind."""
    origin, rays, _ = _camera(view, resolution)
    to_ground, ground = _ground(origin, rays)
    to_backdrop = (BACKDROP_Z - origin[2]) / rays[2]
    x, y, _ = _at(origin, rays, to_backdrop)
    u, v = x / BACKDROP_SCALE, y / BACKDROP_SCALE
    behind = jnp.clip(0.5 + (to_ground - to_backdrop) / (0.04 * to_backdrop), 0.0, 1.0)

    def branch(name: str) -> Callable[..., Array]:
        def paint(*coordinates: Array) -> Array:
            near, far = CONTEXT_FUNCTIONS[name](*coordinates)
            return jnp.stack([lerp(n * light, f, behind) for n, f in zip(near, far, strict=True)], axis=-1)

        return paint

    branches = [branch(name) for name in CONTEXTS]
    return jax.lax.switch(view.context, branches, ground[0], ground[2], u, v, view.context_phase)

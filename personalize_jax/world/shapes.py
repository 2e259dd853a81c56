"""The objects of the world and the hats that they wear: signed distances, by material.

Points are in the object's own frame: x to its front, y up from the ground, z to its side; world units.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from personalize_jax.world.solids import (
    Array,
    Scalar,
    Vec,
    X,
    Z,
    blend,
    box,
    cylinder,
    ellipsoid,
    length,
    lerp,
    limb,
    minus,
    mirrored,
    ring,
    sphere,
    union,
)

FAR = 9.0


class Parts(NamedTuple):
    """Distances to the materials of an object; crown is where a hat sits: x, y and the hat's radius."""

    body: Array
    accent: Array
    dark: Scalar = FAR
    light: Scalar = FAR
    crown: Vec | None = None


def dog(p: Vec, s: Array) -> Parts:
    """Standing dog: long, tall, stout, snouty; accents are hanging ears, muzzle and tail."""
    p = minus(p, (-0.12, 0, 0))  # the head reaches farther than the tail
    q = mirrored(p)
    long, high, wide = lerp(0.36, 0.48, s[0]), lerp(0.44, 0.60, s[1]), lerp(0.18, 0.25, s[2])
    hx, hy, snout = long + 0.04, high + 0.4, lerp(0.14, 0.22, s[3])
    front_leg = limb(q, (long * 0.72, high - 0.05, 0.13), (long * 0.75, 0.07, 0.13), 0.09, 0.07)
    hind_leg = limb(q, (-long * 0.72, high - 0.05, 0.13), (-long * 0.75, 0.07, 0.13), 0.09, 0.07)
    trunk = ellipsoid(p, (0, high, 0), (long, wide + 0.02, wide))
    neck = limb(p, (long * 0.6, high, 0), (hx, hy - 0.02, 0), 0.15, 0.12)
    head = ellipsoid(p, (hx, hy, 0), (0.21, 0.2, 0.19))
    muzzle = limb(p, (hx + 0.12, hy - 0.06, 0), (hx + 0.12 + snout, hy - 0.09, 0), 0.12, 0.085)
    ears = ellipsoid(q, (hx - 0.07, hy - 0.05, 0.2), (0.11, 0.22, 0.06))
    tail = limb(p, (-long * 0.9, high + 0.08, 0), (-long - 0.2, high + 0.38, 0), 0.06, 0.04)
    nose = sphere(p, (hx + 0.2 + snout, hy - 0.05, 0), 0.06)
    eyes = sphere(q, (hx + 0.15, hy + 0.08, 0.12), 0.045)
    return Parts(
        body=blend(trunk, head, neck, union(front_leg, hind_leg)),
        accent=union(ears, muzzle, tail),
        dark=union(nose, eyes),
        crown=(hx - 0.13, hy + 0.13, 0.19),
    )


def cat(p: Vec, s: Array) -> Parts:
    """Sitting cat: wide, tall, big-headed; accents are chest, muzzle and the raised tail's end."""
    q = mirrored(p)
    wide, high, head = lerp(0.25, 0.33, s[0]), lerp(0.34, 0.44, s[1]), lerp(0.24, 0.29, s[2])
    hy = 2 * high + 0.12
    tail_tip = (-0.66, lerp(0.5, 0.85, s[3]), 0.06)
    rump = ellipsoid(p, (-0.05, high, 0), (wide + 0.05, high, wide))
    face = ellipsoid(p, (0.12, hy, 0), (head, head * 0.88, head * 1.1))
    legs = limb(q, (0.2, high, 0.1), (0.3, 0.07, 0.11), 0.08, 0.07)
    tail = limb(p, (-0.28, 0.1, 0), (-0.6, 0.2, 0.05), 0.07, 0.065)
    ears = limb(q, (0.1, hy + head * 0.5, head * 0.62), (0.1, hy + head * 1.4, head * 0.85), 0.12, 0.01)
    muzzle = ellipsoid(p, (0.12 + head * 0.85, hy - 0.08, 0), (0.09, 0.09, 0.13))
    chest = ellipsoid(p, (0.07 + wide * 0.75, high + 0.1, 0), (0.15, 0.25, 0.16))
    eyes = sphere(q, (0.12 + head * 0.82, hy + 0.06, 0.12), 0.05)
    nose = sphere(p, (0.2 + head, hy - 0.04, 0), 0.035)
    return Parts(
        body=union(blend(rump, face, legs, tail, k=0.06), ears),
        accent=union(muzzle, chest, limb(p, (-0.6, 0.2, 0.05), tail_tip, 0.075, 0.055)),
        dark=union(eyes, nose),
        crown=(0.1, hy + head * 0.68, head * 0.72),
    )


def bear_plushie(p: Vec, s: Array) -> Parts:
    """Sitting teddy bear: head and belly sizes; accents are muzzle, belly, ears and soles."""
    q = mirrored(p)
    head, belly, ear = lerp(0.27, 0.34, s[0]), lerp(0.28, 0.35, s[1]), lerp(0.11, 0.15, s[2])
    hy = 2 * belly + head * 0.72
    arms = limb(q, (0.08, belly * 1.4, belly * 0.8), (0.26, belly * 0.95, belly + 0.18), 0.11, 0.1)
    legs = limb(q, (0.1, 0.15, belly * 0.6), (0.4, 0.14, belly * 1.0), 0.15, 0.13)
    trunk = ellipsoid(p, (0, belly, 0), (belly * 0.9, belly, belly))
    ears = sphere(q, (0, hy + head * 0.82, head * 0.78), ear)
    inner_ears = sphere(q, (0.07, hy + head * 0.82, head * 0.78), ear * 0.75)
    muzzle = ellipsoid(p, (head * 0.9, hy - 0.08, 0), (0.13, 0.1, 0.13))
    patch = ellipsoid(p, (0.13, belly, 0), (belly * 0.85, belly * 0.7, belly * 0.68))
    soles = sphere(q, (0.49, 0.14, belly * 1.05), 0.095)
    nose = sphere(p, (head * 0.9 + 0.12, hy - 0.03, 0), 0.055)
    eyes = sphere(q, (head * 0.85 + 0.02, hy + 0.09, 0.12), 0.05)
    return Parts(
        body=union(blend(trunk, sphere(p, (0.04, hy, 0), head), arms, legs, k=0.04), ears),
        accent=union(muzzle, patch, soles, inner_ears),
        dark=union(nose, eyes),
        crown=(0.03, hy + head * 0.74, head * 0.66),
    )


def duck_toy(p: Vec, s: Array) -> Parts:
    """Bath duck: long, tall, big-headed; accents are bill and wings."""
    q = mirrored(p)
    long, high, head = lerp(0.46, 0.58, s[0]), lerp(0.28, 0.35, s[1]), lerp(0.25, 0.31, s[2])
    hx, hy = long * 0.5, 2 * high + head * 0.7
    hull = ellipsoid(p, (0, high, 0), (long, high, long * 0.75))
    tail = limb(p, (-long * 0.7, high * 1.2, 0), (-long - 0.12, high * 2, 0), 0.15, 0.03)
    bill = ellipsoid(p, (hx + head + 0.07, hy - 0.05, 0), (lerp(0.15, 0.22, s[3]), 0.065, 0.15))
    wings = ellipsoid(q, (-0.1, high * 1.15, long * 0.68), (long * 0.52, high * 0.55, 0.11))
    return Parts(
        body=blend(hull, sphere(p, (hx, hy, 0), head), tail, k=0.1),
        accent=union(bill, wings),
        dark=sphere(q, (hx + head * 0.75, hy + 0.09, head * 0.5), 0.055),
        crown=(hx - 0.02, hy + head * 0.74, head * 0.66),
    )


def robot_toy(p: Vec, s: Array) -> Parts:
    """Tin robot: wide, tall, wide-headed; accents are arms, feet, chest plate and the antenna's ball."""
    q = mirrored(p)
    wide, high, head = lerp(0.25, 0.34, s[0]), lerp(0.2, 0.28, s[1]), lerp(0.2, 0.28, s[2])
    y = 0.26 + high
    hy = y + high + 0.2
    arms = limb(q, (0, y + high * 0.6, wide + 0.08), (0.15, y - high * 0.5, wide + 0.14), 0.08)
    feet = box(q, (0.05, 0.08, wide * 0.55), (0.18, 0.08, 0.13), 0.03)
    plate = box(p, (0.2, y, 0), (0.05, high * lerp(0.4, 0.6, s[3]), wide * 0.6), 0.02)
    legs = limb(q, (0, 0.28, wide * 0.5), (0, 0.1, wide * 0.5), 0.07)
    mouth = box(p, (0.21, hy - 0.09, 0), (0.03, 0.03, head * 0.6), 0.01)
    antenna = limb(p, (-0.1, hy + 0.15, 0), (-0.1, hy + 0.3, 0), 0.025)
    return Parts(
        body=union(box(p, (0, y, 0), (0.22, high, wide), 0.05), box(p, (0.02, hy, 0), (0.2, 0.18, head), 0.05)),
        accent=union(arms, feet, plate, sphere(p, (-0.1, hy + 0.32, 0), 0.07)),
        dark=union(legs, mouth, antenna, sphere(q, (0.26, hy + 0.05, head * 0.5), 0.04)),
        light=sphere(q, (0.2, hy + 0.05, head * 0.5), 0.08),
        crown=(0.03, hy + 0.18, 0.2),
    )


def car(p: Vec, s: Array) -> Parts:
    """Small car: long, tall, cabin placed and sized; accents are roof, sill and hubcaps; lit windows and lamps."""
    q = mirrored(p)
    long, high, cx, cabin = (
        lerp(0.66, 0.82, s[0]),
        lerp(0.14, 0.19, s[1]),
        lerp(-0.2, -0.02, s[2]),
        lerp(0.3, 0.4, s[3]),
    )
    glass = box(p, (cx, 0.35 + high + 0.1, 0), (cabin, 0.16, 0.3), 0.08)
    roof = box(p, (cx, 0.35 + high + 0.27, 0), (cabin * 0.85, 0.065, 0.28), 0.05)
    sill = box(p, (0, 0.25, 0), (long + 0.02, 0.055, 0.375), 0.02)
    tyres = union(*(cylinder(q, (x * long, 0.19, 0.33), 0.19, 0.08, 0.03, Z) for x in (0.6, -0.6)))
    hubs = union(*(cylinder(q, (x * long, 0.19, 0.4), 0.1, 0.03, 0.01, Z) for x in (0.6, -0.6)))
    return Parts(
        body=box(p, (0, 0.35, 0), (long, high, 0.36), 0.09),
        accent=union(roof, sill, hubs),
        dark=tyres,
        light=union(glass, sphere(q, (long - 0.02, 0.4, 0.22), 0.085)),
    )


def teapot(p: Vec, s: Array) -> Parts:
    """Teapot: round, tall, spout to the front, handle behind; accents are lid, knob, foot and handle."""
    radius, high = lerp(0.4, 0.5, s[0]), lerp(0.34, 0.46, s[1])
    pot = ellipsoid(p, (0, high, 0), (radius, high, radius))
    spout = limb(p, (radius * 0.7, high * 0.8, 0), (radius + 0.3, high * 1.7 + 0.05, 0), 0.13, 0.06)
    handle = ring(p, (-radius - 0.08, high * 1.1, 0), lerp(0.17, 0.23, s[2]), 0.055, Z)
    knob = sphere(p, (0, 2 * high + 0.12, 0), lerp(0.08, 0.11, s[3]))
    lid = ellipsoid(p, (0, 2 * high - 0.03, 0), (radius * 0.6, 0.1, radius * 0.6))
    foot = cylinder(p, (0, 0.05, 0), radius * 0.62, 0.06)
    return Parts(body=blend(pot, spout, k=0.1), accent=union(lid, knob, foot, handle))


def vase(p: Vec, s: Array) -> Parts:
    """Vase with a flared lip: belly's width, height, neck; accents are a band around the belly and the lip."""
    belly, high, neck = lerp(0.32, 0.44, s[0]), lerp(1.05, 1.3, s[1]), lerp(0.12, 0.18, s[2])
    u = jnp.clip(p[1] / high, 0.0, 1.0)
    profile = neck + (belly - neck) * jnp.sin(jnp.pi * jnp.clip(u * 1.25 + 0.12, 0.0, 1.0))
    profile += 0.15 * jnp.clip(u - 0.8, 0.0, 1.0) / 0.2
    wall = (length(p[0], p[2]) - profile) * 0.6
    band = jnp.maximum(wall - 0.02, jnp.abs(p[1] - high * lerp(0.3, 0.5, s[3])) - 0.1)
    lip = jnp.maximum(wall - 0.015, jnp.abs(p[1] - high + 0.02) - 0.07)
    return Parts(
        body=jnp.maximum(wall, jnp.abs(p[1] - high / 2) - high / 2),
        accent=union(band, lip),
        dark=cylinder(p, (0, high + 0.05, 0), neck + 0.09, 0.012, 0.005),
    )


def candle(p: Vec, s: Array) -> Parts:
    """Burning candle on a saucer with a handle: thick, tall, wide saucer; accents are saucer and its handle."""
    radius, high = lerp(0.17, 0.27, s[0]), lerp(0.36, 0.48, s[1])
    saucer = radius + lerp(0.18, 0.28, s[2])
    drip = limb(p, (radius * 0.9, 2 * high - 0.05, 0.05), (radius * 0.95, 2 * high - 0.3, 0.07), 0.05)
    wick = limb(p, (0, 2 * high, 0), (0, 2 * high + 0.1, 0), 0.025)
    flame = limb(p, (0, 2 * high + 0.19, 0), (0, 2 * high + 0.4, 0), lerp(0.1, 0.13, s[3]), 0.02)
    return Parts(
        body=blend(cylinder(p, (0, high, 0), radius, high, 0.04), drip, k=0.05),
        accent=union(cylinder(p, (0, 0.06, 0), saucer, 0.07), ring(p, (-saucer - 0.08, 0.13, 0), 0.11, 0.045, Z)),
        dark=wick,
        light=flame,
    )


def boot(p: Vec, s: Array) -> Parts:
    """Boot: tall, wide-shafted, long-footed; accents are cuff and toe cap; dark sole."""
    high, radius, long = lerp(0.85, 1.15, s[0]), lerp(0.21, 0.27, s[1]), lerp(0.46, 0.56, s[2])
    shaft = limb(p, (-0.14, high, 0), (-0.14, 0.3, 0), radius, radius * 0.95)
    foot = blend(
        ellipsoid(p, (long * 0.55, 0.24, 0), (long * 0.62, 0.21, 0.22)),
        box(p, (0.05, 0.18, 0), (long * 0.72, 0.1, 0.2), 0.08),
    )
    cuff = cylinder(p, (-0.14, high - 0.04, 0), radius + 0.05, lerp(0.09, 0.13, s[3]), 0.04)
    toe = ellipsoid(p, (long * 0.85, 0.22, 0), (long * 0.36, 0.2, 0.225))
    sole = union(
        box(p, (0.12, 0.06, 0), (long + 0.02, 0.06, 0.25), 0.05), box(p, (-0.22, 0.05, 0), (0.14, 0.1, 0.21), 0.02)
    )
    hole = cylinder(p, (-0.14, high + 0.08, 0), radius - 0.03, 0.02, 0.005)
    return Parts(
        body=jnp.maximum(blend(shaft, foot, k=0.15), p[1] - high), accent=union(cuff, toe), dark=union(sole, hole)
    )


def backpack(p: Vec, s: Array) -> Parts:
    """Backpack seen from its pocket side: tall, wide; accents are pocket, flap and handle; dark zips and straps."""
    q = mirrored(p)
    high, wide, pocket = lerp(0.46, 0.56, s[0]), lerp(0.34, 0.44, s[1]), lerp(0.4, 0.5, s[2])
    bag = blend(
        box(p, (0, high, 0), (0.22, high, wide), 0.14), ellipsoid(p, (0, 2 * high - 0.15, 0), (0.22, 0.22, wide)), k=0.1
    )
    handle = ring(p, (-0.05, 2 * high + 0.05, 0), 0.12, 0.045, X)
    zips = union(
        box(p, (0.21, high * 1.45, 0), (0.03, 0.03, wide * 0.8), 0.01),
        box(p, (0.33, high * lerp(0.8, 0.95, s[3]), 0), (0.03, 0.03, wide * 0.6), 0.01),
    )
    straps = box(q, (-0.1, high * 0.75, wide + 0.03), (0.06, high * 0.6, 0.07), 0.05)
    front = box(p, (0.22, high * 0.62, 0), (0.12, high * pocket, wide * 0.78), 0.07)
    return Parts(body=bag, accent=union(front, handle), dark=union(zips, straps))


def can(p: Vec, s: Array) -> Parts:
    """Drinks can: thick, tall; the accent is a broad label; light metal rims."""
    radius, high, label = lerp(0.3, 0.42, s[0]), lerp(0.48, 0.6, s[1]), lerp(0.3, 0.48, s[2])
    top = 2 * high
    rims = union(ring(p, (0, top - 0.01, 0), radius - 0.04, 0.045), ring(p, (0, 0.04, 0), radius - 0.04, 0.045))
    return Parts(
        body=cylinder(p, (0, high, 0), radius, high, 0.05),
        accent=cylinder(p, (0, high * lerp(0.85, 1.1, s[3]), 0), radius + 0.02, high * label, 0.01),
        dark=ellipsoid(p, (0.1, top + 0.01, 0), (0.13, 0.025, 0.08)),
        light=union(rims, cylinder(p, (0, top - 0.02, 0), radius - 0.05, 0.025, 0.01)),
    )


SHAPES: dict[str, Callable[[Vec, Array], Parts]] = {
    "dog": dog,
    "cat": cat,
    "bear plushie": bear_plushie,
    "duck toy": duck_toy,
    "robot toy": robot_toy,
    "car": car,
    "teapot": teapot,
    "vase": vase,
    "candle": candle,
    "boot": boot,
    "backpack": backpack,
    "can": can,
}


class Hat(NamedTuple):
    """Measures of a hat, in units of the crown's radius, and its colours (rgb in [0, 1])."""

    brim: float
    brim_half_height: float
    base: float  # radius of the crown at the brim
    tip: float  # radius of the crown at its tip
    lean: float  # how far the tip leans back
    height: float
    cut: float  # the crown is cut flat at this height
    bobble: float  # radius of the ball at the tip
    colour: tuple[float, float, float]
    trim: tuple[float, float, float]  # brim and bobble


HATS = {
    "wearing a red hat": Hat(1.75, 0.14, 1.0, 0.95, 0.0, 0.35, 9.0, 0.0, (0.85, 0.07, 0.09), (0.85, 0.07, 0.09)),
    "wearing a santa hat": Hat(1.2, 0.3, 1.0, 0.2, 0.75, 1.75, 9.0, 0.5, (0.85, 0.05, 0.08), (0.98, 0.98, 0.98)),
    "wearing a black top hat": Hat(1.65, 0.12, 0.95, 1.0, 0.0, 2.0, 1.75, 0.0, (0.05, 0.05, 0.06), (0.05, 0.05, 0.06)),
}


def hat(p: Vec, crown: Vec, measures: Hat) -> tuple[Array, Array]:
    """Distances to a hat's crown and to its trim; the measures may be traced scalars."""
    x, y, radius = crown
    across, up, sideways = minus(p, (x, y, 0.0))
    q = across / radius, up / radius, sideways / radius
    tip = (-measures.lean, measures.height, 0.0)
    brim = cylinder(q, (0, measures.brim_half_height, 0), measures.brim, measures.brim_half_height, 0.1)
    crown_distance = jnp.maximum(limb(q, (0, 0.1, 0), tip, measures.base, measures.tip), q[1] - measures.cut)
    bobble = jnp.where(measures.bobble > 0, sphere(q, tip, measures.bobble), FAR)
    return radius * crown_distance, radius * union(brim, bobble)

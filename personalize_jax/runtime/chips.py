"""TPU chips: memory, speed and links."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One chip of a TPU generation.

    Attributes:
        kinds: JAX's names of the device (`device_kind`).
        hbm_bytes: memory of the chip.
        flops: bfloat16 operations a second.
        hbm_bandwidth: bytes a second between the chip and its memory.
        link_bandwidth: bytes a second over one link between chips, in one direction.
        dimensions: number of dimensions of a slice's torus.
        ring: sides of a slice whose length is a multiple of this number of chips are rings; others are lines.
    """

    kinds: tuple[str, ...]
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    ring: int


# Google Cloud's system architecture pages (TPU v4, v5e, v5p, v6e); bandwidths of links as "How to scale your model"
# (Austin et al. 2025, "TPU networking") derives them from the totals given there.
CHIPS = {
    "v4": Chip(("TPU v4",), 32 * GIB, 275e12, 1.2e12, 4.5e10, 3, 4),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 8.1e11, 4.5e10, 2, 16),
    "v5p": Chip(("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2.765e12, 9e10, 3, 4),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1.6e12, 9e10, 2, 16),
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations a second of a device, by JAX's name of its kind; None for an unknown one."""
    return next((chip.flops for chip in CHIPS.values() if device_kind in chip.kinds), None)

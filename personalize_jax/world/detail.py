"""How sharp pictures are: their amplitude at each spatial frequency, beside that of renders."""

import numpy as np

OCTAVES = (4, 8, 16, 32)  # cycles along a picture's side, the lower end of each octave


def relative_amplitudes(images: np.ndarray, renders: np.ndarray) -> dict[str, float]:
    """The amplitude of pictures' brightness in each octave of spatial frequency, over that of renders.

    1 is as sharp as renders are, less is blurred, more is noisy. A square of R pixels has frequencies up to R / 2
    cycles, and the means run over all pictures' power.

    Args:
        images: uint8 [N, R, R, 3].
        renders: uint8 [M, R, R, 3] of like scenes.

    Returns:
        Ratios by octave, such as "16 to 32 cycles", as far as R pixels have them.
    """
    found, expected = _power(images), _power(renders)
    octaves = [low for low in OCTAVES if 2 * low <= images.shape[1] // 2]
    return {
        f"{low} to {2 * low} cycles": float(np.sqrt(a / b)) for low, a, b in zip(octaves, found, expected, strict=False)
    }


def _power(images: np.ndarray) -> list[float]:
    """Mean power in each of `OCTAVES`."""
    side = images.shape[1]
    window = np.outer(np.hanning(side), np.hanning(side))  # so that opposite borders, which differ, make no edge
    grey = images.astype(np.float64).mean(-1)
    spectrum = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
    cycles = np.fft.fftfreq(side, 1 / side)
    radius = np.hypot(cycles[:, None], cycles)
    return [float(spectrum[:, (radius >= low) & (radius < 2 * low)].mean()) for low in OCTAVES if 2 * low <= side // 2]

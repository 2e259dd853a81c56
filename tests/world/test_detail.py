import numpy as np
import pytest

from personalize_jax.world.detail import relative_amplitudes


def waves(cycles, amplitude, side=128, n=2, angle=0.3):
    """Pictures of a wave, each with another phase."""
    x, y = np.meshgrid(np.arange(side) / side, np.arange(side) / side)
    along = x * np.cos(angle) + y * np.sin(angle)
    phases = np.linspace(0, 3, n)[:, None, None]
    grey = 128 + amplitude * np.sin(2 * np.pi * cycles * along + phases)
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize(("cycles", "octave"), [(6, "4 to 8 cycles"), (23, "16 to 32 cycles"), (45, "32 to 64 cycles")])
def test_the_amplitude_of_a_wave_is_found_in_its_octave(cycles, octave):
    found = relative_amplitudes(waves(cycles, 30), waves(cycles, 60))
    assert found[octave] == pytest.approx(0.5, rel=0.01)


def test_blurred_pictures_lack_high_frequencies_and_noisy_ones_have_too_many():
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
    blurred = sharp.reshape(4, 32, 2, 32, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    found = relative_amplitudes(blurred, sharp)
    assert list(found) == ["4 to 8 cycles", "8 to 16 cycles", "16 to 32 cycles"]
    assert found["4 to 8 cycles"] > 0.9 and found["16 to 32 cycles"] < 0.7
    assert relative_amplitudes(sharp, blurred)["16 to 32 cycles"] > 1.4


def test_the_number_of_pictures_does_not_matter():
    few, many = waves(20, 40, n=2), waves(20, 40, n=9)
    assert relative_amplitudes(few, many)["16 to 32 cycles"] == pytest.approx(1, rel=0.02)

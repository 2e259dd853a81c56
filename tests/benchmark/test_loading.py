import functools

import numpy as np
import pytest

from personalize_jax.benchmark import dreambooth
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.benchmark.world import settings_benchmark
from personalize_jax.runtime.errors import UserError


def test_names_and_folders_are_told_apart(copy, tmp_path, monkeypatch):
    assert load_benchmark("world").names[0] == "dog_0"
    assert load_benchmark("world:settings").names == settings_benchmark().names
    from_folder = load_benchmark(str(copy))
    dreambooth.load(tmp_path, folder=copy)
    monkeypatch.setattr(dreambooth, "load", functools.partial(dreambooth.load, tmp_path))
    prepared = load_benchmark("dreambooth")
    assert from_folder.names == prepared.names
    np.testing.assert_array_equal(from_folder[10].photos[0], prepared[10].photos[0])


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is no benchmark; give world, world:settings, dreambooth, or a folder"):
        load_benchmark(tmp_path / "nowhere")

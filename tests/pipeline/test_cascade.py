import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny

PROMPTS = ["a dog", "a red teapot on the beach", "a clock in the snow", "a boot", "a dog"]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def together(pipeline):
    """Five pictures of each stage in batches of two, the last of which is filled up."""
    return pipeline.sample(PROMPTS, SEEDS, batch_size=2)


def test_every_stage_gives_a_picture_for_each_prompt(together):
    assert [p.shape for p in together] == [(5, 8, 8, 3), (5, 16, 16, 3)]
    assert all(p.dtype == np.uint8 for p in together)
    assert together[0].std() > 10


def test_prompt_and_seed_decide_the_picture_not_its_place_or_neighbours(pipeline, together):
    order = [4, 2, 0]
    again = pipeline.sample([PROMPTS[i] for i in order], [SEEDS[i] for i in order], batch_size=2)
    for pictures, expected in zip(again, together, strict=True):
        np.testing.assert_array_equal(pictures, expected[order])


def test_the_size_of_the_batch_changes_no_more_than_rounding(pipeline, together):
    base = pipeline.sample_stage(pipeline.stages[0], PROMPTS, SEEDS, batch_size=3)
    assert np.abs(base.astype(int) - together[0]).max() <= 1


def test_other_seeds_and_other_prompts_give_other_pictures(together):
    base = together[0].astype(int)
    assert np.abs(base[0] - base[4]).mean() > 5  # another seed
    assert np.abs(base[1] - base[3]).mean() > 0.5  # another prompt


def draw_on_every_device(file):
    """Run on eight devices."""
    assert jax.device_count() == 8
    np.save(file, tiny.pipeline().sample(PROMPTS, SEEDS, batch_size=3)[-1])


def test_eight_devices_draw_the_same_pictures(together, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = f"from {__name__} import draw_on_every_device; draw_on_every_device({str(tmp_path / 'drawn.npy')!r})"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[2])
    drawn = np.load(tmp_path / "drawn.npy")
    assert np.abs(drawn.astype(int) - together[-1]).max() <= 1


def test_progress_counts_pictures_not_filled_rows(pipeline):
    done = []
    pipeline.sample_stage(pipeline.stages[0], PROMPTS, SEEDS, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_parts_are_replaced_in_a_copy(pipeline):
    sampling = pipeline.stages[1].sampling._replace(num_steps=9)
    changed = pipeline.replace_sampling(super_resolution=sampling)
    assert changed.stage("super_resolution").sampling.num_steps == 9
    assert changed.spec["stages"][1]["sampling"]["num_steps"] == 9
    assert pipeline.stages[1].sampling.num_steps == pipeline.spec["stages"][1]["sampling"]["num_steps"] == 2
    assert pipeline.replace_params(base={}).params["base"] == {} != pipeline.params["base"]
    short = pipeline.up_to("base")
    assert [stage.name for stage in short.stages] == [spec["name"] for spec in short.spec["stages"]] == ["base"]


def test_each_prompt_needs_a_seed(pipeline):
    with pytest.raises(ValueError, match="5 prompts and 1 seeds"):
        pipeline.sample(PROMPTS, [0])

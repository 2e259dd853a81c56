import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.families.text import Text
from personalize_jax.families.world import World
from personalize_jax.pipeline import cascade
from personalize_jax.runtime.errors import UserError
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
    assert (base[1] != base[3]).mean() > 0.2  # another prompt


def draw_on_every_device(file):
    """Run on eight devices."""
    assert jax.device_count() == 8
    np.save(file, tiny.pipeline().sample(PROMPTS, SEEDS, batch_size=3)[-1])


@pytest.mark.slow
def test_eight_devices_draw_the_same_pictures(together, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = f"from {__name__} import draw_on_every_device; draw_on_every_device({str(tmp_path / 'drawn.npy')!r})"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[2])
    drawn = np.load(tmp_path / "drawn.npy")
    assert np.abs(drawn.astype(int) - together[-1]).max() <= 1


class Recording:
    """In place of `sample_pictures`: notes what it is given, and draws the pictures that it is told to."""

    def __init__(self, draws=lambda stage, keys, low: jnp.zeros((len(keys), *stage.shape))):
        self.draws, self.sizes, self.keys, self.low, self.samplings = draws, [], [], [], []

    def __call__(self, stage, sampling, mesh, params, keys_B, text, null_text, low_res):
        assert len(keys_B) == len(text.embeddings) == len(null_text.embeddings)
        self.sizes.append(len(keys_B))
        self.keys.append(jax.random.key_data(keys_B).tolist())
        self.low.append(low_res)
        self.samplings.append(sampling)
        return self.draws(stage, keys_B, low_res)


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    monkeypatch.setattr(cascade, "sample_pictures", recording)
    return recording


@pytest.mark.parametrize(
    ("count", "batch_size", "full", "devices", "sizes"),
    [
        (1, 16, False, 1, [1]),
        (2, 16, False, 1, [2]),
        (3, 16, False, 1, [4]),
        (9, 12, False, 1, [12]),
        (17, 16, False, 1, [16, 16]),
        (3, 2, False, 1, [2, 2]),
        (1, 16, False, 8, [8]),
        (9, 12, False, 8, [16]),
        (1, 4, True, 1, [4]),
        (5, 4, True, 1, [4, 4]),
        (1, 4, True, 8, [8]),
    ],
)
def test_few_pictures_take_small_batches_but_where_full_ones_are_asked_for(
    pipeline, recording, monkeypatch, count, batch_size, full, devices, sizes
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    low, enlarged = pipeline.sample(["a dog"] * count, range(count), batch_size, full_batches=full)
    assert recording.sizes == [size for size in sizes for _ in pipeline.stages] and len(low) == len(enlarged) == count


def test_prompts_that_come_again_are_not_encoded_again(pipeline, recording, monkeypatch):
    encoded, pipeline = [], pipeline.replace_params()

    def condition(family, params, tokens):
        encoded.append(len(tokens))
        return Text(jnp.zeros((len(tokens), 1, 1)), jnp.ones((len(tokens), 1), bool))

    monkeypatch.setattr(World, "condition", condition)
    pipeline.sample(["a dog"] * 6, range(6), batch_size=2)
    assert encoded == [2, 2]  # "a dog", and the empty prompt
    pipeline.sample(["a dog", "a cat", "a clock", "a cat"], range(4), batch_size=2)
    assert encoded == [2, 2, 2, 2]  # a batch's new prompts at once, filled up


def test_every_stage_and_seed_has_a_key_of_its_own(pipeline, recording):
    pipeline.sample(PROMPTS, SEEDS, batch_size=8)
    base, enlarged = ([tuple(key) for key in keys] for keys in recording.keys)  # all in one batch
    assert not set(base) & set(enlarged)
    assert base[1] == base[3] and len(set(base[:5])) == len(set(SEEDS))


def test_pictures_are_enlarged_each_with_its_own_seed_and_sampling(pipeline, monkeypatch):
    levels = jnp.linspace(-1, 1, 6)

    def draws(stage, keys, low):
        value = jax.vmap(lambda key: jax.random.uniform(key))(keys) if low is None else jnp.mean(low, (1, 2, 3)) / 255
        return jnp.broadcast_to(value[:, None, None, None], (len(keys), *stage.shape))

    monkeypatch.setattr(cascade, "sample_pictures", recording := Recording(draws))
    other = pipeline.stages[1].sampling._replace(num_steps=7)
    low, enlarged = pipeline.sample(["a dog"] * len(levels), range(len(levels)), 4, {"super_resolution": other})
    assert len({picture[0, 0, 0] for picture in low}) > 3
    np.testing.assert_array_equal(enlarged[:, 0, 0, 0], cascade.to_uint8(low[:, 0, 0, 0] / 255))
    np.testing.assert_array_equal(np.concatenate(recording.low[1::2])[:6], low)
    assert recording.samplings == [pipeline.stages[0].sampling, other] * 2


def test_a_batch_is_given_before_the_next_one_is_sampled(pipeline, recording):
    batches = pipeline.sample_batches(["a dog"] * 3, range(3), batch_size=2)
    assert recording.sizes == []
    assert [len(pictures) for pictures in next(batches)] == [2, 2] and recording.sizes == [2, 2]
    assert [len(pictures) for pictures in next(batches)] == [1, 1] and recording.sizes == [2, 2, 2, 2]


def test_parameters_are_placed_on_the_devices_once(pipeline, recording, monkeypatch):
    placed, pipeline = [], pipeline.replace_params()
    monkeypatch.setattr(cascade, "_on_every_device", lambda params: placed.append(1) or params)
    for seed in range(2):
        pipeline.sample(["a dog"] * 3, [seed] * 3, batch_size=2)
    assert len(placed) == len(pipeline.stages)


def test_pictures_that_are_not_finite_are_told_with_stage_prompt_and_seed(pipeline, monkeypatch):
    ruined = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), pipeline.params["base"])
    sentence = "The stage base gives no finite picture of 'a dog' .seed 7.. Its weights .*dtype=float32"
    with pytest.raises(UserError, match=sentence):
        pipeline.replace_params(base=ruined).sample(["a dog"], [7], batch_size=2, full_batches=True)

    def draws(stage, keys, low):
        return jnp.zeros((len(keys), *stage.shape)).at[1, 2, 3, 0].set(jnp.inf)

    monkeypatch.setattr(cascade, "sample_pictures", Recording(draws))
    with pytest.raises(UserError, match="'a cat' .seed 4."):
        pipeline.sample(["a dog", "a cat"], [7, 4])
    assert len(pipeline.sample(["a dog"], [7], batch_size=2, full_batches=True)[-1]) == 1  # what is cut does not matter


def test_a_picture_of_a_later_batch_that_is_not_finite_is_told_by_its_own_prompt_and_seed(pipeline, monkeypatch):
    values = iter([0.0, jnp.inf])
    draw = Recording(lambda stage, keys, low: jnp.full((len(keys), *stage.shape), next(values)))
    monkeypatch.setattr(cascade, "sample_pictures", draw)
    with pytest.raises(UserError, match="'a clock in the snow' .seed 4."):
        pipeline.sample_stage(pipeline.stages[0], PROMPTS, SEEDS, batch_size=2)


def test_progress_counts_pictures_not_filled_rows(pipeline):
    done = []
    pipeline.sample_stage(pipeline.stages[0], PROMPTS, SEEDS, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_parts_are_replaced_in_a_copy(pipeline):
    sampling = pipeline.stages[1].sampling._replace(num_steps=9)
    changed = pipeline.replace_sampling(super_resolution=sampling)
    assert changed.stage("super_resolution").sampling.num_steps == 9
    assert changed.family.specs[1]["sampling"]["num_steps"] == 9
    assert pipeline.stages[1].sampling.num_steps == pipeline.family.specs[1]["sampling"]["num_steps"] == 2
    assert pipeline.replace_params(base={}).params["base"] == {} != pipeline.params["base"]
    short = pipeline.up_to("base")
    assert [stage.name for stage in short.stages] == [spec["name"] for spec in short.family.specs] == ["base"]


def test_stages_that_there_are_not_are_told_by_those_that_there_are(pipeline):
    for find in (pipeline.stage, pipeline.up_to):
        with pytest.raises(UserError, match="no stage 'refiner'; its stages are base and super_resolution"):
            find("refiner")


def test_networks_are_read_once_for_the_fingerprints_of_all_that_share_them(pipeline):
    read = []

    def reading(name):
        return lambda: read.append(name) or pipeline.params[name]

    rounded = dataclasses.replace(pipeline, read_float32={name: reading(name) for name in pipeline.params}, digests={})
    assert rounded.fingerprint == pipeline.fingerprint
    other = jax.tree.map(lambda leaf: leaf * 1.5, pipeline.params["base"])
    tuned = rounded.replace_params(base=other)
    assert tuned.fingerprint == tiny.pipeline().replace_params(base=other).fingerprint != pipeline.fingerprint
    assert tuned.up_to("base").fingerprint != tuned.fingerprint == rounded.replace_params(base=other).fingerprint
    assert sorted(read) == sorted(pipeline.params)
    guided = pipeline.stages[0].sampling._replace(guidance_scale=2.5)  # draws other pictures
    assert pipeline.replace_sampling(base=guided).fingerprint != pipeline.fingerprint

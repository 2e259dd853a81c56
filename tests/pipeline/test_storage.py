import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.process import cosine, linear
from personalize_jax.formats.parameters import load_params, read_metadata, save_params
from personalize_jax.pipeline import Sampling, load_pipeline, save_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from tests import tiny

PARAMS = {"a": {"kernel": jnp.array([[1.0, 1e-3], [-2.5, 7.0]]), "bias": jnp.arange(3.0)}, "b": jnp.ones(())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipeline = tiny.pipeline()
    pipeline.tokenizer.counts[5:8] = [4, 0, 10**10]
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(pipeline, folder, jnp.float32)
    return pipeline, folder


def test_a_pipeline_comes_back_as_it_was(saved):
    pipeline, folder = saved
    loaded = load_pipeline(folder)
    assert loaded.stages == pipeline.stages and loaded.family == pipeline.family
    assert jax.tree.structure(loaded.params) == jax.tree.structure(pipeline.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, pipeline.params)
    np.testing.assert_array_equal(loaded.tokenizer.counts, pipeline.tokenizer.counts)
    np.testing.assert_array_equal(loaded.tokenizer(tiny.CAPTIONS), pipeline.tokenizer(tiny.CAPTIONS))


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "pipeline.json"
    spec = json.loads(file.read_text())
    spec["text_encoder"]["vocab_size"] -= 1
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"the token .* with id \d+, and the text encoder's table has \d+ rows; give"):
        load_pipeline(tmp_path / "pipeline")


@pytest.mark.parametrize(
    "damage", ['{"text_encoder": {', '{"stages": []}', '{"text_encoder": {"depth": 1}, "stages": []}']
)
def test_a_damaged_description_is_told(saved, tmp_path, damage):
    shutil.copytree(saved[1], tmp_path / "pipeline")
    (tmp_path / "pipeline" / "pipeline.json").write_text(damage)
    with pytest.raises(UserError, match="pipeline is damaged .*restore it"):
        load_pipeline(tmp_path / "pipeline")


def test_stages_come_back_with_all_that_tells_them_from_the_usual(saved, tmp_path):
    """Every kind of value differs between the stages, and from its default."""
    pipeline, _ = saved
    sampling = {"sampler": "ancestral", "num_steps": 7, "guidance_scale": 3.0, "augmentation_level": 0.2}
    sampling |= {"threshold_percentile": 0.9, "threshold_max": 2.5, "variance": "large"}
    schedules = {"schedule": {"kind": "linear"}, "augmentation": {"kind": "cosine", "shift": 0.5}}
    family = pipeline.family.with_stage({**tiny.SUPER_RESOLUTION, **schedules, "sampling": sampling})
    save_pipeline(dataclasses.replace(pipeline, family=family), tmp_path, jnp.float32)
    _, loaded = load_pipeline(tmp_path).stages
    assert loaded.sampling == Sampling(**sampling)
    t = np.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(loaded.process.logsnr(t), linear().logsnr(t))
    np.testing.assert_allclose(loaded.augmentation.logsnr(t), cosine(shift=0.5).logsnr(t))
    assert not np.allclose(loaded.process.logsnr(t), loaded.augmentation.logsnr(t))


def test_saved_again_it_gives_the_same_files(saved, tmp_path):
    _, folder = saved
    save_pipeline(load_pipeline(folder), tmp_path, jnp.float32)
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir())  # no temporary files either
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_stored_in_half_precision_parameters_are_read_as_float32(tmp_path):
    save_params(PARAMS, tmp_path / "half.safetensors", jnp.float16)
    loaded = load_params(tmp_path / "half.safetensors")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), loaded, PARAMS)
    save_params(PARAMS, tmp_path / "full.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "full.safetensors").stat().st_size


def test_the_same_parameters_and_text_are_the_same_bytes(tmp_path):
    """Or a resumed run's files would differ from an uninterrupted one's now and then."""
    text = {name: name.upper() for name in ("step", "token_ids", "kind", "seed")}
    for i in range(6):
        save_params(PARAMS, tmp_path / f"{i}.safetensors", metadata=text)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    assert read_metadata(tmp_path / "0.safetensors") == text


def test_reading_compiles_nothing(tmp_path):
    """A program for every shape would cost each start of a command seconds."""
    save_params(PARAMS, tmp_path / "half.safetensors", jnp.float16)
    compiled = []

    def heard(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        load_params(tmp_path / "half.safetensors")
        assert not compiled
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def test_transposed_arrays_are_written_as_they_are_indexed(tmp_path):
    transposed = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    save_params({"kernel": transposed}, tmp_path / "kernel.safetensors")
    np.testing.assert_array_equal(load_params(tmp_path / "kernel.safetensors")["kernel"], transposed)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_file_cut_short_is_named(tmp_path, share):
    file = tmp_path / "base.safetensors"
    save_params(PARAMS, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=r"base.safetensors cannot be read.*restore"):
        load_params(file)


def test_a_missing_network_is_named(saved, tmp_path):
    _, folder = saved
    for file in folder.iterdir():
        if file.name != "super_resolution.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="super_resolution.safetensors cannot be read"):
        load_pipeline(tmp_path)


def test_what_is_no_pipeline_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "missing", "wrold"):
        with pytest.raises(UserError, match="No pipeline at.*give 'world', or a folder"):
            load_pipeline(source)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "params.safetensors"
    save_params(PARAMS, file)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save_params({"a": object()}, file)
    with pytest.raises(TypeError):
        write_text(file, 5)
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_the_description_is_plain_json(saved):
    spec = json.loads((saved[1] / "pipeline.json").read_text())
    assert [stage["name"] for stage in spec["stages"]] == ["base", "super_resolution"]

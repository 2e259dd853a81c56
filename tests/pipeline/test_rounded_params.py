"""Public models whose pretrained parameters lie in bfloat16: what is computed, trained and written is as in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import common
from personalize_jax.families.batch import Batch
from personalize_jax.method.personalized import with_trained
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline, save_pipeline
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.program import stage_program
from personalize_jax.training.trained import trained_of
from tests import tiny, tiny_public

ROUNDED, FULL = jnp.dtype("bfloat16"), jnp.dtype("float32")
ADAPTERS = {"lora.rank": 2, "trainable": ((".*", False),)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tiny_public.save_all(tmp_path_factory.mktemp("public"))
    return {"stable_diffusion": [folder / "sd"], "deepfloyd_if": [folder / "first", folder / "second"]}


@pytest.fixture(params=["stable_diffusion", pytest.param("deepfloyd_if", marks=pytest.mark.slow)])
def sources(request, folders):
    return folders[request.param]


def dtypes(params):
    return {path: leaf.dtype for path, leaf in flatten(params).items()}


def tensors(folder):
    """All that the files under a folder hold, by component and name."""
    files = sorted(folder.rglob("*.safetensors"))
    found = {(file.parent.name, name): array for file in files for name, array in load_file(file).items()}
    # transformers has called what is in a CLIP text encoder by two names.
    return {(component, name.removeprefix("text_model.")): array for (component, name), array in found.items()}


def address(array):
    return array.addressable_data(0).unsafe_buffer_pointer()


def training(**changes):
    config = common.public_training()
    config.update(mesh=(1, 1, 1), num_steps=1, steps_per_dispatch=1, batch_size=2)
    config.prior.weight = 0.0
    config.update_from_flattened_dict(changes)
    return config.lock()


def stage_params(pipeline, stage):
    return pipeline.networks(stage.name)


def test_what_networks_round_lies_rounded_and_is_read_in_full(sources):
    exact, rounded = load_pipeline(sources), load_pipeline(sources, dtype="bfloat16")
    assert set(dtypes(exact.params).values()) == {FULL}
    for path, dtype in dtypes(rounded.params).items():
        in_full = path.endswith(("bias", "scale", "positional_embedding", "relative_attention_bias/embedding"))
        assert dtype == (FULL if in_full else ROUNDED), path
    for name, params in exact.params.items():
        jax.tree.map(np.testing.assert_array_equal, rounded.float32_params(name), params)
    assert rounded.fingerprint == exact.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("sources", ["stable_diffusion", "deepfloyd_if"], indirect=True)
def test_the_loss_is_that_of_parameters_in_full(sources):
    rounded, exact = load_pipeline(sources, dtype="bfloat16"), load_pipeline(sources)
    stage, rng = rounded.stages[-1], np.random.default_rng(0)
    low = None
    if stage.low_resolution is not None:
        low = jnp.asarray(rng.uniform(-1, 1, (2, stage.low_resolution, stage.low_resolution, 3)), jnp.float32)
    x = jnp.asarray(rng.uniform(-1, 1, (2, *stage.shape)), jnp.float32)
    tokens = jnp.asarray(rounded.tokenizer(["a dog"] * 2))
    batch = dict.fromkeys(("instance", "prior"), Batch(x, tokens, None, low, None))
    objective = tiny.objective("none", 1.0, "frozen_prediction", augmentation_levels=(0.1, 0.5))

    @jax.jit
    def terms(params, frozen):
        key = jax.random.key(1)
        return rounded.family.loss(stage, objective, params, frozen, batch, key)[1]

    full, lying = stage_params(exact, stage), stage_params(rounded, stage)
    expected = float(terms(full, full)["instance_loss"])
    found = terms(lying | {"denoiser": full["denoiser"]}, lying)
    assert float(found["instance_loss"]) == pytest.approx(expected, rel=1e-5)
    # The frozen network, rounded, answers what the trained one does before its first step.
    assert float(found["prior_loss"]) < 1e-8 < 1e-2 * expected


ROWS = {"trainable": (("text_encoder/.*token_embedding|text_encoder/shared", "identifier"), (".*", False))}
LOOKS_BACK = {"prior.form": "frozen_prediction", "prior.weight": 1.0}


@pytest.mark.parametrize(
    ("sources", "changes", "expected_reads"),
    [
        ("stable_diffusion", {}, ["denoiser"]),
        ("stable_diffusion", ADAPTERS, []),
        ("stable_diffusion", ROWS, ["text_encoder"]),
        ("deepfloyd_if", LOOKS_BACK, ["denoiser"]),
    ],
    ids=["all layers", "adapters", "rows", "frozen_prediction"],
    indirect=["sources"],
)
def test_what_is_trained_starts_in_full_and_all_else_lies_rounded(sources, changes, expected_reads):
    pipeline, exact = load_pipeline(sources, dtype="bfloat16"), load_pipeline(sources)
    stage, config = pipeline.stages[-1], training(**changes)
    start, read = stage_params(pipeline, stage), []

    def read_float32(name):
        read.append(name)
        return pipeline.float32_network(stage.name, name)

    identifier = Identifier(np.array([3]), np.array([[3, 5]]))
    made = stage_program(stage, pipeline.family, start, {}, config, 0, identifier, read_float32)
    params = made.init().params
    assert set(dtypes(params).values()) == {FULL}
    expected = flatten(stage_params(exact, stage))
    for path, value in flatten(params).items():
        if path.startswith("rows/"):
            table = expected[path.removeprefix("rows/")]
            np.testing.assert_allclose(value, (table[3:4] + table[5:6]) / 2, rtol=1e-6)
        elif not path.startswith("lora/"):
            np.testing.assert_array_equal(value, expected[path])
    assert read == expected_reads
    frozen = flatten(made.frozen_params)
    assert any(path.startswith("denoiser/") for path in frozen) == bool(changes)
    for path, leaf in flatten(start).items():
        assert path not in frozen or address(frozen[path]) == address(leaf), f"{path} is held twice"


def test_files_hold_what_was_read_whatever_lies_in_memory(sources, tmp_path):
    save_pipeline(load_pipeline(sources, dtype="bfloat16"), tmp_path / "again", jnp.float32)
    written = (
        [tmp_path / "again"] if len(sources) == 1 else [tmp_path / "again" / n for n in ("base", "super_resolution")]
    )
    for before, after in zip(sources, written, strict=True):
        read, found = tensors(before), tensors(after)
        for key, value in found.items():
            np.testing.assert_array_equal(value, read[key], err_msg=str(key))
        assert any(folder == "unet" for folder, _ in found)


def test_adapters_are_merged_into_weights_in_full(sources, tmp_path):
    pipeline, exact = load_pipeline(sources, dtype="bfloat16"), load_pipeline(sources)
    stage, config = pipeline.stages[0], training(**ADAPTERS)
    state = stage_program(stage, pipeline.family, stage_params(pipeline, stage), {}, config, 0).init()
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), state.params["lora"])
    tuned = with_trained(pipeline, stage.name, lambda: trained_of(state._replace(params={"lora": adapters})))
    assert set(dtypes(tuned.params[stage.name]).values()) == set(dtypes(pipeline.params[stage.name]).values())
    save_pipeline(tuned, tmp_path / "out", jnp.float32)
    found = load_pipeline(tmp_path / "out")
    for name in ("text_encoder", *(other.name for other in pipeline.stages[1:])):
        jax.tree.map(np.testing.assert_array_equal, found.params[name], exact.params[name])
    factors, before = flatten(adapters["denoiser"]), flatten(exact.params[stage.name])
    for path, value in flatten(found.params[stage.name]).items():
        if f"{path}/down" not in factors:
            np.testing.assert_array_equal(value, before[path], err_msg=path)
            continue
        down, up = (np.asarray(factors[f"{path}/{side}"], np.float64) for side in ("down", "up"))
        np.testing.assert_allclose(value, before[path] + down @ up, rtol=1e-6, atol=1e-7, err_msg=path)

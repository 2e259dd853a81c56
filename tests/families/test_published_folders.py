"""Folders as they were published load here as in diffusers: weights, tokens, processes and sizes."""

import diffusers
import numpy as np
import pytest

from personalize_jax.formats.port_weights import torch_names
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from tests import published_folders
from tests.tiny_public import SD_SCHEDULER


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in published_folders.SIDES:
        variants = (".fp16",) if name == "sd-2.1-base" else ("", ".fp16")
        published_folders.write(name, folder / name, variants=variants)
    return folder


def assert_same(params, module, network, atol=0.0):
    theirs = dict(module.state_dict())
    for path, value in flatten(params).items():
        name = next(name for name in torch_names(path, network) if name in theirs)
        tensor = theirs[name].float().numpy()
        tensor = np.moveaxis(tensor, (1, 0), (-2, -1)) if path.endswith("kernel") else tensor
        np.testing.assert_allclose(value, tensor.reshape(value.shape), rtol=0, atol=atol, err_msg=path)


QUICK = ("sd-1.5", "IF-I-M")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in published_folders.SIDES],
)
def test_a_published_folder_loads_as_in_diffusers(name, folders, caplog):
    sources = [folders / "IF-I-M", folders / name] if name == "IF-II-M" else [folders / name]
    ours = load_pipeline(sources)
    unused = published_folders.UNUSED if name.startswith("IF") else {"safety_checker": None, "feature_extractor": None}
    variant = "fp16" if name == "sd-2.1-base" else None
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders / name, variant=variant, **unused)
    stage = ours.stages[-1]
    assert stage.resolution == published_folders.SIDES[name]
    assert (stage.shape[0], stage.network.in_channels) == (
        theirs.unet.config.sample_size,
        theirs.unet.config.in_channels,
    )
    assert (stage.prediction, stage.learned_variance) == ("v" if name == "sd-2.1" else "eps", name.startswith("IF"))
    assert ours.family.spec["stages"][-1]["scheduler"].get("steps_offset", 0) == theirs.scheduler.config.steps_offset
    alpha = np.asarray(stage.process.alpha(np.arange(1, 1001) / 1000))
    np.testing.assert_allclose(alpha**2, theirs.scheduler.alphas_cumprod, atol=1e-6)

    assert_same(ours.params[stage.name], theirs.unet, "unet")
    assert_same(ours.params["text_encoder"], theirs.text_encoder, "t5" if name.startswith("IF") else "clip")
    if "codec" in ours.params:
        assert_same(ours.params["codec"], theirs.vae, "autoencoder")
        assert ours.family.codec.scaling_factor == theirs.vae.config.scaling_factor
    words = ["a qz dog in the snow", ""]
    expected = theirs.tokenizer(words, padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(ours.tokenizer(words), expected)
    # DDIM in place of PNDM is said; nothing else is odd about these folders.
    said = [record.message for record in caplog.records if record.name.startswith("personalize_jax")]
    assert said == (
        ["Pictures are sampled by ddim, of our samplers the nearest to the pipeline's PNDMScheduler."]
        if name in ("sd-1.5", "sd-2.1-base")
        else []
    )
    if name.startswith("sd"):
        assert stage.sampling.threshold_max is None and stage.spacing.offset == SD_SCHEDULER["steps_offset"]

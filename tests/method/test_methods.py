import re

import jax
import numpy as np
import pytest

from configs import deepfloyd_if, methods, stable_diffusion, world
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations import select
from tests import tiny_public

CONFIGS = {
    "world": world.get_config,
    "stable_diffusion": lambda method: stable_diffusion.get_config(f"1.5:{method}"),
    "deepfloyd_if": lambda method: deepfloyd_if.get_config(f"M:{method}"),
}
TABLES = {
    "world": "text_encoder/tokens/embedding",
    "stable_diffusion": "text_encoder/text_model/embeddings/token_embedding/embedding",
    "deepfloyd_if": "text_encoder/shared/embedding",
}
# What reads the text in each U-Net: the kernels whose input is as wide as its embeddings, or named for it.
READS_TEXT = {
    "world": r".*cross_attention/(key|value)/(kernel|bias)",
    "stable_diffusion": r".*attn2/(to_k|to_v)/kernel",
    "deepfloyd_if": r".*(add_k_proj|add_v_proj)/(kernel|bias)",
}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """Parameters of each family's base stage, in the shapes of their families."""
    folder = tmp_path_factory.mktemp("public")
    tiny_public.stable_diffusion().save_pretrained(folder / "sd")
    tiny_public.deepfloyd_if().save_pretrained(folder / "if")
    pipelines = {
        "world": load_pipeline("world"),
        "stable_diffusion": load_pipeline(str(folder / "sd")),
        "deepfloyd_if": load_pipeline(str(folder / "if")),
    }
    return {
        family: {"denoiser": p.params[p.stages[0].name], "text_encoder": p.params["text_encoder"]}
        for family, p in pipelines.items()
    }


def selection(family, method, params):
    return select(params[family], CONFIGS[family](method).training)


@pytest.mark.parametrize("family", CONFIGS)
def test_each_method_trains_what_it_is_known_for(family, params):
    denoiser = {path for path in flatten(params[family]) if path.startswith("denoiser/")}
    chosen = {method: selection(family, method, params).chosen for method in methods.METHODS}

    assert chosen["dreambooth"].keys() == {"full"} and chosen["dreambooth"]["full"].keys() == denoiser

    assert chosen["textual_inversion"].keys() == {"rows"}
    (table,) = chosen["textual_inversion"]["rows"].values()
    assert table.ndim == 2 and table.shape[0] == max(leaf.shape[0] for leaf in jax.tree.leaves(params[family]))

    assert chosen["lora"].keys() == {"lora"}
    assert chosen["lora"]["lora"].keys() <= denoiser and len(chosen["lora"]["lora"]) >= 4

    reads_text = {path for path in denoiser if re.fullmatch(READS_TEXT[family], path)}
    assert chosen["custom_diffusion"].keys() == {"full", "rows"}
    assert chosen["custom_diffusion"]["full"].keys() == reads_text
    assert chosen["custom_diffusion"]["rows"].keys() == chosen["textual_inversion"]["rows"].keys()
    share = sum(np.size(leaf) for leaf in chosen["custom_diffusion"]["full"].values())
    assert 0 < share < 0.25 * sum(np.size(leaf) for leaf in jax.tree.leaves(params[family]["denoiser"]))


@pytest.mark.parametrize("family", CONFIGS)
def test_methods_differ_in_the_base_stages_training_alone(family):
    plain = CONFIGS[family]("dreambooth")
    assert plain == CONFIGS[family]("dreambooth") and plain.is_locked
    for method in methods.METHODS:
        config = CONFIGS[family](method)
        assert config.is_locked
        assert {key for key in plain if config[key] != plain[key]} <= {"tune", "training"}
    assert CONFIGS[family]("textual_inversion").training.prior.weight == 0
    assert CONFIGS[family]("custom_diffusion").training.prior.weight > 0


def test_a_version_alone_is_dreambooth():
    assert stable_diffusion.get_config("2.1") == stable_diffusion.get_config("2.1:dreambooth")
    assert deepfloyd_if.get_config("XL") == deepfloyd_if.get_config("XL:dreambooth")


@pytest.mark.parametrize("get_config", [world.get_config, CONFIGS["stable_diffusion"], CONFIGS["deepfloyd_if"]])
def test_unknown_methods_are_refused(get_config):
    with pytest.raises(ValueError, match="The method is 'hypernetwork'; give one of dreambooth, textual_inversion"):
        get_config("hypernetwork")


def test_rows_and_adapters_that_leave_nothing_are_refused(params):
    config = CONFIGS["world"]("textual_inversion").copy_and_resolve_references().unlock()
    config.training.trainable = (("nothing", "identifier"), (".*", False))
    with pytest.raises(UserError, match="nothing to train"):
        select(params["world"], config.training)

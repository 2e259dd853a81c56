import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from personalize_jax.formats.port_weights import load_weights, save_weights, torch_names
from personalize_jax.models.autoencoder_kl import AutoencoderKL
from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.models.params import unflatten
from personalize_jax.models.t5_encoder import T5Encoder
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.runtime.errors import UserError
from tests import tiny_public
from tests.models.torch_params import port

TOKENS = jnp.zeros((1, 77), jnp.int32)


def _unet(config):
    theirs = UNet2DConditionModel(**config)
    z, text = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 77, tiny_public.WIDTH))
    low_res = [z, jnp.zeros(1, jnp.int32)] if config["in_channels"] == 6 else []
    z = z if config["in_channels"] in (3, 6) else jnp.zeros((1, 8, 8, 4))
    inputs = [z, jnp.zeros(1, jnp.int32), text, jnp.ones((1, 77), bool), *low_res]
    return theirs, UNet2DCondition.from_config(theirs.config), inputs


def _autoencoder():
    theirs = TorchAutoencoder(block_out_channels=(4,), norm_num_groups=2)
    return theirs, AutoencoderKL.from_config(theirs.config), [jnp.zeros((1, 8, 8, 3))]


def _clip():
    theirs = tiny_public.clip_text(tiny_public.clip_tokenizer())
    return theirs, ClipTextEncoder.from_config(theirs.config.to_dict()), [TOKENS]


def _t5():
    theirs = tiny_public.t5_text(tiny_public.t5_tokenizer())
    return theirs, T5Encoder.from_config(theirs.config.to_dict()), [TOKENS]


NETWORKS = {
    "unet": lambda: _unet(tiny_public.SD_UNET),
    "unet of IF": lambda: _unet(tiny_public.IF_UNET),
    "unet of IF II": lambda: _unet(tiny_public.IF_II_UNET),
    "autoencoder": _autoencoder,
    "clip": _clip,
    "t5": _t5,
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    """The name of the network's kind, diffusers' or transformers' network, shapes of our parameters."""
    theirs, ours, inputs = NETWORKS[request.param]()
    tiny_public.randomized(theirs)
    return request.param.split()[0], theirs, jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]


@pytest.fixture(scope="module")
def autoencoder():
    theirs, ours, inputs = _autoencoder()
    tiny_public.randomized(theirs)
    return theirs, jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]


def own_tensors(module, network):
    """A state dict without names of what another name stands for."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if network == "t5":
        del state["encoder.embed_tokens.weight"]
    return state


def under_our_names(state, network, abstract):
    if network == "clip":
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    return port(state, abstract)


def assert_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("size", ["10GB", "6KB"])
def test_reads_what_they_write(case, size, tmp_path):
    network, theirs, abstract = case
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert size == "10GB" or len(list(tmp_path.glob("*.safetensors"))) > 1
    params = load_weights(tmp_path, abstract, network)
    assert_equal(params, under_our_names(own_tensors(theirs, network), network, abstract))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**4])
def test_they_read_what_we_write(case, max_shard_bytes, tmp_path):
    network, theirs, abstract = case
    theirs.save_config(tmp_path) if hasattr(theirs, "save_config") else theirs.config.save_pretrained(tmp_path)
    diffusers = network in ("unet", "autoencoder")
    file_name = "diffusion_pytorch_model.safetensors" if diffusers else "model.safetensors"
    params = under_our_names(own_tensors(theirs, network), network, abstract)
    save_weights(params, tmp_path, file_name, network, jnp.float32, max_shard_bytes)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**5)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_linear_layers_keep_the_numbers_in_their_names():
    assert torch_names("time_embedding/linear_1/kernel", "unet") == ["time_embedding.linear_1.weight"]
    assert torch_names("mid_block/attentions_0/to_out_0/bias", "unet") == ["mid_block.attentions.0.to_out.0.bias"]


def test_reads_autoencoders_of_old(autoencoder, tmp_path):
    """Stable Diffusion 1.x names attention differently, and some files hold its linear layers as convolutions."""
    theirs, abstract = autoencoder
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, before)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        state[name] = tensor.contiguous()
    assert sum(".proj_attn." in name for name in state) == 4
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    params = load_weights(tmp_path, abstract, "autoencoder")
    assert_equal(params, port(theirs.state_dict(), abstract))


def test_reads_text_encoders_of_old(tmp_path):
    theirs, ours, inputs = _clip()
    abstract = jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]
    state = {f"text_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    expected = port(state, abstract)
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    assert_equal(load_weights(tmp_path, abstract, "clip"), expected)

    theirs, ours, inputs = _t5()
    abstract = jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert torch.equal(state["shared.weight"], state["encoder.embed_tokens.weight"])
    expected = port(own_tensors(theirs, "t5"), abstract)
    for absent in ([], ["shared.weight"], ["encoder.embed_tokens.weight"]):
        save_file({name: state[name] for name in state.keys() - absent}, tmp_path / "model.safetensors")
        assert_equal(load_weights(tmp_path, abstract, "t5"), expected)


@pytest.mark.parametrize("stored, rounded", [(torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_converts_types(stored, rounded, dtype, autoencoder, tmp_path):
    theirs, abstract = autoencoder
    save_file({k: v.to(stored) for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
    params = load_weights(tmp_path, wanted, "autoencoder")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(rounded), port(theirs.state_dict(), abstract))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert_equal(params, jax.tree.map(lambda leaf: leaf.astype(dtype), expected))


@pytest.mark.parametrize("dtype, stored", [(jnp.float16, torch.float16), (jnp.bfloat16, torch.bfloat16)])
def test_writes_half_precision(dtype, stored, autoencoder, tmp_path):
    theirs, abstract = autoencoder
    save_weights(port(theirs.state_dict(), abstract), tmp_path, "model.safetensors", "autoencoder", dtype)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, theirs.state_dict()[name].to(stored))


def test_prefers_full_precision_to_the_variant(autoencoder, tmp_path):
    theirs, abstract = autoencoder
    exact, half = port(theirs.state_dict(), abstract), port(theirs.half().state_dict(), abstract)
    theirs.save_pretrained(tmp_path, variant="fp16")
    theirs.float()
    assert_equal(load_weights(tmp_path, abstract, "autoencoder"), half)
    save_weights(exact, tmp_path, "diffusion_pytorch_model.safetensors", "autoencoder", jnp.float32)
    assert_equal(load_weights(tmp_path, abstract, "autoencoder"), exact)


def test_reads_shards_of_the_variant(autoencoder, tmp_path):
    theirs, abstract = autoencoder
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size="2KB")
    assert_equal(load_weights(tmp_path, abstract, "autoencoder"), port(theirs.state_dict(), abstract))


def test_puts_arrays_where_they_belong(autoencoder, tmp_path):
    theirs, abstract = autoencoder
    theirs.save_pretrained(tmp_path)
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, jax.P("data", *[None] * (leaf.ndim - 1))), abstract)
    params = load_weights(tmp_path, abstract, "autoencoder", sharding)
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, params, sharding))


def test_files_of_an_earlier_save_are_removed(autoencoder, tmp_path):
    theirs, abstract = autoencoder
    params = port(theirs.state_dict(), abstract)
    (tmp_path / "config.json").write_text("{}")
    for max_shard_bytes, count in ((10**9, 1), (4000, None), (8000, None), (10**9, 1)):
        save_weights(params, tmp_path, "model.safetensors", "autoencoder", jnp.float32, max_shard_bytes)
        files = {file.name for file in tmp_path.iterdir()}
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert files == named | {"config.json"} | ({index.name} if index.exists() else set())
        assert count is None or len(named) == count
        assert_equal(load_weights(tmp_path, abstract, "autoencoder"), params)


def test_a_failed_write_leaves_what_was_there(autoencoder, tmp_path, monkeypatch):
    theirs, abstract = autoencoder
    params = port(theirs.state_dict(), abstract)
    save_weights(params, tmp_path, "model.safetensors", "autoencoder", jnp.float32)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("personalize_jax.formats.port_weights.save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_weights(params, tmp_path, "model.safetensors", "autoencoder", jnp.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_names_tensors_that_do_not_fit(autoencoder, tmp_path):
    theirs, abstract = autoencoder
    name = "encoder.conv_in.weight"

    def refuse(state, *words):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as error:
            load_weights(tmp_path, abstract, "autoencoder")
        assert all(word in str(error.value) for word in words), str(error.value)

    state = theirs.state_dict()
    refuse({k: v for k, v in state.items() if k != name}, name)
    refuse(state | {"encoder.extra.weight": torch.zeros(2)}, "encoder.extra.weight")
    refuse(state | {name: state[name].transpose(0, 1).contiguous()}, name, "(4, 3, 3, 3)", "(3, 4, 3, 3)")
    refuse(state | {name: state[name].to(torch.int32)}, name, "I32")


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:4], lambda data: b"\xff" * 64])
def test_refuses_damaged_files(damage, autoencoder, tmp_path):
    theirs, abstract = autoencoder
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors cannot be read"):
        load_weights(tmp_path, abstract, "autoencoder")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "model.bin", "..", "a/b.safetensors", 5]
)
def test_an_index_cannot_lead_out_of_its_folder(name, autoencoder, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    autoencoder[0].save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"encoder.conv_in.weight": name}}))
    with pytest.raises(UserError, match="file in its folder is expected"):
        load_weights(folder, autoencoder[1], "autoencoder")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_refuses_a_damaged_index(text, autoencoder, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index of shards"):
        load_weights(tmp_path, autoencoder[1], "autoencoder")


def test_names_a_missing_shard(autoencoder, tmp_path):
    autoencoder[0].save_pretrained(tmp_path, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_weights(tmp_path, autoencoder[1], "autoencoder")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "v1-5.ckpt", "weights.pt", "weights.pth"])
def test_refuses_pickles_and_tells_how_to_convert_them(name, autoencoder, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'echo unsafe'\ntR.")
    with pytest.raises(UserError, match="safe_serialization=True"):
        load_weights(tmp_path, autoencoder[1], "autoencoder")


def test_names_an_empty_folder(autoencoder, tmp_path):
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors or model.safetensors"):
        load_weights(tmp_path, autoencoder[1], "autoencoder")


# VmHWM starts anew with a program, unlike ru_maxrss. It counts pages of files mapped into memory too: none are.
MEASURE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from personalize_jax.models.params import unflatten
from personalize_jax.formats.port_weights import load_weights

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

shapes = json.loads(sys.argv[2])
abstract = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})
jax.block_until_ready(jnp.zeros(8))
before = kib("VmRSS")
params = jax.block_until_ready(load_weights(Path(sys.argv[1]), abstract, "clip"))
print((kib("VmHWM") - before) * 1024 / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("stored, files", [(np.float32, 1), (np.float16, 3)])
def test_memory_stays_near_the_size_of_the_weights(stored, files, tmp_path):
    layers = {f"encoder/layers_{i}/fc1/kernel": (1024, 4096) for i in range(12)}
    shapes = {"embeddings/token_embedding/embedding": (20_000, 1024), **layers}  # 283 MB in float32, 29% in the first
    params = unflatten({path: np.zeros(shape, stored) for path, shape in shapes.items()})
    save_weights(params, tmp_path, "model.safetensors", "clip", stored, 600_000_000 // files**2)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(shapes)]
    peak = float(subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout)
    assert 0.95 < peak < 1.3

"""Stable Diffusion and DeepFloyd IF in the folders that were published, file by file and key by key, but narrow.

Configurations are those of `planning.published` with what else their files say; only sizes are cut. Weights are random.
"""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from personalize_jax.planning import published
from tests import tiny_public

SIDES = {"sd-1.5": 512, "sd-2.1": 768, "sd-2.1-base": 512, "IF-I-M": 64, "IF-II-M": 256}
UNUSED = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))  # which diffusers need not load
_VAE = {"layers_per_block": 1, "block_out_channels": [32, 32, 64, 64]}
_UNET = _VAE
_T5_WIDTH, _CLIP_WIDTH = 64, 32
_IF_UNET = {"attention_head_dim": 32, "encoder_hid_dim": _T5_WIDTH, "cross_attention_dim": 128}
_NARROW = {
    "sd-1.5": _UNET | {"cross_attention_dim": _CLIP_WIDTH},
    "sd-2.1": _UNET | {"cross_attention_dim": _CLIP_WIDTH, "attention_head_dim": [1, 1, 2, 2]},
    "sd-2.1-base": _UNET | {"cross_attention_dim": _CLIP_WIDTH, "attention_head_dim": [1, 1, 2, 2]},
    "IF-I-M": _IF_UNET | {"block_out_channels": [32, 64, 96, 128], "layers_per_block": 1},
    "IF-II-M": _IF_UNET
    | {"block_out_channels": [32, 32, 64, 64, 64], "layers_per_block": [1, 1, 1, 1, 2], "time_embedding_dim": 128},
}
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of an autoencoder's attention
_TRANSFORMERS = {"torch_dtype": "float32", "transformers_version": "4.22.0.dev0"}


def write(name, folder, side=None, variants=("", ".fp16")):
    """Write one of `SIDES`.

    Args:
        name: which.
        folder: made.
        side: of what the U-Net denoises, where the published one is too large to be computed with.
        variants: of the weights.
    """
    torch.manual_seed(0)
    unet, others = (_stable_diffusion if name.startswith("sd") else _deepfloyd_if)(name, folder, variants)
    unet |= _NARROW[name] | ({} if side is None else {"sample_size": side, "_diffusers_version": "0.9.0"})
    _write_json(folder / "unet" / "config.json", unet)
    network = tiny_public.randomized(UNet2DConditionModel.from_config(unet), 2)
    _weights(network.state_dict(), folder / "unet", "diffusion_pytorch_model", variants)
    for component, config in others.items():
        _write_json(folder / component / "scheduler_config.json", config)
    return folder


def _stable_diffusion(name, folder, variants):
    version, old = name.removeprefix("sd-"), name == "sd-1.5"
    diffusers_version = "0.6.0" if old else "0.10.0.dev0"
    scheduler = published.stable_diffusion_scheduler(version) | {"_diffusers_version": diffusers_version}
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"] if old else [None, None]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": checker,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if old:  # before the key was thought of
        del scheduler["prediction_type"]
    else:
        index["requires_safety_checker"] = False
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", {"crop_size": 224, "do_resize": True})

    tokenizer = tiny_public.clip_tokenizer()
    _clip_files(tokenizer, folder / "tokenizer", "<|endoftext|>" if old else "!")
    sizes = {"hidden_size": _CLIP_WIDTH, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = published.clip_text(version) | sizes | _TRANSFORMERS | {"vocab_size": len(tokenizer)}
    _write_json(folder / "text_encoder" / "config.json", text | {"_name_or_path": "openai/clip-vit-large-patch14"})
    state = tiny_public.randomized(CLIPTextModel(CLIPTextConfig(**text)), 1).state_dict()
    state = {f"text_model.{key}": value for key, value in state.items() if "position_ids" not in key}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # a buffer of older files
    _weights(state, folder / "text_encoder", "model", variants)

    vae = published.vae() | _VAE | {"_diffusers_version": diffusers_version}
    if old:
        del vae["scaling_factor"]
    _write_json(folder / "vae" / "config.json", vae)
    state = tiny_public.randomized(AutoencoderKL.from_config(vae), 3).state_dict()
    for new, other in _OLD_NAMES.items() if old else ():
        state = {key.replace(f".{new}.", f".{other}."): value for key, value in state.items()}
    _weights(state, folder / "vae", "diffusion_pytorch_model", variants)
    unet = published.stable_diffusion_unet(version) | {"_diffusers_version": diffusers_version}
    return unet, {"scheduler": scheduler}


def _deepfloyd_if(name, folder, variants):
    enlarges, version = name == "IF-II-M", {"_diffusers_version": "0.16.0.dev0"}
    index = {
        "_class_name": "IFSuperResolutionPipeline" if enlarges else "IFPipeline",
        **version,
        "_ignore_files": ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"],
    }
    schedulers = {"scheduler": published.if_scheduler() | version}
    unet = published.if_unet("M")
    if enlarges:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
        noising = published.if_image_noising_scheduler() | version
        schedulers = {
            "scheduler": published.if_super_resolution_scheduler() | version,
            "image_noising_scheduler": noising,
        }
        unet = published.if_super_resolution_unet("M")
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "watermarker" / "config.json", {"_class_name": "IFWatermarker", **version})
    rows = _t5_files(folder / "tokenizer") + 100 + 28  # sentinels, and rows up to the next multiple of 128
    sizes = {"d_model": _T5_WIDTH, "d_kv": 8, "d_ff": 96, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    text = published.t5_xxl() | sizes | _TRANSFORMERS | {"vocab_size": rows}
    _write_json(folder / "text_encoder" / "config.json", text | {"_name_or_path": "google/t5-v1_1-xxl"})
    state = tiny_public.randomized(T5EncoderModel(T5Config(**text)), 1).state_dict()
    _weights(state, folder / "text_encoder", "model", variants, shards=2)
    return unet | version | {"_name_or_path": "if/IF-I-M"}, schedulers


def _weights(state, folder, stem, variants, shards=1):
    """Safetensors of each variant, and the pickles that lie beside them, which are not to be read."""
    (folder / f"{stem.replace('model', 'pytorch_model') if stem == 'model' else stem}.bin").write_bytes(b"a pickle")
    for variant in variants:
        dtype = torch.float16 if variant else torch.float32
        tensors = {
            key: (value.to(dtype) if value.is_floating_point() else value).clone() for key, value in state.items()
        }
        if shards == 1:
            save_file(tensors, folder / f"{stem}{variant}.safetensors", {"format": "pt"})
            continue
        weight_map = {}
        for shard in range(shards):
            file = f"{stem}{variant}-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % shards == shard}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index{variant}.json", index)


def _clip_files(tokenizer, folder, pad):
    folder.mkdir(parents=True)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = (added | {"content": content} for content in ("<|startoftext|>", "<|endoftext|>"))
    config = {
        "add_prefix_space": False,
        "bos_token": bos,
        "do_lower_case": True,
        "eos_token": eos,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": eos,
    }
    plain = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write_json(folder / "tokenizer_config.json", config | {"pad_token": pad})
    _write_json(folder / "special_tokens_map.json", plain | {"pad_token": pad})


def _t5_files(folder):
    """Write `spiece.model` and what lies beside it; the number of its pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    special = {"<pad>": kinds.CONTROL, "</s>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}
    vocabulary = json.loads(tiny_public.t5_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    for piece, score in vocabulary:
        model.pieces.add(piece=piece, score=score, type=special.get(piece, kinds.NORMAL))
    spec = model.trainer_spec
    spec.model_type, spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = spec.UNIGRAM, 0, 1, 2, -1
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    sentinels = {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}
    _write_json(folder / "special_tokens_map.json", tokens | sentinels)
    config = {"extra_ids": 100, "model_max_length": 512, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    _write_json(folder / "tokenizer_config.json", config | tokens | sentinels | {"clean_up_tokenization_spaces": True})
    return len(vocabulary)


def _write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))

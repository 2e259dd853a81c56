"""Networks whose steps are measured, their random inputs, and the clock."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from personalize_jax.planning import published

LAMBDA, LEARNING_RATE, CLIP_NORM = 1.0, 5e-6, 1.0
TOKENS = 77  # of a text
OURS, DIFFUSERS = "ours", "diffusers"
CHANNELS_LAST, COMPILED, REMAT = "channels last", "compiled", "remat"  # options behind the name of a layout


@dataclasses.dataclass(frozen=True)
class Case:
    """A U-Net with its process, and the steps in which it is measured.

    Attributes:
        pipeline: the class of diffusers whose U-Net it resembles.
        shared: configurations of the pipeline's other networks, which are not run.
        unet: configuration of diffusers' UNet2DConditionModel.
        scheduler: configuration of its scheduler.
        guidance_scale: guidance scale of sampling.
        text_width: features of a token.
        batch: pictures of each group in a training batch.
        samples: pictures sampled at once.
        dtype: dtype of the computation; trained parameters and moments are float32.
        attention: our implementation of attention.
        train_steps: train steps of which the fastest counts.
        steps_per_dispatch: of these, steps in one dispatch of ours.
        sampling_steps: steps in which pictures are sampled.
        layouts: what is measured, by names such as "diffusers, compiled". "remat" computes activations again in the
            backward pass, by which layouts are compared among themselves.
    """

    pipeline: str
    shared: dict[str, Any]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    guidance_scale: float
    text_width: int
    batch: int
    samples: int
    dtype: str
    attention: str
    train_steps: int
    steps_per_dispatch: int
    sampling_steps: int
    layouts: tuple[str, ...]


_SMALL_TEXT = 256
_ON_CPU: dict[str, Any] = {
    "text_width": _SMALL_TEXT,
    "batch": 2,
    "samples": 2,
    "dtype": "float32",
    "attention": "heads",
    "train_steps": 6,
    "steps_per_dispatch": 1,
    "sampling_steps": 8,
    "layouts": (OURS, DIFFUSERS, f"{DIFFUSERS}, {CHANNELS_LAST}"),
}
_SMALL_STABLE_DIFFUSION = Case(
    "StableDiffusionPipeline",
    {
        "text_encoder": published.clip_text("1.5") | {"hidden_size": _SMALL_TEXT, "num_attention_heads": 4},
        "vae": published.vae(),
    },
    {
        "sample_size": 32,
        "block_out_channels": (64, 128, 256, 256),
        "attention_head_dim": 8,
        "cross_attention_dim": _SMALL_TEXT,
    },
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
    7.5,
    **_ON_CPU,
)
_SMALL_DEEPFLOYD_IF = Case(
    "IFPipeline",
    {"text_encoder": published.t5_xxl() | {"d_model": _SMALL_TEXT}},
    {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": _SMALL_TEXT,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
    },
    {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
    },
    7.0,
    **_ON_CPU,
)
_STABLE_DIFFUSION = Case(
    "StableDiffusionPipeline",
    {"text_encoder": published.clip_text("1.5"), "vae": published.vae()},
    published.stable_diffusion_unet("1.5"),
    published.stable_diffusion_scheduler("1.5") | {"_class_name": "DDIMScheduler"},
    7.5,
    text_width=768,
    batch=8,
    samples=4,
    dtype="bfloat16",
    attention="auto",
    train_steps=20,
    steps_per_dispatch=10,
    sampling_steps=50,
    layouts=(
        OURS,
        f"{OURS}, {REMAT}",
        DIFFUSERS,
        f"{DIFFUSERS}, {CHANNELS_LAST}",
        f"{DIFFUSERS}, {COMPILED}",
        f"{DIFFUSERS}, {REMAT}",
    ),
)
CASES = {
    "cpu": {"Stable Diffusion": _SMALL_STABLE_DIFFUSION, "DeepFloyd IF": _SMALL_DEEPFLOYD_IF},
    "gpu": {"Stable Diffusion 1.5": _STABLE_DIFFUSION},
}


def timed(step: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds of the fastest of `count` steps, and by how much a step before them, which compiles, takes longer."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times[1:]), "compile": times[0] - min(times[1:])}


def pictures(case: Case, count: int) -> np.ndarray:
    """Random pictures or latents [count, H, W, C]."""
    side, channels = case.unet["sample_size"], case.unet.get("in_channels", 4)
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, channels)).astype(np.float32)


def embeddings(case: Case, count: int) -> np.ndarray:
    """Random text embeddings [count, L, D]."""
    return np.random.default_rng(1).normal(size=(count, TOKENS, case.text_width)).astype(np.float32)

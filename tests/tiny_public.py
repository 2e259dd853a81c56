"""Random Stable Diffusion and DeepFloyd IF pipelines, made by diffusers in their exact shapes, as small as can be."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.models.torch_params import scramble

WIDTH = 16  # of the text embeddings
RARE = [a + b for a in "qxzvw" for b in "zxkjq"]
WORDS = ["a", "dog", "teapot", "backpack", "in", "the", "snow", "on", "beach", "photo", "of"]

SD_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
IF_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
}
IF_II_UNET = {
    **IF_UNET,
    "sample_size": 16,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "layers_per_block": (1, 2),
    "only_cross_attention": (True, False),
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.414,
    "mid_block_scale_factor": 1.414,
}
SQUAREDCOS = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "clip_sample": False}
IF_SCHEDULER = {**SQUAREDCOS, "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
SD_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def randomized(module, seed=0):
    """Parameters that are nowhere zero, where diffusers would start some at zero; evaluation mode."""
    scramble(module, seed)
    return module.eval()


def clip_tokenizer():
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []

    def merge(left, right):
        if left + right not in vocabulary:
            merges.append((left, right))
            vocabulary.append(left + right)

    for word in WORDS + RARE:
        so_far = word[0]
        for letter in word[1:-1]:
            merge(so_far, letter)
            so_far += letter
        if len(word) > 1:
            merge(so_far, word[-1] + "</w>")
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges, model_max_length=77)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -4.0 - 0.1 * i) for i, word in enumerate(WORDS + RARE)]
    pieces += [(letter, -9.0) for letter in string.ascii_lowercase + string.digits + ".,'-"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def clip_text(tokenizer, seed=1):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomized(CLIPTextModel(config), seed)


def t5_text(tokenizer, seed=1):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return randomized(T5EncoderModel(config), seed)


def stable_diffusion(prediction="epsilon", scheduler=DDIMScheduler, seed=0):
    """16 pixels, latents of 8."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    options = (
        SD_SCHEDULER
        if scheduler is DDIMScheduler
        else {k: v for k, v in SD_SCHEDULER.items() if k != "set_alpha_to_one"}
    )
    return StableDiffusionPipeline(
        vae=randomized(vae, seed + 3),
        text_encoder=clip_text(tokenizer, seed + 1),
        tokenizer=tokenizer,
        unet=randomized(UNet2DConditionModel(**SD_UNET), seed + 2),
        scheduler=scheduler(prediction_type=prediction, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def deepfloyd_if(seed=0):
    """8 pixels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    return IFPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, seed + 1),
        unet=randomized(UNet2DConditionModel(**IF_UNET), seed + 2),
        scheduler=DDPMScheduler(**IF_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def deepfloyd_if_super_resolution(seed=10):
    """8 to 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    return IFSuperResolutionPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, seed - 10 + 1),
        unet=randomized(UNet2DConditionModel(**IF_II_UNET), seed + 2),
        scheduler=DDPMScheduler(**{**IF_SCHEDULER, "sample_max_value": 1.0}),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def save_all(folder):
    """All of them, in folders as diffusers saves them: `sd`, and a cascade's `first` and `second`."""
    stable_diffusion().save_pretrained(folder / "sd")
    deepfloyd_if().save_pretrained(folder / "first")
    deepfloyd_if_super_resolution().save_pretrained(folder / "second")
    return folder

"""What the configurations share: every key of a training with its usual value."""

from ml_collections import ConfigDict


def training() -> ConfigDict:
    """The keys that `personalize_jax.training.loop.train` reads."""
    return ConfigDict(
        {
            "num_steps": 1000,
            "batch_size": 8,  # of each half: subject and class
            "microbatches": 1,  # parts of a batch that go through the networks one after another, to save memory
            "caption_dropout": 0.0,
            "object_weight": 0.0,  # added to the loss weight of the object's pixels, where masks are known
            "augmentation_levels": (0.0, 0.0),  # of the low-resolution picture, super-resolution only
            "weighting": "none",
            "prior": {
                "weight": 0.0,  # lambda
                "form": "sampled",  # or frozen_prediction
                "caption_dropout": 0.1,
            },
            "trainable": (("denoiser/", True), ("text_encoder/", False)),
            # Low-rank adapters of frozen kernels; with trainable=((".*", False),) nothing else is trained.
            "lora": {
                "rank": 0,  # 0 switches them off
                # Whole paths of kernels, and how many of a kernel's dimensions are inputs: here the embedded cascade's.
                "targets": (
                    ("denoiser/.*attention/(query|key|value)/kernel", 1),
                    ("denoiser/.*attention/out/kernel", 2),
                ),
            },
            "ema_decay": 0.0,  # 0 switches it off
            "optimizer": {
                "learning_rate": 1e-4,
                "warmup_steps": 0,
                "decay_steps": 0,
                "b1": 0.9,
                "b2": 0.99,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            "mesh": (-1, 1, 1),  # sizes of data, fsdp and tensor
            # Axes of the last dimensions, last first: features over tensor, inputs over fsdp.
            "sharding": (("", ("tensor", "fsdp")),),
            "steps_per_dispatch": 1,
            "log_every": 20,
            "checkpoint_every": 500,
        }
    )


def base_stage() -> ConfigDict:
    """The embedded cascade's base model, 32x32."""
    return ConfigDict(
        {
            "name": "base",
            "resolution": 32,
            "low_resolution": None,
            "network": {
                "channels": (64, 128, 256),
                "patch": 2,
                "down_blocks": (1, 1, 1),
                "up_blocks": (1, 2, 1),
                "attention": (False, False, True),
            },
            "schedule": {"kind": "cosine", "shift": 0.0},
            "augmentation": {"kind": "cosine"},
            "prediction": "v",
            "sampling": {"sampler": "dpm_solver_pp", "num_steps": 12, "guidance_scale": 2.0},
        },
        convert_dict=False,
    )


def super_resolution_stage() -> ConfigDict:
    """The embedded cascade's super-resolution model, 32x32 to 128x128.

    It predicts the clean picture as a difference from the enlarged one: a network this small then never does worse
    than enlarging.
    """
    return ConfigDict(
        {
            "name": "super_resolution",
            "resolution": 128,
            "low_resolution": 32,
            "network": {
                "channels": (48, 96, 192),
                "patch": 4,
                "down_blocks": (1, 1, 1),
                "up_blocks": (1, 1, 1),
                "attention": (False, False, True),
            },
            "schedule": {"kind": "cosine", "shift": 0.0},
            "augmentation": {"kind": "cosine"},
            "prediction": "x0",
            "sampling": {
                "sampler": "ddim",
                "num_steps": 8,
                "guidance_scale": 1.0,
                "threshold_max": 1.0,
                "augmentation_level": 0.03,
            },
        },
        convert_dict=False,
    )

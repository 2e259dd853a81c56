"""Common parts of the configurations: every key with its usual value."""

from ml_collections import ConfigDict

# The contexts of a report, from the paper's prompts.
CONTEXTS = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of a purple rug in a forest",
    "with a mountain in the background",
    "with a city in the background",
    "floating on top of water",
)


def training() -> ConfigDict:
    """The keys that `personalize_jax.training.loop.train` reads."""
    return ConfigDict(
        {
            "num_steps": 1000,
            "batch_size": 8,  # of each group: instance images and class images
            "microbatches": 1,  # parts of a batch that go through the networks one after another, to save memory
            "caption_dropout": 0.0,
            "object_weight": 0.0,  # added to the loss weight of the object's pixels, where masks are known
            "augmentation_levels": (0.0, 0.0),  # range for the low-resolution picture, super-resolution only
            "weighting": "none",  # or min_snr
            "offset_noise": 0.0,  # standard deviation of noise that is constant over a picture
            "vlb_weight": 0.0,  # weight of the bound that trains learned variances, usually 1; 0 does not train them
            "prior": {
                "weight": 0.0,  # lambda
                "form": "sampled",  # or frozen_prediction
                "caption_dropout": 0.1,
            },
            # Patterns of paths, and whether the parameters are trained; "identifier" trains its tokens' embedding rows.
            "trainable": (("denoiser/", True), ("text_encoder/", False)),
            "identifier_init": "pretrained",  # initial values of such rows: their own, or class_noun: the class noun's
            # Low-rank adapters of frozen kernels; with trainable=((".*", False),) nothing else is trained.
            "lora": {
                "rank": 0,  # 0 switches them off
                # Patterns of whole paths, and the number of input dimensions of the kernels: here for the embedded
                # cascade.
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
                "moment_dtype": "float32",  # or bfloat16, to save memory: of the first moment, see make_optimizer
            },
            "mesh": (-1, 1, 1),  # sizes of the axes data, fsdp and tensor; see runtime/sharding.py:make_mesh
            # Mesh axes of a parameter's last dimensions, last first: features over tensor, inputs over fsdp.
            "sharding": (("", ("tensor", "fsdp")),),
            "steps_per_dispatch": 1,
            "log_every": 20,
            "checkpoint_every": 500,
        }
    )


def public_training() -> ConfigDict:
    """Training of a stage of a public model: all layers, text encoder frozen, lambda 1."""
    config = training()
    config.prior.weight = 1.0
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 1e-2
    config.lora.targets = (("denoiser/.*/(to_q|to_k|to_v|to_out_0|add_k_proj|add_v_proj)/kernel", 1),)
    config.steps_per_dispatch = 10
    # The last layers of an attention, an MLP or a transformer have inputs that are sharded over tensor: they sum their
    # partial outputs over it (Shoeybi et al. 2019, "Megatron-LM") in place of gathering their inputs.
    config.sharding = (("(to_out_0|net_2|proj_out)/kernel", ("fsdp", "tensor")), *config.sharding)
    config.mesh = (1, -1, -1)  # shard parameters: over fsdp as far as the batch can be split, the rest over tensor
    return config


def public(pretrained: str | tuple[str, ...]) -> ConfigDict:
    """The configuration of a public model, to be adapted to it.

    Args:
        pretrained: repository on the hub or folder, one for each stage.
    """
    return ConfigDict(
        {
            "seed": 0,
            "pretrained": pretrained,
            "compute": {
                "dtype": "bfloat16",  # of activations and frozen parameters; trained parameters are float32
                "remat": True,  # compute activations again in the backward pass
                "attention": "auto",  # flash on TPUs, cudnn on GPUs wherever it can, else xla; also heads, for CPUs
            },
            "subject": {
                "num_tokens": 1,  # of the identifier
                "frequency": "recorded",  # source of token frequencies: or sentencepiece, bpe_rank, a file of captions
                "rule": "rarest",  # or paper, frequent, random_characters
                "label": "identifier_and_class",  # or identifier: "a [V]"
                "registry": "runs/registry.json",  # identifiers in use, shared by runs
                "class_threshold": 0.6,  # least score of a class noun found by a classifier
            },
            "class_images": {
                "folder": "",  # folder of the user's own class images; empty: sample them
                "count": 1000,
                "num_steps": 100,
                "guidance_scale": 7.5,
                "batch_size": 16,
            },
            "tune": ("base",),
            "training": public_training(),
            # Settings of the other methods as published for Stable Diffusion: the first two by diffusers' examples at
            # batch sizes of 4 and 1, the third by its authors at 8.
            "methods": {
                "textual_inversion": {"num_steps": 3000, "optimizer": {"learning_rate": 2e-3}},
                "lora": {"num_steps": 500, "lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-4}},
                "custom_diffusion": {"num_steps": 250, "optimizer": {"learning_rate": 8e-5}},
            },
            "report": {
                "contexts": CONTEXTS,
                "images_per_context": 4,
                "class_samples": 32,
                "without_prior": False,  # also tune the base without the prior term, to compare
                "batch_size": 16,
            },
            "evaluation": {
                "prompts": "dreambooth",  # list of prompts: world, dreambooth, or a file
                "images_per_prompt": 4,
                "class_samples": 64,
                "batch_size": 16,
                "dino": "timm/vit_small_patch16_224.dino",  # on the hub, or a folder; "" leaves its metrics out
                "clips": ("openai/clip-vit-base-patch32@refs/pr/66", "openai/clip-vit-large-patch14"),
                "lpips": "models/lpips",  # a folder, see metrics/encoders.py; "" measures DIV by DINO's cosine
                "probe": False,  # whether pictures are of the rendered world, see configs/world.py
            },
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
                "attention": (False, True, True),
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

    It denoises the difference of the picture from the enlarged one, whose noise it sees and predicts in units of that
    difference's own size.
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
            "prediction": "v",
            "residual_std": 0.15,
            "sampling": {
                "sampler": "dpm_solver_pp",
                "num_steps": 8,
                "guidance_scale": 1.0,
                "threshold_max": 1.0,
                "augmentation_level": 0.03,
            },
        },
        convert_dict=False,
    )

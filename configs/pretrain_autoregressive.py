"""Pretraining of an autoregressive model on the rendered world: its picture tokenizer, then its transformer.

python -m personalize_jax.pretrain --config=configs/pretrain_autoregressive.py:picture_tokenizer \
    --workdir=runs/autoregressive_tokenizer
python -m personalize_jax.pretrain --config=configs/pretrain_autoregressive.py:base --workdir=runs/autoregressive

So it was trained at low priority on one core of an AMD EPYC that had other work: 51,200 pictures in six minutes, and
52,800 in about half an hour, which is little for a transformer. Of 200 prompts to it,
`python -m experiments.pretrained_cascade --pipeline=runs/autoregressive/pipeline` then reads the class in .99 of the
pictures, the context in .995 and the body colour in .87. The pictures are blurred and patchy; the loss still falls.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(stage: str = "") -> ConfigDict:
    """Configuration of one network's pretraining.

    Args:
        stage: "picture_tokenizer" or "base", the transformer.
    """
    config = ConfigDict({"seed": 0, "family": "autoregressive", "training": common.training()})
    config.dataset = ConfigDict({"resolution": 128, "count": 20_480})
    config.text_encoder = ConfigDict({"width": 128, "num_layers": 2, "num_heads": 4, "max_length": 32})
    training = config.training
    training.log_every = 20
    training.checkpoint_every = 200
    training.object_weight = 4.0
    if stage == "picture_tokenizer":
        config.stage = picture_tokenizer()
        config.pretrained = ""
        training.trainable = (("denoiser/", True), (".*", False))  # the text encoder is trained with the transformer
        training.batch_size = 32
        training.num_steps = 1_600
        training.ema_decay = 0.99
        training.optimizer.learning_rate = 1e-3
        training.optimizer.warmup_steps = 50
        training.optimizer.decay_steps = 800
    elif stage == "base":
        config.stage = transformer()
        config.pretrained = "runs/autoregressive_tokenizer/pipeline"
        training.trainable = ((".*", True),)
        training.caption_dropout = 0.1
        training.batch_size = 16
        training.num_steps = 3_300
        training.ema_decay = 0.995
        training.optimizer.learning_rate = 2e-3
        training.optimizer.weight_decay = 0.01
        training.optimizer.warmup_steps = 100
        training.optimizer.decay_steps = 1_500
    else:
        raise ValueError(
            f"The stage is {stage!r}; give picture_tokenizer or base after a colon, as in "
            "pretrain_autoregressive.py:base."
        )
    return config.lock()


def picture_tokenizer() -> ConfigDict:
    """Pictures of 32x32 pixels as 8x8 tokens out of 1,000 (Mentzer et al. 2023, section 4.1, for some 2^10)."""
    return ConfigDict(
        {
            "name": "picture_tokenizer",
            "resolution": 32,
            "network": {"channels": (48, 96), "patch": 2, "blocks": 1, "levels": (8, 5, 5, 5)},
        },
        convert_dict=False,
    )


def transformer() -> ConfigDict:
    """A transformer over the 64 tokens."""
    return ConfigDict(
        {
            "name": "base",
            "network": {"width": 128, "num_layers": 4, "num_heads": 4},
            "sampling": {
                "sampler": "truncated",
                "num_steps": 64,
                "guidance_scale": 2.0,
                "temperature": 1.0,
                "top_k": 100,
            },
        },
        convert_dict=False,
    )

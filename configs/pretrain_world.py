"""Pretraining of the embedded cascade on the rendered world.

python -m personalize_jax.pretrain --config=configs/pretrain_world.py:all --budget_minutes=540 --workdir=runs/world

trains text encoder and base, then super-resolution, as many steps of each as fit into so many minutes; without the flag
as many as configured. On a GPU or TPU the values in `config.accelerator` hold: more pictures, large batches, several
steps a dispatch; what the command line gives goes before them, such as `--config.base.training.batch_size=256`. There
JAX multiplies float32 matrices in TF32 or bfloat16; `JAX_DEFAULT_MATMUL_PRECISION=bfloat16` in the environment chooses
bfloat16 on a GPU, too, and `float32` full precision.

One stage alone, with a number of steps:

python -m personalize_jax.pretrain --config=configs/pretrain_world.py:base --workdir=runs/world_base
python -m personalize_jax.pretrain --config=configs/pretrain_world.py:super_resolution --workdir=runs/world_sr \
    --config.pretrained=runs/world_base/pipeline

The weights in `personalize_jax/assets/world` come from three trainings of the base, each of which began with those of
the one before, and one of super-resolution. The third was on one core of an Intel Xeon at 2.1 GHz, the others on 2
cores of an AMD EPYC (Zen 4) that had other work as well:

| | pictures seen | of | settings | CPU hours, about | loss at the end |
|---|---|---|---|---|---|
| base | 179,200 | 80,000 | num_steps=5600 | 1.5 | .372 |
| base, second | 160,000 | the same | num_steps=5000, pretrained=world | 1.7 | .338 |
| base, third | 121,232 | the same | see below | 1 | .336 |
| super_resolution | 57,600 | 20,480 | num_steps=3600, decay_steps=1600, warmup_steps=100 | 1 | .64 |

Base loss by mean over 500 steps, first training: .510 at 1,500, .440 at 2,500, .403 at 3,500, .410 at 4,500, .372 at
5,600; second: .391 at 2,000, where its learning rate began to fall, .378 at 3,000, .367 at 4,000, .338 at 5,000: still
falling. That of super-resolution: 1.11 at 500, .78 at 1,000, .75 at 1,500, .72 at 2,000, where its learning rate began
to fall, .69 at 2,500, .64 at 3,000, .64 at 3,500.
For the third training the base's network got attention at 8x8 pixels and weights of the noisy picture, which began
without effect. Its 7,577 steps of 16 pictures had the time of

python -m personalize_jax.pretrain --config=configs/pretrain_world.py:all --config.train='("base",)' \
    --config.pretrained=world --config.base.training.batch_size=16 \
    --config.base.training.optimizer.learning_rate=4e-4 --budget_minutes=62 --workdir=runs/world

and the learning rate fell over the second half of them. Its loss is a mean of the single steps that were logged.
Captions of the first training had ordinary words without a meaning (see `world/captions.py`), and the pictures
of its first 500 steps had another lighting. `python -m experiments.pretrained_cascade` prints the probe's scores, see
experiments/README.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(stage: str = "") -> ConfigDict:
    """Configuration of one stage's pretraining, or of both.

    Args:
        stage: "base", "super_resolution" or "all".
    """
    if stage == "all":
        return _both()
    config = ConfigDict({"seed": 0, "training": common.training()})
    config.training.mesh = (-1, 1, 1)
    config.training.caption_dropout = 0.1
    config.training.ema_decay = 0.999
    config.training.optimizer.warmup_steps = 300
    config.training.log_every = 100
    config.training.checkpoint_every = 500
    if stage == "base":
        config.stage = common.base_stage()
        config.text_encoder = ConfigDict({"width": 128, "num_layers": 2, "num_heads": 4, "max_length": 32})
        config.pretrained = ""  # a pipeline whose text encoder is used; empty: train one
        config.dataset = ConfigDict({"resolution": 64, "count": 80_000})
        config.training.trainable = ((".*", True),)
        config.training.object_weight = 4.0
        config.training.batch_size = 32
        config.training.num_steps = 50_000
        config.training.optimizer.learning_rate = 1e-3
        config.training.optimizer.decay_steps = 3_000
    elif stage == "super_resolution":
        config.stage = common.super_resolution_stage()
        config.text_encoder = ConfigDict()
        config.pretrained = "runs/world_base/pipeline"
        config.dataset = ConfigDict({"resolution": 128, "count": 24_000})
        config.training.augmentation_levels = (0.0, 0.08)
        config.training.object_weight = 2.0
        config.training.batch_size = 16
        config.training.num_steps = 6_000
        config.training.optimizer.learning_rate = 1e-3
        config.training.optimizer.decay_steps = 1_500
    else:
        raise ValueError(
            f"The stage is {stage!r}; give all, base or super_resolution after a colon, as in pretrain_world.py:all."
        )
    return config.lock()


def _both() -> ConfigDict:
    """Each stage as by itself, in a section of its own."""
    config = ConfigDict(
        {
            "seed": 0,
            "pretrained": "",  # a pipeline whose networks each stage goes on from; empty: begin with random ones
            "train": ("base", "super_resolution"),  # in this order
            "decay_share": 0.5,  # of the steps that fit into a budget: the learning rate falls over the last of them
            "accelerator": {  # in place of the stages' own values, on a GPU or TPU
                "base": {"dataset": {"count": 160_000}, "training": {"batch_size": 512, "steps_per_dispatch": 20}},
                "super_resolution": {
                    "dataset": {"count": 60_000},
                    "training": {"batch_size": 256, "steps_per_dispatch": 20},
                },
            },
        }
    )
    for name, share in (("base", 0.58), ("super_resolution", 0.42)):  # of the budget
        section = get_config(name).unlock()
        del section.seed, section.pretrained
        section.share = share
        config[name] = section
    return config.lock()

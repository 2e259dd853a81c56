"""Personalise the autoregressive model that `configs/pretrain_autoregressive.py` pretrains.

python -m personalize_jax.personalize --config=configs/autoregressive.py --images=photos/ --class_noun=dog \
    --workdir=runs/rex

Methods other than DreamBooth: --config=configs/autoregressive.py:textual_inversion, or lora, or custom_diffusion.
"""

from ml_collections import ConfigDict

from configs import methods, world


def get_config(method: str = methods.DREAMBOOTH) -> ConfigDict:
    """The transformer tuned with prior preservation; or another method.

    Args:
        method: a key of `configs.methods.METHODS`.
    """
    config = world.get_config().unlock()
    config.pretrained = "runs/autoregressive/pipeline"
    config.tune = ("base",)
    del config.super_resolution_training, config.pretrained_augmentation_levels
    config.class_images.num_steps = 64  # one a token
    config.class_images.guidance_scale = 1.5
    training = config.training
    # With the text encoder, which makes the identifier a word among others: the transformer alone learns the photos by
    # heart, and shows the subject less where it was not photographed.
    training.trainable = ((".*", True),)
    training.num_steps = 200
    training.batch_size = 8
    training.prior.weight = 1.0
    training.prior.form = "frozen_prediction"
    training.optimizer.learning_rate = 2e-4
    training.optimizer.decay_steps = 100
    return methods.apply(method, config)

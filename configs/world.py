"""Personalise the embedded cascade.

python -m personalize_jax.personalize --config=configs/world.py --images=photos/ --class_noun=dog --workdir=runs/rex
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Both stages tuned with prior preservation, each on its own inputs."""
    config = ConfigDict(
        {
            "seed": 0,
            "pretrained": "world",
            "subject": {
                "num_tokens": 1,  # of the identifier
                "rule": "rarest",  # which tokens are chosen, or "paper"
                "frequency": "recorded",  # or "sentencepiece", "bpe_rank", a file of captions: subject/frequency.py
                "registry": "runs/registry.json",  # identifiers in use, shared by runs
                "class_threshold": 0.6,  # least score of a class noun found by the classifier
            },
            "class_images": {
                "count": 64,
                "num_steps": 24,
                "guidance_scale": 1.5,
                "batch_size": 16,
            },
            "tune": ("base", "super_resolution"),
            "training": common.training(),
            "super_resolution_training": common.training(),
            "report": {
                "contexts": common.CONTEXTS,
                "images_per_context": 2,
                "class_samples": 32,
                "without_prior": True,  # tune the base once more without the prior term, to compare
                "batch_size": 16,
            },
        }
    )
    training = config.training
    training.num_steps = 200
    training.batch_size = 8
    training.prior.weight = 1.0
    # Keeps more of the class in few steps than "sampled" does, whose targets are noisy: experiments.heldout_subjects.
    training.prior.form = "frozen_prediction"
    training.prior.caption_dropout = 0.2
    training.optimizer.learning_rate = 4e-4
    training.optimizer.decay_steps = 100
    training.checkpoint_every = 50
    training.log_every = 5

    super_resolution = config.super_resolution_training
    super_resolution.num_steps = 60
    super_resolution.batch_size = 4
    super_resolution.prior.weight = 1.0
    super_resolution.weighting = "min_snr"
    super_resolution.optimizer.learning_rate = 1e-4
    super_resolution.augmentation_levels = (0.0, 0.005)
    super_resolution.checkpoint_every = 30
    super_resolution.log_every = 5
    return config.lock()

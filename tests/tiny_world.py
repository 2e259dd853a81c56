"""The configuration of `configs/world.py` for the tiny cascade, small enough to run within a test."""

from pathlib import Path

from configs import world


def get_config(folder, **changes):
    """Tune the cascade in `folder`; the registry of identifiers lies beside it.

    `changes` by dotted key with __ for the dots.
    """
    config = world.get_config().unlock()
    config.pretrained = str(folder)
    config.subject.registry = str(Path(folder).parent / "registry.json")
    config.class_images.update(count=4, num_steps=2, batch_size=3)
    config.report.update(contexts=("in the snow", "on the moon"), images_per_context=2, class_samples=9, batch_size=4)
    # Without the probe, which reads pictures of 32 pixels or more.
    config.evaluation.update(images_per_prompt=2, class_samples=3, batch_size=4, probe=False)
    for training in (config.training, config.super_resolution_training):
        training.update(num_steps=6, batch_size=2, log_every=2, checkpoint_every=3)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()

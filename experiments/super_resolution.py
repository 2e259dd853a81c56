"""What does tuning the super-resolution stage do, and at which augmentation?

    python -m experiments.super_resolution --config=configs/world.py --workdir=runs/paper

Ruiz et al. 2023, section 3.4, has pictures and no table. All arms have the first arm's base stage. Views of the subject
that no arm was tuned on, known at full resolution, are enlarged from their low-resolution versions: "view PSNR" is the
peak signal-to-noise ratio over the object.
"""

import numpy as np
from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.method.changes import changed
from personalize_jax.method.personalized import Personalized
from personalize_jax.metrics.table import Row
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.examples import downsample_uint8
from personalize_jax.world.photos import unseen_views

NUM_VIEWS = 8
VIEW_PSNR = "view PSNR"
STAGE = "super_resolution"


def view_fidelity(tuned: Personalized, subject: BenchmarkSubject) -> list[Row]:
    """PSNR of unseen views of a rendered subject, enlarged from their low-resolution versions; none for a real one."""
    stage = tuned.pipeline.stage(STAGE)
    if subject.truth is None or stage.low_resolution is None:
        return []
    views = unseen_views(subject.truth, NUM_VIEWS)
    truth = downsample_uint8(views, stage.resolution)
    low = downsample_uint8(views[..., :3], stage.low_resolution)
    enlarged = tuned.pipeline.sample_stage(stage, [tuned.subject.labels[0]] * NUM_VIEWS, range(NUM_VIEWS), low)
    return [
        Row(subject.name, "view", tuned.subject.labels[0], i, "", {VIEW_PSNR: object_psnr(enlarged[i], truth[i])})
        for i in range(NUM_VIEWS)
    ]


def object_psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the object's pixels.

    Args:
        picture: uint8 [H, W, 3].
        truth: uint8 [H, W, 4], the object's mask as fourth channel.
    """
    mask = truth[..., 3:] / 255.0
    error = np.square((picture.astype(np.float64) - truth[..., :3]) / 255)
    return float(-10 * np.log10(np.sum(mask * error) / (3 * np.sum(mask))))


def make_study(config: ConfigDict) -> Study:
    """The stage tuned at the configured, reduced augmentation; at its pretrained augmentation; and not tuned."""
    if "pretrained_augmentation_levels" not in config:
        raise UserError("This configuration is of a model without a super-resolution stage; give one of a cascade.")
    normal = config.pretrained_augmentation_levels
    arms = [
        Arm("dreambooth", config),
        Arm("normal_augmentation", changed(config, super_resolution_training__augmentation_levels=normal), STAGE),
        Arm("super_resolution_not_tuned", changed(config, tune=("base",)), STAGE),
    ]
    findings = [
        Finding(f"detail is finer than {words}", metric, "dreambooth", arm)
        for arm, words in ((arms[1].name, "with normal augmentation"), (arms[2].name, "without tuning"))
        for metric in (VIEW_PSNR, "DINO")
    ]
    return Study(STAGE, arms, findings, paper={}, num_subjects=10, measure=view_fidelity)


if __name__ == "__main__":
    study.run(make_study)

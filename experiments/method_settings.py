"""Which settings serve DreamBooth best on the embedded cascade?

    python -m experiments.method_settings --config=configs/world.py --workdir=runs/method_settings

The arms vary the configuration's training of the base stage by one or two keys, and leave super-resolution out. The
five subjects are none of the benchmark's, so that settings chosen here can be measured there; boots, whose class
DreamBooth spoils most there (results/prior_preservation.csv), are among them.
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.method.changes import changed

LENGTHS = (0.5, 1.5)  # of a training, as shares of the configured number of steps
FACTORS = (0.5, 2.0)  # of the learning rate, and of the prior term's weight


def base_changes(training: ConfigDict) -> dict[str, dict[str, object]]:
    """The changed keys of each arm that tunes the base stage in another way, by the arm's name.

    Args:
        training: the base stage's training as configured.
    """
    rate, prior, optimizer = training.optimizer.learning_rate, training.prior, training.optimizer

    def length(share: float) -> dict[str, object]:
        steps = max(1, round(share * training.num_steps / training.steps_per_dispatch)) * training.steps_per_dispatch
        return {"num_steps": steps, "optimizer__decay_steps": round(optimizer.decay_steps * steps / training.num_steps)}

    shorter, longer = map(length, LENGTHS)
    slower, faster = ({"optimizer__learning_rate": factor * rate} for factor in FACTORS)
    weaker, stronger = ({"prior__weight": factor * prior.weight} for factor in FACTORS)
    forms = [{"prior__form": form} for form in PRIOR_FORMS if form != prior.form]
    dropouts = [{"prior__caption_dropout": dropout} for dropout in (0.0, min(1.0, 2 * prior.caption_dropout))]
    alone = [shorter, longer, slower, faster, *forms, weaker, stronger, *dropouts]
    pairs = [shorter | faster, longer | slower, longer | stronger, *(longer | form for form in forms)]
    return {arm_name(changes): changes for changes in [*alone, *pairs]}


def arm_name(changes: dict[str, object]) -> str:
    """Name an arm by its changes, except for the decay, which follows from the number of steps.

    >>> arm_name({"num_steps": 100, "optimizer__decay_steps": 50, "optimizer__learning_rate": 8e-4})
    'num_steps_100_learning_rate_0.0008'
    """
    told = {key: value for key, value in changes.items() if key != "optimizer__decay_steps"}
    return "_".join(f"{key.removeprefix('optimizer__').replace('__', '_')}_{value}" for key, value in told.items())


def make_study(config: ConfigDict) -> Study:
    """The configuration as it is, the base stage tuned in other ways, and later stages not tuned."""
    arms = [Arm("dreambooth", config)]
    for name, changes in base_changes(config.training).items():
        keys = {f"training__{key}": value for key, value in changes.items()}
        arms.append(Arm(name, changed(config, **keys), stage="base"))
    for stage in config.tune[1:]:
        tuned = tuple(name for name in config.tune if name != stage)
        arms.append(Arm(f"{stage}_not_tuned", changed(config, tune=tuned), stage))
    return Study("method_settings", arms, findings=[], paper={}, num_subjects=5, benchmark="world:settings")


if __name__ == "__main__":
    study.run(make_study)

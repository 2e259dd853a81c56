"""When to stop? Fidelity and diversity against the number of steps, with the prior term and without.

    python -m experiments.training_length --config=configs/world.py --workdir=runs/paper

Only the base stage is tuned, at a constant learning rate, so that a longer training continues a shorter one.
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.method.changes import changed

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the configured number of steps


def lengths(config: ConfigDict) -> list[int]:
    """Numbers of steps, each more than the one before."""
    dispatch = config.training.steps_per_dispatch
    return sorted({max(1, round(share * config.training.num_steps / dispatch)) * dispatch for share in SHARES})


def make_study(config: ConfigDict) -> Study:
    """Trainings of increasing length, with the prior term and without."""
    base_alone = changed(config, tune=("base",), training__optimizer__decay_steps=0)
    arms: list[Arm] = []
    for name, weight in (("with_prior", config.training.prior.weight), ("without_prior", 0.0)):
        before = None
        for steps in lengths(config):
            longer = changed(base_alone, training__prior__weight=weight, training__num_steps=steps)
            arms.append(Arm(f"{name}_{steps}_steps", longer, continues=before))
            before = arms[-1].name
    shortest, longest = lengths(config)[0], lengths(config)[-1]
    short, long = f"with_prior_{shortest}_steps", f"with_prior_{longest}_steps"
    without = f"without_prior_{longest}_steps"
    findings = [
        Finding("long training without the prior term spoils the class", "PRES", without, long),
        Finding("long training costs prompt fidelity", "CLIP-T", short, long),
        Finding("long training shows the subject better", "DINO", long, short),
    ]
    return Study("training_length", arms, findings, paper={}, num_subjects=10)


if __name__ == "__main__":
    study.run(make_study)

"""What does the prior term preserve? Both forms of it, and none (Table 3).

    python -m experiments.prior_preservation --config=configs/world.py --workdir=runs/paper

Only the base stage is tuned anew; the others are the first arm's.
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.configuration import changed
from personalize_jax.configuration_keys import PRIOR_FORMS

PAPER = {
    "with": {"PRES": 0.493, "DIV": 0.391, "DINO": 0.684, "CLIP-I": 0.815, "CLIP-T": 0.308},
    "without": {"PRES": 0.664, "DIV": 0.371, "DINO": 0.712, "CLIP-I": 0.828, "CLIP-T": 0.306},
}
WITHOUT = "without_prior"


def make_study(config: ConfigDict) -> Study:
    """The configuration as it is, with the prior term's other form, and without it."""
    form = config.training.prior.form
    (other,) = set(PRIOR_FORMS) - {form}
    variations = {
        f"prior_{other}": changed(config, training__prior__form=other),
        WITHOUT: changed(config, training__prior__weight=0.0),
    }
    arms = [Arm("dreambooth", config)] + [Arm(name, varied, stage="base") for name, varied in variations.items()]
    findings = []
    for arm in (arms[0].name, arms[1].name):
        findings += [
            Finding(f"{arm}: pictures of the class resemble the subject less", "PRES", WITHOUT, arm),
            Finding(f"{arm}: pictures of the class become the subject less often", "is subject", WITHOUT, arm),
            Finding(f"{arm}: the class keeps more of its diversity", "diversity kept", arm, WITHOUT),
            Finding(f"{arm}: pictures of the subject are more diverse", "DIV", arm, WITHOUT),
        ]
    findings += [
        Finding(f"the form {form} keeps more of the class than {other}", "diversity kept", arms[0].name, arms[1].name),
        Finding(f"the form {form} shows the subject better than {other}", "DINO", arms[0].name, arms[1].name),
    ]
    return Study("prior_preservation", arms, findings, PAPER, num_subjects=15)


if __name__ == "__main__":
    study.run(make_study)

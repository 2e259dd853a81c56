"""What does the prior term preserve? Every form of the term, and none (Table 3).

    python -m experiments.prior_preservation --config=configs/world.py --workdir=runs/paper

The arms tune only the base stage; the others are those of the first arm.
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.method.changes import changed

PAPER = {
    "with": {"PRES": 0.493, "DIV": 0.391, "DINO": 0.684, "CLIP-I": 0.815, "CLIP-T": 0.308},
    "without": {"PRES": 0.664, "DIV": 0.371, "DINO": 0.712, "CLIP-I": 0.828, "CLIP-T": 0.306},
}
WITHOUT = "without_prior"


def make_study(config: ConfigDict) -> Study:
    """The configuration as it is, with each other form of the prior term, and without the term."""
    form = config.training.prior.form
    others = {f"prior_{other}": other for other in PRIOR_FORMS if other != form}
    arms = [Arm("dreambooth", config)]
    for name, other in others.items():
        arms.append(Arm(name, changed(config, training__prior__form=other), stage="base"))
    arms.append(Arm(WITHOUT, changed(config, training__prior__weight=0.0), stage="base"))
    findings = []
    for arm in ("dreambooth", *others):
        findings += [
            Finding(f"{arm}: pictures of the class resemble the subject less", "PRES", WITHOUT, arm),
            Finding(f"{arm}: pictures of the class become the subject less often", "is subject", WITHOUT, arm),
            Finding(f"{arm}: the class keeps more of its diversity", "diversity kept", arm, WITHOUT),
            Finding(f"{arm}: pictures of the subject are more diverse", "DIV", arm, WITHOUT),
        ]
    for name, other in others.items():
        findings += [
            Finding(f"the form {form} keeps more of the class than {other}", "diversity kept", "dreambooth", name),
            Finding(f"the form {form} shows the subject better than {other}", "DINO", "dreambooth", name),
        ]
    return Study("prior_preservation", arms, findings, PAPER, num_subjects=15)


if __name__ == "__main__":
    study.run(make_study)

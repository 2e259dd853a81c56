"""Why a rare token? Rare tokens against frequent words and random characters (Ruiz et al. 2023, section 3.2).

    python -m experiments.identifier_rarity --config=configs/world.py --workdir=runs/paper

The paper gives a reason and no table: a frequent word has a meaning that the model must unlearn, and random characters
are split into single letters, which are as frequent.
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.method.changes import changed

OTHERS = {"frequent": "a frequent word", "random_characters": "random characters"}


def make_study(config: ConfigDict) -> Study:
    """The configured rule for identifiers, and two others."""
    arms = [Arm("dreambooth", config)]
    arms += [Arm(f"identifier_{rule}", changed(config, subject__rule=rule)) for rule in OTHERS]
    findings = [
        Finding(f"a rare token names the subject better than {words}", metric, "dreambooth", f"identifier_{rule}")
        for rule, words in OTHERS.items()
        for metric in ("DINO", "CLIP-T", "accent colour", "context")
    ]
    return Study("identifier_rarity", arms, findings, paper={}, num_subjects=10)


if __name__ == "__main__":
    study.run(make_study)

"""What is the effect of the class noun? The right one, none, and a wrong one (Table 4).

    python -m experiments.class_noun --config=configs/world.py --workdir=runs/paper

Without a noun the labels are "a [V]", and class images are still of "a dog"; with a wrong noun both are of another
class. Prompts have the same noun as the labels.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.method.changes import changed

PAPER = {
    "correct": {"DINO": 0.744, "CLIP-I": 0.853},
    "none": {"DINO": 0.303, "CLIP-I": 0.607},
    "wrong": {"DINO": 0.454, "CLIP-I": 0.728},
}


def wrong(noun: str, nouns: Sequence[str]) -> str:
    """Another of the benchmark's nouns, half the list further on.

    >>> wrong("cat", ("dog", "cat", "car", "can"))
    'can'
    """
    return nouns[(nouns.index(noun) + len(nouns) // 2) % len(nouns)]


def make_study(config: ConfigDict) -> Study:
    """The right class noun, none, and a wrong one."""
    arms = [
        Arm("dreambooth", config),
        Arm("no_class_noun", changed(config, subject__label="identifier")),
        Arm("wrong_class_noun", config, class_noun=wrong),
    ]
    findings = [
        Finding(f"the subject is shown better with its class noun than with {words}", metric, "dreambooth", arm)
        for arm, words in (("no_class_noun", "none"), ("wrong_class_noun", "a wrong one"))
        for metric in ("DINO", "CLIP-I", "class", "accent colour")
    ]
    return Study("class_noun", arms, findings, PAPER, num_subjects=10)


if __name__ == "__main__":
    study.run(make_study)

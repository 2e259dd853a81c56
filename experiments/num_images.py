"""How many photos are needed? One to five (Table 5).

python -m experiments.num_images --config=configs/world.py --workdir=runs/paper
"""

from ml_collections import ConfigDict

from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding

COUNTS = (1, 2, 3, 4)  # the first arm has all photos; every subject of the benchmarks has at least four
PAPER = {
    f"{subject}, {count} image{'s' * (count > 1)}": {"DINO": dino}
    for subject, row in (
        ("backpack", (0.494, 0.515, 0.596, 0.604, 0.597)),
        ("dog", (0.798, 0.851, 0.871, 0.876, 0.864)),
    )
    for count, dino in enumerate(row, start=1)
}


def make_study(config: ConfigDict) -> Study:
    """All photos, and the first few."""
    arms = [Arm("dreambooth", config)] + [Arm(f"{count}_photos", config, num_photos=count) for count in COUNTS]
    claims = (
        ("show the subject better", "DINO"),
        ("let prompts say more", "CLIP-T"),
        ("let prompts say more", "context"),
    )
    findings = [
        Finding(f"more photos than {count} {words}", metric, "dreambooth", f"{count}_photos")
        for count in COUNTS
        for words, metric in claims
    ]
    return Study("num_images", arms, findings, PAPER, num_subjects=10)


if __name__ == "__main__":
    study.run(make_study)

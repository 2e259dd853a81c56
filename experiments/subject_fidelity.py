"""Do the pictures show the very subject? DreamBooth against Textual Inversion and the methods between (Table 1).

    python -m experiments.subject_fidelity --config=configs/world.py --workdir=runs/paper

Thirty subjects, twenty-five prompts, four pictures each, every method with the same cascade, subjects and prompts.
"""

from ml_collections import ConfigDict

from configs import methods
from experiments import study
from experiments.study import Arm, Study
from experiments.tables import Finding

PAPER = {
    "real images": {"DINO": 0.774, "CLIP-I": 0.885},
    "DreamBooth (Imagen)": {"DINO": 0.696, "CLIP-I": 0.812, "CLIP-T": 0.306},
    "DreamBooth (Stable Diffusion)": {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305},
    "Textual Inversion (Stable Diffusion)": {"DINO": 0.569, "CLIP-I": 0.780, "CLIP-T": 0.255},
}


def make_study(config: ConfigDict) -> Study:
    """DreamBooth as configured, and the other methods."""
    ours, other = methods.DREAMBOOTH, "textual_inversion"
    shown = ("DINO", "CLIP-I", "body colour", "accent colour", "pattern", "proportions")
    findings = [Finding("DreamBooth shows the subject better than Textual Inversion", m, ours, other) for m in shown]
    findings += [
        Finding("DreamBooth follows prompts better than Textual Inversion", m, ours, other)
        for m in ("CLIP-T", "context", "property")
    ]
    arms = [Arm(name, method(config)) for name, method in methods.METHODS.items()]
    return Study("subject_fidelity", arms, findings, PAPER, num_subjects=30)


if __name__ == "__main__":
    study.run(make_study)

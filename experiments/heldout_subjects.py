"""Does personalisation keep the subject, the prompt and the class? Ten held-out subjects of the rendered world.

    python -m experiments.heldout_subjects --config=configs/world.py --workdir=runs/heldout_subjects

Personalises the cascade for each subject, reads four pictures in each context with the probe, and prints one row a
subject and their mean: fidelity to the subject's true properties and to the prompt's context, and for "a class" the
entropy of body colours, as a share of the pretrained cascade's, and the leakage of the subject's colour, with the prior
term and without. Runs that are there already are read, so that the command goes on where it stopped.
`--config.training.prior.form=frozen_prediction` measures the other form of the prior.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from personalize_jax import command
from personalize_jax.metrics.world import colour_entropy, leakage, prompt_fidelity, subject_fidelity
from personalize_jax.personalization import SubjectPhotos, personalize, tune_without_prior
from personalize_jax.pictures import save_png
from personalize_jax.pipeline import Pipeline, load_pipeline
from personalize_jax.pipeline.storage import write_text
from personalize_jax.subject.images import load_images
from personalize_jax.world.captions import prompt
from personalize_jax.world.photos import HeldoutSubject, heldout_subject
from personalize_jax.world.probe import Probe
from personalize_jax.world.scene import CLASSES, CONTEXTS

CLASS_SAMPLES = 64
CLASS_SEED = 10_000


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("workdir", None, "Folder for the runs and the table.")
    flags.DEFINE_integer("num_subjects", 10, "How many subjects, each of another class.", 1, len(CLASSES))
    flags.DEFINE_integer("images_per_context", 4, "Pictures of the subject in each context.", lower_bound=1)


def measure(
    pretrained: Pipeline, held: HeldoutSubject, config: ConfigDict, workdir: Path, images_per_context: int
) -> dict[str, float]:
    """Personalise for one subject and measure.

    Args:
        pretrained: the cascade.
        held: the subject.
        config: of `configs/world.py`.
        workdir: of this subject's run.
        images_per_context: pictures of the subject in each context.
    """
    files = [workdir / "photos" / f"{i:02d}.png" for i in range(len(held.photos))]
    for file, photo in zip(files, held.photos, strict=True):
        save_png(photo, file, {"subject": held.description})
    photos = SubjectPhotos(load_images(files, held.photos.shape[1]), held.class_noun)
    tuned = personalize(pretrained, photos, config, workdir)
    without = tune_without_prior(pretrained, tuned, config, workdir)

    probe = Probe.load()
    contexts = np.repeat([CONTEXTS.index(context) for context in config.report.contexts], images_per_context)
    texts = [prompt(held.class_noun, context=CONTEXTS[c], identifier=tuned.subject.identifier.text) for c in contexts]
    seeds = list(range(images_per_context)) * len(config.report.contexts)
    reading = probe.read(tuned.pipeline.sample(texts, seeds)[-1])
    subject = held.subject
    scores = subject_fidelity(
        reading,
        class_id=int(subject.class_id[0]),
        body_colour=int(subject.body_colour[0]),
        accent_colour=int(subject.accent_colour[0]),
        pattern=int(subject.pattern[0]),
    )
    scores |= {"context": prompt_fidelity(reading, int(subject.class_id[0]), contexts=contexts)["context"]}
    of_class = {
        name: probe.read(_class_pictures(pipeline, tuned.subject.class_prompt))
        for name, pipeline in (("before", pretrained), ("with prior", tuned.pipeline), ("without", without))
    }
    entropy = {name: colour_entropy(r) for name, r in of_class.items()}
    for name in ("with prior", "without"):
        scores[f"diversity kept, {name}"] = entropy[name] / max(entropy["before"], 1e-6)
    for name, r in of_class.items():
        scores[f"leakage, {name}"] = leakage(r, int(subject.body_colour[0]))
    return scores


def _class_pictures(pipeline: Pipeline, text: str) -> np.ndarray:
    """Base-stage pictures of a class prompt: the probe reads 32 pixels."""
    seeds = range(CLASS_SEED, CLASS_SEED + CLASS_SAMPLES)
    return pipeline.sample_stage(pipeline.stages[0], [text] * CLASS_SAMPLES, seeds)


def main(_: list[str]) -> None:
    """Measure every subject, print the table."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir)
    pretrained = load_pipeline(config.pretrained)
    rows = {}
    for class_noun in tqdm(CLASSES[: arguments.num_subjects], desc="subjects"):
        held = heldout_subject(class_noun, 0)
        run = workdir / class_noun.replace(" ", "_")
        file = run / "scores.json"
        if not file.exists():
            scores = measure(pretrained, held, config, run, arguments.images_per_context)
            write_text(file, json.dumps(scores, indent=2))
        rows[held.description] = json.loads(file.read_text())
    names = list(next(iter(rows.values())))
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{rows[row][name]:.2f}" for name in names) + " |" for row in rows]
    write_text(workdir / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "workdir"))

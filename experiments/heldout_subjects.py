"""Does personalisation keep the subject, the prompt and the class? Ten held-out subjects of the rendered world.

    python -m experiments.heldout_subjects --config=configs/world.py --workdir=runs/heldout

Personalises the cascade for each subject as the configuration says, and the base model once more with the other form of
the prior and once without the prior term. The probe reads four pictures of "a [V] class" in each context: shares that
show the subject's true class, colours and pattern and the prompt's context. Of 64 pictures of "a class" it takes the
entropy of body colours, as a share of the pretrained cascade's, and the leakage, the share in the subject's body
colour. And for the super-resolution stage: peak signal-to-noise ratio over the object's pixels when it enlarges the
32-pixel versions of eight views of the subject that are not among its photos, tuned and not tuned.

Subjects that are in the working directory already are read, so that the command goes on where it stopped, and several
can share one with `--classes`.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from personalize_jax import command
from personalize_jax.configuration import PRIOR_FORMS
from personalize_jax.errors import UserError
from personalize_jax.metrics.world import accuracy, colour_entropy, leakage, subject_fidelity
from personalize_jax.personalization import SubjectPhotos, personalize, tune_base_again
from personalize_jax.personalized import Personalized
from personalize_jax.pictures import save_png
from personalize_jax.pipeline import Pipeline, load_pipeline
from personalize_jax.pipeline.storage import write_text
from personalize_jax.subject.images import load_images
from personalize_jax.training.examples import downsample_uint8
from personalize_jax.world.captions import prompt
from personalize_jax.world.photos import HeldoutSubject, heldout_subject, unseen_views
from personalize_jax.world.probe import Probe
from personalize_jax.world.scene import CLASSES, CONTEXTS

CLASS_SAMPLES = 64
CLASS_SEED = 10_000
NUM_VIEWS = 8

Scores = dict[str, dict[str, float]]


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("workdir", None, "Folder for the runs and the table.")
    flags.DEFINE_list("classes", list(CLASSES[:10]), "One subject of each of these classes.")
    flags.DEFINE_integer("images_per_context", 4, "Pictures of the subject in each context.", lower_bound=1)


def measure(
    pretrained: Pipeline, held: HeldoutSubject, config: ConfigDict, workdir: Path, images_per_context: int
) -> Scores:
    """Personalise for one subject and measure.

    Args:
        pretrained: the cascade.
        held: the subject.
        config: of `configs/world.py`.
        workdir: of this subject's run.
        images_per_context: pictures of the subject in each context.

    Returns:
        Scores by name, for each way of tuning.
    """
    files = [workdir / "photos" / f"{i:02d}.png" for i in range(len(held.photos))]
    for file, photo in zip(files, held.photos, strict=True):
        save_png(photo, file, {"subject": held.description})
    photos = SubjectPhotos(load_images(files, held.photos.shape[1]), held.class_noun)
    tuned = personalize(pretrained, photos, config, workdir)
    form = config.training.prior.form
    (other,) = set(PRIOR_FORMS) - {form}
    bases = {
        "pretrained": pretrained,
        form: tuned.pipeline,
        other: tune_base_again(pretrained, tuned, config, workdir, other, form=other),
        "without prior": tune_base_again(pretrained, tuned, config, workdir, "without_prior", weight=0.0),
    }

    probe = Probe.load()
    texts, contexts = prompts_in_contexts(held, tuned, config, images_per_context)
    seeds = list(range(images_per_context)) * len(config.report.contexts)
    scores = {}
    for name, pipeline in bases.items():
        scores[name] = {}
        if name != "pretrained":
            scores[name] |= of_subject(probe, pipeline.sample_stage(pipeline.stages[0], texts, seeds), held, contexts)
        scores[name] |= of_class(probe, pipeline, held, tuned.subject.class_prompt)
    before = scores["pretrained"]["entropy"]
    for row in scores.values():
        row["diversity kept"] = row["entropy"] / max(before, 1e-6)
    scores["pretrained"] |= {"view PSNR": view_fidelity(pretrained, held, f"a {held.class_noun}")}
    scores[f"{form}, super-resolved"] = of_subject(probe, tuned.pipeline.sample(texts, seeds)[-1], held, contexts) | {
        "view PSNR": view_fidelity(tuned.pipeline, held, tuned.subject.labels[0])
    }
    return scores


def prompts_in_contexts(
    held: HeldoutSubject, tuned: Personalized, config: ConfigDict, count: int
) -> tuple[list[str], np.ndarray]:
    """The prompts "a [V] class in a context", `count` of each, and the numbers of their contexts."""
    contexts = np.repeat([CONTEXTS.index(context) for context in config.report.contexts], count)
    identifier = tuned.subject.identifier.text
    return [prompt(held.class_noun, context=CONTEXTS[c], identifier=identifier) for c in contexts], contexts


def of_subject(probe: Probe, pictures: np.ndarray, held: HeldoutSubject, contexts: np.ndarray) -> dict[str, float]:
    """Shares of the pictures that show the subject's properties and the prompt's context."""
    names = ("class_id", "body_colour", "accent_colour", "pattern")
    truth = {name: int(getattr(held.subject, name)[0]) for name in names}
    reading = probe.read(pictures)
    return subject_fidelity(reading, **truth) | accuracy(reading, context=contexts)


def of_class(probe: Probe, pipeline: Pipeline, held: HeldoutSubject, class_prompt: str) -> dict[str, float]:
    """Diversity of the base model's pictures of "a class", and how many have the subject's colour."""
    seeds = range(CLASS_SEED, CLASS_SEED + CLASS_SAMPLES)
    reading = probe.read(pipeline.sample_stage(pipeline.stages[0], [class_prompt] * CLASS_SAMPLES, seeds))
    return {"entropy": colour_entropy(reading), "leakage": leakage(reading, int(held.subject.body_colour[0]))}


def view_fidelity(pipeline: Pipeline, held: HeldoutSubject, text: str) -> float:
    """PSNR of unseen views that the last stage enlarges from their 32-pixel versions."""
    stage, views = pipeline.stages[-1], unseen_views(held, NUM_VIEWS)
    low = downsample_uint8(views[..., :3], stage.low_resolution)
    return object_psnr(pipeline.sample_stage(stage, [text] * len(views), range(len(views)), low), views)


def object_psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the object's pixels.

    Args:
        pictures: uint8 [N, H, W, 3].
        truth: uint8 [N, H, W, 4], the object's mask as fourth channel.
    """
    mask = truth[..., 3:] / 255.0
    error = np.square((pictures.astype(np.float64) - truth[..., :3]) / 255)
    return float(-10 * np.log10(np.sum(mask * error) / (3 * np.sum(mask))))


def table(rows: Scores) -> str:
    """The rows as a Markdown table; blank where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean(subjects: list[Scores]) -> Scores:
    """Means over subjects of every score."""
    return {
        row: {name: float(np.mean([subject[row][name] for subject in subjects])) for name in subjects[0][row]}
        for row in subjects[0]
    }


def main(_: list[str]) -> None:
    """Measure every subject, print the tables."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir)
    if unknown := sorted(set(arguments.classes) - set(CLASSES)):
        raise UserError(f"--classes names {', '.join(unknown)}; the world has {', '.join(CLASSES)}.")
    pretrained = load_pipeline(config.pretrained)
    subjects = {}
    for class_noun in tqdm(arguments.classes, desc="subjects"):
        held = heldout_subject(class_noun, 0)
        run = workdir / class_noun.replace(" ", "_")
        file = run / "scores.json"
        if not file.exists():
            write_text(file, json.dumps(measure(pretrained, held, config, run, arguments.images_per_context), indent=2))
        subjects[held.description] = json.loads(file.read_text())
    of_form = {name: scores[config.training.prior.form] for name, scores in subjects.items()}
    text = f"Mean over {len(subjects)} subjects\n\n{table(mean(list(subjects.values())))}\n"
    text += f"Each subject, base model, prior form {config.training.prior.form}\n\n{table(of_form)}"
    write_text(workdir / "table.md", text)
    print(text)


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "workdir"))

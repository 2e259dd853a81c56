"""The frame of the experiments: the same subjects personalised in several ways, scored, and compared.

An experiment has arms, which are the ways of personalising, and expected findings. Runs lie in
`workdir/<arm>/<subject>`: experiments that share a working directory share the runs of equal arms, and a run that was
scored is only read. Rows of scores stay in each run's `evaluation/rows.jsonl`; the experiment's own folder,
`workdir/<experiment>`, gets the tables and a figure.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import tables
from experiments.folders import copy_checkpoints, link_class_images, remove_weights, shared_folder
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation.protocol import evaluate, read_scored
from personalize_jax.evaluation.report import Panel
from personalize_jax.evaluation.scoring import find_encoders, load_encoders, read_rows, summary, write_rows
from personalize_jax.evaluation.showcase import sheets
from personalize_jax.method.changes import changed
from personalize_jax.method.configuration import check, check_values, num_steps, training_sections
from personalize_jax.method.personalization import (
    SubjectPhotos,
    class_knowledge,
    load_pretrained,
    personalize_subject,
    retune_stage,
)
from personalize_jax.method.personalized import Personalized, load_personalized
from personalize_jax.metrics.metric import MetricEncoders
from personalize_jax.metrics.table import Row, SubjectScores
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.subject.images import from_pixels, read_image
from personalize_jax.subject.registry import reserve_identifier
from personalize_jax.training import tracking
from personalize_jax.training.tracking import JSONL_ONLY, NO_DESTINATIONS, Destinations, Tracking
from personalize_jax.world.exact_metrics import truth_of

QUICK_SUBJECTS = 2


class Arm(NamedTuple):
    """A way of personalising: a row of the table.

    Attributes:
        name: name of the row and of the folder.
        config: configuration of its runs.
        stage: the only stage that this arm tunes; the others are those of the first arm's run. None to tune
            `config.tune`.
        continues: name of the arm whose training this one continues, with more steps; or None.
        num_photos: number of photos of each subject; None for all.
        class_noun: (the subject's class noun, the benchmark's class nouns) -> the class noun that is used.
    """

    name: str
    config: ConfigDict
    stage: str | None = None
    continues: str | None = None
    num_photos: int | None = None
    class_noun: Callable[[str, Sequence[str]], str] = lambda noun, nouns: noun


class Study(NamedTuple):
    """An experiment.

    Attributes:
        name: name of its folder.
        arms: arms in the order of the table; the others vary the first.
        findings: expected findings.
        paper: the paper's own rows: {row: {metric: value}}.
        num_subjects: number of subjects, unless the command line gives another.
        benchmark: the benchmark that they are of, unless the command line gives another; see `load_benchmark`.
        measure: an additional measurement of tuned cascades, or None.
    """

    name: str
    arms: Sequence[Arm]
    findings: Sequence[tables.Finding]
    paper: Mapping[str, Mapping[str, float]]
    num_subjects: int
    benchmark: str = "world"
    measure: Callable[[Personalized, BenchmarkSubject], list[Row]] | None = None


class Subjects(NamedTuple):
    """The subjects of one call.

    Attributes:
        part: the subjects that it runs.
        names: names of all subjects of the experiment, whatever part of them the call runs.
        class_nouns: class nouns of the whole benchmark, in its order.
    """

    part: Sequence[BenchmarkSubject]
    names: Sequence[str]
    class_nouns: Sequence[str]


def define_flags() -> None:
    """The command line of every experiment."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("workdir", None, "Folder for runs and tables; experiments may share it.")
    flags.DEFINE_string(
        "benchmark", None, 'Benchmark, such as "world", "dreambooth", or its folder; by default the experiment\'s.'
    )
    flags.DEFINE_integer(
        "num_subjects", None, "Number of the benchmark's subjects; by default the experiment's.", lower_bound=1
    )
    flags.DEFINE_list("arms", None, "Names of the arms to run; by default all.")
    flags.DEFINE_string("part", "1/1", "Part of the subjects, such as 2/3: every third, beginning with the second.")
    flags.DEFINE_bool("delete_weights", False, "Delete a subject's weights once all arms have been scored.")
    tracking.define_flags()
    flags.DEFINE_bool("quick", False, "Two subjects, few steps and pictures: to see whether it runs.")


def run(make_study: Callable[[ConfigDict], Study]) -> None:
    """Run an experiment as a command."""

    def main(_: list[str]) -> None:
        arguments = flags.FLAGS
        check_values(arguments.config)
        workdir, destinations = Path(arguments.workdir), tracking.from_flags()
        destinations.tracking(workdir)  # refuses destinations that are not installed, before identifiers are reserved
        config = quick(arguments.config) if arguments.quick else arguments.config
        find_encoders(config.evaluation)
        study = select_arms(make_study(config), arguments.arms)
        subjects = subjects_of_command(study)
        options = arguments.delete_weights, destinations
        print(run_study(study, load_pretrained(config), subjects, workdir, *options))

    command.run(main, define_flags, required=("config", "workdir"))


def subjects_of_command(study: Study) -> Subjects:
    """The subjects that the command line asks for.

    Raises:
        UserError: see `load_benchmark` and `select_subjects`.
    """
    arguments = flags.FLAGS
    benchmark = load_benchmark(arguments.benchmark or study.benchmark)
    count = arguments.num_subjects or (QUICK_SUBJECTS if arguments.quick else study.num_subjects)
    part = select_subjects(benchmark, count, arguments.part)
    return Subjects(part, benchmark.names[:count], benchmark.class_nouns)


def quick(config: ConfigDict) -> ConfigDict:
    """The configuration with so few steps and pictures that it only shows whether everything runs."""
    changes = {"class_images__count": 4, "evaluation__images_per_prompt": 2, "evaluation__class_samples": 4}
    for training in training_sections(config).values():
        changes |= {f"{training}__num_steps": config[training].steps_per_dispatch, f"{training}__batch_size": 2}
    for method, numbers in config.get("methods", {}).items():
        if "num_steps" in numbers:
            changes[f"methods__{method}__num_steps"] = config.training.steps_per_dispatch
    return changed(config, **changes)


def select_arms(study: Study, names: Sequence[str] | None) -> Study:
    """The experiment with some of its arms, and the findings about these.

    Args:
        study: the experiment.
        names: names of arms; None for all.

    Raises:
        UserError: the experiment has no such arm, or the arms vary the first one, which is left out.
    """
    if names is None:
        return study
    all_names = [arm.name for arm in study.arms]
    if unknown := sorted(set(names) - set(all_names)):
        raise UserError(f"--arms names {', '.join(unknown)}; the arms are {', '.join(all_names)}.")
    arms = [arm for arm in study.arms if arm.name in names]
    if any(arm.stage for arm in arms) and arms[0] != study.arms[0]:
        raise UserError(f"These arms vary {all_names[0]}; name it among --arms, too.")
    findings = [finding for finding in study.findings if {finding.greater, finding.less} <= set(names)]
    return study._replace(arms=arms, findings=findings)


def select_subjects(subjects: Sequence[BenchmarkSubject], count: int, part: str) -> list[BenchmarkSubject]:
    """The subjects of one call: a part of the first `count`.

    >>> select_subjects(range(30), 8, "2/3")
    [1, 4, 7]

    Raises:
        UserError: there are fewer subjects, or `part` is no such text, or has no subject.
    """
    if count > len(subjects):
        raise UserError(f"{count} subjects were asked for and the benchmark has {len(subjects)}; ask for fewer.")
    k, slash, n = part.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise UserError(f"--part is {part!r}; give such as 2/3, the second of three.")
    if int(k) > count:
        raise UserError(f"--part is {part!r}, and there are {count} subjects; make no more parts than that.")
    return [subjects[i] for i in range(int(k) - 1, count, int(n))]


def reserve_identifiers(
    study: Study, pretrained: Pipeline, names: Sequence[str], class_nouns: Sequence[str], workdir: Path
) -> None:
    """Reserve the identifier of every subject in every arm, in order, so that parallel calls get the same ones.

    Args:
        study: the experiment.
        pretrained: the cascade.
        names: names of all subjects of the experiment, whatever part of them this call runs.
        class_nouns: class nouns of the whole benchmark.
        workdir: folder of all runs.
    """
    nouns = tuple(dict.fromkeys(class_nouns))
    for arm in (arm for arm in study.arms if arm.stage is None):
        _, known_nouns = class_knowledge(arm.config)
        for name, class_noun in zip(names, class_nouns, strict=False):
            noun = determine([], arm.class_noun(class_noun, nouns)).noun
            config, folder = run_config(arm, workdir), workdir / arm.name / name
            reserve_identifier(pretrained.tokenizer, config, folder, noun, known_nouns or ())


def run_config(arm: Arm, workdir: Path) -> ConfigDict:
    """The configuration of an arm's runs, which share a registry of identifiers."""
    return changed(arm.config, subject__registry=str(workdir / arm.name / "registry.json"))


def run_study(
    study: Study,
    pretrained: Pipeline,
    subjects: Subjects,
    workdir: Path,
    delete_weights: bool = False,
    destinations: Destinations = NO_DESTINATIONS,
) -> str:
    """Run the arms as `scores_of` does, and write tables and figure; the tables as Markdown."""
    scores = scores_of(study, pretrained, subjects, workdir, delete_weights, destinations)
    return tables.write(scores, study.findings, study.paper, workdir / study.name)


def scores_of(
    study: Study,
    pretrained: Pipeline,
    subjects: Subjects,
    workdir: Path,
    delete_weights: bool = False,
    destinations: Destinations = NO_DESTINATIONS,
) -> dict[str, SubjectScores]:
    """Run the arms for all subjects, except where they were scored before: the subjects' scores by arm.

    Args:
        study: the experiment.
        pretrained: the cascade.
        subjects: the subjects.
        workdir: folder of all runs.
        delete_weights: whether to delete a subject's weights once all arms have been scored.
        destinations: additional destinations of the runs' numbers and pictures.

    Raises:
        UserError: the cascade cannot be tuned as an arm's configuration says, a run's directory belongs to another
            configuration, or a destination cannot be reached.
    """
    for arm in study.arms:
        check(pretrained, arm.config)
    reserve_identifiers(study, pretrained, subjects.names, subjects.class_nouns, workdir)
    encoders = load_encoders(find_encoders(study.arms[0].config.evaluation))
    nouns = tuple(dict.fromkeys(subjects.class_nouns))
    rows: dict[str, list[Row]] = {arm.name: [] for arm in study.arms}
    with tqdm(total=len(subjects.part) * len(study.arms), desc=study.name, unit="run") as bar:
        for subject in subjects.part:
            for arm in study.arms:
                rows[arm.name] += scored_run(study, arm, subject, nouns, pretrained, encoders, workdir, destinations)
                bar.update()
            if delete_weights:
                for arm in study.arms:
                    remove_weights(workdir / arm.name / subject.name)
    return {arm: summary(arm_rows) for arm, arm_rows in rows.items()}


def scored_run(
    study: Study,
    arm: Arm,
    subject: BenchmarkSubject,
    nouns: Sequence[str],
    pretrained: Pipeline,
    encoders: MetricEncoders,
    workdir: Path,
    destinations: Destinations = NO_DESTINATIONS,
) -> list[Row]:
    """The rows of one subject in one arm: personalised and scored, or read where they are of this evaluation already.

    Args:
        study: the experiment.
        arm: one of its arms.
        subject: the subject.
        nouns: all class nouns of the benchmark.
        pretrained: the cascade.
        encoders: encoders of the metrics, by name.
        workdir: folder of all runs.
        destinations: additional destinations of the run's numbers and pictures.
    """
    folder = workdir / arm.name / subject.name
    out = folder / "evaluation"
    config = run_config(arm, workdir)
    manifest.record_config(config, folder, may_change=["subject.registry"])  # the folders may have been moved
    rows, measured = read_scored(out, config.evaluation), out / f"{study.name}.jsonl"
    if rows is None or (study.measure and not measured.exists()):
        noun = arm.class_noun(subject.class_noun, nouns)
        prompts = [reword(prompt, subject.class_noun, noun, config.subject.label) for prompt in subject.prompts]
        truth = None if subject.truth is None else truth_of(subject.truth)
        before = shared_folder(workdir, "class_before", noun, pretrained, config)
        tracked = destinations.tracking(folder, f"{arm.name}/{subject.name}")
        with tracked.running(config):
            first = workdir / study.arms[0].name / subject.name
            tuned = tune_arm(arm, config, subject, noun, pretrained, workdir, first, tracked)
            inputs = prompts, encoders, config.evaluation, out, subject.photos, truth, before
            rows = evaluate(tuned, pretrained, subject.name, *inputs)
            if study.measure:
                write_rows(study.measure(tuned, subject), measured)
            track_scores(rows, num_steps(config), out, tracked)
    return rows + (read_rows(measured) if study.measure else [])


def track_scores(rows: Sequence[Row], step: int, folder: Path, tracked: Tracking) -> None:
    """Send a run's scores, and a sheet of the first picture of each prompt in `folder`, to additional destinations."""
    if tracked == JSONL_ONLY:
        return
    (scores,) = summary(rows).values()
    tracked.for_part("scores").write(step, scores)
    images = np.stack([read_image(folder / row.file) for row in rows if (row.role, row.seed) == ("subject", 0)])
    tracked.for_part("pictures").write(step, sheets([Panel("Evaluation", "the first picture of each prompt", images)]))


def tune_arm(
    arm: Arm,
    config: ConfigDict,
    subject: BenchmarkSubject,
    noun: str,
    pretrained: Pipeline,
    workdir: Path,
    first: Path,
    tracked: Tracking,
) -> Personalized:
    """Tune the cascade to one subject in one arm, in `workdir/<arm>/<subject>`.

    Args:
        arm: the arm.
        config: configuration of the run.
        subject: the subject.
        noun: the class noun that is used for it.
        pretrained: the cascade.
        workdir: folder of all runs.
        first: run directory of the first arm, for arms that tune only one stage.
        tracked: additional destinations of metrics.
    """
    folder = workdir / arm.name / subject.name
    if arm.stage is not None:
        return retune_stage(pretrained, load_personalized(first), arm.stage, config, first, folder / arm.stage, tracked)
    resolution = pretrained.stages[-1].resolution
    images = [from_pixels(f"{i:02d}", p, resolution) for i, p in enumerate(subject.photos[: arm.num_photos])]
    link_class_images(folder, shared_folder(workdir, "class_images", noun, pretrained, config))
    if arm.continues is not None:
        copy_checkpoints(workdir / arm.continues / subject.name, folder, config.tune)
    return personalize_subject(pretrained, SubjectPhotos(images, noun), config, folder, tracked)


def reword(prompt: str, true_noun: str, noun: str, label: str) -> str:
    """A prompt with another class noun in place of the true one; without any where the subject's labels have none."""
    used = noun if label == "identifier_and_class" else ""
    return " ".join(prompt.replace(f"{PLACEHOLDER} {true_noun}", f"{PLACEHOLDER} {used}").split())

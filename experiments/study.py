"""What the experiments share: the same subjects personalised in several ways, scored, and compared.

An experiment names its arms, the ways of personalising, and what it expects to find. Runs lie in
`workdir/<arm>/<subject>`: an arm that several experiments have is run once where they share a working directory, and a
run that has been scored is only read. Rows of scores stay in each run's `evaluation/rows.jsonl`; the experiment's own
folder, `workdir/<experiment>`, gets the tables and a figure.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import tables
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation.protocol import evaluate
from personalize_jax.evaluation.report import Panel
from personalize_jax.evaluation.scoring import find_encoders, load_encoders, read_rows, summary, write_rows
from personalize_jax.evaluation.showcase import sheets
from personalize_jax.method.configuration import changed, check, check_values, num_steps, training_sections
from personalize_jax.method.personalization import (
    SubjectPhotos,
    class_knowledge,
    load_pretrained,
    personalize_subject,
    retune_stage,
)
from personalize_jax.method.personalized import Personalized, load_personalized
from personalize_jax.metrics.metric import MetricEncoders
from personalize_jax.metrics.table import Row
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.subject.images import from_pixels, read_image
from personalize_jax.subject.registry import reserve_identifier
from personalize_jax.training import tracking, trained
from personalize_jax.training.tracking import JSONL_ONLY, NO_DESTINATIONS, Destinations, Tracking
from personalize_jax.world.exact_metrics import truth_of

QUICK_SUBJECTS = 2


class Arm(NamedTuple):
    """A way of personalising: a row of the table.

    Attributes:
        name: of the row and of the folder.
        config: of the run.
        stage: if given, only this stage is tuned as `config` says, and the rest is taken from the first arm's run.
        goes_on_from: if given, the arm whose training this one continues, with more steps.
        num_photos: the first so many photos of each subject; None for all.
        class_noun: what the subject is said to be, of what it is and the benchmark's nouns.
    """

    name: str
    config: ConfigDict
    stage: str | None = None
    goes_on_from: str | None = None
    num_photos: int | None = None
    class_noun: Callable[[str, Sequence[str]], str] = lambda noun, nouns: noun


class Study(NamedTuple):
    """An experiment.

    Attributes:
        name: of its folder.
        arms: in the order of the table; the first is the one that the others vary.
        findings: what is expected.
        paper: the paper's own rows: {row: {metric: value}}.
        num_subjects: how many of the benchmark's subjects, unless the command says otherwise.
        measure: what else is measured of a tuned cascade, if anything.
    """

    name: str
    arms: Sequence[Arm]
    findings: Sequence[tables.Finding]
    paper: Mapping[str, Mapping[str, float]]
    num_subjects: int
    measure: Callable[[Personalized, BenchmarkSubject], list[Row]] | None = None


def define_flags() -> None:
    """The command line of every experiment."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("workdir", None, "Folder for runs and tables; experiments may share it.")
    flags.DEFINE_string("benchmark", "world", 'Whose subjects: "world", "dreambooth", or a folder with its copy.')
    flags.DEFINE_integer(
        "num_subjects", None, "How many of them; by default as many as the experiment needs.", lower_bound=1
    )
    flags.DEFINE_list("arms", None, "Which of the experiment's arms; by default all.")
    flags.DEFINE_string("part", "1/1", "Which of the subjects, such as 2/3: every third, beginning with the second.")
    flags.DEFINE_bool("delete_weights", False, "Delete a subject's weights once all arms have been scored.")
    tracking.define_flags()
    flags.DEFINE_bool("quick", False, "Two subjects, few steps and pictures: to see whether it runs.")


def run(make_study: Callable[[ConfigDict], Study]) -> None:
    """The command of an experiment."""

    def main(_: list[str]) -> None:
        arguments = flags.FLAGS
        check_values(arguments.config)
        workdir, destinations = Path(arguments.workdir), tracking.asked_for()
        destinations.of(workdir)  # which refuses what is not installed, before identifiers are given out
        config = quick(arguments.config) if arguments.quick else arguments.config
        find_encoders(config.evaluation)
        study = with_arms(make_study(config), arguments.arms)
        count = arguments.num_subjects or (QUICK_SUBJECTS if arguments.quick else study.num_subjects)
        benchmark = load_benchmark(arguments.benchmark)
        chosen = select(benchmark, count, arguments.part)
        nouns = tuple(dict.fromkeys(benchmark.class_nouns))
        pretrained = load_pretrained(config)
        for arm in study.arms:
            check(pretrained, arm.config)
        reserve_identifiers(study, pretrained, benchmark.names[:count], benchmark.class_nouns, workdir)
        how = arguments.delete_weights, destinations
        print(conduct(study, config, pretrained, chosen, nouns, workdir, *how))

    command.run(main, define_flags, required=("config", "workdir"))


def quick(config: ConfigDict) -> ConfigDict:
    """The configuration with so few steps and pictures that nothing but running can be seen."""
    changes = {"class_images__count": 4, "evaluation__images_per_prompt": 2, "evaluation__class_samples": 4}
    for training in training_sections(config).values():
        changes |= {f"{training}__num_steps": config[training].steps_per_dispatch, f"{training}__batch_size": 2}
    for method, numbers in config.get("methods", {}).items():
        if "num_steps" in numbers:
            changes[f"methods__{method}__num_steps"] = config.training.steps_per_dispatch
    return changed(config, **changes)


def with_arms(study: Study, names: Sequence[str] | None) -> Study:
    """The experiment with some of its arms, and the findings that are about these.

    Raises:
        UserError: it has no such arm, or they vary the first one, which is left out.
    """
    if names is None:
        return study
    known = [arm.name for arm in study.arms]
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--arms names {', '.join(unknown)}; the arms are {', '.join(known)}.")
    arms = [arm for arm in study.arms if arm.name in names]
    if any(arm.stage for arm in arms) and arms[0] != study.arms[0]:
        raise UserError(f"These arms vary {known[0]}; name it among --arms, too.")
    findings = [finding for finding in study.findings if {finding.greater, finding.less} <= set(names)]
    return study._replace(arms=arms, findings=findings)


def select(subjects: Sequence[BenchmarkSubject], count: int, part: str) -> list[BenchmarkSubject]:
    """Which subjects a call is for: its part of the first `count`.

    >>> select(range(30), 8, "2/3")
    [1, 4, 7]

    Raises:
        UserError: there are fewer, or the text does not say which part, or that part has none of them.
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
    """Give every subject its identifier in every arm, in order, so that parts that run at once change none of them.

    Args:
        study: the experiment.
        pretrained: the cascade.
        names: of all subjects that it is about, whatever part of them this call is for.
        class_nouns: of the whole benchmark.
        workdir: for runs.
    """
    nouns = tuple(dict.fromkeys(class_nouns))
    for arm in (arm for arm in study.arms if arm.stage is None):
        _, known = class_knowledge(arm.config)
        for name, class_noun in zip(names, class_nouns, strict=False):
            noun = determine([], arm.class_noun(class_noun, nouns)).noun
            config, folder = in_workdir(arm, workdir), workdir / arm.name / name
            reserve_identifier(pretrained.tokenizer, config, folder, noun, known or ())


def in_workdir(arm: Arm, workdir: Path) -> ConfigDict:
    """The configuration of an arm's runs, which share a registry."""
    return changed(arm.config, subject__registry=str(workdir / arm.name / "registry.json"))


def conduct(
    study: Study,
    config: ConfigDict,
    pretrained: Pipeline,
    subjects: Sequence[BenchmarkSubject],
    nouns: Sequence[str],
    workdir: Path,
    delete_weights: bool = False,
    destinations: Destinations = NO_DESTINATIONS,
) -> str:
    """Run what is missing, write tables and figure.

    Args:
        study: the experiment.
        config: that its arms vary.
        pretrained: the cascade.
        subjects: of the benchmark.
        nouns: all class nouns of the benchmark.
        workdir: for runs and tables.
        delete_weights: whether to delete a subject's weights once all arms have been scored.
        destinations: where the numbers and pictures of runs go besides.

    Returns:
        The tables as Markdown.

    Raises:
        UserError: a run's directory belongs to another configuration, or a destination cannot be reached.
    """
    encoders = load_encoders(find_encoders(config.evaluation))
    rows: dict[str, list[Row]] = {arm.name: [] for arm in study.arms}
    with tqdm(total=len(subjects) * len(study.arms), desc=study.name, unit="run") as bar:
        for subject in subjects:
            for arm in study.arms:
                rows[arm.name] += scored_run(study, arm, subject, nouns, pretrained, encoders, workdir, destinations)
                bar.update()
            if delete_weights:
                for arm in study.arms:
                    forget_weights(workdir / arm.name / subject.name)
    scores = {arm: summary(of_arm) for arm, of_arm in rows.items()}
    return tables.write(scores, study.findings, study.paper, workdir / study.name)


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
    """The rows of one subject in one arm: personalised and scored, or read where that was done before."""
    folder = workdir / arm.name / subject.name
    config = in_workdir(arm, workdir)
    manifest.record_config(config, folder, may_change=["subject.registry"])  # the folders may have been moved
    scored = folder / "evaluation" / "rows.jsonl"
    measured = folder / "evaluation" / f"{study.name}.jsonl"
    if not scored.exists() or (study.measure and not measured.exists()):
        first = workdir / study.arms[0].name / subject.name
        noun = arm.class_noun(subject.class_noun, nouns)
        prompts = [worded(prompt, subject.class_noun, noun, config.subject.label) for prompt in subject.prompts]
        truth = None if subject.truth is None else truth_of(subject.truth)
        settings, out = config.evaluation, folder / "evaluation"
        before = shared_folder(workdir, "class_before", noun, pretrained, config)
        tracked = destinations.of(folder, f"{arm.name}/{subject.name}")
        with tracked.running(config):
            tuned = tuned_run(arm, config, subject, noun, pretrained, workdir, first, tracked)
            rows = evaluate(
                tuned, pretrained, subject.name, prompts, encoders, settings, out, subject.photos, truth, before
            )
            if study.measure:
                write_rows(study.measure(tuned, subject), measured)
            hand_on(rows, num_steps(config), out, tracked)
    return read_rows(scored) + (read_rows(measured) if study.measure else [])


def hand_on(rows: Sequence[Row], step: int, folder: Path, tracked: Tracking) -> None:
    """Hand on a run's scores, and a sheet with the first picture of each prompt, from the evaluation's folder."""
    if tracked == JSONL_ONLY:
        return
    (scores,) = summary(rows).values()
    tracked.of("scores").scalars(step, scores)
    drawn = np.stack([read_image(folder / row.file) for row in rows if (row.role, row.seed) == ("subject", 0)])
    tracked.of("pictures").pictures(step, sheets([Panel("Evaluation", "the first picture of each prompt", drawn)]))


def tuned_run(
    arm: Arm,
    config: ConfigDict,
    subject: BenchmarkSubject,
    noun: str,
    pretrained: Pipeline,
    workdir: Path,
    first: Path,
    tracked: Tracking,
) -> Personalized:
    """The cascade of one subject, tuned as an arm says, in `workdir/<arm>/<subject>`.

    Args:
        arm: the way of personalising.
        config: of the run.
        subject: of the benchmark.
        noun: what it is said to be.
        pretrained: the cascade.
        workdir: of all arms.
        first: run directory of the first arm, for arms that vary one stage of it.
        tracked: where metrics go besides.
    """
    folder = workdir / arm.name / subject.name
    if arm.stage is not None:
        return retune_stage(pretrained, load_personalized(first), arm.stage, config, first, folder / arm.stage, tracked)
    resolution = pretrained.stages[-1].resolution
    images = [from_pixels(f"{i:02d}", p, resolution) for i, p in enumerate(subject.photos[: arm.num_photos])]
    share_class_images(folder, shared_folder(workdir, "class_images", noun, pretrained, config))
    if arm.goes_on_from is not None:
        take_checkpoints(workdir / arm.goes_on_from / subject.name, folder, config.tune)
    return personalize_subject(pretrained, SubjectPhotos(images, noun), config, folder, tracked)


def worded(prompt: str, true_noun: str, noun: str, label: str) -> str:
    """A prompt as it is put to a cascade that was tuned with another noun, or with none."""
    given = noun if label == "identifier_and_class" else ""
    return " ".join(prompt.replace(f"{PLACEHOLDER} {true_noun}", f"{PLACEHOLDER} {given}").split())


def shared_folder(workdir: Path, part: str, noun: str, pretrained: Pipeline, config: ConfigDict) -> Path:
    """Where runs keep what the pretrained cascade draws for a class: one folder for all that draw the same there.

    Args:
        workdir: of the runs.
        part: "class_images" or "class_before".
        noun: of the class.
        pretrained: the cascade, which different runs may have different ones of.
        config: of a run. Pictures depend on how networks compute, and class images on their own keys, but for how many
            there are.
    """
    settings = config.class_images if part == "class_images" else {"batch_size": config.evaluation.batch_size}
    drawn_by = {key: value for key, value in settings.items() if key not in ("count", "folder")}
    drawn_by |= {"weights": pretrained.fingerprint, "compute": dict(config.get("compute", {}))}
    digest = hashlib.sha256(json.dumps(drawn_by, sort_keys=True).encode()).hexdigest()[:8]
    return workdir / part / f"{noun.replace(' ', '_')}-{digest}"


def share_class_images(folder: Path, shared: Path) -> None:
    """Let a run find the class images of others that draw the same, see `shared_folder`."""
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    link, target = folder / "class_images", os.path.relpath(shared, folder)  # so that all can be moved together
    if link.is_symlink() and os.readlink(link) != target:
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(target)


def take_checkpoints(source: Path, folder: Path, stages: Sequence[str]) -> None:
    """Begin a run with the checkpoints of another one."""
    for stage in stages:
        if not (folder / stage).exists():
            shutil.copytree(source / stage, temporary := folder / f".{stage}", dirs_exist_ok=True)
            temporary.rename(folder / stage)


def forget_weights(folder: Path) -> None:
    """Delete what a run has trained, which has been scored: checkpoints and results."""
    for file in folder.glob(f"*/{trained.FILE}"):
        file.unlink(missing_ok=True)
    for checkpoints in folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)

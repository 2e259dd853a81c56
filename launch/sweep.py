"""Run a configuration with many variations of its values, and write a table of the results.

    python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/prior_weight.py --images=photos/ \
        --class_noun=dog --workdir=runs/sweep --metric=CLIP-T
    python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/learning_rate_and_steps.py \
        --benchmark=world --num_subjects=3 --workdir=runs/sweep3 --engine=ray --resources=TPU=4

Each point of the sweep (`launch/sweep_points.py`) is a personalised and evaluated run of every subject, in
`workdir/<point>/<subject>`. With `--rungs=100,200,400` all points are trained for 100 steps and evaluated; the best
share `--keep` of them by `--metric` continues to 200, and so forth (successive halving, Jamieson and Talwalkar 2016).
The folder gets `table.csv`, `table.md` and `figure.png`; `sweep.json` lists the points.

The same command continues a sweep that was stopped, and may have other points: runs that were scored are only read.
Given in several places that share the folder, the commands share the points, with or without Ray.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments.folders import remove_weights
from experiments.study import select_subjects
from launch.sweep_engines import Engine, Job, LocalEngine, Outcome, RayEngine, read_job
from launch.sweep_points import STEPS, Point, prolonged, read_points
from launch.sweep_table import Result, ranked, write
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.benchmark.prompts import LIVE_CLASSES, read_prompts
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.scoring import encoder_names, summary
from personalize_jax.method.changes import changed
from personalize_jax.method.configuration import check_values
from personalize_jax.method.personalization import class_knowledge, load_subject
from personalize_jax.metrics.table import estimates
from personalize_jax.runtime import command, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.images import list_images, read_image
from personalize_jax.training import tracking
from personalize_jax.training.optimizer import same_learning_rates

DONE, STOPPED = "done", "stopped early"


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("sweep", None, "Points, such as configs/sweeps/prior_weight.py.")
    flags.DEFINE_string("workdir", None, "Folder for runs and results.")
    flags.DEFINE_multi_string("images", None, "Photos of one subject: a folder, or image files (repeat the flag).")
    flags.DEFINE_string("class_noun", None, "What they show, such as dog; found by a classifier if absent.")
    flags.DEFINE_string(
        "benchmark", None, 'Benchmark, in place of --images: "world", "dreambooth", or a folder with a copy of it.'
    )
    flags.DEFINE_integer("num_subjects", None, "Number of the benchmark's subjects; by default all.", lower_bound=1)
    flags.DEFINE_string("metric", "DINO", "Metric of the evaluation by which points are compared.")
    flags.DEFINE_list("rungs", [], "Numbers of steps of the base model after which points are compared.")
    flags.DEFINE_float("keep", 0.5, "Share of the points that continues from each rung.")
    flags.DEFINE_bool("delete_weights", False, "Delete the weights of points that do not continue; the best's stay.")
    flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where points run: in this process, or on a Ray cluster.")
    flags.DEFINE_string("ray_address", "auto", "Address of the cluster: auto, local, or host:port.")
    flags.DEFINE_list("resources", ["CPU=1"], "Resources of one node that a point takes, such as TPU=4 or GPU=1.")
    flags.DEFINE_integer("max_retries", 2, "How often a point is restarted after its node died.", lower_bound=0)
    tracking.define_flags()


def main(_: list[str]) -> None:
    """Run the points that were not scored before, then write the table."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir).absolute()
    points = read_points(Path(arguments.sweep), config)
    for checked in (config, *(point.config for point in points)):
        check_values(checked)
    rungs = parse_rungs(arguments.rungs, arguments.keep, points)
    check_metric(arguments.metric, config)
    resources = parse_resources(arguments.resources)
    if (arguments.images is None) == (arguments.benchmark is None):
        raise UserError("Give either --images (photos of one subject) or --benchmark (whose subjects).")
    destinations = tracking.from_flags()
    engine: Engine
    if arguments.engine == "ray":
        engine = RayEngine(arguments.ray_address, resources, arguments.max_retries, destinations)
    else:
        engine = LocalEngine(destinations)
    if arguments.images is not None:
        subjects = [subject_of_photos(arguments.images, arguments.class_noun, config)]
    else:
        benchmark = load_benchmark(arguments.benchmark)
        subjects = select_subjects(benchmark, arguments.num_subjects or len(benchmark), "1/1")
    engine.check(points)
    record_sweep(config, subjects, workdir)
    comparison = {"metric": arguments.metric, "rungs": rungs, "keep": arguments.keep}
    sweep = {"points": {point.name: dict(point.overrides) for point in points}, **comparison}
    write_text(workdir / "sweep.json", json.dumps(sweep, indent=2))
    results = run_points(
        points, subjects, engine, workdir, arguments.metric, rungs, arguments.keep, arguments.delete_weights
    )
    print(f"{write(results, arguments.metric, len(subjects), workdir)}\nTables and figure: {workdir}")
    if failed := sum(not result.metrics for result in results):
        raise UserError(f"{failed} of {len(results)} points failed, see {workdir / 'table.md'}; call again to retry.")


def run_points(
    points: Sequence[Point],
    subjects: Sequence[BenchmarkSubject],
    engine: Engine,
    workdir: Path,
    metric: str,
    rungs: Sequence[int] = (),
    keep: float = 0.5,
    delete_weights: bool = False,
) -> list[Result]:
    """Run the points, rung by rung if there are rungs.

    A rung ends when all of its points have ended, so that the choice of those that continue does not depend on their
    speed. Each rung is a new run, which begins with the checkpoints of the one before and leaves that unchanged.

    Args:
        points: points of the sweep.
        subjects: subjects that each point personalises.
        engine: the engine that runs them.
        workdir: folder of the sweep.
        metric: metric by which points continue.
        rungs: increasing numbers of steps; without any, all points run once as configured.
        keep: share of the points that continues from each rung, at least one point.
        delete_weights: whether to delete the weights of runs that are not continued, except for the best at the end.

    Returns:
        The result of each point at its last rung, in the order of the sweep.

    Raises:
        UserError: no point has the metric.
    """
    results: dict[str, Result] = {}
    ran: set[str] = set()
    remaining = list(points)
    for rung in tuple(rungs) or (None,):
        runs = {point.name: point if rung is None else prolonged(point, rung) for point in remaining}
        jobs = [Job(run, results[name].point.name if name in results else None) for name, run in runs.items()]
        outcomes = _outcomes(jobs, subjects, engine, workdir, "points" if rung is None else f"points, {rung} steps")
        last = rung is None or rung == rungs[-1]
        results |= {name: _result(run, outcomes[run.name], last) for name, run in runs.items()}
        best = ranked([results[name] for name in runs], metric)
        if not best and (scored := next((results[name] for name in runs if results[name].metrics), None)):
            raise UserError(f"No point has {metric!r}; give --metric one of {', '.join(scored.metrics)}.")
        kept = best[: 1 if last else max(1, math.ceil(round(keep * len(best), 6)))]
        remaining = [point for point in remaining if results[point.name] in kept]
        ran |= {run.name for run in runs.values()}
        if delete_weights:
            for name in ran - {result.point.name for result in kept}:
                for subject in subjects:
                    remove_weights(workdir / name / subject.name)
    return [results[point.name] for point in points]


def subject_of_photos(images: Sequence[str], class_noun: str | None, config: ConfigDict) -> BenchmarkSubject:
    """The subject of the user's photos, with the configuration's prompts.

    Raises:
        UserError: photos or class noun cannot be used.
    """
    source = images[0] if len(images) == 1 else images
    photos = load_subject(source, class_noun)
    noun = determine(photos.images, class_noun, *class_knowledge(config), config.subject.class_threshold).noun
    files = list_images(Path(source) if isinstance(source, str) else [Path(file) for file in source])
    prompts = read_prompts(config.evaluation.prompts, noun)
    name = re.sub(r"\W+", "_", noun)
    return BenchmarkSubject(name, noun, noun in LIVE_CLASSES, [read_image(file) for file in files], prompts)


def record_sweep(config: ConfigDict, subjects: Sequence[BenchmarkSubject], workdir: Path) -> None:
    """Record the configuration and the subjects of a sweep in its folder, or compare them with the recorded ones.

    Raises:
        UserError: the folder belongs to a sweep of another configuration, or of other subjects.
    """
    common = changed(config).unlock()
    common.photos = {s.name: [hashlib.sha256(photo.tobytes()).hexdigest() for photo in s.photos] for s in subjects}
    manifest.record_config(common.lock(), workdir, may_change=["subject.registry"])


def parse_rungs(words: Sequence[str], keep: float, points: Sequence[Point]) -> list[int]:
    """The numbers of steps of `--rungs`.

    Raises:
        UserError: they do not increase, or the training of a point cannot be prolonged from one to the next.
    """
    if not 0 < keep <= 1:
        raise UserError(f"--keep is {keep:g}; give a share of the points, above 0 and up to 1.")
    if not words:
        return []
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--rungs is {','.join(words)}; give numbers of steps, such as 100,200,400.")
    rungs = [int(word) for word in words]
    if rungs != sorted(set(rungs)) or rungs[0] == 0:
        raise UserError(f"--rungs is {','.join(words)}; give numbers of steps that increase, such as 100,200,400.")
    for point in points:
        training = point.config.training
        if STEPS in point.overrides:
            raise UserError(f"The sweep overrides {STEPS}, which --rungs do, too; leave one of them out.")
        if "base" not in point.config.tune:
            raise UserError("--rungs are steps of the base model, which config.tune leaves out; leave them out, too.")
        climbs = itertools.pairwise(rungs)
        if not all(same_learning_rates(training.optimizer, rung, rung, longer) for rung, longer in climbs):
            raise UserError(
                f"The learning rate falls over the last {training.optimizer.decay_steps} steps, and a training whose "
                "rate has fallen cannot be prolonged; with --rungs give --config.training.optimizer.decay_steps=0."
            )
        if uneven := [rung for rung in rungs if rung % training.steps_per_dispatch]:
            raise UserError(f"--rungs has {uneven[0]}; give multiples of {training.steps_per_dispatch}, a dispatch.")
    return rungs


def check_metric(metric: str, config: ConfigDict) -> None:
    """Refuse a metric that the evaluation does not measure, or that has no better direction.

    Raises:
        UserError: points cannot be compared by the metric.
    """
    measured = metric_registry.metrics_for(encoder_names(config.evaluation))
    comparable = [known.name for known in measured if known.better is not None]
    if metric not in comparable:
        raise UserError(f"--metric is {metric!r}; give one of {', '.join(comparable)}.")


def parse_resources(entries: Sequence[str]) -> dict[str, float]:
    """Amounts by name, from entries such as ["CPU=4", "TPU=8"].

    Raises:
        UserError: an entry has another form.
    """
    resources = {}
    for entry in entries:
        name, _, amount = entry.partition("=")
        if not name.strip() or not re.fullmatch(r"\d+(\.\d+)?", amount.strip()):
            raise UserError(f"--resources has {entry!r}; give names with amounts, such as CPU=4,TPU=8.")
        resources[name.strip()] = float(amount)
    return resources


def _outcomes(
    jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], engine: Engine, workdir: Path, description: str
) -> dict[str, Outcome]:
    """Outcomes by name of the run; those that were scored before are read, the engine runs the others."""
    scored = {job.point.name: read_job(job, subjects, workdir) for job in jobs}
    outcomes: dict[str, Outcome] = {name: rows for name, rows in scored.items() if rows is not None}
    missing = [job for job in jobs if job.point.name not in outcomes]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=description, unit="point") as bar:
        for job, outcome in engine.run(missing, subjects, workdir):
            outcomes[job.point.name] = outcome
            bar.update()
    return outcomes


def _result(point: Point, outcome: Outcome, last: bool) -> Result:
    if isinstance(outcome, Exception):
        kind = "" if isinstance(outcome, UserError) else f"{type(outcome).__name__}: "
        return Result(point, {}, f"failed: {kind}{str(outcome).partition(chr(10))[0]}")
    return Result(point, estimates(summary(outcome)), DONE if last else STOPPED)


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "sweep", "workdir"))

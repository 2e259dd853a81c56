"""Run a configuration many times with other values, and table what came of it.

    python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/prior_weight.py --images=photos/ \
        --class_noun=dog --workdir=runs/sweep --metric=CLIP-T
    python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/learning_rate_and_steps.py \
        --benchmark=world --num_subjects=3 --workdir=runs/sweep3 --engine=ray --resources=TPU=4

Each point of the sweep (`launch/sweep_points.py`) is a personalised and evaluated run of every subject, in
`workdir/<point>/<subject>`. With `--rungs=100,200,400` all points are trained for 100 steps and evaluated; the share
`--keep` of them that is best by `--metric` goes on to 200, and so forth (successive halving, Jamieson and Talwalkar
2016). The folder gets `table.csv`, `table.md` and `figure.png`; what ran is in `sweep.json`.

The same command goes on where the last one stopped, and so does one whose sweep has other points: what was scored is
only read. The same command given in several places that share the folder shares the points, with or without Ray.
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

from experiments.study import forget_weights, select
from launch.sweep_engines import Job, Local, Outcome, Ray, read_job
from launch.sweep_points import STEPS, Point, prolonged, read_points
from launch.sweep_table import Result, ranked, write
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.benchmark.prompts import LIVE_CLASSES, read_prompts
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.scoring import encoder_names, summary
from personalize_jax.method.configuration import changed, check_values
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
    flags.DEFINE_string("benchmark", None, 'Instead: subjects of "world", "dreambooth", or a folder with its copy.')
    flags.DEFINE_integer("num_subjects", None, "How many of the benchmark's subjects; by default all.", lower_bound=1)
    flags.DEFINE_string("metric", "DINO", "What points are compared by: a metric of the evaluation.")
    flags.DEFINE_list("rungs", [], "Numbers of steps of the base model after which points are compared.")
    flags.DEFINE_float("keep", 0.5, "Share of the points that goes on from each rung.")
    flags.DEFINE_bool(
        "delete_weights", False, "Delete the weights of points that are out of the race; the best's stay."
    )
    flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where points run: in this process, or on a Ray cluster.")
    flags.DEFINE_string("ray_address", "auto", "Of the cluster: auto, local, or host:port.")
    flags.DEFINE_list("resources", ["CPU=1"], "What a point takes of one node of the cluster, such as TPU=4 or GPU=1.")
    flags.DEFINE_integer("max_retries", 2, "How often a point is started again whose node has died.", lower_bound=0)
    tracking.define_flags()


def main(_: list[str]) -> None:
    """Run what is missing, then table it."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir).absolute()
    points = read_points(Path(arguments.sweep), config)
    for checked in (config, *(point.config for point in points)):
        check_values(checked)
    rungs = check_rungs(arguments.rungs, arguments.keep, points)
    check_metric(arguments.metric, config)
    resources = read_resources(arguments.resources)
    if (arguments.images is None) == (arguments.benchmark is None):
        raise UserError("Give either --images (photos of one subject) or --benchmark (whose subjects).")
    destinations = tracking.asked_for()
    engine: Local | Ray
    if arguments.engine == "ray":
        engine = Ray(arguments.ray_address, resources, arguments.max_retries, destinations)
    else:
        engine = Local(destinations)
    if arguments.images is not None:
        subjects = [own_subject(arguments.images, arguments.class_noun, config)]
    else:
        benchmark = load_benchmark(arguments.benchmark)
        subjects = select(benchmark, arguments.num_subjects or len(benchmark), "1/1")
    engine.check(points)
    record(config, subjects, workdir)
    comparison = {"metric": arguments.metric, "rungs": rungs, "keep": arguments.keep}
    described = {"points": {point.name: dict(point.overrides) for point in points}, **comparison}
    write_text(workdir / "sweep.json", json.dumps(described, indent=2))
    race = arguments.metric, rungs, arguments.keep, arguments.delete_weights
    results = conduct(points, subjects, engine, workdir, *race)
    print(f"{write(results, arguments.metric, len(subjects), workdir)}\nTables and figure: {workdir}")
    if failed := sum(not result.metrics for result in results):
        raise UserError(f"{failed} of {len(results)} points failed, see {workdir / 'table.md'}; call again to retry.")


def conduct(
    points: Sequence[Point],
    subjects: Sequence[BenchmarkSubject],
    engine: Local | Ray,
    workdir: Path,
    metric: str,
    rungs: Sequence[int] = (),
    keep: float = 0.5,
    delete_weights: bool = False,
) -> list[Result]:
    """Run the points, rung by rung if there are any.

    All points of a rung are awaited before some of them go on, so that which ones do does not depend on how fast they
    were. Each rung is a run of its own, which begins with the checkpoints of the one before and stays as it was.

    Args:
        points: of the sweep.
        subjects: whom each of them personalises.
        engine: where.
        workdir: of the sweep.
        metric: by which points go on.
        rungs: increasing numbers of steps; without any, all points are run once as they are configured.
        keep: share of the points that goes on from each rung, at least one.
        delete_weights: whether to delete the weights of runs that none goes on from, but for the best at the end.

    Returns:
        What became of each point at its last rung, in the order of the sweep.

    Raises:
        UserError: the evaluation gives no point that metric.
    """
    results: dict[str, Result] = {}
    ran: set[str] = set()
    going = list(points)
    for rung in tuple(rungs) or (None,):
        runs = {point.name: point if rung is None else prolonged(point, rung) for point in going}
        jobs = [Job(run, results[name].point.name if name in results else None) for name, run in runs.items()]
        outcomes = _outcomes(jobs, subjects, engine, workdir, "points" if rung is None else f"points, {rung} steps")
        last = rung is None or rung == rungs[-1]
        results |= {name: _result(run, outcomes[run.name], last) for name, run in runs.items()}
        best = ranked([results[name] for name in runs], metric)
        if not best and (scored := next((results[name] for name in runs if results[name].metrics), None)):
            raise UserError(f"No point has {metric!r}; give --metric one of {', '.join(scored.metrics)}.")
        kept = best[: 1 if last else max(1, math.ceil(round(keep * len(best), 6)))]
        going = [point for point in going if results[point.name] in kept]
        ran |= {run.name for run in runs.values()}
        if delete_weights:
            for name in ran - {result.point.name for result in kept}:
                for subject in subjects:
                    forget_weights(workdir / name / subject.name)
    return [results[point.name] for point in points]


def own_subject(images: Sequence[str], class_noun: str | None, config: ConfigDict) -> BenchmarkSubject:
    """The user's photos as the only subject.

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


def record(config: ConfigDict, subjects: Sequence[BenchmarkSubject], workdir: Path) -> None:
    """Keep what all points have in common, or compare it with what the folder was begun with.

    Raises:
        UserError: the folder belongs to a sweep of another configuration, or of other subjects.
    """
    common = changed(config).unlock()
    common.photos = {s.name: [hashlib.sha256(photo.tobytes()).hexdigest() for photo in s.photos] for s in subjects}
    manifest.record_config(common.lock(), workdir, may_change=["subject.registry"])


def check_rungs(given: Sequence[str], keep: float, points: Sequence[Point]) -> list[int]:
    """The numbers of steps of `--rungs`.

    Raises:
        UserError: they do not increase, or training cannot be prolonged from one to the next.
    """
    if not 0 < keep <= 1:
        raise UserError(f"--keep is {keep:g}; give a share of the points, above 0 and up to 1.")
    if not given:
        return []
    if not all(rung.strip().isdecimal() for rung in given):
        raise UserError(f"--rungs is {','.join(given)}; give numbers of steps, such as 100,200,400.")
    rungs = [int(rung) for rung in given]
    if rungs != sorted(set(rungs)) or rungs[0] == 0:
        raise UserError(f"--rungs is {','.join(given)}; give numbers of steps that increase, such as 100,200,400.")
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
    """Refuse a metric that the evaluation will not give, or of which neither way is better.

    Raises:
        UserError: there is no such metric.
    """
    measured = metric_registry.metrics_for(encoder_names(config.evaluation))
    known = [of_all.name for of_all in measured if of_all.better is not None]
    if metric not in known:
        raise UserError(f"--metric is {metric!r}; give one of {', '.join(known)}.")


def read_resources(given: Sequence[str]) -> dict[str, float]:
    """Amounts by name, from such as ["CPU=4", "TPU=8"].

    Raises:
        UserError: an entry is of another form.
    """
    resources = {}
    for entry in given:
        name, _, amount = entry.partition("=")
        if not name.strip() or not re.fullmatch(r"\d+(\.\d+)?", amount.strip()):
            raise UserError(f"--resources has {entry!r}; give names with amounts, such as CPU=4,TPU=8.")
        resources[name.strip()] = float(amount)
    return resources


def _outcomes(
    jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], engine: Local | Ray, workdir: Path, description: str
) -> dict[str, Outcome]:
    """By name of the run; those that were scored before are read, the rest goes to the engine."""
    scored = {job.point.name: read_job(job, subjects, workdir) for job in jobs}
    found: dict[str, Outcome] = {name: rows for name, rows in scored.items() if rows is not None}
    missing = [job for job in jobs if job.point.name not in found]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=description, unit="point") as bar:
        for job, outcome in engine.run(missing, subjects, workdir):
            found[job.point.name] = outcome
            bar.update()
    return found


def _result(point: Point, outcome: Outcome, last: bool) -> Result:
    if isinstance(outcome, Exception):
        kind = "" if isinstance(outcome, UserError) else f"{type(outcome).__name__}: "
        return Result(point, {}, f"failed: {kind}{str(outcome).partition(chr(10))[0]}")
    return Result(point, estimates(summary(outcome)), DONE if last else STOPPED)


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "sweep", "workdir"))

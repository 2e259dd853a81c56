"""How the points of a sweep are run: one after the other in this process, or on the nodes of a Ray cluster.

A run that was scored is only read, and one that was interrupted goes on from its checkpoints. Whoever runs a point
locks its folder meanwhile (flock, which the kernel gives up for a process that dies): neither two commands on one
folder nor a task that Ray has started again run a point at once. Across machines this takes a file system that locks
across them, such as NFS.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.study import Arm, Study, scored_run
from launch.sweep_points import Point
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation.scoring import find_encoders, load_encoders, read_rows
from personalize_jax.method import configuration
from personalize_jax.method.personalization import load_pretrained
from personalize_jax.metrics.metric import MetricEncoders
from personalize_jax.metrics.table import Row
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.program import mesh_of
from personalize_jax.training.tracking import NO_DESTINATIONS, Destinations

logger = logging.getLogger(__name__)


_ONE_PICTURE = {"batch_size": 1, "microbatches": 1}


class Job(NamedTuple):
    """A point to be run.

    Attributes:
        point: what to run.
        goes_on_from: name of the run whose training it continues, if any.
    """

    point: Point
    goes_on_from: str | None


Outcome = list[Row] | Exception  # of a job: its rows, or why there are none


class BusyError(Exception):
    """Somebody else is running the point."""


def check_points(points: Sequence[Point], destinations: Destinations) -> None:
    """Refuse points whose runs would fail later on.

    Raises:
        UserError: a configuration that cannot be used, or models or destinations that are not there.
    """
    destinations.of(Path())
    for point in points:
        try:
            pretrained, _ = _models(_asked(point.config))
            configuration.check(pretrained, point.config)
        except UserError as error:
            raise UserError(f"The point {point.name} cannot be run: {error}") from error


def read_job(job: Job, subjects: Sequence[BenchmarkSubject], workdir: Path) -> list[Row] | None:
    """The rows of a job, or None if not all of its subjects have been scored."""
    files = [_rows_file(workdir / job.point.name / subject.name) for subject in subjects]
    return [row for file in files for row in read_rows(file)] if all(file.exists() for file in files) else None


def run_job(
    job: Job, subjects: Sequence[BenchmarkSubject], workdir: Path, destinations: Destinations, wait: bool = True
) -> list[Row]:
    """Personalise and score what was not scored before, subject after subject.

    Args:
        job: what to run.
        subjects: to personalise; each has a run directory, `workdir/<point>/<subject>`.
        workdir: of the sweep.
        destinations: where the numbers and pictures of runs go besides.
        wait: whether to wait where somebody else is running the point.

    Returns:
        The rows of all subjects.

    Raises:
        BusyError: somebody else is running the point, and we do not wait.
        UserError: the run fails.
    """
    point = job.point
    study = Study("sweep", [Arm(point.name, point.config, goes_on_from=job.goes_on_from)], [], {}, len(subjects))
    with _claimed(workdir / point.name, wait):
        for subject in subjects:
            folder = workdir / point.name / subject.name
            if not _rows_file(folder).exists():
                pretrained, encoders = _models(_asked(point.config))
                scored_run(study, study.arms[0], subject, (), pretrained, encoders, workdir, destinations)
        rows = read_job(job, subjects, workdir)
        assert rows is not None  # all of them have been written
        return rows


class Local:
    """Runs points one after the other in this process; several such commands share the points of one folder."""

    def __init__(self, destinations: Destinations = NO_DESTINATIONS) -> None:
        """With where the numbers and pictures of runs go besides."""
        self._destinations = destinations

    def check(self, points: Sequence[Point]) -> None:
        """See `check_points`."""
        check_points(points, self._destinations)

    def run(
        self, jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], workdir: Path
    ) -> Iterator[tuple[Job, Outcome]]:
        """Yield every job as it ends; those that another command is running come last."""
        busy = []
        for job in jobs:
            outcome = _outcome(run_job, job, subjects, workdir, self._destinations, wait=False)
            if isinstance(outcome, BusyError):
                busy.append(job)
            else:
                yield job, outcome
        for job in busy:
            yield job, _outcome(run_job, job, subjects, workdir, self._destinations)


class Ray:
    """Runs points on a Ray cluster, each in a process of its own.

    Nodes have this checkout, its environment and the sweep's folder under the same paths as here.
    """

    def __init__(
        self,
        address: str,
        resources: Mapping[str, float],
        max_retries: int,
        destinations: Destinations = NO_DESTINATIONS,
    ) -> None:
        """Connect.

        Args:
            address: of the cluster; "auto" for that of this machine, "local" to start one on this machine.
            resources: what a point takes of one node: {"CPU": 4}, {"GPU": 1}, {"TPU": 8}.
            max_retries: how often a point is started again after its node or process has died.
            destinations: where the numbers and pictures of runs go besides.

        Raises:
            UserError: Ray is not installed, or there is no such cluster.
        """
        try:
            import ray
            from ray._private import services  # the only way to what "auto" is without waiting for it
        except ImportError as error:
            raise UserError("Ray is not installed; pip install -r launch/requirements.txt, on every node.") from error
        jax.config.update("jax_platforms", "cpu")  # this process only looks on: accelerators are for the points
        try:
            found = services.get_ray_address_from_environment(address, None) if address == "auto" else address
            _check_answers(found)  # also where a cluster that was killed has left its address behind
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            raise UserError(
                f"No Ray cluster at {address!r} ({_one_line(error)}); start one by ray start --head, "
                "or give --ray_address=local."
            ) from error
        if not any(node["Alive"] and _offers(node["Resources"], resources) for node in ray.nodes()):
            logger.warning("No node has %s now; points wait for one that has.", dict(resources))
        further = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        self._ray, self._destinations = ray, destinations
        self._task = ray.remote(
            num_cpus=resources.get("CPU", 1),
            num_gpus=resources.get("GPU", 0),
            resources=further,
            max_calls=1,  # a process ends with its point, and gives accelerators and memory back
            max_retries=max_retries,
        )(_in_worker)

    def check(self, points: Sequence[Point]) -> None:
        """See `check_points`; on a node, where the models are read anyway."""
        outcome = self._outcome(self._task.remote(os.getcwd(), check_points, points, self._destinations))
        if isinstance(outcome, Exception):
            raise outcome

    def run(
        self, jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], workdir: Path
    ) -> Iterator[tuple[Job, Outcome]]:
        """Yield every job as it ends."""
        shared = self._ray.put(subjects)
        further = workdir, self._destinations
        pending = {self._task.remote(os.getcwd(), run_job, job, shared, *further): job for job in jobs}
        while pending:
            (reference, *_), _ = self._ray.wait(list(pending))
            yield pending.pop(reference), self._outcome(reference)

    def _outcome(self, reference: Any) -> Any:
        outcome = _outcome(self._ray.get, reference)
        return outcome.cause if isinstance(outcome, self._ray.exceptions.RayTaskError) else outcome


def _in_worker(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    os.chdir(folder)  # configurations name files relative to where the command was given
    command.set_up()
    return function(*arguments)


def _outcome(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function gives, or the error that it ends with: a point that fails must not stop the others."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        if not isinstance(error, UserError | BusyError):
            logger.warning("A point has failed.", exc_info=True)
        return error


@contextlib.contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[None]:
    """Keep everybody else from running a point."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:  # closing the file releases the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(folder) from error
        yield


def _rows_file(folder: Path) -> Path:
    return folder / "evaluation" / "rows.jsonl"


def _asked(config: ConfigDict) -> str:
    """Which models a configuration names, and where their parameters go."""
    lying, sections = {}, configuration.training_sections(config)
    for name, training in configuration.stage_trainings(config).items():
        sizes = tuple(mesh_of(training).shape.values())  # which depend on the batch's, that sweeps may vary
        lying[sections[name]] = {
            "mesh": sizes,
            "sharding": training.sharding,
            **_ONE_PICTURE,
        }
    named = {"pretrained": config.pretrained, **lying} | ({"compute": config.compute} if "compute" in config else {})
    return ConfigDict({**named, "evaluation": config.evaluation}).to_json(sort_keys=True)


@functools.lru_cache(maxsize=1)  # hardly any sweep varies them
def _models(asked: str) -> tuple[Pipeline, MetricEncoders]:
    config = ConfigDict(json.loads(asked))
    return load_pretrained(config), load_encoders(find_encoders(config.evaluation))


def _offers(node: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in resources.items())


def _check_answers(address: str) -> None:
    """Raises OSError unless somebody answers at "host:port", whom Ray itself would wait for for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

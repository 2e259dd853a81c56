"""The engines that run the points of a sweep, one after the other in this process or on the nodes of a Ray cluster.

A run that was scored is only read, and one that was interrupted continues from its checkpoints. A process locks the
folder of the point that it runs (by flock, which the kernel releases when the process dies), so that neither two
commands on one folder nor a task that Ray has restarted run a point twice at a time. Across machines this needs a file
system that locks across them, such as NFS.
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
from typing import Any, NamedTuple, Protocol

import jax
from ml_collections import ConfigDict

from experiments.study import Arm, Study, scored_run
from launch.sweep_points import Point
from personalize_jax.benchmark.subjects import BenchmarkSubject
from personalize_jax.evaluation.protocol import read_scored
from personalize_jax.evaluation.scoring import find_encoders, load_encoders
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

_ONE_PICTURE = {"batch_size": 1, "microbatches": 1}  # with these `mesh_of` accepts any mesh


class Job(NamedTuple):
    """A point to be run.

    Attributes:
        point: the point.
        continues: name of the run whose training it continues; or None.
    """

    point: Point
    continues: str | None


Outcome = list[Row] | Exception  # a job's rows, or the error that it ended with


class BusyError(Exception):
    """Another process is running the point."""


class Engine(Protocol):
    """Runs the points of a sweep."""

    def check(self, points: Sequence[Point]) -> None:
        """See `check_points`."""

    def run(
        self, jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], workdir: Path
    ) -> Iterator[tuple[Job, Outcome]]:
        """Run jobs, see `run_job`, and yield each of them as it ends."""


def check_points(points: Sequence[Point], destinations: Destinations) -> None:
    """Refuse points whose runs would fail later.

    Raises:
        UserError: a configuration cannot be used, or models or destinations are missing.
    """
    destinations.tracking(Path())
    for point in points:
        try:
            pretrained, _ = _load_models(_models_key(point.config))
            configuration.check(pretrained, point.config)
        except UserError as error:
            raise UserError(f"The point {point.name} cannot be run: {error}") from error


def read_job(job: Job, subjects: Sequence[BenchmarkSubject], workdir: Path) -> list[Row] | None:
    """The rows of a job, or None if not all of its subjects have been scored."""
    rows: list[Row] = []
    for subject in subjects:
        scored = read_scored(_evaluation_folder(job, subject, workdir), job.point.config.evaluation)
        if scored is None:
            return None
        rows += scored
    return rows


def run_job(
    job: Job, subjects: Sequence[BenchmarkSubject], workdir: Path, destinations: Destinations, wait: bool = True
) -> list[Row]:
    """Personalise and score subject after subject, except those that were scored before.

    Args:
        job: the job.
        subjects: subjects to personalise; each has a run directory, `workdir/<point>/<subject>`.
        workdir: folder of the sweep.
        destinations: additional destinations of the runs' numbers and pictures.
        wait: whether to wait while another process is running the point.

    Returns:
        The rows of all subjects.

    Raises:
        BusyError: another process is running the point, and `wait` is False.
        UserError: the run fails.
    """
    point = job.point
    study = Study("sweep", [Arm(point.name, point.config, continues=job.continues)], [], {}, len(subjects))
    with _locked(workdir / point.name, wait):
        for subject in subjects:
            if read_scored(_evaluation_folder(job, subject, workdir), point.config.evaluation) is None:
                pretrained, encoders = _load_models(_models_key(point.config))
                scored_run(study, study.arms[0], subject, (), pretrained, encoders, workdir, destinations)
        rows = read_job(job, subjects, workdir)
        assert rows is not None  # all of them have been written
        return rows


class LocalEngine:
    """Runs points one after the other in this process; several such commands share the points of one folder."""

    def __init__(self, destinations: Destinations = NO_DESTINATIONS) -> None:
        """An engine whose runs have additional destinations of numbers and pictures."""
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


class RayEngine:
    """Runs points on a Ray cluster, each in its own process.

    Nodes have this checkout, its environment and the sweep's folder under the same paths as this machine.
    """

    def __init__(
        self,
        address: str,
        resources: Mapping[str, float],
        max_retries: int,
        destinations: Destinations = NO_DESTINATIONS,
    ) -> None:
        """Connect to a cluster.

        Args:
            address: address of the cluster; "auto" for that of this machine, "local" to start one on this machine.
            resources: resources of one node that a point takes: {"CPU": 4}, {"GPU": 1}, {"TPU": 8}.
            max_retries: how often a point is restarted after its node or process has died.
            destinations: additional destinations of the runs' numbers and pictures.

        Raises:
            UserError: Ray is not installed, or there is no such cluster.
        """
        try:
            import ray
            from ray._private import services  # the only way to resolve "auto" without waiting for the cluster
        except ImportError as error:
            raise UserError("Ray is not installed; pip install -r launch/requirements.txt, on every node.") from error
        jax.config.update("jax_platforms", "cpu")  # this process computes nothing: accelerators are for the points
        try:
            resolved = services.get_ray_address_from_environment(address, None) if address == "auto" else address
            _check_reachable(resolved)  # a cluster that was killed leaves its address behind
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            raise UserError(
                f"No Ray cluster at {address!r} ({_one_line(error)}); start one by ray start --head, "
                "or give --ray_address=local."
            ) from error
        if not any(node["Alive"] and _has(node["Resources"], resources) for node in ray.nodes()):
            logger.warning("No node has %s now; points wait for one that has.", dict(resources))
        self._ray, self._destinations = ray, destinations
        self._task = ray.remote(
            num_cpus=resources.get("CPU", 1),
            num_gpus=resources.get("GPU", 0),
            resources={name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")},
            max_calls=1,  # the process ends with its point, which releases accelerators and memory
            max_retries=max_retries,
        )(_in_worker)

    def check(self, points: Sequence[Point]) -> None:
        """See `check_points`; on a node, because this process reads no models."""
        outcome = self._outcome(self._task.remote(os.getcwd(), check_points, points, self._destinations))
        if isinstance(outcome, Exception):
            raise outcome

    def run(
        self, jobs: Sequence[Job], subjects: Sequence[BenchmarkSubject], workdir: Path
    ) -> Iterator[tuple[Job, Outcome]]:
        """Yield every job as it ends."""
        shared = self._ray.put(subjects)
        pending = {
            self._task.remote(os.getcwd(), run_job, job, shared, workdir, self._destinations): job for job in jobs
        }
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
    """The result of a function, or the exception that it raises: a point that fails must not stop the others."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        if not isinstance(error, UserError | BusyError):
            logger.warning("A point has failed.", exc_info=True)
        return error


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other processes from running a point."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:  # closing the file releases the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(folder) from error
        yield


def _evaluation_folder(job: Job, subject: BenchmarkSubject, workdir: Path) -> Path:
    return workdir / job.point.name / subject.name / "evaluation"


def _models_key(config: ConfigDict) -> str:
    """The part of a configuration that determines the pretrained models and the placement of their parameters."""
    placement, sections = {}, configuration.training_sections(config)
    for name, training in configuration.stage_trainings(config).items():
        sizes = tuple(mesh_of(training).shape.values())  # they depend on the batch size, which sweeps may vary
        placement[sections[name]] = {"mesh": sizes, "sharding": training.sharding, **_ONE_PICTURE}
    compute = {"compute": config.compute} if "compute" in config else {}
    key = {"pretrained": config.pretrained, **placement, **compute, "evaluation": config.evaluation}
    return ConfigDict(key).to_json(sort_keys=True)


@functools.lru_cache(maxsize=1)  # hardly any sweep varies the models
def _load_models(key: str) -> tuple[Pipeline, MetricEncoders]:
    config = ConfigDict(json.loads(key))
    return load_pretrained(config), load_encoders(find_encoders(config.evaluation))


def _has(node: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in resources.items())


def _check_reachable(address: str) -> None:
    """Raise OSError unless "host:port" accepts a connection; Ray itself would wait for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

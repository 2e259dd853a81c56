"""Several processes of one program, usually one on each host of a TPU slice.

All of them run the same command on the same input: they compute together, each on its own devices, and must call this
module's functions in the same order. Their files lie on a file system that all of them see.
"""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import reason
from personalize_jax.runtime.interruption import Stopped

_OUTCOME_BYTES = 4096
# The kinds of errors that work may raise, the worst last. An error's severity is its position, from 1; 0 is success.
_ERRORS: tuple[type[Exception], ...] = (Stopped, UserError, Exception)
_FAILED = len(_ERRORS)
_SHUTDOWN_SECONDS = 60  # how long a process that has failed waits for the others before it ends them


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Make this process one of several, before anything is computed.

    Args:
        coordinator: host and port of process 0; None where the environment names it, as TPU VMs and Slurm do.
        num_processes: number of processes of the program; None likewise.
        process_id: number of this process, from 0; None likewise.

    Raises:
        UserError: the processes do not find each other.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"The processes of this program do not find each other ({str(error).splitlines()[0]}); leave out "
            "--multihost on a single host, or give --coordinator, --num_processes and --process_id."
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes the files that are written once."""
    return jax.process_index() == 0


def first_does(work: Callable[[], object]) -> None:
    """Do some work in process 0 while the others wait.

    Raises:
        Exception: see `each_does`.
    """
    each_does(work if is_first() else lambda: None)


def each_does(work: Callable[[], object]) -> None:
    """Do some work in every process independently, and continue once all processes have finished theirs.

    Unlike elsewhere, processes may ask `interruption.requested` differently often in it.

    Raises:
        UserError: the work raised one, or an OSError, in some process; it is raised in all of them.
        Stopped: likewise.
        Exception: the work raised another error, which is raised in that process; in the others, one that names it.
    """
    if jax.process_count() == 1:
        work()
        return
    raised: Exception | None = None
    try:
        work()
    except OSError as error:
        raised = UserError(reason(error))
    except Exception as error:
        raised = error
    severity = next((i for i, kind in enumerate(_ERRORS, start=1) if isinstance(raised, kind)), 0)
    sentence = "" if raised is None else str(raised)
    if severity == _FAILED:
        sentence = f"Process {jax.process_index()} has failed ({type(raised).__name__}: {sentence})."
    outcomes = _gather_outcomes(severity, sentence)
    interruption.set_count(max(count for _, count, _ in outcomes))
    worst, _, sentence = max(outcomes, key=lambda outcome: outcome[0])
    if raised is not None and worst == severity:
        raise raised
    if worst > 0:
        raise _ERRORS[worst - 1](sentence)


def _gather_outcomes(severity: int, sentence: str) -> list[tuple[int, int, str]]:
    """The severity, the `interruption.count`, and the message of every process; long messages are cut off."""
    encoded = f"{severity} {interruption.count()} {sentence}".encode(errors="replace")[:_OUTCOME_BYTES]
    gathered = multihost_utils.process_allgather(np.frombuffer(encoded.ljust(_OUTCOME_BYTES, b"\0"), np.uint8))
    fields = [row.tobytes().rstrip(b"\0").decode(errors="ignore").split(" ", 2) for row in gathered]
    return [(int(severity), int(count), sentence) for severity, count, sentence in fields]


def wait() -> None:
    """Wait until every process has called this."""
    each_does(lambda: None)


def true_in_all(facts: Sequence[bool]) -> list[bool]:
    """For each fact, whether it is true in every process; all give lists of the same length."""
    if jax.process_count() == 1 or not len(facts):
        return list(facts)
    return multihost_utils.process_allgather(np.array(facts, bool)).all(0).tolist()


def of_first(number: int) -> int:
    """The number that process 0 has, in every process; of at most 31 bits."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.array(number, np.int32)))


def to_numpy(array: Any) -> np.ndarray:
    """An array gathered on this host, wherever its parts lie."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def gather_on_first(tree: Any) -> Any:
    """Gather arrays on the host of process 0, wherever their parts lie; leaves are None in the other processes.

    Other hosts hold one whole array at a time.

    Args:
        tree: pytree of arrays.
    """

    def gather(array: Any) -> np.ndarray | None:
        array = to_numpy(array)
        return array if is_first() else None

    return jax.tree.map(gather, tree)


def device_put(tree: Any, sharding: Sharding | None) -> Any:
    """`jax.device_put` of arrays of which every process has the same copy, or its own part.

    JAX itself would first compare the copies by sending them over the network.

    Args:
        tree: pytree of arrays.
        sharding: the sharding of all of them; None for the default device.
    """

    def place(value: Any) -> Array:
        spread = isinstance(value, Array) and not value.is_fully_addressable
        if spread or sharding is None or sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(value)))
        copy = np.asarray(value)
        return jax.make_array_from_callback(copy.shape, sharding, copy.__getitem__)

    return jax.tree.map(place, tree)


def check_shared(folder: Path) -> None:
    """Refuse a folder that is not the same on all hosts.

    Args:
        folder: the folder, made if missing.

    Raises:
        UserError: some process does not see a file that process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    file = folder / f".seen_by_all_{of_first(secrets.randbits(31))}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()

    first_does(write)
    (seen,) = true_in_all([file.exists()])
    first_does(lambda: file.unlink(missing_ok=True))
    if not seen:
        raise UserError(
            f"{folder} is not the same folder on all {jax.process_count()} hosts; give one on a file system "
            "that they share, such as a mounted bucket."
        )

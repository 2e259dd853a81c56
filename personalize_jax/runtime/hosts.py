"""Several processes of one program, one on each host of a TPU slice as a rule.

All of them run the same command on the same input: they compute together, each on its own devices, and must come by
every call of this module's functions in the same order. Their files lie where all of them see them.
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
# With which a share of work may end, the worst last. Its severity is its place here, from 1; 0 is none.
_ERRORS: tuple[type[Exception], ...] = (Stopped, UserError, Exception)
_FAILED = len(_ERRORS)
_SHUTDOWN_SECONDS = 60  # that a process which has failed waits for the others, before it ends them


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Make this process one of several, before anything is computed.

    Args:
        coordinator: host and port on which process 0 is found; None where the machines tell, as TPU VMs and Slurm do.
        num_processes: of the program; None likewise.
        process_id: of this process, from 0; None likewise.

    Raises:
        UserError: they do not find each other.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"The processes of this program do not find each other ({str(error).splitlines()[0]}); leave out "
            "--multihost on a single host, or give --coordinator, --num_processes and --process_id."
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def first_does(work: Callable[[], object]) -> None:
    """Have process 0 do something while the others wait.

    Raises:
        Exception: as `each_does`.
    """
    each_does(work if is_first() else lambda: None)


def each_does(work: Callable[[], object]) -> None:
    """Have every process do its share, in which the others take no part, and go on once all have done theirs.

    A share may ask whether to stop, in one process more often than in another.

    Raises:
        UserError: what it raises in one of them, and what keeps one from writing a file, in every process.
        Stopped: likewise.
        Exception: what else it raises, in that process; in the others, one that tells of it.
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
    outcomes = [_read_outcome(written) for written in multihost_utils.process_allgather(_written_outcome(raised))]
    interruption.count_on_from(max(count for _, count, _ in outcomes))
    worst, _, sentence = max(outcomes, key=lambda outcome: outcome[0])
    if raised is not None and worst == _severity(raised):
        raise raised
    if worst > 0:
        raise _ERRORS[worst - 1](sentence)


def _severity(raised: Exception | None) -> int:
    """The severity of what a share of work has raised."""
    if raised is None:
        return 0
    return next(i for i, kind in enumerate(_ERRORS, start=1) if isinstance(raised, kind))


def _written_outcome(raised: Exception | None) -> np.ndarray:
    """What has come of this process's share, in so many bytes, whatever it is: severity, times asked, sentence."""
    severity = _severity(raised)
    sentence = "" if raised is None else str(raised)
    if severity == _FAILED:
        sentence = f"Process {jax.process_index()} has failed ({type(raised).__name__}: {sentence})."
    written = f"{severity} {interruption.count()} {sentence}".encode(errors="replace")[:_OUTCOME_BYTES]
    return np.frombuffer(written.ljust(_OUTCOME_BYTES, b"\0"), np.uint8)


def _read_outcome(written: np.ndarray) -> tuple[int, int, str]:
    severity, count, sentence = written.tobytes().rstrip(b"\0").decode(errors="ignore").split(" ", 2)
    return int(severity), int(count), sentence


def wait() -> None:
    """Go on once every process has come here."""
    each_does(lambda: None)


def true_in_all(facts: Sequence[bool]) -> list[bool]:
    """Which facts hold in every process; of one length everywhere."""
    if jax.process_count() == 1 or not len(facts):
        return list(facts)
    return multihost_utils.process_allgather(np.array(facts, bool)).all(0).tolist()


def to_numpy(array: Any) -> np.ndarray:
    """An array on this host, wherever its parts lie."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def gather_on_first(tree: Any) -> Any:
    """Arrays on the host of process 0, wherever their parts lie; None in the other processes.

    An array at a time is whole on every host, and no longer than it takes.

    Args:
        tree: pytree of arrays.
    """

    def gather(array: Any) -> np.ndarray | None:
        array = to_numpy(array)
        return array if is_first() else None

    return jax.tree.map(gather, tree)


def device_put(tree: Any, sharding: Sharding | None) -> Any:
    """`jax.device_put` of arrays of which every process has the same copy, or its part.

    JAX itself would first compare the copies, sending all of them over the network.

    Args:
        tree: pytree of arrays.
        sharding: of all of them; None for the default device.
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
    """Refuse a folder that each host has for itself.

    Args:
        folder: made if missing.

    Raises:
        UserError: what process 0 writes there is not seen by all.
    """
    if jax.process_count() == 1:
        return
    word = multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31), np.int32))
    file = folder / f".seen_by_all_{int(word)}"

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

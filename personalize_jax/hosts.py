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

from personalize_jax.errors import UserError
from personalize_jax.files import reason

_SENTENCE_BYTES = 4096
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
        UserError: what it raises there, and what keeps it from writing a file, in every process.
    """
    each_does(work if is_first() else lambda: None)


def each_does(work: Callable[[], object]) -> None:
    """Have every process do its share, in which the others take no part, and go on once all have done theirs.

    Raises:
        UserError: what it raises in one of them, and what keeps one from writing a file, in every process.
    """
    if jax.process_count() == 1:
        work()
        return
    sentence = ""
    try:
        work()
    except UserError as error:
        sentence = str(error)
    except OSError as error:
        sentence = reason(error)
    padded = np.zeros(_SENTENCE_BYTES, np.uint8)
    encoded = np.frombuffer(sentence.encode()[:_SENTENCE_BYTES], np.uint8)
    padded[: len(encoded)] = encoded
    for of_one in multihost_utils.process_allgather(padded):
        if told := of_one.tobytes().rstrip(b"\0"):
            raise UserError(told.decode(errors="ignore"))


def wait() -> None:
    """Go on once every process has come here."""
    each_does(lambda: None)


def in_all(facts: Sequence[bool]) -> list[bool]:
    """Which facts hold in every process; of one length everywhere."""
    if jax.process_count() == 1 or not len(facts):
        return list(facts)
    return multihost_utils.process_allgather(np.array(facts, bool)).all(0).tolist()


def whole(array: Any) -> np.ndarray:
    """An array on this host, wherever its parts lie."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def put(tree: Any, sharding: Sharding | None) -> Any:
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
    (seen,) = in_all([file.exists()])
    first_does(lambda: file.unlink(missing_ok=True))
    if not seen:
        raise UserError(
            f"{folder} is not the same folder on all {jax.process_count()} hosts; give a --workdir on a file system "
            "that they share, such as a mounted bucket."
        )

"""Checkpoints of the train state, written by orbax."""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import FULL

logger = logging.getLogger(__name__)

# What lies whole on several devices is written in parts, one by each: of small arrays, slicing takes longer to compile
# than it saves.
_TYPES = ocp.type_handlers.create_type_handler_registry(
    (int, ocp.type_handlers.ScalarHandler()),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
)

_DAMAGED = "damaged-"  # before the step in the name of a checkpoint that was set aside

# With which damage shows; and the statuses of tensorstore's by which the storage is to blame.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError)
_PASSING = (
    *("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)


class Checkpoints:
    """The last few train states of one stage, in one directory.

    A checkpoint appears under its final name only when it is complete. One that is damaged is set aside under another
    name: left in place it would keep its step, and every step before it, from being saved again.
    """

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False) -> None:
        """Name a directory, which is made when it is first read or written.

        Args:
            directory: of the checkpoints.
            keep: how many of the latest stay; two, so that one survives if the other is damaged.
            read_only: another process may be writing here; otherwise, what killed ones left unfinished is deleted.
        """
        self.directory = directory.absolute()
        self._keep = keep
        self._read_only = read_only

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Not orbax's own read_only, which warns of itself.
        writable = not self._read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=writable,
            cleanup_tmp_directories=writable,
            lightweight_initialize=True,  # without when and how each was made: that may be damaged, and none is needed
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_TYPES)  # also tells what a checkpoint holds
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def steps(self) -> list[int]:
        """The steps after which there is a checkpoint, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(folder.name) for folder in self.directory.iterdir() if folder.name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Write in the background, once the numbers are on this host; the state may be donated as soon as this returns.

        What is waited for takes a second or two for each gigabyte: the checksum is taken of every byte, too.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        with self._writing():
            args = ocp.args.PyTreeSave(state)
            self._manager.save(step, args=args, custom_metadata=_checksums(state))

    def restore(self, abstract_state: Any | None, defaults: Mapping[str, Any] | None = None) -> Any | None:
        """The latest state that can be read, or None without any.

        A damaged checkpoint is passed over with a warning, and set aside once an older one has been read.

        Args:
            abstract_state: shapes, dtypes and shardings of the state; None for a nested dict as it was saved.
            defaults: fields of the state, a named tuple, that a checkpoint of an earlier version may lack, and what
                they are then.

        Raises:
            UserError: there are checkpoints, and all are damaged.
            OSError: one cannot be read now, though it may be sound; everything is left as it is.
        """
        steps = self.steps()[::-1]
        for i, step in enumerate(steps):
            state, reason = None, "another process cannot"

            def read(step: int = step) -> None:
                nonlocal state, reason
                try:
                    state = self._read(step, abstract_state, defaults or {})
                except Exception as error:
                    reason = self._damage(step, error)

            hosts.each_does(read)
            if hosts.true_in_all([state is not None]) == [False]:
                logger.warning(
                    "Checkpoint %d in %s cannot be read (%s); trying the one before.", step, self.directory, reason
                )
            else:
                if i > 0 and not self._read_only:
                    self._set_aside(steps[:i])
                return state
        if steps:
            raise UserError(
                f"None of the checkpoints {steps} in {self.directory} can be read; "
                "delete that folder to start this phase anew."
            )
        return None

    def _read(self, step: int, abstract_state: Any | None, defaults: Mapping[str, Any]) -> Any:
        if lacking := self._lacking(step, defaults):
            fields = {name: value for name, value in abstract_state._asdict().items() if name not in lacking}
            return type(abstract_state)(**self._read(step, fields, {}), **lacking)
        if abstract_state is None:  # on this host, whatever devices it was saved from
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract_state = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), self._manager.item_metadata(step).tree
            )
        placed = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract_state, restore_args=placed))
        _check_numbers(state, self._known_checksums(step))
        return state

    def _lacking(self, step: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the defaults that a checkpoint of an earlier version lacks; of a damaged one, none."""
        try:
            saved = self._manager.item_metadata(step).tree if defaults else {}
            return {name: value for name, value in defaults.items() if name not in saved}
        except _DAMAGE:
            return {}

    def _damage(self, step: int, error: Exception) -> str:
        """What is wrong with a checkpoint that could not be read; if that was not why, the error is raised instead."""
        if (of_system := _system_error(error, self.directory / str(step))) is not None:
            raise of_system from error
        if not isinstance(_first_cause(error), _DAMAGE):
            raise error
        return _reason(_first_cause(error))

    def _known_checksums(self, step: int) -> dict[str, Any]:
        file = self.directory / str(step) / "_CHECKPOINT_METADATA"
        try:
            return {"checksum": None, "checksums": None} | json.loads(file.read_text())["custom_metadata"]
        except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s): the checkpoint is taken without its checksum.", file, _reason(error))
            return {"checksum": None, "checksums": None}

    def _set_aside(self, damaged: list[int]) -> None:
        """Rename damaged checkpoints; the latest stays under that name, for whoever wants to see to it."""

        def rename() -> None:
            for step in sorted(damaged):
                for before in self.directory.glob(f"{_DAMAGED}*"):
                    shutil.rmtree(before)
                (self.directory / str(step)).rename(self.directory / f"{_DAMAGED}{step}")

        hosts.first_does(rename)
        self._manager.reload()

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            UserError: it cannot be written.
        """
        if "_manager" not in vars(self):  # never needed
            return
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as many kinds as for reading
            raise UserError(
                f"A checkpoint cannot be written to {self.directory} ({_reason(error)}); "
                "check free space and permissions, and start again."
            ) from error


def checksum(state: Any) -> int | None:
    """A number that damage to a state changes, as orbax's files have none of their own for the numbers in arrays.

    It depends on neither the devices that the arrays lie on nor the kinds of containers that hold them. None where
    other processes hold a part of them.
    """
    arrays = _by_name(state)
    if not all(a.is_fully_addressable for a in arrays.values() if isinstance(a, jax.Array)):
        return None
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(_bytes_of(arrays[name]), zlib.crc32(name.encode(), crc))
    return crc


def checksum_of_parts(state: Any) -> tuple[int, int]:
    """The same for those parts of a state that this process holds, after a number that says which parts those are."""
    place, crc = 0, 0
    for name, array in sorted(_by_name(state).items()):
        shards = array.addressable_shards if isinstance(array, jax.Array) else []
        parts = {str(shard.index): shard.data for shard in shards}  # what is on several devices counts once
        for index in sorted(parts):
            place = zlib.crc32(f"{name} {index}".encode(), place)
            crc = zlib.crc32(_bytes_of(parts[index]), crc)
    return place, crc


def _checksums(state: Any) -> dict[str, Any]:
    """What is kept with a checkpoint: its checksum, or of several processes that of each one's parts."""
    if jax.process_count() == 1:
        return {"checksum": checksum(state)}
    of_all = multihost_utils.process_allgather(np.array(checksum_of_parts(state), np.uint32))
    return {"checksums": of_all.tolist()}


def _check_numbers(state: Any, known: dict[str, Any]) -> None:
    """Compare a state with what was kept with its checkpoint, if the same parts of it are on this host again.

    Raises:
        ValueError: it is another.
    """
    if known["checksum"] is not None and (found := checksum(state)) not in (None, known["checksum"]):
        raise ValueError(f"its checksum is {found} in place of {known['checksum']}")
    if known["checksums"] is not None and len(known["checksums"]) == jax.process_count():
        (place, found), (known_place, expected) = checksum_of_parts(state), known["checksums"][jax.process_index()]
        if place == known_place and found != expected:
            raise ValueError(f"the checksum of its parts on this host is {found} in place of {expected}")


def _by_name(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _bytes_of(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _first_cause(error: Exception) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _system_error(error: Exception, folder: Path) -> OSError | None:
    """The error of the system or of the storage for which a checkpoint could not be read, if that was why.

    What tensorstore raises is a ValueError for all reasons, whose message begins with a status and holds the number of
    the system's error if there was one.

    Args:
        error: as it was raised.
        folder: of the checkpoint, to be named.
    """
    cause = _first_cause(error)
    number = cause.errno if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) else None
    if found := re.search(r"os_error_code='(\d+)'", str(cause)):
        number = int(found[1])
    if number is not None:
        return OSError(number, os.strerror(number), str(folder))
    if str(cause).startswith(_PASSING):
        return OSError(errno.EIO, _reason(cause), str(folder))
    return None


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    full = [reason for number in FULL if (reason := os.strerror(number)) in text]  # amid much else
    return full[0] if full else text.splitlines()[0][:200]

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
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import FULL

if TYPE_CHECKING:  # slow to import, and needed only where checkpoints are read or written
    import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

_DAMAGED = "damaged-"  # the prefix of a checkpoint that was set aside, before its step

# Errors that a damaged checkpoint raises, and tensorstore's statuses that blame the storage instead.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError)
_PASSING = (
    *("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)


class Checkpoints:
    """The last few train states of one stage, in one directory.

    A checkpoint appears under its final name only when it is complete. A damaged one is renamed: in its place it would
    prevent its own and every earlier step from being saved again.
    """

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        """Refer to a directory, which is made when it is first read or written.

        Args:
            directory: folder of the checkpoints.
            read_only: whether another process may be writing here; if not, unfinished checkpoints of killed processes
                are deleted.
        """
        self.directory = directory.absolute()
        self._read_only = read_only

    @functools.cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        # Orbax's own read_only logs warnings.
        writable = not self._read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,  # so that one survives if the other is damaged
            create=writable,
            cleanup_tmp_directories=writable,
            lightweight_initialize=True,  # without reading when each was made, which may be damaged and is not needed
        )
        # Replicated arrays are written in parts, one by each device, but for small ones: compiling the slices takes
        # longer than they save.
        type_handlers = ocp.type_handlers.create_type_handler_registry(
            (int, ocp.type_handlers.ScalarHandler()),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=type_handlers)  # reads metadata, too
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(folder.name) for folder in self.directory.iterdir() if folder.name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Write a state in the background; it may be donated as soon as this returns.

        The call takes a second or two for each gigabyte, which it copies to this host and sums up.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        import orbax.checkpoint as ocp

        with self._writing():
            args = ocp.args.PyTreeSave(state)
            self._manager.save(step, args=args, custom_metadata=_checksums(state))

    def restore(self, abstract_state: Any | None, defaults: Mapping[str, Any] | None = None) -> Any | None:
        """Read the latest state; None if there is no checkpoint.

        A damaged checkpoint is skipped with a warning, and renamed once an older one has been read.

        Args:
            abstract_state: shapes, dtypes and shardings of the state, a named tuple or a dict; None to read a nested
                dict as it was saved.
            defaults: values for the fields of a named tuple that a checkpoint of an earlier version lacks.

        Raises:
            UserError: there are checkpoints, and all are damaged.
            OSError: a checkpoint cannot be read now, though it may be sound; everything is left as it is.
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
        import orbax.checkpoint as ocp

        if abstract_state is not None and (missing := self._missing(step, defaults)):
            fields = {name: value for name, value in abstract_state._asdict().items() if name not in missing}
            return type(abstract_state)(**self._read(step, fields, {}), **missing)
        if abstract_state is None:  # in this host's memory, whatever devices it was saved from
            abstract_state = self._manager.item_metadata(step).tree
            placed = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract_state)
        else:
            placed = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract_state, restore_args=placed))
        _check_numbers(state, self._known_checksums(step))
        return state

    def _missing(self, step: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of the fields that a checkpoint of an earlier version lacks; none for a damaged one."""
        try:
            saved = self._manager.item_metadata(step).tree if defaults else {}
            return {name: value for name, value in defaults.items() if name not in saved}
        except _DAMAGE:
            return {}

    def _damage(self, step: int, error: Exception) -> str:
        """Say what is wrong with a checkpoint that could not be read; raise the error if it may be sound."""
        if (system_error := _system_error(error, self.directory / str(step))) is not None:
            raise system_error from error
        if not isinstance(_first_cause(error), _DAMAGE):
            raise error
        return _reason(_first_cause(error))

    def _known_checksums(self, step: int) -> dict[str, Any]:
        file = self.directory / str(step) / "_CHECKPOINT_METADATA"
        known: dict[str, Any] = {"checksum": None, "checksums": None}
        try:
            return known | json.loads(file.read_text())["custom_metadata"]
        except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s): the checkpoint is taken without its checksum.", file, _reason(error))
            return known

    def _set_aside(self, damaged: list[int]) -> None:
        """Rename damaged checkpoints; only the latest is kept under its new name, to be looked into."""

        def rename() -> None:
            for step in sorted(damaged):
                for before in self.directory.glob(f"{_DAMAGED}*"):
                    shutil.rmtree(before)
                (self.directory / str(step)).rename(self.directory / f"{_DAMAGED}{step}")

        hosts.first_does(rename)
        self._manager.reload()

    def close(self) -> None:
        """Wait until the last checkpoint is written.

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
    """The checksum of a state's arrays, as orbax's files have none; None where other processes hold parts of them.

    It depends neither on the devices of the arrays nor on the types of the containers.
    """
    arrays = _leaves_by_path(state)
    if not all(a.is_fully_addressable for a in arrays.values() if isinstance(a, jax.Array)):
        return None
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(_bytes_of(arrays[name]), zlib.crc32(name.encode(), crc))
    return crc


def checksum_of_parts(state: Any) -> tuple[int, int]:
    """Two checksums of the parts of a state that this process holds: of their places, and of their numbers."""
    place, crc = 0, 0
    for name, array in sorted(_leaves_by_path(state).items()):
        shards = array.addressable_shards if isinstance(array, jax.Array) else []
        parts = {str(shard.index): shard.data for shard in shards}  # replicated parts count once
        for index in sorted(parts):
            place = zlib.crc32(f"{name} {index}".encode(), place)
            crc = zlib.crc32(_bytes_of(parts[index]), crc)
    return place, crc


def _checksums(state: Any) -> dict[str, Any]:
    """The metadata of a checkpoint: its checksum, or with several processes those of each one's parts."""
    if jax.process_count() == 1:
        return {"checksum": checksum(state)}
    checksums = multihost_utils.process_allgather(np.array(checksum_of_parts(state), np.uint32))
    return {"checksums": checksums.tolist()}


def _check_numbers(state: Any, known: dict[str, Any]) -> None:
    """Compare a state with the checksums of its checkpoint, if this process holds the same parts as when it was saved.

    Raises:
        ValueError: the numbers differ.
    """
    if known["checksum"] is not None and (found := checksum(state)) not in (None, known["checksum"]):
        raise ValueError(f"its checksum is {found} in place of {known['checksum']}")
    if known["checksums"] is not None and len(known["checksums"]) == jax.process_count():
        (place, found), (known_place, expected) = checksum_of_parts(state), known["checksums"][jax.process_index()]
        if place == known_place and found != expected:
            raise ValueError(f"the checksum of its parts on this host is {found} in place of {expected}")


def _leaves_by_path(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _bytes_of(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _system_error(error: Exception, folder: Path) -> OSError | None:
    """The error of the system or of the storage that kept a checkpoint from being read, if there was one.

    Tensorstore raises a ValueError whatever the reason; its message begins with a status, and has the number of the
    system's error if there was one.

    Args:
        error: the error that was raised.
        folder: the checkpoint's folder, which the new error names.
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
    full = [reason for number in FULL if (reason := os.strerror(number)) in text]  # in a long message
    return full[0] if full else text.splitlines()[0][:200]

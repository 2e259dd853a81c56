"""Checkpoints of the train state, written by orbax."""

import contextlib
import functools
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from personalize_jax import hosts
from personalize_jax.errors import UserError
from personalize_jax.files import FULL

logger = logging.getLogger(__name__)

# What lies whole on several devices is written in parts, one by each: of small arrays, slicing takes longer to compile
# than it saves.
_TYPES = ocp.type_handlers.create_type_handler_registry(
    (int, ocp.type_handlers.ScalarHandler()),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
)


class Checkpoints:
    """The last few train states of one stage, in one directory.

    A checkpoint appears under its final name only when it is complete.
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
            max_to_keep=self._keep, create=writable, cleanup_tmp_directories=writable
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_TYPES)  # also tells what a checkpoint holds
        try:
            return ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
        except (ValueError, TypeError, KeyError) as error:
            # Orbax reads when and how each checkpoint was made, and fails if it cannot; checkpoints are whole without.
            logger.warning("Metadata in %s cannot be read (%s) and are left out.", self.directory, _reason(error))
            for file in self.directory.glob("*/_CHECKPOINT_METADATA"):
                file.unlink()
            return ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def save(self, step: int, state: Any) -> None:
        """Write in the background; the state may be donated as soon as this returns.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        with self._writing():
            args = ocp.args.PyTreeSave(state)
            self._manager.save(step, args=args, custom_metadata={"checksum": checksum(state)})

    def restore(self, abstract_state: Any | None) -> Any | None:
        """The latest state that can be read, or None without any.

        A damaged checkpoint is passed over with a warning, and deleted once an older one has been read: left in place
        it would keep its step, and every step before it, from being saved again.

        Args:
            abstract_state: shapes, dtypes and shardings of the state; None for a nested dict as it was saved.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            reason = "another process cannot"
            try:
                state = self._read(step, abstract_state)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                state, reason = None, _reason(error)
            if hosts.in_all([state is not None]) == [False]:
                logger.warning(
                    "Checkpoint %d in %s cannot be read (%s); trying the one before.", step, self.directory, reason
                )
            else:
                for damaged in steps[: 0 if self._read_only else i]:
                    self._manager.delete(damaged)
                return state
        if steps:
            raise UserError(
                f"None of the checkpoints {steps} in {self.directory} can be read; "
                "delete that folder to start this phase anew."
            )
        return None

    def _read(self, step: int, abstract_state: Any | None) -> Any:
        if abstract_state is None:  # on this host, whatever devices it was saved from
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract_state = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), self._manager.item_metadata(step).tree
            )
        placed = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract_state, restore_args=placed))
        known = (self._manager.metadata(step).custom_metadata or {}).get("checksum")
        if known is not None and (found := checksum(state)) is not None and found != known:
            raise ValueError(f"its checksum is {found} in place of {known}")
        return state

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
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if not all(a.is_fully_addressable for a in arrays.values() if isinstance(a, jax.Array)):
        return None
    crc = 0
    for name in sorted(arrays):
        content = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        crc = zlib.crc32(content, zlib.crc32(name.encode(), crc))
    return crc


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    full = [reason for number in FULL if (reason := os.strerror(number)) in text]  # amid much else
    return full[0] if full else text.splitlines()[0][:200]

"""Where pretrained weights lie, and whether their files have changed, told without reading them."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from personalize_jax.runtime.files import ASSETS

EMBEDDED = ("world",)
_RECENT = 2_000_000_000  # nanoseconds; more than file systems round times to


class Origin(NamedTuple):
    """What a model was read from.

    Attributes:
        folders: its folders.
        state: their `state_of` before anything was read.
    """

    folders: tuple[Path, ...]
    state: str | None

    def is_unchanged(self) -> bool:
        """Whether no file has changed since, as far as can be told."""
        return self.state is not None and state_of(self.folders) == self.state


def origin_of(folders: Sequence[Path]) -> Origin:
    """The origin of a model that is read from folders now."""
    return Origin(tuple(folders), state_of(folders))


def folder_of(source: str | Path) -> Path:
    """The folder of an embedded model, or the folder that is named."""
    return ASSETS / source if str(source) in EMBEDDED else Path(source)


def state_of(folders: Sequence[Path]) -> str | None:
    """A digest of the files of folders, of folders in them and in those: of paths, sizes and times, not of contents.

    A file that is replaced has another inode or time of change even if its size and time of modification are kept. None
    if there is nothing to tell by: a folder is missing, or a file was changed just now, so that another change might
    not show.
    """
    newest, files = 0, []
    try:
        for folder in folders:
            here = folder.resolve(strict=True)
            for file in sorted(file for pattern in ("*", "*/*", "*/*/*") for file in here.glob(pattern)):
                found = file.stat()
                newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
                if file.is_file():
                    files.append([str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
    except OSError:
        return None
    if not files or newest > time.time_ns() - _RECENT:
        return None
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()

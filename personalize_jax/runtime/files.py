"""Files that are written completely or not at all, errors that name their file, and the package's assets."""

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a full disk, quota or file

_HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(\d+)@(.+)")  # a temporary file of `replacing`: its process and host


@contextlib.contextmanager
def replacing(file: Path, own_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `file`, and move it to `file` at the end unless there was an error.

    Args:
        file: the file to write or replace.
        own_folder: whether the temporary file has its own folder, and the mode of any new file: for libraries that
            first write another file beside it, which only this user may read.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}@{_HOST}")
    written = temporary / "content" if own_folder else temporary
    try:
        with naming(file, temporary):
            if own_folder:
                temporary.mkdir(exist_ok=True)
                written.touch()
            mode = written.stat().st_mode if own_folder else None
            yield written
            if mode is not None and written.stat().st_mode != mode:
                written.chmod(mode)
            os.replace(written, file)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def naming(file: Path, temporary: Path | None = None) -> Iterator[None]:
    """Add the name of a file to errors, which the system names only when a file is opened.

    Args:
        file: the file to name.
        temporary: a path whose name, like that of any path within it, `file` replaces in errors.
    """
    try:
        yield
    except OSError as error:
        within = temporary is not None and Path(str(error.filename)).is_relative_to(temporary)
        if error.errno is not None and (error.filename is None or within):
            error.filename = str(file)
        raise


def reason(error: OSError) -> str:
    """An error message that says which file cannot be used, and why."""
    file = error.filename or "A file"
    if error.errno in FULL:
        return f"{file} cannot be written ({error.strerror}); what is done is kept: make free space, and start again."
    return f"{file} cannot be used: {error.strerror or ' '.join(str(error).split())}."


def write_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def cache_folder() -> Path:
    """The project's folder in the user's cache directory, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personalize_jax"


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files of this host's killed processes below a folder; links are not followed.

    Those of other hosts stay, as it is not known here which of their processes are alive.
    """
    for found in list(folder.rglob(".*")):
        match = _TEMPORARY.fullmatch(found.name)
        if match and match[2] == _HOST and not _is_alive(int(match[1])):
            _remove(found)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

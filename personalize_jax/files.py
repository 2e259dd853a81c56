"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a full disk, quota or file

# What `replacing` writes to, with the number of its process; and safetensors, which tells of none.
_TEMPORARY = re.compile(r"\..+\.(\d+)|\.tmp\w{6}")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield where to write, beside `file`, which what is there replaces at the end, unless there was an error.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with naming(file, temporary):
            yield temporary
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(file: Path, temporary: Path | None = None) -> Iterator[None]:
    """Have failures to write say which file it was, as the system says only when one is opened.

    Args:
        file: to be named.
        temporary: another name, in whose place it is named.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(file)
        raise


def reason(error: OSError) -> str:
    """A sentence that says which file cannot be used, and why."""
    file = error.filename or "A file"
    if error.errno in FULL:
        return f"{file} cannot be written ({error.strerror}); what is done is kept: make free space, and start again."
    return f"{file} cannot be used: {error.strerror or ' '.join(str(error).split())}."


def write_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes have left unfinished below a folder; links are not followed.

    For a folder in which no other process saves parameters.
    """
    for file in folder.rglob(".*"):
        if (match := _TEMPORARY.fullmatch(file.name)) and not (match[1] and _is_alive(int(match[1]))):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

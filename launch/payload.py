"""What is run on a machine: the user's command, and the code and files that it needs there."""

import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from launch.worker import BUCKETS
from personalize_jax.errors import UserError
from personalize_jax.files import replacing

ROOT = Path(__file__).parent.parent
OUTPUT_FLAGS = ("workdir", "out", "output")  # by which the project's commands are told where to write

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?![a-z0-9._-])")


class Program(NamedTuple):
    """A command as it is run on a machine.

    Attributes:
        command: its words; buckets are named by where they are mounted.
        buckets: names of those that it uses.
        workdir: its --workdir, or None.
        local_outputs: paths that it writes on the machine's own disk.
        inputs: paths on this computer that it names.
    """

    command: list[str]
    buckets: list[str]
    workdir: str | None
    local_outputs: list[str]
    inputs: list[str]


def read_command(command: Sequence[str]) -> Program:
    """Read a user's command.

    Args:
        command: its words; `gs://bucket/path` may stand wherever a path may.

    Raises:
        UserError: there is none, or it names a bucket that cannot be.
    """
    if not command:
        raise UserError(
            "No command was given; put it after --, such as: -- python -m personalize_jax.personalize "
            "--config=configs/world.py --images=photos/ --workdir=gs://BUCKET/rex"
        )
    mounted = [_BUCKET.sub(rf"{BUCKETS}/\1", word) for word in command]
    if wrong := [word for word in mounted if "gs://" in word]:
        raise UserError(f"{wrong[0]!r} names no bucket; give such as gs://BUCKET/rex.")
    buckets = sorted({bucket for word in command for bucket in _BUCKET.findall(word)})
    outputs = {flag: value for flag in OUTPUT_FLAGS if (value := _value(mounted, flag)) is not None}
    local = [path for path in outputs.values() if not path.startswith(f"{BUCKETS}/")]
    values = [word.partition("=")[2] if word.startswith("-") else word for word in mounted[1:]]
    inputs = [value for value in values if value and value not in outputs.values() and os.path.exists(ROOT / value)]
    return Program(mounted, buckets, outputs.get("workdir"), local, inputs)


def project_files(extra: Sequence[str]) -> list[str]:
    """Files to copy, relative to the project's folder: all that git does not ignore, and what is asked for.

    Args:
        extra: further files and folders of the project's folder.

    Raises:
        UserError: one of them is not there, or is elsewhere; or the project is no git checkout.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"git cannot list the files of {ROOT}; launch from a git checkout of the project.") from error
    files = {file for file in listed if file and (ROOT / file).is_file()}  # a deleted one is listed, too
    for path in extra:
        place = (ROOT / path).resolve()
        if not place.exists() or not place.is_relative_to(ROOT.resolve()):
            raise UserError(f"--copy={path} is not in the project's folder {ROOT}; put it there, or into a bucket.")
        found = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
        files |= {file.relative_to(ROOT.resolve()).as_posix() for file in found}
    return sorted(files)


def check_inputs(program: Program, files: Sequence[str]) -> None:
    """See that what the command names is copied, before a machine is paid for that lacks it.

    Raises:
        UserError: it is not.
    """
    for path in program.inputs:
        if PurePath(path).is_absolute():
            raise UserError(
                f"{path} is on this computer only; name it relative to the project's folder {ROOT}, or put it into a "
                "bucket."
            )
        if not any(PurePath(file).is_relative_to(path) for file in files):
            raise UserError(f"{path} would not be copied, as git ignores it or it is elsewhere; add --copy={path}.")


def pack(files: Sequence[str], archive: Path) -> None:
    """Write files of the project's folder into a .tar.gz."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
        for file in files:
            tar.add(ROOT / file, arcname=file)


def jax_version() -> str:
    """The version of JAX that the requirements pin."""
    return re.search(r"^jax==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE).group(1)


def _value(command: Sequence[str], flag: str) -> str | None:
    """The value of a flag, as `--flag=value` or `--flag value`; the last one counts."""
    found = None
    for i, word in enumerate(command):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            found = value if equals else next(iter(command[i + 1 :]), None)
    return found

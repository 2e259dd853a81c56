"""The command that is run on a machine, and the code and files that it needs there."""

import itertools
import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from launch.worker import BUCKETS
from personalize_jax.families.sources import EMBEDDED
from personalize_jax.formats import hub
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing

ROOT = Path(__file__).parent.parent
OUTPUT_FLAGS = ("workdir", "out", "output")  # flags of the project's commands with paths to write to
INPUT_FLAGS = ("images", "photos", "prompts", "sweep", "config")  # and with paths to read
MODEL_FLAGS = ("pipeline", "config.pretrained")  # likewise, or with names on the hub
COMMANDS = ("personalize_jax", "experiments", "launch")  # packages of the project's commands
GATED = "DeepFloyd/"  # names on the hub that begin with this need a licence
GATED_CONFIG = "configs/deepfloyd_if.py"  # the configuration that names them

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?![a-z0-9._-])")


class Program(NamedTuple):
    """A command as it is run on a machine.

    Attributes:
        command: its words; buckets are replaced by the folders where they are mounted.
        buckets: names of the buckets.
        workdir: its --workdir, or None.
        local_outputs: paths that it writes on the machine's own disk.
        inputs: paths on this computer that it names, existing or not.
        hub_names: names on the Hugging Face hub in its flags.
    """

    command: list[str]
    buckets: list[str]
    workdir: str | None
    local_outputs: list[str]
    inputs: list[str]
    hub_names: list[str]

    @property
    def module(self) -> str | None:
        """The project's module that it runs by `python -m`, or None."""
        return _module(self.command)

    @property
    def takes_multihost(self) -> bool:
        """Whether that module can run as one process of several."""
        return self.module is not None and "define_multihost()" in _module_file(self.module).read_text()

    @property
    def is_gated(self) -> bool:
        """Whether it reads models that need a licence, and so an access token."""
        named = any(name.startswith(GATED) for name in self.hub_names)
        return named or (GATED_CONFIG in self.inputs and _value(self.command, "config.pretrained") is None)


def read_command(command: Sequence[str]) -> Program:
    """Read a user's command.

    Args:
        command: its words; every path may be `gs://bucket/path`.

    Raises:
        UserError: the command is empty, or has an invalid name of a bucket.
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
    paths, names = _flag_inputs(mounted) if _module(mounted) else ([], [])
    inputs = list(dict.fromkeys([*inputs, *paths]))
    return Program(mounted, buckets, outputs.get("workdir"), local, inputs, names)


def _flag_inputs(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The inputs that the flags of a project's command name: paths outside buckets, and names on the hub."""
    paths = [re.sub(r"(?<=\.py):.*", "", value) for value in _values(command, INPUT_FLAGS)]
    values = _values(command, MODEL_FLAGS)
    models = [model for value in values for model in re.findall(r"['\"]([^'\"]*)['\"]", value) or [value]]
    models = [model for model in models if model not in EMBEDDED]
    names = [model for model in models if hub.is_name(model) and not os.path.exists(ROOT / model)]
    paths += [model for model in models if model not in names]
    return [path for path in paths if not path.startswith(f"{BUCKETS}/")], names


def project_files(extra: Sequence[str]) -> list[str]:
    """Files to copy, relative to the project's folder: all that git does not ignore, and some extra ones.

    Args:
        extra: files and folders of the project's folder that git ignores.

    Raises:
        UserError: one of them is missing or elsewhere, or the project is no git checkout.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"git cannot list the files of {ROOT}; launch from a git checkout of the project.") from error
    files = {file for file in listed if file and (ROOT / file).is_file()}  # git lists deleted files, too
    for path in extra:
        place = (ROOT / path).resolve()
        if not place.exists() or not place.is_relative_to(ROOT.resolve()):
            raise UserError(f"--copy={path} is not in the project's folder {ROOT}; put it there, or into a bucket.")
        added = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
        files |= {file.relative_to(ROOT.resolve()).as_posix() for file in added}
    return sorted(files)


def check_inputs(program: Program, files: Sequence[str]) -> None:
    """Check that the command's inputs exist and are copied, before a machine without them is paid for.

    Raises:
        UserError: one of them is missing or not copied.
    """
    if program.module is not None and not _module_file(program.module).is_file():
        raise UserError(f"There is no command {program.module} in {ROOT}; correct what follows -m.")
    for path in program.inputs:
        if PurePath(path).is_absolute():
            raise UserError(
                f"{path} is on this computer only; name it relative to the project's folder {ROOT}, or put it into a "
                "bucket."
            )
        if not os.path.exists(ROOT / path):
            raise UserError(f"{path!r} is not in the project's folder {ROOT}; put it there, or into a bucket.")
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
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    return pins["jax"]


def _value(command: Sequence[str], flag: str) -> str | None:
    """The value of a flag; the last one counts."""
    return next(reversed(_values(command, [flag])), None)


def _values(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The values of flags, given as `--flag=value` or `--flag value`."""
    values: list[str] = []
    for i, word in enumerate(command):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in flags:
            values += [value] if equals else command[i + 1 : i + 2]
    return values


def _module(command: Sequence[str]) -> str | None:
    modules = [name for flag, name in itertools.pairwise(command) if flag == "-m"]
    return next((name for name in modules if name.partition(".")[0] in COMMANDS), None)


def _module_file(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"

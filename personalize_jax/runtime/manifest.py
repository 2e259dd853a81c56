"""`manifest.json`: the inputs of a run directory, the calls that worked on it, and its progress.

config    the configuration
seeds     random seeds by purpose: one, or the first and the last
subject   the subject's name, its identifier, and the words that stand for the name in prompts
data      hashes of the inputs: photos, pretrained weights
files     states of files of the inputs on this machine, see `families.sources`
phases    {name: {"seconds": ..., "done": ...}}, over all calls
calls     the calls that began or resumed the run, each with arguments, versions, git revision, devices, phase and
          status: "running", "done", "stopped" (on request, after saving), "failed", or "killed"
done      whether every phase is finished
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import remove_temporaries, write_text
from personalize_jax.runtime.interruption import Stopped

FILE = "manifest.json"
# The packages that requirements.txt lists as imported, and libtpu.
PACKAGES = (
    *("absl-py", "array-record", "beautifulsoup4", "einops", "flax", "ftfy", "huggingface-hub", "jax", "jaxlib"),
    *("libtpu", "matplotlib", "ml-collections", "numpy", "optax", "orbax-checkpoint", "pillow", "safetensors"),
    *("scipy", "sentencepiece", "tensorboardx", "tensorflow-datasets", "tokenizers", "tqdm", "transformers"),
    "wordfreq",
)


def read(workdir: Path) -> dict[str, Any]:
    """The manifest of a run directory; empty before the first call.

    Raises:
        UserError: the file is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or delete it to go on without it.") from error


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of a run.

    Raises:
        UserError: the directory has no manifest with a configuration.
    """
    manifest = read(workdir)
    if "config" not in manifest:
        raise UserError(f"{workdir} is no run directory: it has no {FILE} with a configuration; give one that has.")
    return ConfigDict(manifest["config"])


def recorded(workdir: Path, key: str, default: Any) -> Any:
    """A value of the configuration that a run was last called with.

    Args:
        workdir: run directory, which may not exist yet.
        key: dotted key.
        default: the value where the run has none.
    """
    value = read(workdir).get("config", {})
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return default if value == {} else value


def record_config(config: ConfigDict, workdir: Path, may_change: Sequence[str] = ()) -> None:
    """Write the configuration to the run directory, or compare it with the run's.

    Args:
        config: the configuration of this call.
        workdir: run directory, made if missing.
        may_change: dotted keys in which a later call may differ; the run is then no longer done.

    Raises:
        UserError: the directory belongs to a run with another configuration.
    """
    if "config" in read(workdir):
        changed = changes(config, workdir)
        if not changed:
            return
        if different := [key for key in changed if key not in may_change]:
            raise UserError(
                f"{workdir} was begun with another configuration (different: {', '.join(different[:5])}); "
                "give the same configuration to go on, or another --workdir."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    _update(workdir, config=_plain(config), done=False)


def changes(config: ConfigDict, workdir: Path) -> list[str]:
    """Dotted keys in which a configuration differs from the run's."""
    return sorted(_different_keys(read(workdir).get("config", {}), _plain(config)))


def record_files(workdir: Path, **states: str | None) -> None:
    """Record the states of files of inputs, by the inputs' names."""
    _update(workdir, files=states)


def record_subject(workdir: Path, name: str, identifier: str, in_prompts: str) -> None:
    """Record the subject's name.

    Args:
        workdir: run directory.
        name: the name, such as "a xii dog".
        identifier: the rare word in it.
        in_prompts: the words that stand for the name in prompts, such as "a [V] dog".
    """
    _update(workdir, subject={"name": name, "identifier": identifier, "in prompts": in_prompts})


def record_data(workdir: Path, data: Mapping[str, object]) -> None:
    """Record hashes of inputs that are known only after the call has begun, beside those that `record` was given."""
    _update(workdir, data=read(workdir).get("data", {}) | dict(data))


@contextlib.contextmanager
def record(workdir: Path, seeds: Mapping[str, object], data: Mapping[str, object]) -> Iterator[None]:
    """Record a call when it begins, its status when it ends, and that the run is done if the call succeeded.

    Args:
        workdir: run directory, made if missing; temporary files of killed calls are deleted.
        seeds: random seeds by purpose.
        data: hashes of the inputs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    hosts.each_does(lambda: remove_temporaries(workdir))
    start = time.monotonic()
    before = [call | {"status": "killed"} if call["status"] == "running" else call for call in _calls(workdir)]
    call = {
        "status": "running",
        "phase": None,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "devices": _devices(),
        "versions": _versions(),
        "git": _git(),
    }
    _update(workdir, done=False, seeds=dict(seeds), data=dict(data), calls=[*before, call])

    def end(status: str) -> None:
        _update_call(workdir, status=status, seconds=round(time.monotonic() - start, 1))

    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # such as a full disk, which may be why the call failed
            end("stopped" if isinstance(error, Stopped) else "failed")
        raise
    end("done")
    _update(workdir, done=True)


@contextlib.contextmanager
def phase(workdir: Path, name: str) -> Iterator[None]:
    """Record a phase when it begins, and its seconds when it ends, summed over the calls that worked on it."""
    start = time.monotonic()
    seconds = read(workdir).get("phases", {}).get(name, {}).get("seconds", 0.0)

    def write(done: bool) -> None:
        state = {"seconds": round(seconds + time.monotonic() - start, 2), "done": done}
        _update(workdir, phases=read(workdir).get("phases", {}) | {name: state})

    _update_call(workdir, phase=name)
    write(done=False)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # see above
            write(done=False)
        raise
    write(done=True)


def phase_times(workdir: Path) -> dict[str, float]:
    """Seconds of each finished phase."""
    phases = read(workdir).get("phases", {})
    return {name: state["seconds"] for name, state in phases.items() if state["done"]}


def _plain(config: ConfigDict) -> dict[str, Any]:
    """A configuration as the manifest has it."""
    return json.loads(config.to_json_best_effort())


def _calls(workdir: Path) -> list[dict[str, Any]]:
    return read(workdir).get("calls", [])


def _update(workdir: Path, **changes: object) -> None:
    if hosts.is_first():
        write_text(workdir / FILE, json.dumps(read(workdir) | changes, indent=2))


def _update_call(workdir: Path, **changes: object) -> None:
    """Change the record of the current call, if there is one: phases also run outside of calls."""
    if calls := _calls(workdir):
        _update(workdir, calls=[*calls[:-1], calls[-1] | changes])


def _devices() -> dict[str, object]:
    device = jax.devices()[0]
    kind = {"platform": device.platform, "kind": device.device_kind}
    if device.platform == "cpu":
        kind["cores"] = _cores()  # XLA splits sums among them
    return kind | {"count": jax.device_count(), "processes": jax.process_count()}


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git() -> dict[str, object] | None:
    """Revision of the checkout that this file belongs to, and whether its files differ from it."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment may lie within another project's checkout
        revision, dirty, _ = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").partition("-dirty")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "dirty": bool(dirty)}


def _different_keys(old: object, new: object, prefix: str = "") -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return set().union(*(_different_keys(old.get(k), new.get(k), f"{prefix}{k}.") for k in keys), set())
    return set() if old == new else {prefix.rstrip(".")}

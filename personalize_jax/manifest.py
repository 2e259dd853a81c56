"""`manifest.json`: what made a run directory."""

import contextlib
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import jax
from ml_collections import ConfigDict

from personalize_jax.pipeline.storage import write_text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@contextlib.contextmanager
def record(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Write the manifest when a call begins, and again, with status and seconds, when it ends.

    Calls that resume a run are listed one after the other.

    Args:
        workdir: run directory, made if missing.
        config: for the seed.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "manifest.json"
    calls = json.loads(file.read_text())["calls"] if file.exists() else []
    start = time.monotonic()
    call = {
        "status": "running",
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "seed": config.seed,
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "git_revision": _git_revision(),
    }

    def write(status: str) -> None:
        call.update(status=status, seconds=round(time.monotonic() - start, 1))
        write_text(file, json.dumps({"calls": [*calls, call]}, indent=2))

    write("running")
    try:
        yield
    except BaseException:
        write("failed")
        raise
    write("done")


@contextlib.contextmanager
def phase(workdir: Path, name: str) -> Iterator[None]:
    """Add the seconds of a phase to `times.json`; those of calls that resumed it add up."""
    start = time.monotonic()
    try:
        yield
    finally:
        times = phase_times(workdir)
        times[name] = round(times.get(name, 0.0) + time.monotonic() - start, 2)
        write_text(workdir / "times.json", json.dumps(times, indent=2))


def phase_times(workdir: Path) -> dict[str, float]:
    """Seconds by phase."""
    file = workdir / "times.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _git_revision() -> str | None:
    try:
        here = Path(__file__).parent
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()

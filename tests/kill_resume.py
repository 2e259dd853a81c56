"""Kill a personalisation at random moments, resume it each time, and compare it with one that was left alone.

    python -m tests.kill_resume --workdir=runs/kill_resume --kills=20            # configs/world.py shrunk: minutes
    python -m tests.kill_resume --workdir=runs/kill_resume_full --kills=20 --full      # as it ships

Kills are spread evenly over starting and all phases, each at a random moment of its phase. At the end pictures, logged
losses, train states and the personalised cascade must be the same bit for bit.
"""

import collections
import logging
import multiprocessing
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from personalize_jax.runtime import manifest
from personalize_jax.training.trained import latest_state
from tests import processes
from tests.logged import metrics_of

COMMAND = "personalize_jax.personalize"
IMAGES = Path(__file__).parent.parent / "personalize_jax" / "assets" / "world" / "subject"
SHRUNK = {
    "class_images.count": 6,
    "class_images.num_steps": 4,
    "class_images.batch_size": 2,
    "training.num_steps": 20,
    "training.batch_size": 2,
    "training.log_every": 2,
    "training.checkpoint_every": 4,
    "super_resolution_training.num_steps": 12,
    "super_resolution_training.batch_size": 2,
    "super_resolution_training.log_every": 2,
    "super_resolution_training.checkpoint_every": 4,
    "report.contexts": ("in the snow", "on the beach"),
    "report.images_per_context": 2,
    "report.class_samples": 8,
    "report.batch_size": 2,
}
PICTURES = ("subject", "class_images", "samples", "class_samples")
STARTING = "starting"


def survive(arguments, folder, kills, seed, start):
    """Run uninterrupted, and killed and resumed; compare.

    Args:
        arguments: of `personalize`, without the run directory and the registry.
        folder: for both runs.
        kills: how many.
        seed: of the moments.
        start: from arguments of `personalize` and two files for what it prints, to its started process.

    Returns:
        How many kills came in each phase.
    """

    def begin(name):
        registry = folder / f"{name}.registry.json"  # of its own, where the same identifier is free
        files = folder / f"{name}.output", folder / f"{name}.error"
        flags = [*arguments, f"--workdir={folder / name}", f"--config.subject.registry={registry}"]
        return start([str(flag) for flag in flags], files)

    def end(name):
        process = begin(name)
        process.join()
        assert process.exitcode == 0, (folder / f"{name}.error").read_text()
        assert manifest.read(folder / name)["done"]

    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    end("uninterrupted")
    seconds = time.monotonic() - began
    phases = manifest.phase_times(folder / "uninterrupted")
    phases = {STARTING: seconds - sum(phases.values()), **phases}
    print(f"Uninterrupted: {seconds:.0f} s.", flush=True)

    moments, killed = random.Random(seed), []
    while len(killed) < kills:
        # Rather early in a phase: the first run had to compile, which makes its phases longer than those to come.
        phase = list(phases)[len(killed) * len(phases) // kills]
        found, took = kill_in(phase, list(phases), phases[phase] * moments.random() ** 2, begin, folder / "killed")
        phases[phase] = min(phases[phase], took)
        if found is None:  # it came to its end first: let it make its report anew
            assert manifest.read(folder / "killed")["done"], (folder / "killed.error").read_text()
            (folder / "killed" / "report.html").unlink()
            continue
        killed.append(found)
        print(f"Killed {len(killed)} of {kills}: {found}.", flush=True)
    end("killed")
    assert_same(folder / "uninterrupted", folder / "killed")
    return collections.Counter(killed)


def kill_in(phase, phases, delay, begin, workdir):
    """Start the run and kill it so many seconds after a phase has begun, or as soon as that phase is over.

    Returns:
        The phase it was in, None if it ended first; and seconds of the phase, infinite if it was cut short.
    """
    calls = len(manifest.read(workdir).get("calls", []))

    def current():
        of_run = manifest.read(workdir).get("calls", [])
        return (of_run[-1]["phase"] if len(of_run) > calls else None) or STARTING

    def wait_while(condition):
        began = time.monotonic()
        while process.is_alive() and condition(time.monotonic() - began):
            time.sleep(0.002)
        return time.monotonic() - began

    process = begin("killed")
    wait_while(lambda _: phases.index(current()) < phases.index(phase))
    took = wait_while(lambda seconds: seconds < delay and current() == phase)
    process.kill()
    process.join()
    return current() if process.exitcode == -signal.SIGKILL else None, took if took < delay else float("inf")


def assert_same(expected, found):
    """Assert that two runs have left the same, bit for bit."""
    for name in PICTURES:
        files = [{f.relative_to(run): f.read_bytes() for f in (run / name).rglob("*.*")} for run in (expected, found)]
        assert files[0].keys() == files[1].keys(), name
        assert [file for file in files[0] if files[0][file] != files[1][file]] == []
    trainings = sorted(folder.parent.name for folder in expected.glob("*/checkpoints"))
    assert trainings
    for name in trainings:
        states = [latest_state(run / name) for run in (expected, found)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        jax.tree.map(np.testing.assert_array_equal, *states)
        trained = [(run / name / "trained.safetensors").read_bytes() for run in (expected, found)]
        assert trained[0] == trained[1]
        assert metrics_of(expected / name) == metrics_of(found / name)
    assert (expected / "metrics.json").read_bytes() == (found / "metrics.json").read_bytes()
    manifests = [manifest.read(run) for run in (expected, found)]
    for key in ("seeds", "data", "done"):
        assert manifests[0][key] == manifests[1][key]
    assert not [f for f in found.rglob("*") if "orbax-checkpoint-tmp" in f.name or f.name[0] == "."]


def start_afresh(arguments, files):
    """`personalize` in a Python of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=processes.run_module, args=(COMMAND, arguments, files)
    )
    process.start()
    return process


def main(_):
    """The command."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    given = flags.FLAGS
    arguments = [f"--config={given.config}", f"--images={given.images}", "--class_noun=dog"]
    if not given.full:
        arguments += [f"--config.{key}={value}" for key, value in SHRUNK.items()]
    killed = survive(arguments, Path(given.workdir), given.kills, given.seed, start_afresh)
    print(f"The same bit for bit after {killed.total()} kills: {dict(killed)}.")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for both runs.", required=True)
    flags.DEFINE_integer("kills", 20, "How many times to kill it.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("config", "configs/world.py", "Configuration.")
    flags.DEFINE_string("images", str(IMAGES), "Photos of a dog.")
    flags.DEFINE_bool("full", False, "The configuration as it is, not shrunk.")
    app.run(main)

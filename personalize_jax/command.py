"""What the commands share: flags, devices, one-sentence errors, progress bars, the configuration kept with a run."""

import contextlib
import ctypes
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax.errors import UserError
from personalize_jax.pipeline.storage import write_text


def run(main: Callable[[list[str]], None], define_flags: Callable[[], None], required: Sequence[str]) -> None:
    """Run a command: `UserError` and failures to write end it with one sentence and exit status 2.

    Args:
        main: the command.
        define_flags: defines its flags; a function, so that importing a command's module defines none.
        required: names of the flags that must be given.
    """

    def guarded(argv: list[str]) -> None:
        set_up()
        try:
            main(argv)
        except UserError as error:
            sys.exit(_fail(str(error)))
        except OSError as error:
            sys.exit(_fail(f"{error.filename or 'A file'} cannot be used: {error.strerror or _one_line(error)}."))

    define_flags()
    flags.mark_flags_as_required(required)
    app.run(guarded, flags_parser=_parse)


def set_up() -> None:
    """What a process does before it computes: silence what is no warning, keep compiled programs and memory."""
    for name in ("absl", "jax"):  # JAX tells which backends it did not find
        logging.getLogger(name).setLevel(logging.WARNING)
    _keep_compiled_programs()
    _keep_memory()


def record_config(
    config: ConfigDict, workdir: Path, may_change: Sequence[str] = (), outdates: Sequence[Path] = ()
) -> None:
    """Keep the configuration in the run directory, or compare it with what the run began with.

    Args:
        config: of this call.
        workdir: run directory, made if missing.
        may_change: dotted keys in which a later call may differ.
        outdates: files to delete if it does.

    Raises:
        UserError: the directory belongs to a run with another configuration.
    """
    file = workdir / "config.json"
    new = json.loads(config.to_json_best_effort())
    if file.exists():
        changed = sorted(_different_keys(json.loads(file.read_text()), new))
        if not changed:
            return
        if different := [key for key in changed if key not in may_change]:
            raise UserError(
                f"{workdir} was begun with another configuration (different: {', '.join(different[:5])}); "
                "give the same configuration to go on, or another --workdir."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    for outdated in outdates:
        outdated.unlink(missing_ok=True)
    write_text(file, json.dumps(new, indent=2))


@contextlib.contextmanager
def steps_bar(description: str, total: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A progress bar over steps; yields `progress(steps done, metrics)`."""
    with tqdm(total=total, desc=description, unit="step", dynamic_ncols=True, mininterval=1.0) as bar:

        def progress(step: int, metrics: dict[str, float]) -> None:
            if bar.n == 0:
                bar.initial = max(step - 1, 0)
            bar.set_postfix({"loss": f"{metrics['loss']:.4f}"} if metrics else {}, refresh=False)
            bar.update(step - bar.n)

        yield progress


def _parse(argv: list[str]) -> list[str]:
    """As absl does, but with one sentence where a configuration refuses its argument, or lacks a `--config.` key."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        *before, last = str(error).strip().splitlines()
        if before and not last.startswith("ValueError: "):  # by which configurations refuse their arguments
            print(*before, sep="\n", file=sys.stderr)
        sys.exit(_fail(last.removeprefix("ValueError: ")))
    except (AttributeError, KeyError) as error:
        sys.exit(_fail(f"A --config flag names a key that the configuration lacks: {_one_line(error)}"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace("\\n", " ").replace("\\", "").split())


def _keep_compiled_programs() -> None:
    """Programs are compiled once for all runs: in the user's cache directory, unless JAX is told of another."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(home, "personalize_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_memory() -> None:
    """On CPU, arrays of many megabytes come and go: memory that glibc gives back costs page faults to get again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _different_keys(old: object, new: object, prefix: str = "") -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return set().union(*(_different_keys(old.get(k), new.get(k), f"{prefix}{k}.") for k in keys), set())
    return set() if old == new else {prefix.rstrip(".")}


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2

"""The frame of every command: flags, several hosts, one-sentence errors, exit statuses, progress bars.

Exit statuses: 0, everything is done; 2, one sentence on stderr says what is wrong; 75 (EX_TEMPFAIL), stopped by SIGTERM
or Ctrl-C after saving, and the same command continues.
"""

import contextlib
import ctypes
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax.runtime import hosts, interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import cache_folder, reason

_CACHE_FOLDER = "jax_compilation_cache_dir"


def run(
    main: Callable[[list[str]], None],
    define_flags: Callable[[], None],
    required: Sequence[str],
    takes_words: bool = False,
) -> None:
    """Run a command. A `UserError` or a failure to write ends it with one sentence and exit status 2, a signal with 75.

    Args:
        main: the command, called with its name and the words beside its flags.
        define_flags: defines its flags; a function, so that importing a command's module defines none.
        required: names of the flags that must be given.
        takes_words: whether the command takes words beside its flags; otherwise they are refused.
    """

    def guarded(argv: list[str]) -> None:
        set_up()
        try:
            with interruption.on_signals():
                _join()
                main(argv)
        except interruption.Stopped:
            print("Stopped; what is done is saved, and the same command goes on.", file=sys.stderr)
            sys.exit(interruption.STATUS)
        except UserError as error:
            sys.exit(_fail(str(error)))
        except OSError as error:
            sys.exit(_fail(reason(error)))

    define_flags()
    flags.mark_flags_as_required(required)
    app.run(guarded, flags_parser=functools.partial(_parse, takes_words=takes_words))


def define_multihost() -> None:
    """Define the flags of commands that can run as several processes of one program."""
    flags.DEFINE_bool("multihost", False, "Run with the same command on the other hosts, which TPU VMs and Slurm name.")
    flags.DEFINE_string("coordinator", None, "With --multihost, where nothing names them: process 0's host and port.")
    flags.DEFINE_integer("num_processes", None, "Likewise: the number of processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Likewise: the number of this process, from 0.", lower_bound=0)


def _join() -> None:
    """Join the other processes of the program if the flags ask for it."""
    arguments = flags.FLAGS
    if "multihost" not in arguments:
        return
    given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.multihost:
        hosts.join(*given)
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --num_processes and --process_id are for --multihost; give that, too.")
    elif jax.process_count() > 1:
        raise UserError(f"This is one of {jax.process_count()} hosts of a slice; give --multihost, and start on all.")


def set_up() -> None:
    """Prepare a process for computing: silence loggers, cache compiled programs, keep memory."""
    logging.getLogger("jax").setLevel(logging.WARNING)  # it lists the backends that it did not find
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs at length the errors that it also raises
    sys.unraisablehook = _report_unraisable
    _keep_compiled_programs()
    _keep_memory()


@contextlib.contextmanager
def steps_bar(description: str, total: int | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A progress bar over steps; yields `progress(steps done, metrics)`, whose first call sets where the bar begins.

    Args:
        description: the words before the bar.
        total: number of steps; None while it is not known.
    """
    bar: tqdm | None = None

    def progress(step: int, metrics: dict[str, float]) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(initial=step, total=total, desc=description, unit="step", dynamic_ncols=True, mininterval=1.0)
        bar.set_postfix({"loss": f"{metrics['loss']:.4f}"} if metrics else {}, refresh=False)
        bar.update(step - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def _parse(argv: list[str], takes_words: bool) -> list[str]:
    """Parse flags as absl does, but with one-sentence errors, and with "~" for the home folder.

    Shells expand "~" in `--workdir ~/rex`, but not in `--workdir=~/rex`.
    """
    try:
        words = flags.FLAGS(argv)
    except flags.Error as error:
        *before, last = str(error).strip().splitlines()
        if before and not last.startswith("ValueError: "):  # with which configurations refuse their arguments
            print(*before, sep="\n", file=sys.stderr)
        sys.exit(_fail(last.removeprefix("ValueError: ")))
    except (AttributeError, KeyError) as error:
        sys.exit(_fail(f"A --config flag names a key that the configuration lacks: {_one_line(error)}"))
    if words[1:] and not takes_words:
        sys.exit(_fail(_left_over(words[1:])))
    for flag in [flags.FLAGS[name] for name in flags.FLAGS if "." not in name]:  # --config.key=value is in --config
        if isinstance(flag.value, ConfigDict):
            _expand_home(flag.value)
        elif (expanded := _expanded(flag.value)) != flag.value:
            flag.value = expanded
    return words


def _expand_home(config: ConfigDict) -> None:
    """Replace a leading "~" by the home folder in all values of a configuration."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif (expanded := _expanded(value)) != value:
            config[key] = expanded


def _left_over(words: Sequence[str]) -> str:
    """An error message about words that belong to no flag."""
    named = f"{words[0]!r} and {words[1]!r}" if len(words) == 2 else repr(words[0])
    named += f" and {len(words) - 1} more" * (len(words) > 2)
    several = [name for name in flags.FLAGS if isinstance(flags.FLAGS[name], flags.MultiFlag)]
    repeated = "".join(f", and --{name} once for each" for name in several)
    verb = "stands" if len(words) == 1 else "stand"
    return f"{named} {verb} beside the flags and would be ignored; write values with spaces in quotes{repeated}."


def _expanded(value: object) -> object:
    """A value, or a sequence of values, with a leading "~" replaced by the home folder."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r"~(/|$)", value) else value


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an unraisable error, but not those of orbax's remaining writes once one of them has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace("\\n", " ").replace("\\", "").split())


def _keep_compiled_programs() -> None:
    """Cache compiled programs for all runs in the user's cache directory, unless JAX is told of another."""
    if getattr(jax.config, _CACHE_FOLDER) is not None:
        return
    jax.config.update(_CACHE_FOLDER, str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_memory() -> None:
    """Keep freed memory: on CPU large arrays come and go, and memory that glibc returns costs page faults again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2

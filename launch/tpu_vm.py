"""Run a command on a Cloud TPU VM, from asking for the machine to deleting it.

    python -m launch.tpu_vm --name=rex --type=v5litepod-16 --zone=us-west4-a --spot --copy=photos -- \
        python -m personalize_jax.personalize --config=configs/world.py --images=photos --workdir=gs://BUCKET/rex

The machine is a queued resource. Once it is there, it gets the code and its environment, and every worker runs the
command, apart from the connection, so that it goes on where that drops. If the machine is preempted, or the command
stops itself (exit status 75) or leaves its run unfinished, all is done again, and the run resumes from its checkpoints.

The machine is deleted when this command ends, whatever the reason. It is kept with --keep, and on Ctrl-C, which says
how to watch the run again, by the same command, and how to delete the machine.
"""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from absl import flags

from launch import payload, worker
from launch.gcloud import ABSENT, ACTIVE, FAILED, OVER, RUNTIME_VERSIONS, SSH_FAILED, GcloudError, Machine
from launch.payload import Program
from personalize_jax import command
from personalize_jax.errors import UserError

AGAIN = os.EX_TEMPFAIL  # exit status of a command that has saved and stopped: start it again
SETUP_TRIES = 3
WATCH_TRIES = 30  # with growing pauses, hours: a laptop may be carried home
LONGEST_PAUSE = 64  # in units of --poll

_NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_ZONE = r"[a-z]+-[a-z]+[0-9]+-[a-z]"
_TYPE = r"v[0-9a-z]+-[0-9]+"
_PROJECT = r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"
_VERSION = r"[a-z0-9][-.a-z0-9]*"

T = TypeVar("T")


class MachineLost(Exception):
    """The machine was preempted, or never came."""


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("name", None, "Of the machine: lower-case letters, digits and dashes.")
    flags.DEFINE_string("type", None, "Accelerator type, such as v5litepod-16, v6e-8, v4-32.")
    flags.DEFINE_string("zone", None, "Such as us-west4-a.")
    flags.DEFINE_string("project", None, "Google Cloud project; by default gcloud's.")
    flags.DEFINE_string("version", None, "The machine's image; by default what Google documents for the type and JAX.")
    flags.DEFINE_bool("spot", False, "Whether the machine may be preempted, and costs less.")
    flags.DEFINE_multi_string("copy", [], "A file or folder that git ignores, to be copied, too; may be repeated.")
    flags.DEFINE_bool("keep", False, "Do not delete the machine at the end.")
    flags.DEFINE_integer("max_restarts", 20, "How often to begin again after preemptions.", lower_bound=0)
    flags.DEFINE_float("poll", 10.0, "Seconds between two looks at the machine.", lower_bound=0.0)
    flags.DEFINE_string("logs", "runs/tpu_vm", "Folder for the workers' logs, in a folder of the machine's name.")
    flags.DEFINE_bool("dry_run", False, "Print every command that a smooth run takes, and run none.")


def main(argv: list[str]) -> None:
    """The command; exits with the status of the program that it ran."""
    arguments = flags.FLAGS
    machine = requested_machine()
    program = payload.read_command(argv[1:])
    if program.local_outputs and not arguments.keep:
        raise UserError(
            f"{program.local_outputs[0]} would be on the machine's own disk and be deleted with it; write to a bucket, "
            "such as --workdir=gs://BUCKET/rex, or --keep the machine."
        )
    files = payload.project_files(arguments.copy)
    payload.check_inputs(program, files)
    if not machine.dry_run and shutil.which("gcloud") is None:
        raise UserError("gcloud was not found; install it from https://cloud.google.com/sdk/docs/install.")
    for end in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: whoever ends this is told that the machine still runs
        if signal.getsignal(end) != signal.SIG_IGN:  # as under nohup
            signal.signal(end, signal.default_int_handler)
    folder = Path(arguments.logs) / machine.name
    payload.pack(files, archive := folder / worker.ARCHIVE)
    launch = Launch(machine, program, archive, folder, arguments.poll)
    sys.exit(launch.run(arguments.max_restarts, arguments.keep))


def requested_machine() -> Machine:
    """The machine that the flags describe.

    Raises:
        UserError: it cannot exist.
    """
    arguments = flags.FLAGS
    for flag, pattern, example in (
        ("name", _NAME, "rex-1, at most 63 lower-case letters, digits and dashes"),
        ("type", _TYPE, "v5litepod-16"),
        ("zone", _ZONE, "us-west4-a"),
        ("project", _PROJECT, "my-project-1"),
        ("version", _VERSION, "v2-alpha-tpuv5-lite"),
    ):
        if arguments[flag].value is not None and not re.fullmatch(pattern, arguments[flag].value):
            raise UserError(f"--{flag}={arguments[flag].value!r} cannot be; give such as {example}.")
    generation = arguments.type.partition("-")[0]
    if not arguments.version and generation not in RUNTIME_VERSIONS:
        raise UserError(
            f"--type={arguments.type} is of no generation known here ({', '.join(RUNTIME_VERSIONS)}); "
            "give its runtime version by --version."
        )
    return Machine(
        arguments.name,
        arguments.type,
        arguments.zone,
        arguments.project,
        arguments.version or RUNTIME_VERSIONS[generation],
        arguments.spot,
        arguments.dry_run,
    )


class Launch:
    """A program's run on a machine, and on those that take its place."""

    def __init__(self, machine: Machine, program: Program, archive: Path, folder: Path, poll: float) -> None:
        """A launch.

        Args:
            machine: may exist already.
            program: to run on it.
            archive: of the code.
            folder: for the logs.
            poll: seconds between two looks.
        """
        self.machine = machine
        self.program = program
        self.archive = archive
        self.folder = folder
        self.poll = 0.0 if machine.dry_run else poll
        self.digest = worker.digest(program.command)

    def run(self, max_restarts: int, keep: bool) -> int:
        """Run the program until it has ended for good.

        Args:
            max_restarts: how often to begin again.
            keep: whether to keep the machine.

        Returns:
            The program's exit status; 75 if it was begun again too often; 130 if interrupted; 1 if it could not be run.

        Raises:
            UserError: the machine was refused, or runs something else; there is nothing to delete.
        """
        try:
            status = self._until_done(max_restarts)
        except KeyboardInterrupt:
            self._say(f"interrupted. {self._left_running()}")
            return 130
        except UserError:
            raise
        except GcloudError as error:
            self._say(f"giving up: {error.message}")
            status = 1
        except BaseException:
            self._say(self._left_running())
            raise
        if keep:
            self._say(f"the machine is kept, and costs. Delete it with:\n  {self.machine.delete_command}")
            return status
        try:
            self._patiently(self.machine.delete, SETUP_TRIES)
            self._say("the machine is deleted.")
        except (GcloudError, KeyboardInterrupt) as error:
            self._say(f"could not delete the machine ({error}), which costs. {self._left_running()}")
        return status

    def _until_done(self, max_restarts: int) -> int:
        for restart in range(max_restarts + 1):
            if restart:
                self._say(f"beginning again ({restart} of at most {max_restarts}).")
                self._pause(restart)
            try:
                self._acquire(first=restart == 0)
                status = self._run_once()
            except MachineLost as error:
                self._say(f"{error}.")
                status = AGAIN
            if status != AGAIN:
                self._say("the program is done." if status == 0 else f"the program failed, with status {status}.")
                return status
        self._say(f"the program was begun {max_restarts + 1} times and is not done; --max_restarts allows no more.")
        return AGAIN

    def _acquire(self, first: bool) -> None:
        """Wait until the machine is active; ask for it where there is none, or one that is over."""
        asked, said = False, ""
        while (state := self._patiently(self.machine.state, WATCH_TRIES)).word != ACTIVE:
            if state.word in OVER:
                self._patiently(self.machine.delete, SETUP_TRIES)
                if asked:
                    self._refused(state.reason or state.word, fatal=first and state.word == FAILED)
            elif state.word == ABSENT:
                try:
                    self.machine.create()
                except GcloudError as error:
                    self._refused(error.summary, fatal=first)
                asked = True
            elif state.word != said:
                said = state.word
                self._say(f"waiting for a {self.machine.accelerator_type} in {self.machine.zone}: {said}")
            self._pause(0)
        self._say("the machine is there.")

    def _refused(self, reason: str, fatal: bool) -> NoReturn:
        sentence = f"{self.machine.name} was not given: {reason}"
        raise UserError(sentence) if fatal else MachineLost(sentence)

    def _run_once(self) -> int:
        """The program's exit status on this machine; if it is running there already, it is only watched."""
        running = [each for each, how in self._statuses() if how == worker.RUNNING]
        if running and set(running) != {self.digest}:
            raise UserError(
                f"{self.machine.name} is running another command; give another --name, or delete it with: "
                f"{self.machine.delete_command}"
            )
        if running:
            self._say("the program is running; watching it.")
        else:
            self._set_up()
            self._ssh(worker.stop(), SETUP_TRIES)
            self._ssh(worker.start(self.program.command), SETUP_TRIES)
        logs = self._new_log_folder()
        status = self._watch(logs / "worker_0.log")
        if status == 0 and not self._manifest_agrees():
            self._say("the program has ended and the manifest of its run does not say done.")
            status = AGAIN
        self._fetch_logs(logs)
        return status

    def _set_up(self) -> None:
        self._say(f"copying {self.archive} and installing.")
        self._reaching(lambda: self.machine.copy_to(self.archive, worker.ARCHIVE), SETUP_TRIES)
        self._ssh(worker.install(payload.jax_version()), SETUP_TRIES)
        for bucket in self.program.buckets:
            self._ssh(worker.mount(bucket), SETUP_TRIES)

    def _watch(self, log: Path) -> int:
        """Show the log of worker 0 until the program has ended; its exit status."""
        self._say(f"running {shlex.join(self.program.command)}")
        offset = 0
        while True:
            hows = [how for _, how in self._statuses()]
            new = worker.read_log(self._ssh(worker.new_log(offset), WATCH_TRIES, "0"))
            offset += len(new)
            if not self.machine.dry_run:
                _append(log, new)
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
            if (status := exit_status(hows)) is not None:
                return status
            self._pause(0)

    def _statuses(self) -> list[tuple[str, str]]:
        smooth = f"{self.digest} 0"
        return worker.read_statuses(self._ssh(worker.status(), WATCH_TRIES, reply=smooth))

    def _manifest_agrees(self) -> bool:
        """Whether the run is done; of commands that leave no manifest, the exit status has said it."""
        if self.program.workdir is None:
            return True
        try:
            manifest = json.loads(self._ssh(worker.manifest(self.program.workdir), WATCH_TRIES, "0"))
        except json.JSONDecodeError:
            return True
        return bool(manifest.get("done", True))

    def _fetch_logs(self, folder: Path) -> None:
        """Copy all workers' logs, as far as they can be had."""
        try:
            for i in range(self.machine.num_workers()):
                self.machine.copy_from(worker.LOG, i, folder / f"worker_{i}.log")
        except GcloudError as error:
            self._say(f"not all logs could be copied: {error.summary}")
        self._say(f"logs are in {folder}.")

    def _new_log_folder(self) -> Path:
        """A numbered folder for each time that the program is begun or watched."""
        number = 1
        while (self.folder / str(number)).exists():
            number += 1
        if not self.machine.dry_run:
            (self.folder / str(number)).mkdir(parents=True)
        return self.folder / str(number)

    def _ssh(self, script: str, tries: int, worker_number: str = "all", reply: str = "") -> str:
        return self._reaching(lambda: self.machine.ssh(script, worker_number, reply), tries)

    def _reaching(self, step: Callable[[], T], tries: int) -> T:
        """Do what needs a connection; where it fails, see whether the machine is still there."""

        def attempt() -> T:
            try:
                return step()
            except GcloudError:
                if (word := self._word_if_known()) not in (ACTIVE, None):
                    raise MachineLost(f"the machine is gone: {word}") from None
                raise

        return self._patiently(attempt, tries)

    def _word_if_known(self) -> str | None:
        try:
            return self.machine.state().word
        except GcloudError:  # this computer is offline
            return None

    def _patiently(self, step: Callable[[], T], tries: int) -> T:
        """Repeat a step that fails, with growing pauses, and at last let its error through."""
        for failures in range(1, tries):
            try:
                return step()
            except GcloudError as error:
                dropped = "the connection dropped" if error.status == SSH_FAILED else error.summary
                self._say(f"{dropped}; trying again.")
                self._pause(failures)
        return step()

    def _pause(self, failures: int) -> None:
        time.sleep(self.poll * min(2**failures, LONGEST_PAUSE))

    def _left_running(self) -> str:
        again = shlex.join(["python", "-m", "launch.tpu_vm", *sys.argv[1:]])
        return (
            f"The machine may still be running, and costs. Watch it again with:\n  {again}\n"
            f"Delete it with:\n  {self.machine.delete_command}"
        )

    def _say(self, text: str) -> None:
        print(f"[{self.machine.name}] {text}", file=sys.stderr, flush=True)


def exit_status(hows: list[str]) -> int | None:
    """The program's exit status by what its workers say, or None while it runs.

    One worker's failure is the program's, whatever the others still do: they wait for it. A worker that has stopped to
    be started again, or was killed, lets the others fail, and comes first.

    >>> exit_status(["0", "running"]), exit_status(["0", "0"]), exit_status(["1", "running"]), exit_status(["1", "75"])
    (None, 0, 1, 75)
    """
    ended = {AGAIN if how in (worker.LOST, worker.ABSENT) else int(how) for how in hows if how != worker.RUNNING}
    if AGAIN in ended:
        return AGAIN
    if failed := ended - {0}:
        return min(failed)
    return 0 if hows and worker.RUNNING not in hows else None


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)


if __name__ == "__main__":
    command.run(main, define_flags, required=("name", "type", "zone"))

"""The run of a program on a TPU VM: waiting for the machine, installing, watching, restarting, deleting."""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from launch import payload, worker
from launch.gcloud import ABSENT, ACTIVE, FAILED, OVER, SSH_FAILED, GcloudError, Machine, State
from launch.payload import Program
from personalize_jax.runtime.errors import UserError

RESTART = os.EX_TEMPFAIL  # exit status of a command that has saved and stopped, and is to be restarted
SETUP_TRIES = 3
WATCH_TRIES = 30  # with growing pauses this takes hours: a laptop may be carried home
LONGEST_PAUSE = 64  # in units of `poll`

T = TypeVar("T")


class MachineLost(Exception):
    """The machine was preempted, or never came."""


class Launch:
    """The run of a program on a machine, and on the machines that replace it after preemptions."""

    def __init__(
        self, machine: Machine, program: Program, archive: Path, folder: Path, poll: float, token: str = ""
    ) -> None:
        """A launch that has not begun.

        Args:
            machine: the machine, which may exist already.
            program: the program.
            archive: archive of the code.
            folder: folder of the logs.
            poll: seconds between two polls of the machine.
            token: access token for the Hugging Face hub, if the program needs one.
        """
        self.machine = machine
        self.program = program
        self.archive = archive
        self.folder = folder
        self.poll = 0.0 if machine.dry_run else poll
        self.token = token
        self.digest = worker.digest(program.command)

    def run(self, max_restarts: int, keep: bool) -> int:
        """Run the program until it has ended for good.

        Args:
            max_restarts: how often the program may be restarted.
            keep: whether to keep the machine.

        Returns:
            The program's exit status; 75 after too many restarts; 130 if interrupted; 1 if it could not be run.

        Raises:
            UserError: the machine was refused, or runs another command; there is nothing to delete.
        """
        try:
            status = self._run_with_restarts(max_restarts)
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
            self._clear()
            self._say(f"the machine is kept, and costs. Delete it with:\n  {self.machine.delete_command}")
            return status
        try:
            self._retry(self.machine.delete, SETUP_TRIES)
            self._say("the machine is deleted.")
        except (GcloudError, KeyboardInterrupt) as error:
            self._say(f"could not delete the machine ({error}), which costs. {self._left_running()}")
        return status

    def _run_with_restarts(self, max_restarts: int) -> int:
        for restart in range(max_restarts + 1):
            if restart:
                self._say(f"beginning again ({restart} of at most {max_restarts}).")
                self._pause(restart)
            try:
                self._acquire(first=restart == 0)
                status = self._run_once(first=restart == 0)
            except MachineLost as error:
                self._say(f"{error}.")
                status = RESTART
            if status != RESTART:
                self._say("the program is done." if status == 0 else f"the program failed, with status {status}.")
                return status
        self._say(f"the program was begun {max_restarts + 1} times and is not done; --max_restarts allows no more.")
        return RESTART

    def _acquire(self, first: bool) -> None:
        """Wait until the machine is active; request it if there is none, or only one that is over."""
        requested, reported = False, ""
        while (state := self._state(first=first and not requested)).name != ACTIVE:
            if state.name in OVER:
                self._retry(self.machine.delete, SETUP_TRIES)
                if requested:
                    self._refused(state.reason or state.name, fatal=first and state.name == FAILED)
            elif state.name == ABSENT:
                try:
                    self.machine.create()
                except GcloudError as error:
                    if self._state_name() == ABSENT:  # otherwise the request arrived and only its answer was lost
                        self._refused(error.summary, fatal=first)
                requested = True
            elif state.name != reported:
                reported = state.name
                self._say(f"waiting for a {self.machine.accelerator_type} in {self.machine.zone}: {reported}")
            self._pause(0)
        self._say("the machine is there.")

    def _state(self, first: bool) -> State:
        if not first:
            return self._retry(self.machine.state, WATCH_TRIES)
        try:
            return self.machine.state()
        except GcloudError as error:  # not signed in, no such project
            raise UserError(f"gcloud cannot be asked about {self.machine.name}: {error.summary}") from error

    def _refused(self, reason: str, fatal: bool) -> NoReturn:
        sentence = f"{self.machine.name} was not given: {reason}"
        raise UserError(sentence) if fatal else MachineLost(sentence)

    def _run_once(self, first: bool) -> int:
        """Run the program on this machine and return its exit status; on the first, one that runs is only watched."""
        if first and self._was_started():
            self._say("the program was started before; watching it.")
        else:
            self._set_up()
            self._ssh(worker.stop(), SETUP_TRIES)
            self._ssh(worker.start(self.program.command), SETUP_TRIES)
        logs = self._new_log_folder()
        status = self._watch(logs / "worker_0.log")
        if status == 0 and not self._manifest_agrees():
            self._say("the program has ended and the manifest of its run does not say done.")
            status = RESTART
        self._fetch_logs(logs)
        if status not in (0, RESTART):
            self._check_machine()  # if one worker is preempted, the program fails on the others
        return status

    def _was_started(self) -> bool:
        statuses = self._statuses(dry_run_status=worker.ABSENT)
        if any(digest != self.digest and status == worker.RUNNING for digest, status in statuses):
            raise UserError(
                f"{self.machine.name} is running another command; give another --name, or delete it with: "
                f"{self.machine.delete_command}"
            )
        return {digest for digest, status in statuses if status != worker.ABSENT} == {self.digest}

    def _set_up(self) -> None:
        self._say(f"copying {self.archive} and installing.")
        self._connect(lambda: self.machine.copy_to(self.archive, worker.ARCHIVE), SETUP_TRIES)
        self._ssh(worker.install(payload.jax_version()), SETUP_TRIES)
        if self.token:
            self._copy_token()
        for bucket in self.program.buckets:
            self._ssh(worker.mount(bucket), SETUP_TRIES)

    def _copy_token(self) -> None:
        """Copy the token as a file that nobody else can read: command lines are visible to others, and logged."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(worker.TOKEN)  # where a user who pastes a dry run's commands has to put it
            if not self.machine.dry_run:
                file = Path(folder) / worker.TOKEN
                file.touch(mode=0o600)
                file.write_text(self.token)
            self._connect(lambda: self.machine.copy_to(file, worker.TOKEN), SETUP_TRIES)
        self._ssh(worker.keep_token(), SETUP_TRIES)

    def _watch(self, log: Path) -> int:
        """Show the log of worker 0 until the program has ended, and return its exit status."""
        self._say(f"running {shlex.join(self.program.command)}")
        offset = 0
        while True:
            status = exit_status([worker_status for _, worker_status in self._statuses()])
            new = worker.read_log(self._ssh(worker.new_log(offset), WATCH_TRIES, "0"))
            offset += len(new)
            if not self.machine.dry_run:
                _append(log, new)
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
            if status is not None:
                return status
            self._pause(0)

    def _statuses(self, dry_run_status: str = "0") -> list[tuple[str, str]]:
        return worker.read_statuses(self._ssh(worker.status(), WATCH_TRIES, reply=f"{self.digest} {dry_run_status}"))

    def _manifest_agrees(self) -> bool:
        """Whether the run's manifest says done, or there is none."""
        if self.program.workdir is None:
            return True
        try:
            manifest = json.loads(self._ssh(worker.manifest(self.program.workdir), WATCH_TRIES, "0"))
        except json.JSONDecodeError:
            return True
        return bool(manifest.get("done", True))

    def _fetch_logs(self, folder: Path) -> None:
        """Copy the logs of all workers that can be reached."""
        try:
            for i in range(self.machine.num_workers()):
                self.machine.copy_from(worker.LOG, i, folder / f"worker_{i}.log")
        except GcloudError as error:
            self._say(f"not all logs could be copied: {error.summary}")
        self._say(f"logs are in {folder}.")

    def _clear(self) -> None:
        """Remove program and token from a machine that is kept, so that the same command can run there again."""
        try:
            self._ssh(worker.stop(), SETUP_TRIES)
            if self.token:
                self._ssh(worker.forget_token(), SETUP_TRIES)
        except (GcloudError, MachineLost) as error:
            self._say(f"the program could not be cleared away: {error}")

    def _new_log_folder(self) -> Path:
        """A new numbered folder; there is one for each time that the program is started or watched."""
        number = 1
        while (self.folder / str(number)).exists():
            number += 1
        if not self.machine.dry_run:
            (self.folder / str(number)).mkdir(parents=True)
        return self.folder / str(number)

    def _ssh(self, script: str, tries: int, worker_number: str = "all", reply: str = "") -> str:
        return self._connect(lambda: self.machine.ssh(script, worker_number, reply), tries)

    def _connect(self, step: Callable[[], T], tries: int) -> T:
        """Repeat a step that needs a connection while it fails and the machine is still there."""

        def attempt() -> T:
            try:
                return step()
            except GcloudError:
                self._check_machine()
                raise

        return self._retry(attempt, tries)

    def _check_machine(self) -> None:
        if (name := self._state_name()) not in (ACTIVE, None):
            raise MachineLost(f"the machine is gone: {name}")

    def _state_name(self) -> str | None:
        try:
            return self.machine.state().name
        except GcloudError:  # this computer is offline
            return None

    def _retry(self, step: Callable[[], T], tries: int) -> T:
        """Repeat a step while it fails, with growing pauses; the last failure is raised."""
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
        if not self.machine.dry_run:
            print(f"[{self.machine.name}] {text}", file=sys.stderr, flush=True)


def exit_status(statuses: list[str]) -> int | None:
    """The program's exit status by the statuses of its workers, or None while it runs.

    The failure of one worker is the program's, because the others wait for it. A worker that stopped to be restarted,
    or was killed, makes the others fail, so that its status decides.

    >>> exit_status(["0", "running"]), exit_status(["0", "0"]), exit_status(["1", "running"]), exit_status(["1", "75"])
    (None, 0, 1, 75)
    """
    ended = {RESTART if s in (worker.LOST, worker.ABSENT) else int(s) for s in statuses if s != worker.RUNNING}
    if RESTART in ended:
        return RESTART
    if failed := ended - {0}:
        return min(failed)
    return 0 if statuses and worker.RUNNING not in statuses else None


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)

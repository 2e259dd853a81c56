"""A program's run on a TPU VM: waiting for the machine, installing, watching, beginning again, deleting."""

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

AGAIN = os.EX_TEMPFAIL  # exit status of a command that has saved and stopped: start it again
SETUP_TRIES = 3
WATCH_TRIES = 30  # with growing pauses, hours: a laptop may be carried home
LONGEST_PAUSE = 64  # in units of `poll`

T = TypeVar("T")


class MachineLost(Exception):
    """The machine was preempted, or never came."""


class Launch:
    """A program's run on a machine, and on those that take its place."""

    def __init__(
        self, machine: Machine, program: Program, archive: Path, folder: Path, poll: float, token: str = ""
    ) -> None:
        """A launch.

        Args:
            machine: may exist already.
            program: to run on it.
            archive: of the code.
            folder: for the logs.
            poll: seconds between two looks.
            token: for the Hugging Face hub, if the program needs one.
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
            self._forget()
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
                status = self._run_once(first=restart == 0)
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
        while (state := self._look(first=first and not asked)).word != ACTIVE:
            if state.word in OVER:
                self._patiently(self.machine.delete, SETUP_TRIES)
                if asked:
                    self._refused(state.reason or state.word, fatal=first and state.word == FAILED)
            elif state.word == ABSENT:
                try:
                    self.machine.create()
                except GcloudError as error:
                    if self._word_if_known() == ABSENT:  # or else the request came through and only its answer did not
                        self._refused(error.summary, fatal=first)
                asked = True
            elif state.word != said:
                said = state.word
                self._say(f"waiting for a {self.machine.accelerator_type} in {self.machine.zone}: {said}")
            self._pause(0)
        self._say("the machine is there.")

    def _look(self, first: bool) -> State:
        if not first:
            return self._patiently(self.machine.state, WATCH_TRIES)
        try:
            return self.machine.state()
        except GcloudError as error:  # not signed in, no such project
            raise UserError(f"gcloud cannot be asked about {self.machine.name}: {error.summary}") from error

    def _refused(self, reason: str, fatal: bool) -> NoReturn:
        sentence = f"{self.machine.name} was not given: {reason}"
        raise UserError(sentence) if fatal else MachineLost(sentence)

    def _run_once(self, first: bool) -> int:
        """The program's exit status on this machine; at first, one that was started before is only watched."""
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
            status = AGAIN
        self._fetch_logs(logs)
        if status not in (0, AGAIN):
            self._check_machine()  # where one worker is preempted, the program fails on the others
        return status

    def _was_started(self) -> bool:
        statuses = self._statuses(smooth=worker.ABSENT)
        if any(digest != self.digest and how == worker.RUNNING for digest, how in statuses):
            raise UserError(
                f"{self.machine.name} is running another command; give another --name, or delete it with: "
                f"{self.machine.delete_command}"
            )
        return {digest for digest, how in statuses if how != worker.ABSENT} == {self.digest}

    def _set_up(self) -> None:
        self._say(f"copying {self.archive} and installing.")
        self._reaching(lambda: self.machine.copy_to(self.archive, worker.ARCHIVE), SETUP_TRIES)
        self._ssh(worker.install(payload.jax_version()), SETUP_TRIES)
        if self.token:
            self._bring_token()
        for bucket in self.program.buckets:
            self._ssh(worker.mount(bucket), SETUP_TRIES)

    def _bring_token(self) -> None:
        """Copy the token as a file that nobody else can read: command lines are seen by others, and logged."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(worker.TOKEN)  # where whoever pastes a dry run's commands has to put it
            if not self.machine.dry_run:
                file = Path(folder) / worker.TOKEN
                file.touch(mode=0o600)
                file.write_text(self.token)
            self._reaching(lambda: self.machine.copy_to(file, worker.TOKEN), SETUP_TRIES)
        self._ssh(worker.keep_token(), SETUP_TRIES)

    def _watch(self, log: Path) -> int:
        """Show the log of worker 0 until the program has ended; its exit status."""
        self._say(f"running {shlex.join(self.program.command)}")
        offset = 0
        while True:
            status = exit_status([how for _, how in self._statuses()])
            new = worker.read_log(self._ssh(worker.new_log(offset), WATCH_TRIES, "0"))
            offset += len(new)
            if not self.machine.dry_run:
                _append(log, new)
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
            if status is not None:
                return status
            self._pause(0)

    def _statuses(self, smooth: str = "0") -> list[tuple[str, str]]:
        return worker.read_statuses(self._ssh(worker.status(), WATCH_TRIES, reply=f"{self.digest} {smooth}"))

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

    def _forget(self) -> None:
        """So that the same command runs again on a kept machine, and no token stays there."""
        try:
            self._ssh(worker.stop(), SETUP_TRIES)
            if self.token:
                self._ssh(worker.forget_token(), SETUP_TRIES)
        except (GcloudError, MachineLost) as error:
            self._say(f"the program could not be cleared away: {error}")

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
                self._check_machine()
                raise

        return self._patiently(attempt, tries)

    def _check_machine(self) -> None:
        if (word := self._word_if_known()) not in (ACTIVE, None):
            raise MachineLost(f"the machine is gone: {word}")

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
        if not self.machine.dry_run:
            print(f"[{self.machine.name}] {text}", file=sys.stderr, flush=True)


def exit_status(words: list[str]) -> int | None:
    """The program's exit status by what its workers say, or None while it runs.

    One worker's failure is the program's, whatever the others still do: they wait for it. A worker that has stopped to
    be started again, or was killed, lets the others fail, and comes first.

    >>> exit_status(["0", "running"]), exit_status(["0", "0"]), exit_status(["1", "running"]), exit_status(["1", "75"])
    (None, 0, 1, 75)
    """
    ended = {AGAIN if how in (worker.LOST, worker.ABSENT) else int(how) for how in words if how != worker.RUNNING}
    if AGAIN in ended:
        return AGAIN
    if failed := ended - {0}:
        return min(failed)
    return 0 if words and worker.RUNNING not in words else None


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)

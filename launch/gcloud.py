"""A Cloud TPU VM, requested as a queued resource with gcloud.

Every method is one gcloud command. `Machine(..., dry_run=True)` prints the commands in a form that can be pasted into a
shell, and continues as if each had succeeded.
"""

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

# The images for JAX by https://cloud.google.com/tpu/docs/runtimes; keys are accelerator types up to the dash.
RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

ABSENT = "ABSENT"  # this module's own state for a machine that gcloud does not find; all others are the service's
ACTIVE = "ACTIVE"
FAILED = "FAILED"  # the request was accepted and then refused
OVER = {FAILED, "SUSPENDED", "PREEMPTED", "TERMINATED"}  # states that no machine leaves again

SSH_FAILED = 255  # exit status of ssh, and so of gcloud, where a connection failed or dropped
# A machine that is gone leaves connections open that never answer.
SSH_FLAGS = ("--ssh-flag=-oConnectTimeout=15", "--ssh-flag=-oServerAliveInterval=15")
SCP_FLAGS = ("--scp-flag=-oConnectTimeout=15", "--scp-flag=-oServerAliveInterval=15")

WORKER_SIZE = 8  # the largest number in an accelerator type, of chips or cores, of a machine with one worker


class GcloudError(Exception):
    """A gcloud command failed.

    Attributes:
        status: its exit status.
        message: the end of its standard error.
    """

    def __init__(self, status: int, stderr: str) -> None:
        self.status = status
        self.message = "\n".join(stderr.strip().splitlines()[-20:]) or f"gcloud ended with status {status}"
        super().__init__(self.message)

    @property
    def summary(self) -> str:
        """The line of the message that names the error."""
        lines = self.message.splitlines()
        return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])


class State(NamedTuple):
    """The state of a machine.

    Attributes:
        name: ACTIVE if it can be used; otherwise the state of the queued resource, or of its VM, or ABSENT.
        reason: the service's message about a failure.
    """

    name: str
    reason: str = ""


@dataclasses.dataclass
class Machine:
    """A TPU VM and the queued resource of the same name that it belongs to.

    Attributes:
        name: name of both.
        accelerator_type: accelerator type, such as v5litepod-16.
        zone: zone, such as us-west4-a.
        project: Google Cloud project; None for gcloud's default.
        runtime_version: image of the VM.
        spot: whether it may be preempted, and costs less.
        dry_run: whether commands are printed and not run.
        created: whether this object has requested it.
    """

    name: str
    accelerator_type: str
    zone: str
    project: str | None
    runtime_version: str
    spot: bool
    dry_run: bool = False
    created: bool = False

    def create(self) -> None:
        """Request the machine; it becomes active when the zone has one."""
        self._call(
            "queued-resources",
            "create",
            self.name,
            f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator_type}",
            f"--runtime-version={self.runtime_version}",
            *(["--spot"] if self.spot else []),
        )
        self.created = True

    def state(self) -> State:
        """The machine's state."""
        reply = {"state": {"state": ACTIVE}} if self.created else None
        resource = self._describe("queued-resources", reply)
        if resource is None:
            return State(ABSENT)
        state = resource["state"]
        if state["state"] != ACTIVE:
            return State(state["state"], state.get("failedData", {}).get("error", {}).get("message", ""))
        node = self._describe("tpu-vm", {"state": "READY"})  # the queued resource notices a preemption late
        if node is None:
            return State("TERMINATED")
        return State(ACTIVE if node["state"] == "READY" else node["state"])

    def num_workers(self) -> int:
        """The number of its workers, which are its hosts."""
        node = self._describe("tpu-vm", {"networkEndpoints": [{}]})
        return len((node or {}).get("networkEndpoints", []))

    def ssh(self, script: str, worker: str = "all", reply: str = "") -> str:
        """Run a shell script on a worker, or on all of them at once, in the home directory.

        gcloud runs it again, up to ten times, where the connection drops.

        Args:
            script: script for bash.
            worker: number of the worker, or "all".
            reply: the assumed output in a dry run.

        Returns:
            Standard output; that of several workers in no particular order.
        """
        return self._call(
            "tpu-vm", "ssh", self.name, f"--worker={worker}", f"--command={script}", *SSH_FLAGS, reply=reply
        )

    def copy_to(self, file: Path, target: str) -> None:
        """Copy a file to every worker; the target is relative to the home directory."""
        self._call("tpu-vm", "scp", str(file), f"{self.name}:{target}", "--worker=all", *SCP_FLAGS)

    def copy_from(self, source: str, worker: int, file: Path) -> None:
        """Copy a file, relative to the home directory, from a worker."""
        self._call("tpu-vm", "scp", f"{self.name}:{source}", str(file), f"--worker={worker}", *SCP_FLAGS)

    def delete(self) -> None:
        """Delete the queued resource and the VM in it."""
        self._call(*self._deletion)

    @property
    def delete_command(self) -> str:
        """The shell command that deletes it."""
        return shlex.join(self._command(*self._deletion))

    @property
    def _deletion(self) -> tuple[str, ...]:
        return "queued-resources", "delete", self.name, "--force"

    def _command(self, *arguments: str) -> list[str]:
        place = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else []), "--quiet"]
        return ["gcloud", "compute", "tpus", *arguments, *place]

    def _call(self, *arguments: str, reply: str = "") -> str:
        command = self._command(*arguments)
        if self.dry_run:
            print(shlex.join(command))
            return reply
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode:
            raise GcloudError(done.returncode, done.stderr)
        return done.stdout

    def _describe(self, kind: str, reply: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return json.loads(self._call(kind, "describe", self.name, "--format=json", reply=json.dumps(reply)))
        except GcloudError as error:
            if "NOT_FOUND" in error.message:
                return None
            raise
